"""The benchmarks refuse wrong results, keep what was measured, and README says what the results say."""

import dataclasses
import functools
import json
import re
import subprocess
import sys

import pytest
import torch

from internvit.benchmarks.harness import results, run
from internvit.benchmarks.harness.cases import Implementation, MissingPeerError, Setting
from internvit.benchmarks.harness.machine_limits import bfloat16_products
from internvit.benchmarks.harness.timing import Times, copies_past_cache, last_level_cache
from internvit.benchmarks.model import bench_training
from internvit.benchmarks.reports import report, table
from internvit.cli import app as cli
from internvit.cli.environment import cpu_name
from internvit.ops.core.spec import SPECS, every_spec
from tests.support import ROOT

QUICK = Setting(quick=True, dtypes=(torch.float32,))


def bench(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.run(["bench", *arguments])
    return int(stopped.value.code or 0)


@pytest.fixture(scope="module")
def measured() -> results.Results:
    return run.run(("rms_norm", "attention"), QUICK, rounds=3)


@pytest.fixture
def only_rows(monkeypatch) -> None:
    """Runs measure neither the machine nor a call of every op, and rotate no inputs: `measured` does."""
    limits = run.machine_limits.Limits(1e9, {"float32": 1e9}, {})
    monkeypatch.setattr(run.machine_limits, "measure", lambda *_: limits)
    monkeypatch.setattr(run, "call_costs", lambda _: {})
    monkeypatch.setattr(run, "copies_past_cache", lambda *_: 1)


def test_freed_pages_are_kept_inside_and_given_back_after() -> None:
    """In a process of its own, as `internvit bench` has: what a heap gives back depends on what else lies in it."""
    pytest.importorskip("resource")
    code = """
import resource
from pathlib import Path
import torch
from internvit.benchmarks.harness.timing import freed_pages_kept

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(2**26, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident_pages():
    return int(Path("/proc/self/statm").read_text().split()[1])

with freed_pages_kept() as kept:
    inside = min(faults() for _ in range(16))
    before = resident_pages()
print(int(kept), inside, before - resident_pages())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    kept, inside, given_back = map(int, done.stdout.split())
    if not kept:
        pytest.skip("the C library here is not glibc")
    assert inside < 1000
    assert given_back > 15000  # 4 KiB each, of 64 MiB


def test_every_op_is_timed() -> None:
    files = {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("*/bench_*.py")}
    assert every_spec().keys() - set(run.OPS) == {"qk_norm_attention_qkvpacked"}  # the kernels of qk_norm_attention
    assert files - set(run.BENCHES) <= {"rows", "training", "packed"}  # memory as well as time: commands of their own
    assert {case.bench for case in run.cases(run.OPS, QUICK)} == set(run.OPS)


def test_measures_ours_and_peers(measured) -> None:
    assert measured.complete
    for bench_name in ("rms_norm", "attention"):
        for mode in ("forward", "forward+backward"):
            rows = [r for r in measured.rows if (r.bench, r.mode) == (bench_name, mode)]
            timed = [r for r in rows if r.p50_ms is not None]
            assert any(r.variant.startswith("internvit") for r in timed)
            assert any(r.variant == "eager" for r in timed)
            assert min(r.speedup for r in timed if r.variant.startswith("internvit")) == 1.0
            for r in timed:
                assert 0 < r.p20_ms <= r.p50_ms <= r.p80_ms
                assert r.share > 0
                assert r.rounds == 3
    assert measured.call_us.keys() == every_spec().keys()
    assert measured.limits["bandwidth"] > 1e9
    assert measured.machine["torch"] == torch.__version__


def test_a_missing_peer_is_a_named_gap(measured) -> None:
    gaps = [r for r in measured.rows if r.p50_ms is None]
    assert {r.variant for r in gaps} >= {"LigerRMSNorm", "flash-attn"}
    assert all("GPU" in r.note for r in gaps if r.variant in ("LigerRMSNorm", "flash-attn"))
    assert "needs a GPU" in table.plain(measured)


def replace_rms_norm(monkeypatch, change) -> None:
    """Benchmarks `change(rms_norm(...))` as if it were ours."""
    spec = SPECS["rms_norm"]
    function = functools.wraps(spec.function)(lambda *args, **kwargs: change(spec.function(*args, **kwargs)))
    monkeypatch.setitem(SPECS, "rms_norm", dataclasses.replace(spec, function=function))


def test_a_flipped_sign_is_refused_and_not_timed(only_rows, monkeypatch, capsys) -> None:
    replace_rms_norm(monkeypatch, torch.neg)
    assert bench("rms_norm", "--quick", "--device", "cpu", "--rounds", "1", "--peers", "eager") == 1
    printed = capsys.readouterr()
    assert "refused, the result is wrong" in printed.err
    found = run.run(("rms_norm",), QUICK, peers=("eager",), rounds=1)
    ours = [r for r in found.rows if r.variant.startswith("internvit")]
    assert len(ours) == 2
    assert all(r.p50_ms is None and r.note.startswith("refused") for r in ours)
    assert all(r.p50_ms is not None for r in found.rows if r.variant == "eager")


def test_a_wrong_gradient_is_refused(only_rows, monkeypatch) -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.01

    replace_rms_norm(monkeypatch, Wrong.apply)
    found = run.run(("rms_norm",), QUICK, peers=(), rounds=1)
    verdicts = {r.mode: r.note for r in found.rows}
    assert not verdicts["forward"]
    assert verdicts["forward+backward"].startswith("refused")


def test_files_are_read_back_and_an_interrupted_run_keeps_its_rows(only_rows, tmp_path) -> None:
    steps = 0

    def progress(text: str) -> None:
        nonlocal steps
        steps += text.startswith("rms_norm")
        if steps == 2:
            raise KeyboardInterrupt

    found = run.run(("rms_norm",), QUICK, peers=(), rounds=1, folder=tmp_path, progress=progress)
    assert not found.complete
    assert {r.mode for r in found.rows} == {"forward"}
    assert results.read(tmp_path) == found
    assert len((tmp_path / "bench.csv").read_text().splitlines()) == 1 + len(found.rows)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bench.csv", "bench.json"]


def test_reading_something_else_is_an_error(tmp_path) -> None:
    (tmp_path / "bench.json").write_text("{}")
    with pytest.raises(ValueError, match="internvit bench --out"):
        results.read(tmp_path)


def test_compare_names_what_got_slower(measured, tmp_path, capsys) -> None:
    slow = next(r for r in measured.rows if r.p50_ms is not None)
    changed = dataclasses.replace(slow, p20_ms=slow.p80_ms * 1.1, p50_ms=slow.p80_ms * 1.2, p80_ms=slow.p80_ms * 1.3)
    new = dataclasses.replace(measured, rows=tuple(changed if r == slow else r for r in measured.rows))
    measured.write(tmp_path / "old")
    new.write(tmp_path / "new")
    assert bench("--compare", str(tmp_path / "old"), str(tmp_path / "old")) == 0
    assert "slower" not in capsys.readouterr().out
    assert bench("--compare", str(tmp_path / "old"), str(tmp_path / "new" / "bench.json")) == 1
    printed = capsys.readouterr().out
    assert printed.count("slower:") == 1
    assert slow.variant in printed


def test_a_revision_is_checked_out_and_built_beside_this_one(tmp_path, monkeypatch) -> None:
    """Of a small repository: its setup.py builds, its bench is run with the arguments given, and nothing is left."""
    from internvit.benchmarks.harness import revision

    def git(*words: str) -> str:
        call = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(call, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    (tmp_path / "setup.py").write_text("open('built', 'w').close()")
    (tmp_path / "file").write_text("old")
    git("add", ".")
    git("commit", "-qm", "old")
    (tmp_path / "file").write_text("new")
    monkeypatch.setattr(revision, "ROOT", tmp_path)
    with revision.checkout("HEAD") as folder:
        assert ((folder / "file").read_text(), (tmp_path / "file").read_text()) == ("old", "new")
        assert (folder / "built").exists()
        assert not (tmp_path / "built").exists()
    assert not folder.exists()
    assert len(git("worktree", "list").splitlines()) == 1
    with pytest.raises(ValueError, match="--base: checking out 'nothing' failed: "), revision.checkout("nothing"):
        pass


def test_base_compares_with_a_revision(measured, monkeypatch, capsys) -> None:
    from internvit.benchmarks.harness import revision

    def fake(ref, arguments, progress):
        assert (ref, arguments) == ("v1", ["rms_norm", "--peers", "none", "--rounds", "2", "--quick"])
        return measured, measured

    monkeypatch.setattr(revision, "measured", fake)
    assert bench("rms_norm", "--quick", "--rounds", "2", "--peers", "none", "--base", "v1") == 0
    assert "within the spread" in capsys.readouterr().out
    assert bench("--base", "v1", "--out", "x") == 2


def test_where_a_forward_goes_is_marked_alike(measured, tmp_path) -> None:
    row = {"total ms": 2.0, "kernels": {"Linears": {"ms": 2.0, "of the time": 1.0, "of its limit": 0.5}}}
    found = {"machine": measured.machine, "images": 1, "size": 448, "peak TFLOP/s": 1.0, "copy GB/s": 9.0}
    file = tmp_path / "where.json"
    assert report.where(file) == ""
    for code, marked in ((measured.machine["code"], False), ({}, True)):
        file.write_text(json.dumps(found | {"machine": measured.machine | {"code": code}, "ways": {"fused": row}}))
        assert "| Linears | 2.0 | 100.0% | 50% |" in report.where(file)
        assert ("the code has changed since" in report.where(file)) == marked


def test_results_of_other_code_are_marked(measured) -> None:
    assert results.changed_since(measured.machine) == []
    code = measured.machine["code"]
    assert set(code) == {"csrc", "kernels", "ops", "model"}
    old = dataclasses.replace(measured, machine={**measured.machine, "code": {**code, "csrc": "0"}})
    assert results.changed_since(old.machine) == ["csrc"]
    assert "changed since in csrc" in results.age(old.machine)
    unknown = dataclasses.replace(measured, machine={k: v for k, v in measured.machine.items() if k != "code"})
    assert results.changed_since(unknown.machine) == list(code)


def test_pictures(measured, tmp_path) -> None:
    from internvit.benchmarks.reports.plots import draw

    made = {path.name for path in draw(measured, tmp_path)}
    assert made == {"rms_norm.png", "attention.png", "shares.png", "roofline.png"}
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in made)


def test_unknown_bench_is_a_usage_error(capsys) -> None:
    assert bench("rmsnorm") == 2
    assert "got rmsnorm" in capsys.readouterr().err


def test_inputs_outgrow_the_last_level_cache() -> None:
    inputs = (torch.empty(1 << 20),)
    copies = copies_past_cache(inputs, "cpu")
    assert copies == 16 or copies * inputs[0].nbytes >= 2 * last_level_cache("cpu")


def test_quantiles_of_times() -> None:
    times = Times(tuple(float(i) for i in range(1, 12)))
    assert (times.quantile(20), times.median, times.quantile(80)) == (3.0, 6.0, 9.0)
    assert Times((2.0,)).quantile(80) == 2.0


def test_a_peer_that_raises_is_a_gap() -> None:
    def broken():
        raise MissingPeerError("not to be had")

    work = run.cases(("rms_norm",), QUICK)[0]
    work = dataclasses.replace(work, implementations=(*work.implementations[:1], Implementation("peer", broken)))
    limits = run.machine_limits.Limits(1e9, {"float32": 1e9}, {})
    *_, rows = run.run_case(work, "forward", QUICK, None, 1, limits)
    assert {r.variant: r.note for r in rows}["peer"] == "not to be had"


def test_a_run_resumes_after_the_rows_that_are_there(only_rows, tmp_path) -> None:
    seen: list[str] = []
    first = run.run(("rms_norm",), QUICK, ("eager",), 1, tmp_path)
    again = run.run(("rms_norm", "layer_norm"), QUICK, ("eager",), 1, tmp_path, seen.append, resume=True)
    assert again.rows[: len(first.rows)] == first.rows
    assert not any("rms_norm" in text for text in seen)
    assert any("layer_norm" in text for text in seen)
    facts = json.loads((tmp_path / "bench.json").read_text())
    facts["machine"]["sources"] = "another"
    (tmp_path / "bench.json").write_text(json.dumps(facts))
    seen.clear()
    run.run(("rms_norm",), QUICK, ("eager",), 1, tmp_path, seen.append, resume=True)
    assert any("rms_norm" in text for text in seen), "rows of other code are measured anew"


def test_what_torch_compiles_comes_last_beside_ours(only_rows, monkeypatch) -> None:
    def compiling(benches, setting):
        return [
            dataclasses.replace(
                case,
                implementations=(
                    *case.implementations[:1],
                    Implementation("compiled", lambda case=case: case.implementations[-1].build(), compiles=True),
                    *case.implementations[1:],
                ),
            )
            for case in found
        ]

    found = run.cases(("rms_norm",), QUICK)
    monkeypatch.setattr(run, "cases", compiling)
    steps = run._steps(("rms_norm",), QUICK, compiles_last=True)
    names = [[one.name for one in case.implementations] for case, _ in steps]
    modes = sum(len(case.modes) for case in found)
    assert all("compiled" not in of for of in names[:modes])
    assert all(of == [names[0][0], "compiled"] for of in names[modes:])
    rows = run.run(("rms_norm",), QUICK, rounds=1, compiles_last=True).rows
    assert len({row.key for row in rows}) == len(rows)
    assert sum(row.variant == "compiled" for row in rows) == modes


def test_a_peer_that_raises_when_it_is_called_is_a_gap() -> None:
    def raises(*inputs):
        raise RuntimeError("No available kernel")

    work = run.cases(("rms_norm",), QUICK)[0]
    work = dataclasses.replace(work, implementations=(work.implementations[0], Implementation("peer", lambda: raises)))
    limits = run.machine_limits.Limits(1e9, {"float32": 1e9}, {})
    *_, rows = run.run_case(work, "forward", QUICK, None, 1, limits)
    assert {r.variant: r.note for r in rows}["peer"] == "failed: RuntimeError: No available kernel"


@pytest.mark.sampled(6)
def test_the_bench_package_needs_no_extra() -> None:
    """A GPU machine may have torch and Triton only."""
    code = """
import sys, torch
for name in ("click", "rich", "tqdm", "matplotlib", "transformers", "timm", "pytest", "PIL"):
    sys.modules[name] = None
from internvit.benchmarks.reports import gpu_bench, gpu_report, gpu_smoke
from internvit.benchmarks.harness import run
from internvit.benchmarks.reports import table
run.call_costs, run.copies_past_cache = lambda setting: {}, lambda *inputs: 1  # for time
setting = run.Setting(quick=True, dtypes=(torch.bfloat16,))
found = run.run(("rms_norm",), setting, peers=("eager", "LigerRMSNorm"), rounds=1)
print(table.plain(found))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "rms_norm 257x3200, bfloat16, forward" in done.stdout


@pytest.mark.sampled(6)
def test_pytest_benchmark_runs_the_same_cases() -> None:
    call = [sys.executable, "-m", "pytest", "-q", "benchmarks/ops/bench_rms_norm.py", "--quick", "--benchmark-disable"]
    done = subprocess.run([*call, "-k", "float32 and not backward"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    assert "2 passed, 2 skipped" in done.stdout, done.stdout


@pytest.mark.sampled(6)
def test_training_counts_and_refuses(monkeypatch) -> None:
    pytest.importorskip("transformers", reason="the peer beside ours")
    arguments = (bench_training.VARIANTS[0], 65, "cpu", torch.bfloat16, 1, bench_training.cpu_seconds)
    rows = {row.way: row for row in bench_training.measured(*arguments)}
    units = {way: row.units for way, row in rows.items()}
    peers = [way for way in units if way.startswith("transformers")]
    assert peers == ["transformers SDPA" if bfloat16_products("cpu") else "transformers SDPA, float32"]
    assert 18 < units[bench_training.WITHOUT] < 18.1
    assert [round(units[way]) for way in bench_training.MODES] == [18, 12, 10, 5, 1]
    assert all(row.over > 0 for row in rows.values())
    right = bench_training.Way.gradients

    def wrong(way: bench_training.Way, *arguments: torch.Tensor) -> tuple:
        x, *rest = right(way, *arguments)
        return (-x if "selective" in way.name else x, *rest)

    ways = bench_training.ways
    few = lambda *given: (way for i, way in enumerate(ways(*given)) if i == 0 or "selective" in way.name)  # noqa: E731
    monkeypatch.setattr(bench_training, "ways", few)
    monkeypatch.setattr(bench_training.Way, "gradients", wrong)
    refused = {row.way: row for row in bench_training.measured(*arguments)}
    assert [way for way, row in refused.items() if row.note] == ['internvit "selective"']
    assert refused['internvit "selective"'].p50_ms is None


def test_the_training_page_says_what_the_results_say() -> None:
    text = bench_training.PAGE.read_text()
    assert bench_training.page(text) == text


def test_readme_says_what_the_results_say() -> None:
    assert report.main(["--check"]) == 0


def test_results_name_no_folder_of_the_machine(monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/lib/internvit/__main__.py", "bench", "--out", "/home/me/run1"])
    assert results.machine("cpu")["command"] == "internvit bench --out run1"
    monkeypatch.setattr(sys, "argv", ["bench_model.py", "--out=/home/me/run1"])
    assert results.machine("cpu")["command"] == "bench_model --out=run1"
    files = list((ROOT / "benchmarks/results").rglob("*.json"))
    assert files
    for path in files:
        assert not re.search(r'(^|[ "=])/\w+/', path.read_text(), re.MULTILINE), path


def test_the_cpus_name_has_its_generation() -> None:
    """Two EPYCs of different generations call themselves "AMD EPYC", and differ by two in bfloat16."""
    amd = "vendor_id : AuthenticAMD\ncpu family : {}\nmodel name : AMD EPYC\nflags : {}\n"
    assert cpu_name(amd.format(26, "avx2 avx512f")) == "AMD EPYC (Zen 5)"
    assert cpu_name(amd.format(25, "avx2 avx512f")) == "AMD EPYC (Zen 4)"
    assert cpu_name(amd.format(25, "avx2")) == "AMD EPYC (Zen 3)"
    assert cpu_name("vendor_id : GenuineIntel\ncpu family : 6\nmodel name : Intel Xeon\n") == "Intel Xeon"
    intel = "vendor_id : GenuineIntel\ncpu family : 6\nmodel : {}\nmodel name : {}\nflags : {}\n"
    cloud = "Intel(R) Xeon(R) Processor @ 2.50GHz"
    assert cpu_name(intel.format(85, cloud, "avx512f avx512_vnni")) == "Intel Xeon (Cascade Lake)"
    assert cpu_name(intel.format(85, cloud, "avx512f")) == "Intel Xeon (Skylake)"
    named = "Intel(R) Xeon(R) Platinum 8375C CPU @ 2.90GHz"
    assert cpu_name(intel.format(106, named, "avx512f")) == "Intel Xeon Platinum 8375C (Ice Lake)"
    assert cpu_name(intel.format(143, "Intel Xeon Processor (SapphireRapids)", "amx_bf16")).count("apphire") == 1
