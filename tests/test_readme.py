"""README answers what strangers ask, and its tables say what the code says."""

import re
import shlex

import pytest

from internvit.inference import linear_int8
from internvit.ops.backends.registry import BACKENDS, has_implementation
from internvit.ops.core.spec import every_spec
from tests.support import ROOT
from tests.test_docs import check_command

TEXT = (ROOT / "README.md").read_text()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def status_matrix() -> dict[str, dict[str, str]]:
    """op -> backend -> cell of README's first table."""
    lines = TEXT[TEXT.index("| ops |") :].split("\n\n")[0].splitlines()
    backends = cells(lines[0])[1:]
    rows = [cells(line) for line in lines[2:] if "`" in cells(line)[0]]
    return {op: dict(zip(backends, row[1:], strict=True)) for row in rows for op in re.findall(r"`(\w+)`", row[0])}


def test_it_is_short() -> None:
    assert len(TEXT.splitlines()) <= 150


def test_every_op_is_in_the_matrix_once() -> None:
    first_column = [cells(line)[0] for line in TEXT[TEXT.index("| ops |") :].split("\n\n")[0].splitlines()]
    named = [op for cell in first_column for op in re.findall(r"`(\w+)`", cell)]
    assert sorted(named) == sorted(every_spec())


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton", "cuda", "sdpa", "flash"])
def test_the_matrix_is_what_the_backends_have(backend) -> None:
    if (reason := BACKENDS[backend].unavailable_reason()) is not None:
        pytest.skip(reason)
    for op, row in status_matrix().items():
        runs = {"qk_norm_attention": "attention", "qk_norm_attention_qkvpacked": "attention"}.get(op, op)
        cell = row[backend]
        if backend == "cpu" and op == "linear_int8" and linear_int8.unavailable_reason() is not None:
            continue  # the cell says what it needs
        assert cell.startswith("F") == has_implementation(runs, backend), (op, backend, cell)
        parts = {"linear_gelu": "gelu"}.get(runs, runs)  # its backward is gelu's and two products
        assert ("B" in cell) == has_implementation(f"{parts}_backward", backend), (op, backend, cell)


@pytest.mark.parametrize(
    ("question", "answers"),
    [
        ("What runs on a GPU, and was it measured?", ["No GPU has run this library", "| triton | cuda |", "sm_80"]),
        ("How fast is it next to timm on a CPU?", ["| timm |", r"448 px, bfloat16, forward \| \d+ ms", r"\d\.\d+ ×"]),
        ("How do I patch an InternVL that I have?", [r"with internvit\.patch\(internvl\) as handle", r"undo\(\)"]),
        ("May I use it, and what does it not do?", ["Apache-2.0", "## Limits", "## Models"]),
    ],
)
def test_strangers_questions_are_answered(question, answers) -> None:
    for answer in answers:
        assert re.search(answer if "\\" in answer else re.escape(answer), TEXT), f"{question} {answer}"


@pytest.mark.parametrize("call", re.findall(r"^\| `(internvit [^`]+)`", TEXT, flags=re.MULTILINE))
def test_commands_of_the_table_are_commands(call, tmp_path, monkeypatch) -> None:
    (tmp_path / "photos").mkdir()
    for name in ("SOURCE", "FOLDER", "MODEL"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    check_command(shlex.join(shlex.split(call)), ROOT)
