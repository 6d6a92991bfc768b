"""Everything in this folder runs kernels in Triton's interpreter.

TRITON_INTERPRET=1 pytest tests/proofs/triton/interpreted

The whole product took an hour of one core (AVX-512 server CPU) while each integer sum was checked by ten ops, two
fifths of it float32 attention over 1025 tokens; without slow tests it takes four and a half minutes of a slower core.
"""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.support import interpreter

    interpreter.mend()
else:
    collect_ignore_glob = ["test_*.py"]  # kernels read the variable when they are imported: a process of their own
