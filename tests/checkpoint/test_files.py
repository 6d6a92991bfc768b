"""Files that other processes read, replace, or leave behind."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from internvit.checkpoint import load as loading
from internvit.checkpoint.load import load_pretrained
from internvit.checkpoint.save import save_pretrained
from internvit.checkpoint.state_dict import convert_state_dict
from internvit.files import atomic_write, locked, read_json, staging
from internvit.model.vit import InternViT
from tests.checkpoint.models import PLAIN, assert_loaded, make_model, names
from tests.support.ranks import CONTEXT
from tests.support.strategies import random_weights

posix = pytest.mark.skipif(os.name == "nt", reason="permissions and locks of POSIX")


# ---- atomic writing ----


def test_a_file_is_whole_or_not_there(tmp_path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="half"), atomic_write(path) as part:  # noqa: PT012
        part.write_text("ne")
        raise RuntimeError("half")
    assert path.read_text() == "old"
    assert names(tmp_path) == {"x.txt"}
    with atomic_write(path) as part:
        assert part.name == "x.txt"  # writers tell the format by it
        part.write_text("new")
    assert path.read_text() == "new"
    assert names(tmp_path) == {"x.txt"}
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "nowhere" / "x"):
        pass
    with atomic_write(tmp_path / ("ü" * 120)) as part:  # 240 bytes, near what file systems take
        part.write_text("")
    assert names(tmp_path) == {"x.txt", "ü" * 120}


@posix
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_users_permissions(tmp_path, umask: int) -> None:
    before = os.umask(umask)
    try:
        save_pretrained(make_model(PLAIN), tmp_path, max_shard_size="600KB")
        with atomic_write(tmp_path / "features.safetensors") as part:
            save_file({"x": torch.zeros(1)}, part)
    finally:
        os.umask(before)
    assert len(names(tmp_path)) > 4
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o666 & ~umask}


KILLED = """
import os, signal, sys
from pathlib import Path
from internvit.files import staging
with staging(Path(sys.argv[1]), "checkpoint") as stage:
    stage.path("0.shard").write_bytes(bytes(1000))
    print("there", flush=True)
    {then}
"""


@posix
def test_what_a_kill_leaves_is_used_again(tmp_path) -> None:
    command = [sys.executable, "-c", KILLED.format(then="os.kill(os.getpid(), signal.SIGKILL)"), str(tmp_path)]
    assert subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode == -signal.SIGKILL
    assert names(tmp_path) == {".checkpoint.0.writing"}
    with staging(tmp_path, "checkpoint") as stage:
        assert names(tmp_path) == {".checkpoint.0.writing"}
        assert not stage.path("0.shard").exists()
    assert names(tmp_path) == set()


@posix
def test_what_others_are_writing_stays(tmp_path) -> None:
    command = [sys.executable, "-c", KILLED.format(then="sys.stdin.read()"), str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"there\n"
        save_pretrained(make_model(PLAIN), tmp_path)
        save_pretrained(make_model(PLAIN), tmp_path, overwrite=True)
        assert (tmp_path / ".checkpoint.0.writing" / "files" / "0.shard").stat().st_size == 1000
        process.stdin.close()
    assert names(tmp_path) == {"config.json", "model.safetensors"}


ATOMIC = """
import resource, sys
from internvit.files import atomic_write
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
with atomic_write(sys.argv[1]) as path:
    path.write_bytes(bytes(10000))
"""


@posix
def test_a_disk_that_is_full_is_named(tmp_path) -> None:
    """Python's error of a write names no file."""
    command = [sys.executable, "-c", ATOMIC, str(tmp_path / "features.bin")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert re.search(rf"OSError: \[Errno \d+\] .*: '{re.escape(str(tmp_path))}'", done.stderr)
    assert names(tmp_path) == set()


@posix
def test_planted_links_are_not_followed(tmp_path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious.txt").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".checkpoint.0.writing").symlink_to(victim)
    (tmp_path / "out" / ".checkpoint.1.writing").write_text("a file")
    save_pretrained(make_model(PLAIN), tmp_path / "out")
    assert names(victim) == {"precious.txt"}
    assert_loaded(load_pretrained(InternViT, tmp_path / "out"), random_weights(PLAIN))


@posix
def test_a_writer_waits_for_readers(tmp_path) -> None:
    order: list[str] = []

    def write() -> None:
        with locked(tmp_path):
            order.append("written")

    with locked(tmp_path, shared=True), locked(tmp_path, shared=True):
        thread = threading.Thread(target=write)
        thread.start()
        time.sleep(0.2)
        order.append("read")
    thread.join()
    assert order == ["read", "written"]


# ---- saving at once, loading meanwhile ----


def _save(folder: Path, seed: int, shard: str, times: int) -> None:
    torch.set_num_threads(1)
    model = make_model(PLAIN, seed=seed)
    for _ in range(times):
        save_pretrained(model, folder, max_shard_size=shard, overwrite=True)


def assert_one_of(model: InternViT, seeds: range) -> None:
    state = model.state_dict()
    wanted = [random_weights(PLAIN, seed=seed) for seed in seeds]
    assert any(all(torch.equal(state[name], one[name]) for name in one) for one in wanted), "shards of two saves"


@posix
def test_processes_that_save_at_once(tmp_path) -> None:
    processes = [CONTEXT.Process(target=_save, args=(tmp_path, seed, "600KB", 3)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert_one_of(load_pretrained(InternViT, tmp_path), range(4))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert names(tmp_path) == {"config.json", "model.safetensors.index.json", *index["weight_map"].values()}


@posix
@pytest.mark.parametrize("sizes", [("600KB", "600KB"), ("5GB", "600KB"), ("5GB", "5GB")])
def test_threads_that_save_and_load_at_once(tmp_path, sizes: tuple[str, str]) -> None:
    save_pretrained(make_model(PLAIN), tmp_path)
    errors: list[BaseException] = []

    def save(seed: int) -> None:
        try:
            _save(tmp_path, seed, sizes[seed], 5)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert_one_of(load_pretrained(InternViT, tmp_path), range(2))
    assert not errors


@pytest.mark.parametrize("form", ["shards", "one file", "pth"])
@pytest.mark.parametrize("moment", ["before the first copy", "after it"])
def test_a_file_replaced_while_it_is_read(tmp_path, monkeypatch, form: str, moment: str) -> None:
    """Another process saves meanwhile; every tensor comes from the files that were there at the start."""
    old, new = random_weights(PLAIN, seed=1), random_weights(PLAIN, seed=2)

    def write(weights: dict) -> None:
        if form == "pth":
            with atomic_write(tmp_path / "model.pth") as part:
                torch.save(weights, part)
        else:
            model = make_model(PLAIN)
            model.load_state_dict(weights)
            save_pretrained(model, tmp_path, max_shard_size="600KB" if form == "shards" else "5GB", overwrite=True)

    write(old)
    copies, real, compare = [], loading._copy, loading.compare_shapes

    def copy(item, *arguments):
        item.file.unmap()
        copies.append(item)
        if moment == "after it" and len(copies) == 2:
            write(new)
        return real(item, *arguments)

    def compare_shapes(*arguments, **named):
        compare(*arguments, **named)
        if moment != "after it" and not copies:
            write(new)

    monkeypatch.setattr(loading, "_copy", copy)
    monkeypatch.setattr(loading, "compare_shapes", compare_shapes)
    path = tmp_path / "model.pth" if form == "pth" else tmp_path
    assert_loaded(load_pretrained(InternViT, path), old)
    assert_loaded(load_pretrained(InternViT, path), new)


def test_a_file_written_to_in_place_is_noticed(tmp_path, monkeypatch) -> None:
    save_pretrained(make_model(PLAIN), tmp_path)
    path, real = tmp_path / "model.safetensors", loading._copy

    def copy(*arguments):
        with open(path, "r+b") as file:
            file.seek(-8, 2)
            file.write(b"1" * 8)
        os.utime(path, ns=(1, 1))
        return real(*arguments)

    monkeypatch.setattr(loading, "_copy", copy)
    with pytest.raises(ValueError, match=r"model\.safetensors: was written to while it was read"):
        load_pretrained(InternViT, tmp_path)


# ---- what a save must not remove ----


def internvl(folder: Path) -> Path:
    """A whole InternVL in shards, as transformers writes it."""
    folder.mkdir()
    tower = {f"vision_model.{k}": v for k, v in convert_state_dict(random_weights(PLAIN)).items()}
    language = {"language_model.lm_head.weight": torch.ones(3)}
    weight_map = {}
    for number, part in enumerate((tower, language), 1):
        name = f"model-{number:05d}-of-00002.safetensors"
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "internvl_chat", "vision_config": PLAIN.to_dict()}))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("shard", ["5GB", "600KB"])
def test_overwriting_keeps_the_rest_of_an_internvl(tmp_path, shard: str) -> None:
    folder = internvl(tmp_path / "internvl")
    before = contents(folder)
    model = load_pretrained(InternViT, folder)
    with pytest.raises(FileExistsError, match=r"holds more than an InternViT.*: language_model\.lm_head\.weight;"):
        save_pretrained(model, folder, max_shard_size=shard, overwrite=True)
    assert contents(folder) == before
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    (tmp_path / "elsewhere").mkdir()
    elsewhere = {"weight_map": {key: f"shards/{name}" for key, name in index.items()}}
    (tmp_path / "elsewhere" / "model.safetensors.index.json").write_text(json.dumps(elsewhere))
    before = contents(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError, match=r"holds more than an InternViT"):
        save_pretrained(model, tmp_path / "elsewhere", max_shard_size=shard, overwrite=True)
    assert contents(tmp_path / "elsewhere") == before
    whole = {"vision_model.a": torch.ones(1), "language_model.lm_head.weight": torch.ones(3)}
    (tmp_path / "one").mkdir()
    save_file(whole, tmp_path / "one" / "model.safetensors")
    with pytest.raises(FileExistsError, match="model.safetensors holds more than an InternViT"):  # noqa: RUF043
        save_pretrained(model, tmp_path / "one", overwrite=True)
    assert names(tmp_path / "one") == {"model.safetensors"}


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "internvl_chat", "vision_config": PLAIN.to_dict(), "llm_config": {}},
        {"model_type": "qwen2", "hidden_size": 896},
        {"model_type": "internvl"},
    ],
)
@pytest.mark.parametrize("overwrite", [True, False])
def test_the_configuration_of_another_model_stays(tmp_path, fields: dict, overwrite: bool) -> None:
    """Its weights may be files that a save does not touch, such as pytorch_model.bin, or lie elsewhere."""
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "consolidated.00.pth").write_bytes(b"the language model")
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=r"config\.json is that of another model"):
        save_pretrained(make_model(PLAIN), tmp_path, overwrite=overwrite)
    assert contents(tmp_path) == before
    for text in ("{", "[]", json.dumps(PLAIN.to_dict()), json.dumps(PLAIN.to_dict("transformers"))):
        (tmp_path / "config.json").write_text(text)
        save_pretrained(make_model(PLAIN), tmp_path, overwrite=True)


def test_a_configuration_of_other_settings_stays(tmp_path) -> None:
    """With weights of another name beside it, which would be read with the new one."""
    model = make_model(PLAIN)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    other = {**PLAIN.to_dict(), "drop_path_rate": 0.3, "layer_norm_eps": 1e-3, "pos_embed_mode": "antialias"}
    (tmp_path / "config.json").write_text(json.dumps(other))
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=r"config\.json has another layer_norm_eps, pos_embed_mode; pass"):
        save_pretrained(model, tmp_path)
    assert contents(tmp_path) == before
    save_pretrained(model, tmp_path, overwrite=True)
    (tmp_path / "model.safetensors").unlink()
    save_pretrained(model, tmp_path, layout="transformers")  # the same settings in another spelling


@pytest.mark.parametrize("index", ["precious", "broken", "dots"])
def test_overwriting_removes_only_shards_of_ours(tmp_path, index: str) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    save_file({"language_model.x": torch.ones(1)}, tmp_path / "model-00001-of-00002.safetensors")
    weight_map = dict.fromkeys(random_weights(PLAIN), {"precious": "precious.txt", "dots": ".."}.get(index, "x"))
    text = "{" if index == "broken" else json.dumps({"weight_map": weight_map})
    (tmp_path / "model.safetensors.index.json").write_text(text)
    save_pretrained(make_model(PLAIN), tmp_path, overwrite=True)
    expected = {"precious.txt", "model-00001-of-00002.safetensors", "model.safetensors", "config.json"}
    assert names(tmp_path) == expected
    assert list(load_file(tmp_path / "model-00001-of-00002.safetensors")) == ["language_model.x"]


FULL = """
import resource, signal, sys
import torch
from internvit.cli.app import run
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
run(["convert", sys.argv[1], sys.argv[2], "--to", "mmseg", "--overwrite"])
"""


@posix
def test_a_full_disk_is_one_line_and_changes_nothing(tmp_path) -> None:
    pytest.importorskip("click", reason="the cli extra is not installed")
    source, target = tmp_path / "in", tmp_path / "out"
    save_pretrained(make_model(PLAIN), source)
    save_pretrained(make_model(PLAIN, seed=1), target, max_shard_size="600KB")
    before = contents(target)
    command = [sys.executable, "-c", FULL, str(source), str(target)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert f"internvit: {target}: could not be written: " in result.stderr
    assert contents(target) == before


# ---- names of a checkpoint ----


def test_config_json_names_its_folder(saved: Path) -> None:
    for path in (saved / "config.json", saved / "model.safetensors.index.json", str(saved / "config.json")):
        assert_loaded(load_pretrained(InternViT, path), random_weights(PLAIN))


def test_prefix(tmp_path) -> None:
    both = {f"{name}.{k}": v for seed, name in enumerate(("student", "teacher"))
            for k, v in random_weights(PLAIN, seed=seed).items()}  # fmt: skip
    save_file(both, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"expected one InternViT, got 2: .*pass the prefix") as error:
        load_pretrained(InternViT, tmp_path)
    assert str(tmp_path) in str(error.value)
    for seed, name in enumerate(("student", "teacher")):
        assert_loaded(InternViT.from_pretrained(tmp_path, prefix=name), random_weights(PLAIN, seed=seed))
    with pytest.raises(ValueError, match="prefix: expected that of an InternViT, got 'x'; there is prefix='student"):
        load_pretrained(InternViT, tmp_path, prefix="x")


def test_prefix_on_the_command_line(tmp_path) -> None:
    testing = pytest.importorskip("click.testing", reason="the cli extra is not installed")
    from internvit.cli.app import cli

    both = {f"{name}.{k}": v for seed, name in enumerate(("student", "teacher"))
            for k, v in random_weights(PLAIN, seed=seed).items()}  # fmt: skip
    save_file(both, tmp_path / "x.safetensors")
    command = [
        "convert",
        str(tmp_path / "x.safetensors"),
        str(tmp_path / "out"),
        "--to",
        "mmseg",
        "--prefix",
        "teacher",
    ]
    result = testing.CliRunner().invoke(cli, command)
    assert result.exit_code == 0, result.output
    assert_loaded(load_pretrained(InternViT, tmp_path / "out"), random_weights(PLAIN, seed=1))


@posix
def test_json_that_is_no_file(tmp_path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"config\.json: expected a regular file"):
        read_json(tmp_path / "config.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"deep\.json: not valid JSON"):
        read_json(tmp_path / "deep.json")
    (tmp_path / "large.json").write_bytes(b"")
    os.truncate(tmp_path / "large.json", 2**40)
    with pytest.raises(ValueError, match=r"large\.json: expected at most"):
        read_json(tmp_path / "large.json")
