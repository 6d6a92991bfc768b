"""The benchmark of packed images runs, forward and backward, and its rows are the same features."""

import json

import pytest

from internvit.benchmarks.model import bench_packed


@pytest.mark.parametrize("train", [False, True])
def test_rows(train, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(bench_packed, "GRIDS", ((1, 2), (3, 1), (2, 2)))
    out = tmp_path / "packed.json"
    arguments = ["--images", "5", "--layers", "1", "--dtype", "float32", "--rounds", "1", "--json", str(out)]
    bench_packed.main([*arguments, *(["--train"] if train else [])])
    found = {row["way"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(found) == [bench_packed.PACKED, bench_packed.LOOP, bench_packed.BY_SIZE, bench_packed.PADDED]
    assert all(row["images/s"] > 0 for row in found.values())
    assert all(row["error"] < 1e-5 for name, row in found.items() if name != bench_packed.PADDED)
    assert "medians of 1 interleaved rounds" in capsys.readouterr().out
