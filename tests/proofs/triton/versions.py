"""The committed record of what each Triton makes of every kernel that the models launch, for every target.

    python -m tests.proofs.triton.versions [--version 3.6.0 ...] [--arch sm_90 ...] [--dtype bfloat16 ...] [--again]

Compiles in processes of their own; a version that is not installed is fetched by pip. versions.json is rewritten after
each target, so that a run can be stopped and goes on where it ended: what is there of the same kernels is not compiled
again without --again. An entry has the modes and distinct kernels, what failed, and the bytes that each kernel spills.
"""

import argparse
import ast
import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import triton

from internvit.files import atomic_write
from internvit.kernels.common.target import TARGETS
from internvit.kernels.tools.static_profile import failures
from tests.support import ROOT

RECORD = Path(__file__).with_name("versions.json")
VERSIONS = ("3.6.0", "3.8.0", "3.9.0")
DTYPES = ("bfloat16", "float16", "float32")


@functools.cache
def device_code() -> str:
    """A digest of the functions that Triton compiles, without their comments and docstrings."""
    digest = hashlib.sha256()
    folder = ROOT / "kernels"
    for path in sorted(p for p in folder.rglob("*.py") if folder / "tools" not in p.parents):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                if ast.get_docstring(node) is not None:
                    node.body = node.body[1:]
                digest.update(ast.unparse(node).encode())
    return digest.hexdigest()[:12]


def key(row: dict[str, Any]) -> str:
    return f"{row['kernel']}: {row['config']}"


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """An entry of the record."""
    return {
        "device code": device_code(),
        "modes": len({mode for row in rows for mode in row["modes"]}),
        "kernels": len(rows),
        "failures": [f for row in rows for f in failures(row) if not f.endswith("bytes spilled")],
        "spills": {key(row): row["spills"] for row in rows if row.get("spills")},
    }


def read() -> dict[str, Any]:
    """version -> target -> dtype -> entry."""
    record: dict[str, Any] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    return record


def add(version: str, arch: str, dtype: str, entry: dict[str, Any]) -> None:
    record = read()
    record.setdefault(version, {}).setdefault(arch, {})[dtype] = entry
    with atomic_write(RECORD) as draft:
        draft.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


def installed(version: str, folder: Path) -> dict[str, str]:
    """The environment of a process that has this version of Triton, fetched into `folder` where it is not installed.

    Raises:
        RuntimeError: pip cannot fetch it.
    """
    paths = [str(ROOT)]
    if version != triton.__version__:
        if not (folder / "triton").is_dir():
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
            done = subprocess.run([*command, f"triton=={version}"], capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"pip cannot fetch triton {version}: {done.stderr.strip().splitlines()[-1]}")
        paths.insert(0, str(folder))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def profile(environment: dict[str, str], arch: str, dtype: str, folder: Path) -> list[dict[str, Any]]:
    """The static profile's rows, compiled without an earlier cache."""
    out = folder / "rows.json"
    command = [sys.executable, "-m", "internvit.kernels.tools.static_profile", "--json", str(out)]
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        done = subprocess.run(
            [*command, "--quick", "--arch", arch, "--dtype", dtype],
            cwd=ROOT,
            env={**environment, "TRITON_CACHE_DIR": cache},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"the static profile for {arch}, {dtype} fails: {done.stderr[-4000:]}")
    rows: list[dict[str, Any]] = json.loads(out.read_text())
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.proofs.triton.versions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", nargs="+", default=list(VERSIONS), metavar="X.Y.Z")
    parser.add_argument("--arch", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--again", action="store_true", help="compile what the record has of these kernels too")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        for dtype in asked.dtype:
            for arch in asked.arch:
                for version in asked.version:
                    there = read().get(version, {}).get(arch, {}).get(dtype, {})
                    if there.get("device code") == device_code() and not asked.again:
                        continue
                    begin, environment = time.monotonic(), installed(version, Path(folder) / version)
                    entry = summary(profile(environment, arch, dtype, Path(folder)))
                    add(version, arch, dtype, entry)
                    print(
                        f"triton {version}, {arch}, {dtype}: {entry['kernels']} kernels of {entry['modes']} modes,"
                        f" {len(entry['failures'])} failed, {len(entry['spills'])} spill"
                        f" ({time.monotonic() - begin:.0f} s)",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
