"""Native code for tests: setup.py as a module, and a folder in which one run builds each file once."""

import hashlib
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

from tests.support import ROOT

Command = list[str]


def setup_module() -> types.ModuleType:
    """setup.py's flags and plans, without its call of setup()."""
    text = (ROOT / "setup.py").read_text()
    module = types.ModuleType("internvit_setup")
    module.__file__ = str(ROOT / "setup.py")
    sys.modules[module.__name__] = module  # its dataclass looks itself up there
    try:
        exec(compile(text[: text.index("\nsetup(\n")], "setup.py", "exec"), module.__dict__)
    finally:
        del sys.modules[module.__name__]
    return module


def built_by_setup(source: Path, command: Command) -> Path | None:
    """setup.py's object file of the same source and command, where it is newer than all that it was compiled from."""
    stem = source.stem
    call = shlex.join([*command, "-MMD", "-MF", f"{stem}.d", "-c", str(source), "-o", f"{stem}.o"])
    for rules in (ROOT / "build").glob("*/build.ninja"):
        if f"  command = {call}\n" in rules.read_text() and shutil.which("ninja"):
            asked = subprocess.run(["ninja", "-n", f"{stem}.o"], cwd=rules.parent, capture_output=True, text=True)
            if "no work to do" in asked.stdout:
                return rules.parent / f"{stem}.o"
    return None


class BuildFolder:
    """A folder that the processes of one test run share: the first that asks for a file builds it, others wait.

    It does not outlive the run, in which no source changes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def once(self, name: str, build: Callable[[Path], object]) -> Path:
        """The file `name`, made by `build(path)`."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not target.exists():
                build(target)
        return target

    def compiled(self, source: Path, command: Command) -> str:
        """The object file of `command -c source`; raises with the compiler's message.

        Its name has the whole command in it: with one flag more, or from a copy of the sources, it is another file.
        What setup.py has compiled by the same command is not compiled again.
        """
        if existing := built_by_setup(source, command):
            return str(existing)
        call = [*command, "-c", str(source)]
        digest = hashlib.sha256(shlex.join(call).encode()).hexdigest()[:16]

        def build(target: Path) -> None:
            done = subprocess.run([*call, "-o", str(target)], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{source.name} does not compile:\n{done.stderr}")

        return str(self.once(f"objects/{source.stem}-{digest}.o", build))

    def all_compiled(self, commands: Iterable[tuple[Path, Command]]) -> list[str]:
        """The object files of (source, command) pairs, two compilers at a time."""
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda pair: self.compiled(*pair), commands))
