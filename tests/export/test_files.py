"""Files for other runtimes, run by them: ONNX Runtime, OpenVINO, AOTInductor, torch.export."""

import functools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from internvit.export import Export, export_model, targets
from internvit.export.targets import TARGETS
from internvit.model.vit import InternViT
from internvit.multimodal.connector import InternVLConnector
from internvit.numerics import relative_error
from tests.support import ROOT
from tests.support.models import CONFIGS, random_weights

CONFIG = CONFIGS["tiny-rms_norm"].replace(num_hidden_layers=1)
RUNTIMES = [
    "onnx",
    "openvino",
    "pt2",
    pytest.param("aoti", marks=pytest.mark.slow),  # compiles
]


@pytest.fixture(scope="module")
def model() -> InternViT:
    model = InternViT(CONFIG).eval()
    random_weights(model)
    return model


@pytest.fixture(scope="module")
def connector() -> InternVLConnector:
    return InternVLConnector(CONFIG.hidden_size, 40).eval()


def name_for(to: str) -> str:
    return f"model{TARGETS[to].suffix}"


def need(to: str) -> None:
    for module in TARGETS[to].modules:
        pytest.importorskip(module)


@pytest.fixture(scope="module")
def dynamic(model: InternViT, tmp_path_factory) -> Callable[[str], Export]:
    """The model for a target at any size, exported once."""

    @functools.cache
    def export(to: str) -> Export:
        need(to)
        images = [torch.randn(3, *size) for size in ((56, 56), (70, 42), (28, 126))]
        path = tmp_path_factory.mktemp(to) / name_for(to)
        return export_model(model, path, to, size="dynamic", images=images)

    return export


@pytest.mark.sampled(6)
@pytest.mark.parametrize("to", RUNTIMES)
def test_any_size_and_batch(to: str, model: InternViT, dynamic: Callable[[str], Export]) -> None:
    result = dynamic(to)
    assert set(result.errors) == {(56, 56), (70, 42), (28, 126)}
    assert max(result.errors.values()) < 1e-5
    folder = result.paths[0].parent
    assert {path.name for path in result.paths} == {path.name for path in folder.iterdir()}
    batch = torch.randn(3, 3, 42, 56)
    last, pooled = TARGETS[to].run(result.paths[0], batch)
    with torch.no_grad():
        torch.testing.assert_close(last, model(batch).last_hidden_state, rtol=1e-4, atol=1e-4)
    assert pooled.shape == (3, CONFIG.hidden_size)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("to", ["onnx", "openvino", "pt2"])
def test_sizes_off_the_patch_grid_are_refused(to: str, dynamic: Callable[[str], Export]) -> None:
    """And not cut down to it: a convolution ignores what is left over."""
    for size in ((56, 60), (69, 56), (57, 57), (70, 41)):
        with pytest.raises(Exception, match=r"(?i)reshape|% 14"):
            TARGETS[to].run(dynamic(to).paths[0], torch.randn(2, 3, *size))


def test_files_of_one_name_are_described_each(
    model: InternViT, dynamic: Callable[[str], Export], tmp_path: Path
) -> None:
    for path in dynamic("onnx").paths:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    result = export_model(model, tmp_path / "model.pt2", "pt2", size=(28, 56), batch=2)
    assert [path.name for path in result.paths] == ["model.pt2", "model.pt2.json"]
    shapes = [json.loads((tmp_path / f"model{kind}.json").read_text())["shape"] for kind in (".onnx", ".pt2")]
    assert shapes == [["batch", 3, "height", "width"], [2, 3, 28, 56]]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("to", ["onnx", pytest.param("openvino", marks=pytest.mark.slow)])
def test_feature_maps_and_image_tokens(to: str, connector: InternVLConnector, tmp_path: Path) -> None:
    need(to)
    model = InternViT(CONFIG.replace(num_hidden_layers=2)).eval()
    random_weights(model)
    maps = export_model(model, tmp_path / f"maps{TARGETS[to].suffix}", to, layers=(0, -1))
    assert maps.outputs == ("feature_map_0", "feature_map_1")
    first, _ = TARGETS[to].run(maps.paths[0], torch.randn(2, 3, *CONFIG.image_hw))
    assert first.shape == (2, CONFIG.hidden_size, *CONFIG.grid_size)
    path = tmp_path / f"tokens{TARGETS[to].suffix}"
    tokens = export_model(model, path, to, connector=connector, size=(56, 84), batch=1)
    (out,) = TARGETS[to].run(tokens.paths[0], torch.randn(1, 3, 56, 84))
    assert out.shape == (1, 4 * 6 // 4, 40)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("to", ["onnx", "openvino", "pt2"])
def test_the_documented_use(
    to: str, model: InternViT, dynamic: Callable[[str], Export], tmp_path: Path, monkeypatch
) -> None:
    Image.fromarray((torch.rand(60, 90, 3) * 255).byte().numpy()).save(tmp_path / "photo.jpg")
    for path in dynamic(to).paths:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```py\n(.*?)```", (ROOT / "docs/export.md").read_text(), re.DOTALL)
    first, code = blocks[0], dict(zip(("onnx", "openvino", "pt2", "aoti"), blocks, strict=True))[to]
    assert "internvit" not in code
    assert len(code.splitlines()) <= 20
    namespace: dict = {}
    pixels = first.partition("session =")[0].replace("import onnxruntime\n", "")  # which the other examples take
    pixels = pixels.replace("model.onnx.json", f"{name_for(to)}.json")
    exec(pixels, namespace)
    exec(code, namespace)
    with torch.no_grad():
        expected = model(torch.from_numpy(namespace["pixels"])).last_hidden_state
    assert expected.shape[1] == 1 + 32 * 32
    assert relative_error(torch.as_tensor(namespace["tokens"]), expected) < 1e-4


def test_opset_23_has_attention_as_one_node(model: InternViT, tmp_path: Path) -> None:
    need("onnx")
    import onnx

    result = export_model(model, tmp_path / "model.onnx", size=(56, 56), batch=1, opset=23)
    nodes = [node.op_type for node in onnx.load(str(result.paths[0])).graph.node]
    assert nodes.count("Attention") == CONFIG.num_hidden_layers
    assert nodes.count("RMSNormalization") == 4 * CONFIG.num_hidden_layers
    assert "Softmax" not in nodes


def test_int8_linears(model: InternViT, tmp_path: Path, monkeypatch) -> None:
    need("onnx")
    import onnx

    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        pytest.skip(
            "onnxruntime's int8 products saturate without VNNI: export refuses a file that is off by more than 0.1"
        )
    monkeypatch.setattr(targets.ONNX, "inline_bytes", 0)
    result = export_model(model, tmp_path / "model.onnx", "onnx", precision="int8", size=(56, 56), batch=2)
    assert 1e-4 < max(result.errors.values()) < 0.1
    assert {p.name for p in result.paths} == {p.name for p in tmp_path.iterdir()}
    file = onnx.load(str(result.paths[0]), load_external_data=False)
    assert sum(node.op_type == "MatMulInteger" for node in file.graph.node) == 4
    assert json.loads({p.key: p.value for p in file.metadata_props}["internvit.precision"]) == "int8"


@pytest.mark.sampled(4)  # 6 s
def test_large_weights_lie_beside_the_file(model: InternViT, tmp_path: Path, monkeypatch) -> None:
    need("onnx")
    monkeypatch.setattr(targets.ONNX, "inline_bytes", 0)
    (tmp_path / "model.onnx.data").write_text("mine")
    with pytest.raises(FileExistsError, match=r"model\.onnx\.data exists"):
        export_model(model, tmp_path / "model.onnx", size=(56, 56), batch=1)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx.data"]
    result = export_model(model, tmp_path / "model.onnx", size=(56, 56), batch=1, overwrite=True)
    assert [path.name for path in result.paths] == ["model.onnx", "model.onnx.data", "model.onnx.json"]
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in result.paths:
        path.rename(moved / path.name)
    assert len(TARGETS["onnx"].run(moved / "model.onnx", torch.randn(1, 3, 56, 56))) == 2


@pytest.mark.parametrize(("to", "module"), [(to, m) for to in TARGETS for m in TARGETS[to].modules])
def test_a_missing_runtime_is_named(to: str, module: str, model: InternViT, tmp_path: Path, monkeypatch) -> None:
    for name in TARGETS[to].modules:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"export: {module} is not installed; pip install 'internvit\[export\]'"):
        export_model(model, tmp_path / name_for(to), to)


def test_float16_and_a_fixed_batch(model: InternViT, tmp_path: Path) -> None:
    need("onnx")
    half = InternViT(CONFIG).half().eval()
    half.load_state_dict(model.state_dict())
    result = export_model(half, tmp_path / "half.onnx", "onnx", batch=2)
    assert 1e-5 < max(result.errors.values()) < 5e-3
    with pytest.raises(Exception, match=r"(?i)invalid dimensions|dimension"):
        TARGETS["onnx"].run(result.paths[0], torch.randn(3, 3, *CONFIG.image_hw).half())


def test_the_file_describes_its_input(dynamic: Callable[[str], Export]) -> None:
    result = dynamic("onnx")
    import onnx

    sidecar = json.loads(result.paths[-1].read_text())
    assert sidecar["shape"] == ["batch", 3, "height", "width"]
    assert sidecar["multiple"] == CONFIG.patch_size
    assert sidecar["outputs"] == ["last_hidden_state", "pooler_output"]
    inside = {
        p.key: json.loads(p.value) for p in onnx.load(str(result.paths[0])).metadata_props if "internvit" in p.key
    }
    assert {key.removeprefix("internvit."): value for key, value in inside.items()} == sidecar
    assert result.paths[0].stat().st_mode & 0o777 == result.paths[-1].stat().st_mode & 0o777


def test_nothing_is_overwritten_or_left_behind(model: InternViT, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "model.pt2"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match=r"model\.pt2 exists"):
        export_model(model, path, "pt2")
    assert path.read_text() == "mine"
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no folder"):
        export_model(model, tmp_path / "nowhere" / "model.pt2", "pt2")
    (tmp_path / "model.pt2.json").write_text("mine")
    with pytest.raises(FileExistsError, match=r"model\.pt2\.json exists"):
        export_model(model, path, "pt2")
    (tmp_path / "model.pt2.json").unlink()
    monkeypatch.setattr(
        TARGETS["pt2"], "run", lambda path, pixels: [t + 0.01 for t in model(pixels, return_dict=False)]
    )
    with pytest.raises(ValueError, match=r"differ from PyTorch's by .* it is not written"):
        export_model(model, path, "pt2")
    monkeypatch.setattr(TARGETS["pt2"], "run", lambda path, pixels: [torch.full((1,), float("nan"))])
    with pytest.raises(ValueError, match="returns shapes"):
        export_model(model, path, "pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"to": "tensorflow"}, "to must be one of 'onnx', 'openvino', 'aoti', 'pt2', got 'tensorflow'"),
        ({"layers": (1,)}, "layers must be numbers from -1 to 0, got [1]"),
        ({"layers": ()}, "layers must be numbers"),
        ({"size": (57, 56)}, "size must be multiples of 14, got 57x56"),
        ({"size": "small"}, "size must be (height, width) or 'dynamic', got 'small'"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"batch": "many"}, "batch must be a number or 'dynamic', got 'many'"),
        ({"opset": 23}, "opset=23 is for onnx, got to='pt2'"),
        ({"opset": 18}, "opset=18 is for onnx, got to='pt2'"),
        ({"opset": 11, "to": "onnx"}, "opset must be at least 18, got 11"),
        ({"images": [torch.zeros(3, 28, 28)]}, "images must be 56x56, got shape (3, 28, 28)"),
        ({"precision": "int4"}, "precision must be 'int8' or None, got 'int4'"),
        ({"precision": "int8"}, "precision='int8' is for onnx, got to='pt2'"),
        ({"backend": "rocm", "to": "aoti"}, "backend must be 'cpu', 'cuda' or None, got 'rocm'"),
        ({"backend": "cpu"}, "backend='cpu' is for aoti, got to='pt2'"),
        ({"backend": "cuda", "to": "aoti"}, "model must be on a CUDA device for backend='cuda', got cpu"),
    ],
)
def test_wrong_arguments(change: dict, message: str, model: InternViT, tmp_path: Path) -> None:
    arguments = {"to": "pt2"} | change
    path = tmp_path / ("model.onnx" if arguments["to"] == "onnx" else "model.pt2")
    with pytest.raises(ValueError, match=re.escape(message)):
        export_model(model, path, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_wrong_models(model: InternViT, connector: InternVLConnector, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    with pytest.raises(ValueError, match="must be an InternViT, got Linear"):
        export_model(torch.nn.Linear(1, 1), path, "pt2")
    with pytest.raises(ValueError, match="eval mode"):
        export_model(InternViT(CONFIG), path, "pt2")
    with pytest.raises(ValueError, match="give one of them"):
        export_model(model, path, "pt2", layers=(0,), connector=connector)
    with pytest.raises(ValueError, match=r"path must end in \.onnx, got 'model\.pt2'"):
        export_model(model, path, "onnx")
    with pytest.raises(ValueError, match=r"openvino takes torch\.float32 here, got torch\.float64"):
        export_model(InternViT(CONFIG).double().eval(), tmp_path / "model.xml", "openvino")
    with pytest.raises(ValueError, match=r"onnx in int8 takes torch\.float32 here, got torch\.float16"):
        export_model(InternViT(CONFIG).half().eval(), tmp_path / "model.onnx", precision="int8")
    fixed = InternViT(CONFIG.replace(pos_embed_mode="static")).eval()
    with pytest.raises(ValueError, match="never resizes"):
        export_model(fixed, path, "pt2", size="dynamic")
