"""The workflows as far as they can be checked without a forge: what they call is there, what is promised is tested."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def jobs(path: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load(path.read_text())["jobs"]
    return found


def commands(job: dict[str, Any]) -> list[str]:
    """The shell commands of a job, with the values of its matrix in place."""
    runs = [step["run"] for step in job["steps"] if "run" in step]
    for name, values in job.get("strategy", {}).get("matrix", {}).items():
        if name != "include":
            placeholder = f"${{{{ matrix.{name} }}}}"
            runs = [run.replace(placeholder, value) for run in runs for value in values]
    return runs


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_what_workflows_call_is_there(path: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name, job in jobs(path).items():
        assert set(job.get("needs", "").split()) <= set(jobs(path)), name
        for run in commands(job):
            assert set(re.findall(r"\bmake ([\w-]+)", run)) <= targets, run
            assert all((ROOT / file).is_file() for file in re.findall(r"(?<!\S)\.ci/\w+", run)), run


def test_every_python_and_the_oldest_torch_are_tested() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    oldest = re.search(r'requires-python = ">=3\.(\d+)"', project), re.search(r'"torch>=([\d.]+)"', project)
    assert oldest[0] is not None
    assert oldest[1] is not None
    tested = jobs(ROOT / ".github/workflows/ci.yml")["test"]["strategy"]["matrix"]["include"]
    pythons = sorted({int(row["python"].removeprefix("3.")) for row in tested})
    assert pythons == list(range(int(oldest[0][1]), pythons[-1] + 1))
    torches = sorted({int(row["torch"].removeprefix("2.")) for row in tested})
    assert torches == list(range(int(oldest[1][1].removeprefix("2.")), torches[-1] + 1))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned(path: Path) -> None:
    """By the hash of a release, which a tag beside it names; PyPA asks for the branch of its own."""
    for line in re.findall(r"uses: (.*)", path.read_text()):
        assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+|pypa/gh-action-pypi-publish@release/v1", line)
