"""The same benchmarks of another git revision, built and run in a checkout of its own: `internvit bench --base REF`."""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from internvit.benchmarks.harness.results import Results, read

ROOT = Path(__file__).resolve().parents[2]


def _run(command: Sequence[str | Path], folder: Path, what: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        lines = done.stdout.strip().splitlines() or ["it printed nothing"]
        raise ValueError(f"--base: {what} failed: {lines[-1]}")


@contextlib.contextmanager
def checkout(ref: str) -> Iterator[Path]:
    """A work tree of `ref` with its compiled libraries, removed afterwards; the checkout here is not touched.

    Raises:
        ValueError: this is no git checkout, it has no such revision, or that cannot be built.
    """
    with tempfile.TemporaryDirectory(prefix="internvit-base-") as temporary:
        folder = Path(temporary) / "tree"
        _run(["git", "-C", ROOT, "worktree", "add", "--detach", folder, ref], ROOT, f"checking out {ref!r}")
        try:
            _run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], folder, f"building {ref!r}")
            yield folder
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", folder], capture_output=True)


def measured(ref: str, arguments: Sequence[str], progress: Callable[[str], None]) -> tuple[Results, Results]:
    """Results of `internvit bench ARGUMENTS` at `ref` and here: processes one after the other, the base first."""
    with tempfile.TemporaryDirectory(prefix="internvit-results-") as folder:
        progress(f"building {ref}")
        with checkout(ref) as base:
            for name, tree in (("base", base), ("here", ROOT)):
                progress(f"timing {ref if name == 'base' else 'this checkout'}")
                out = Path(folder) / name
                command = [sys.executable, "-m", "internvit", "bench", *arguments, "--out", str(out)]
                _run(command, tree, f"timing in {name}")
        return read(Path(folder) / "base"), read(Path(folder) / "here")
