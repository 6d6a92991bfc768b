"""Everything in this folder runs kernels in Triton's interpreter.

TRITON_INTERPRET=1 pytest tests/triton/interpreted

The whole product takes an hour of one core (AVX-512 server CPU, measured), two fifths of it float32 attention over 1025
tokens; without slow tests a minute and a half.
"""

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter

    interpreter.mend()
else:
    collect_ignore_glob = ["test_*.py"]  # kernels read the variable when they are imported: a process of their own
