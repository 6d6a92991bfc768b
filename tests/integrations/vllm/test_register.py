"""When the plug-in registers its classes, with a stand-in for vLLM where there is none."""

import ast
import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest

from internvit.integrations import vllm as plugin
from tests.support import ROOT

ARCHITECTURES = ("InternVLChatModel", "InternS1ForConditionalGeneration", "InternVLForConditionalGeneration")


@pytest.fixture
def registered(monkeypatch) -> dict[str, str]:
    """What is registered with a stand-in of vLLM 0.32, by architecture."""
    entries: dict[str, str] = {}
    module, log = ModuleType("vllm"), ModuleType("vllm.logger")
    module.__version__, module.logger = "0.32.1", log
    module.ModelRegistry = SimpleNamespace(register_model=entries.__setitem__)
    log.init_logger = logging.getLogger
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.logger", log)
    for name in ("INTERNVIT_VLLM", "VLLM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    return entries


@pytest.mark.parametrize(
    ("setting", "plugins", "enabled"),
    [
        (None, None, False),
        ("", "", False),
        ("0", None, False),
        (None, "other", False),
        ("1", None, True),
        (None, "other,internvit", True),
        ("1", "internvit", True),
        ("0", "internvit", False),
    ],
)
def test_registers_where_it_is_enabled(monkeypatch, registered, caplog, setting, plugins, enabled) -> None:
    for name, value in (("INTERNVIT_VLLM", setting), ("VLLM_PLUGINS", plugins)):
        if value is not None:
            monkeypatch.setenv(name, value)
    for _ in range(2):
        plugin.register()
    assert sorted(registered) == (sorted(ARCHITECTURES) if enabled else [])
    assert caplog.text == ""


def test_imports_nothing_of_vllm_where_it_is_not_enabled(monkeypatch, registered) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # an import raises
    plugin.register()
    monkeypatch.setenv("INTERNVIT_VLLM", "1")
    with pytest.raises(ImportError):
        plugin.register()


def test_registered_classes_exist(monkeypatch, registered) -> None:
    monkeypatch.setenv("INTERNVIT_VLLM", "1")
    plugin.register()
    for entry in registered.values():
        module, name = entry.split(":")
        source = ROOT / (module.replace(".", "/") + ".py")
        assert name in {node.name for node in ast.parse(source.read_text()).body if isinstance(node, ast.ClassDef)}


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.0.0", "0.320.0", "dev"])
def test_another_version_leaves_vllm_as_it_is(monkeypatch, registered, caplog, version) -> None:
    monkeypatch.setattr(sys.modules["vllm"], "__version__", version)
    monkeypatch.setenv("INTERNVIT_VLLM", "1")
    plugin.register()
    assert registered == {}
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert version in caplog.text
    assert "0.32" in caplog.text


def test_another_setting_leaves_vllm_as_it_is(monkeypatch, registered, caplog) -> None:
    monkeypatch.setenv("INTERNVIT_VLLM", "yes")
    plugin.register()
    assert registered == {}
    assert "'yes'" in caplog.text


def test_is_an_entry_point() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    group = text.split('[project.entry-points."vllm.general_plugins"]\n')[1].split("\n\n")[0]
    assert group == f'internvit = "{plugin.__name__}:{plugin.register.__name__}"'
