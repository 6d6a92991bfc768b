"""What a user gets who installs or imports the package."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT


def python(code: str, cwd: Path | None = None, interpreter: str = sys.executable) -> str:
    run = subprocess.run([interpreter, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    assert not run.stderr, run.stderr
    return run.stdout


def test_import_prints_nothing_and_asks_no_device() -> None:
    code = """
import torch
def refuse(*args): raise AssertionError("a device was asked for")
torch.cuda.is_available = torch.cuda.device_count = torch.cuda.get_device_properties = refuse
import internvit
"""
    assert python(code) == ""


def test_import_pulls_in_no_extra() -> None:
    code = """
import torch, sys
before = set(sys.modules)
import internvit
extras = ("transformers", "timm", "huggingface_hub", "PIL", "tqdm", "rich", "matplotlib", "flash_attn", "triton",
          "torch._dynamo", "torch._inductor", "scipy", "pandas")
print([m for m in extras if m in set(sys.modules) - before])
"""
    assert python(code).strip() == "[]"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("forbidden", ["", "1"])
def test_bytecode_is_kept_in_the_environment_where_it_is_forbidden_elsewhere(forbidden: str, tmp_path: Path) -> None:
    (tmp_path / "show.mk").write_text(f"include {ROOT}/Makefile\nshow:\n\t@env\n")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MAKE"))}
    done = subprocess.run(
        ["make", "-s", "-f", str(tmp_path / "show.mk"), "show"],
        cwd=ROOT,
        env={**kept, "PYTHONDONTWRITEBYTECODE": forbidden},
        capture_output=True,
        text=True,
        check=True,
    )
    seen = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
    assert not seen.get("PYTHONDONTWRITEBYTECODE")
    assert seen.get("PYTHONPYCACHEPREFIX") == (f"{ROOT}/.venv/pycache" if forbidden else None)


def test_kernels_folder_shadows_no_other_package() -> None:
    """`kernels` is another distribution, which transformers imports: the checkout on sys.path must not be it."""
    code = """
import importlib.machinery, importlib.util, internvit
spec = importlib.util.find_spec("internvit.kernels")
print(list(spec.submodule_search_locations)[0].endswith("kernels"))
plain = importlib.util.find_spec("kernels")
print(plain is None or plain.loader is None or plain.origin is not None)
"""
    assert python(code, cwd=ROOT).split() == ["True", "True"]
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "internvit" / "kernels").is_symlink()


def rooms_imported(path: Path) -> set[str]:
    """The folders and modules directly in `internvit/` that a file imports, inside functions too."""
    modules = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
    parts = [module.split(".") for module in modules]
    return {name for package, name, *_ in (p for p in parts if len(p) > 1) if package == "internvit"}


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """A way back to each room that has one."""

    def way(room: str, path: list[str], seen: set[str]) -> list[str] | None:
        for other in sorted(imports.get(room, set()) - {room}):
            if other == path[0]:
                return [*path, other]
            if other not in seen:
                seen.add(other)
                found = way(other, [*path, other], seen)
                if found:
                    return found
        return None

    return [found for room in sorted(imports) if (found := way(room, [room], set()))]


def test_a_circle_is_found() -> None:
    assert circles({"model": {"checkpoint", "ops"}, "checkpoint": {"upstream"}, "upstream": {"model"}})[0] == [
        *("checkpoint", "upstream", "model", "checkpoint"),
    ]
    assert circles({"model": {"model", "ops", "config"}, "ops": {"config"}}) == []


def test_no_import_circle_among_the_rooms() -> None:
    """`internvit/__init__.py` and `__main__.py` name everything and are left out."""
    package = ROOT / "internvit"
    imports: dict[str, set[str]] = {}
    for path in package.rglob("*.py"):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        if room not in ("__init__", "__main__"):
            imports.setdefault(room, set()).update(rooms_imported(path))
    assert {"model", "checkpoint"} <= imports.keys()
    assert "checkpoint" in imports["model"], "imports inside functions are not seen"
    assert circles(imports) == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built without torch in sight, from a copy of what git tracks."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: the files that belong to the package are not known")
    for name in listed.stdout.split("\n"):
        path = ROOT / name
        if name and (path.is_file() or path.is_symlink()):
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.is_symlink():
                target.symlink_to(path.readlink())
            else:
                target.write_bytes(path.read_bytes())
    environment = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    build = [environment / "bin" / "python", "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, source]
    run = subprocess.run(build, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return next(folder.glob("*.whl"))


@pytest.mark.sampled(4)  # 12 s
def test_a_build_without_torch_succeeds_and_runs_elsewhere(wheel, tmp_path) -> None:
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path / "site", wheel]
    subprocess.run(install, check=True, capture_output=True)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path / "site")!r})
import torch, internvit
assert internvit.__file__.startswith({str(tmp_path)!r}), internvit.__file__
import importlib.util
assert importlib.util.find_spec("internvit.kernels") is not None
config = internvit.InternViTConfig(image_size=28, hidden_size=32, num_attention_heads=2, num_hidden_layers=1,
                                   intermediate_size=64)
print(tuple(internvit.InternViT(config)(torch.zeros(1, 3, 28, 28)).last_hidden_state.shape))
"""
    assert python(code, cwd=tmp_path).strip() == "(1, 5, 32)"
    files = {p.relative_to(tmp_path / "site").parts[0] for p in (tmp_path / "site").iterdir()}
    assert {f for f in files if not f.endswith(".dist-info")} <= {"internvit", "bin"}  # bin: the console script
