"""The documentation builds, its links lead somewhere, its code runs, and what its API pages name exists.

Python blocks run in the order of their page, on a tiny checkpoint in place of the hub's. Of shell blocks
every command is looked up: scripts, modules, make's targets, extras, and the options of `internvit`.
"""

import contextlib
import doctest
import functools
import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch

import internvit
import internvit.cli.app
from tests.support import ROOT
from tests.support.upstream.opengvlab import InternVisionModel, InternVLChatModel

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
HUB_ID = re.compile(r"OpenGVLab/InternViT-[\w.-]+")
IDS = [str(page.relative_to(ROOT)) for page in PAGES]


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{target} of {page.name} leads nowhere"
        if anchor:
            assert anchor in anchors(file.read_text()), f"{target} of {page.name} names no heading"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_no_placeholder_is_left(page: Path) -> None:
    """Such as a line that says TABLE alone, where one was to come."""
    assert re.findall(r"^(?:[A-Z]{3,}|TODO.*|TBD.*|XXX.*)$", page.read_text(), flags=re.MULTILINE) == []


def blocks(page: Path, *languages: str) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [block for language, block in fences if language in languages]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Callable[[int], Path]:
    """A folder of a tiny model of so many layers."""

    @functools.lru_cache
    def folder(layers: int) -> Path:
        config = internvit.InternViTConfig(
            image_size=56, hidden_size=32, num_attention_heads=2, num_hidden_layers=layers, intermediate_size=64
        )
        folder = tmp_path_factory.mktemp("checkpoint")
        internvit.InternViT(config).save_pretrained(folder)
        return folder

    return folder


@pytest.fixture(scope="module")
def flash_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("flash")
    thresholds = {"flash_relative_threshold": 0.25, "flash_absolute_threshold": 0.1}
    (folder / "config.json").write_text(json.dumps({"flash_mode": True, **thresholds}))
    connector = internvit.InternVLFlashConnector(32, 40, **thresholds)
    torch.save(connector.state_dict(), folder / "pytorch_model.bin")
    return folder


@pytest.fixture
def namespace_of(checkpoints, flash_folder) -> Callable[[str], dict[str, Any]]:
    """What a text's code takes for granted: a model of 24 layers where the text asks for the last, else of 2."""
    torch.use_deterministic_algorithms(False)  # adaptive pooling's backward has no deterministic form
    return lambda text: names_of(checkpoints(24 if re.search(r"\b2[34][)\]]", text) else 2), flash_folder)


def names_of(checkpoint: Path, flash_folder: Path) -> dict[str, Any]:
    model = internvit.InternViT.from_pretrained(checkpoint)
    config = model.config

    class Chat(InternVLChatModel):
        def generate(self, *_: object) -> torch.Tensor:
            return self.extract_feature(torch.randn(1, 3, 56, 56))

    width, heads = 64, 2
    row = {name: torch.randn(2, 5, width) for name in ("x", "residual", "branch")}
    vector = {name: torch.randn(width) for name in ("weight", "bias", "gamma", "q_weight", "k_weight")}
    qkv = torch.randn(2, 5, 3, heads, width // heads)
    return {
        "internvit": internvit,
        "torch": torch,
        "path": str(checkpoint),
        "model": model,
        "pixels": torch.randn(2, 3, 56, 56),
        "labels": torch.randint(0, 150, (2, 56, 56)),
        "photo": torch.rand(3, 60, 90),
        "upstream": InternVisionModel(config),
        "upstream_model": InternVisionModel(config),
        "internvl": Chat(config, llm_hidden_size=40),
        "flash_folder": flash_folder,
        "picture": torch.randint(0, 256, (3, 60, 90), dtype=torch.uint8),
        "row_scale": torch.rand(2),
        "qkv": qkv,
        **dict(zip("qkv", qkv.unbind(2), strict=True)),
        **row,
        **vector,
    }


def run_python(code: str, namespace: dict[str, Any], name: str) -> None:
    compiled = compile(HUB_ID.sub(lambda _: namespace["path"], code), name, "exec")
    if "cuda" in re.sub("#.*", "", code) and not torch.cuda.is_available():
        return
    exec(compiled, namespace)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_python_blocks_run(page: Path, namespace_of, tmp_path, monkeypatch) -> None:
    pytest.importorskip("torchvision", reason="detectors are torchvision's")
    pytest.importorskip("torchmetrics", reason="the segmentation extra is not installed")
    pytest.importorskip("transformers", reason="the hf extra is not installed")
    monkeypatch.chdir(tmp_path)
    namespace = namespace_of(page.read_text())
    with torch.compiler.set_stance("force_eager"):  # compiling has tests of its own
        for i, block in enumerate(blocks(page, "python")):
            run_python(block, namespace, f"{page.name}, block {i}")


def api_names() -> list[str]:
    """What the API pages show the docstrings of."""
    return [n for page in PAGES for n in re.findall(r"^::: (internvit\S*)$", page.read_text(), flags=re.MULTILINE)]


def documented() -> list[str]:
    """Objects of the API pages whose docstrings have an example, and modules that begin with one."""
    names = api_names()
    names += ["internvit", "internvit.integrations.transformers.model", "internvit.integrations.transformers.backbone"]
    return [name for name in names if ">>>" in (find(name).__doc__ or "")]


def find(name: str) -> Any:
    """A module, or something in one."""
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            return functools.reduce(getattr, parts[i:], importlib.import_module(".".join(parts[:i])))
    raise AttributeError(name)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", documented())
def test_examples_of_docstrings_run(name: str, namespace_of, tmp_path, monkeypatch) -> None:
    import torchvision

    thing = find(name)
    monkeypatch.chdir(tmp_path)
    namespace = namespace_of(thing.__doc__) | {
        "torchvision": torchvision,
        **vars(sys.modules[getattr(thing, "__module__", name)]),
    }
    for i, example in enumerate(doctest.DocTestParser().get_examples(thing.__doc__)):
        run_python(example.source, namespace, f"{name}, example {i}")


def check_command(line: str, folder: Path) -> Path:
    """Looks a shell command up; returns the folder that the next one runs in."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    match words:
        case []:
            pass
        case ["cd", to]:
            folder = folder / to
            assert folder.is_dir(), line
        case ["make", *targets]:
            rules = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
            assert {t for t in targets if "=" not in t} <= set(rules), line
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module), line
        case ["python" | "pytest", script, *arguments]:
            assert (folder / script.partition("::")[0]).exists(), line
            assert all((folder / a).is_file() for a in arguments if a.endswith(".toml")), line
        case ["internvit", *arguments]:
            context = internvit.cli.app.cli.make_context("internvit", list(arguments))
            name, command, rest = context.command.resolve_command(context, [*context._protected_args, *context.args])
            command.make_context(name, rest, parent=context)
        case ["pip", "install", *arguments]:
            text = (ROOT / "pyproject.toml").read_text()
            extras = [e for a in arguments for e in re.findall(r"\[(.*)\]", a)]
            assert all(re.search(rf"^{extra} = \[", text, flags=re.MULTILINE) for extra in extras), line
        case ["git" | "apt" | "pre-commit", *_]:
            pass
        case _:
            pytest.fail(f"no check for {line!r}")
    return folder


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_shell_blocks_name_what_exists(page: Path, tmp_path, monkeypatch) -> None:
    for name in ("OLD", "NEW"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "", "sh", "bash"):
        folder = ROOT
        for line in block.splitlines():
            folder = check_command(line, folder)


@pytest.mark.parametrize(
    "line",
    [
        "make nothing",
        "python -m internvit.nothing",
        "internvit features",
        "internvit plan --size x",
        "rm -rf /",
        "cd no",
    ],
)
def test_wrong_commands_are_found(line) -> None:
    with pytest.raises((AssertionError, click.ClickException, pytest.fail.Exception, ModuleNotFoundError)):
        check_command(line, ROOT)


def test_what_api_pages_name_exists() -> None:
    names = api_names()
    assert len(names) > 20
    for name in names:
        assert find(name).__doc__, name


def test_every_public_op_has_its_place_in_the_api() -> None:
    from internvit import ops

    text = (ROOT / "docs" / "api" / "ops.md").read_text()
    assert {f"::: internvit.ops.{name}" for name in ops.__all__ if name != "backend"} <= set(text.splitlines())


@pytest.mark.sampled(2)  # 11 s
def test_the_site_builds_without_a_warning(tmp_path) -> None:
    call = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "api" / "ops" / "index.html").read_text()
    assert "layer_scale_residual_norm" in page
    assert "residual_out" in page  # from its docstring
    assert "--overwrite" in (tmp_path / "site" / "cli" / "index.html").read_text()  # from `internvit features --help`
    fetched = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)"', page)
    assert not fetched, fetched
