"""What every file of kernels/ keeps to, read from its syntax."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

KERNELS = ROOT / "kernels"
FILES = sorted(KERNELS.rglob("*.py"))
names = [str(path.relative_to(KERNELS)) for path in FILES]


def functions(tree: ast.Module) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def is_jit(function: ast.FunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def early_returns(source: str) -> list[str]:
    """Triton functions that return anywhere but at their end.

    A `return` inside an `if` on a constant does not end a Triton function: what follows is compiled all the same, with
    a pointer that is None. No interpreter shows it, and the error stands where there is a GPU.
    """
    found = []
    for function in filter(is_jit, functions(ast.parse(source))):
        returns = [node for node in ast.walk(function) if isinstance(node, ast.Return)]
        if any(node is not function.body[-1] for node in returns):
            found.append(function.name)
    return found


def test_an_early_return_is_found():
    planted = """
@triton.jit(do_not_specialize=["N"])
def load(p, N):
    if p is None:
        return 1.0
    return tl.load(p)
"""
    assert early_returns(planted) == ["load"]
    assert early_returns(planted.replace("        return 1.0\n", "        x = 1.0\n")) == []


@pytest.mark.parametrize("path", FILES, ids=names)
def test_triton_functions_have_a_single_exit(path: Path):
    assert not early_returns(path.read_text())


def nones_in_tuples(source: str) -> list[str]:
    """Triton functions that return, among others, a name which is not None in some of their code: Triton 3.6 makes a
    tensor of each value in a tuple, and of None it cannot."""
    found = []
    for function in filter(is_jit, functions(ast.parse(source))):
        tests = {ast.unparse(node.test) for node in ast.walk(function) if isinstance(node, ast.If)}
        for node in ast.walk(function):
            if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
                elements = map(ast.unparse, node.value.elts)
                found += [f"{function.name}: {e}" for e in elements if f"{e} is not None" in tests]
    return found


def test_a_none_in_a_tuple_is_found():
    planted = """
@triton.jit
def after(p_x, p_rstd, n):
    if p_rstd is not None:
        p_rstd += n
    return p_x + n, p_rstd
"""
    assert nones_in_tuples(planted) == ["after: p_rstd"]
    assert nones_in_tuples(planted.replace("return p_x + n, p_rstd", "return p_x + n")) == []


@pytest.mark.parametrize("path", FILES, ids=names)
def test_triton_functions_return_no_none_in_a_tuple(path: Path):
    assert not nones_in_tuples(path.read_text())


@pytest.mark.parametrize("path", FILES, ids=names)
def test_kernels_know_no_ops(path: Path):
    """Kernels import torch and triton; the tools beside them may run models, and none imports internvit.ops."""
    allowed = {"internvit"} if path.parent.name == "tools" else {"internvit.kernels"}
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for module in modules:
            assert not module.startswith("internvit.ops"), f"{module} is imported"
            if module.split(".")[0] == "internvit":
                assert any(module == a or module.startswith(f"{a}.") for a in allowed), f"{module} is imported"


@pytest.mark.parametrize("path", FILES, ids=names)
def test_files_and_functions_are_short(path: Path):
    source = path.read_text()
    assert len(source.splitlines()) <= 400
    for function in functions(ast.parse(source)):
        lines = (function.end_lineno or 0) - function.lineno + 1
        assert is_jit(function) or lines <= 60, f"{function.name} has {lines} lines"


def test_kernels_are_imported_without_the_ops():
    modules = [
        "internvit.kernels." + ".".join(path.relative_to(KERNELS).with_suffix("").parts)
        for path in FILES
        if path.parent.name != "tools"
    ]
    code = f"""
import importlib, sys, types
package = types.ModuleType("internvit")
package.__path__ = [{str(ROOT / "internvit")!r}]
sys.modules["internvit"] = package
for module in {modules!r}:
    importlib.import_module(module)
print([m for m in sys.modules if m.startswith("internvit.ops")])
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.strip() == "[]"
