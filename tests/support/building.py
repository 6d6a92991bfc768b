"""setup.py as a module: its flags and plans, without its call of setup()."""

import sys
import types

from tests.support import ROOT


def setup_module() -> types.ModuleType:
    text = (ROOT / "setup.py").read_text()
    module = types.ModuleType("internvit_setup")
    module.__file__ = str(ROOT / "setup.py")
    sys.modules[module.__name__] = module  # its dataclass looks itself up there
    try:
        exec(compile(text[: text.index("\nsetup(\n")], "setup.py", "exec"), module.__dict__)
    finally:
        del sys.modules[module.__name__]
    return module
