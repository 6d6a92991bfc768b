"""What several tests use."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""
CPU_UNITS = sorted(source.stem for source in (ROOT / "csrc" / "cpu" / "isa").glob("*.cpp") if source.stem != "dispatch")
"""The instruction sets that the CPU library is compiled for."""
