"""Graphs for other programs hold no op of this library: torch.export, ONNX by both exporters, torch.jit.trace."""

import importlib.util
import io

import pytest
import torch
from torch import Tensor, nn

import internvit
from internvit.dense.backbone import InternViTBackbone
from internvit.export import decompositions, onnx_table
from internvit.model.vit import InternViT
from internvit.multimodal.connector import InternVLConnector
from internvit.numerics import relative_error
from internvit.ops.core.registration import OPS
from internvit.ops.core.spec import INFERENCE_SPECS, SPECS, converted
from tests.ops.cases import CASES, Case
from tests.support.models import CONFIGS, images, random_weights

LAYER_NORM, RMS_NORM = "tiny-layer_norm", "tiny-rms_norm"


class Tokens(nn.Module):
    """A model's last hidden state alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        output = self.model(pixels)
        return output[0] if isinstance(output, tuple) else output.last_hidden_state


class ImageTokens(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        self.model, self.connector = InternViT(config), InternVLConnector(config.hidden_size, 40)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.connector(self.model(pixels, return_dict=False)[0], (pixels.shape[2] // 14, pixels.shape[3] // 14))


def patched(config) -> nn.Module:
    from tests.support.upstream.opengvlab import InternVisionModel

    model = InternVisionModel(config)
    random_weights(model)
    internvit.patch(model)
    return Tokens(model)


MODELS = {
    "model": lambda config: Tokens(InternViT(config)),
    "backbone": lambda config: InternViTBackbone(config, out_indices=(0, 1, 2, 3), fpn=True),
    "connector": ImageTokens,
    "patched": patched,
}
DOORS = [("model", RMS_NORM), ("backbone", LAYER_NORM), ("connector", RMS_NORM), ("patched", LAYER_NORM)]


def make(name: str, config_name: str) -> tuple[nn.Module, Tensor]:
    config = CONFIGS[config_name].replace(num_hidden_layers=4 if name == "backbone" else 1)
    module = MODELS[name](config)
    if name != "patched":
        random_weights(module)
    return module.eval(), images(config, 2)


def ours(program: torch.export.ExportedProgram) -> set[str]:
    return {str(n.target) for n in program.graph.nodes if "internvit" in str(n.target) and n.op == "call_function"}


def outputs_of(result: object) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)]


def close(actual: list[Tensor], expected: object, bound: float = 2e-6) -> bool:
    wanted = outputs_of(expected)
    return len(actual) == len(wanted) and all(relative_error(a, e) < bound for a, e in zip(actual, wanted, strict=True))


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("name", "config_name"), DOORS)
def test_exported_programs_decompose(name: str, config_name: str) -> None:
    module, pixels = make(name, config_name)
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        program = torch.export.export(module, (pixels,), dynamic_shapes=({0: batch},))
        assert ours(program)
        plain = program.run_decompositions(decompositions())
        more = pixels.repeat(2, 1, 1, 1)[:3]
        assert not ours(plain)
        assert close(outputs_of(plain.module()(more)), module(more))


@pytest.mark.parametrize(("name", "config_name"), DOORS)
def test_traced_graphs_hold_no_op_of_ours(name: str, config_name: str) -> None:
    module, pixels = make(name, config_name)
    with torch.no_grad():
        traced = torch.jit.trace(module, pixels)
        assert not {n.kind() for n in traced.inlined_graph.nodes() if n.kind().startswith("internvit")}
        assert close(outputs_of(traced(pixels)), module(pixels))


def test_a_named_backend_stays_in_a_traced_graph() -> None:
    module, pixels = make("model", LAYER_NORM)
    with torch.no_grad(), internvit.backend("reference"):
        traced = torch.jit.trace(module, pixels)
    assert {n.kind() for n in traced.inlined_graph.nodes() if n.kind().startswith("internvit")}


def run_onnx(file: bytes, pixels: Tensor) -> list[Tensor]:
    session = pytest.importorskip("onnxruntime").InferenceSession(file)
    return [torch.from_numpy(out) for out in session.run(None, {session.get_inputs()[0].name: pixels.numpy()})]


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("name", "config_name"), DOORS)
def test_onnx(name: str, config_name: str) -> None:
    pytest.importorskip("onnxscript")
    module, pixels = make(name, config_name)
    with torch.no_grad():
        exported = torch.onnx.export(module, (pixels,), dynamo=True, opset_version=18, verbose=False)
        assert exported is not None
        file = exported.model_proto.SerializeToString()
        assert close(run_onnx(file, pixels), module(pixels), 1e-5)


@pytest.mark.parametrize("config_name", [LAYER_NORM, RMS_NORM])
def test_onnx_by_torchscript(config_name: str) -> None:
    module, pixels = make("model", config_name)
    buffer = io.BytesIO()
    with torch.no_grad():
        torch.onnx.export(module, (pixels,), buffer, dynamo=False, opset_version=17)
        assert close(run_onnx(buffer.getvalue(), pixels), module(pixels), 1e-5)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ops_decompose(case: Case, generator: torch.Generator) -> None:
    arguments = case.make(generator)
    op = OPS[case.spec.op]

    class Call(nn.Module):
        def forward(self, **tensors: Tensor) -> tuple[Tensor, ...]:
            return case.run({**arguments, **tensors}, "reference")

    tensors = {n: a for n, a in arguments.items() if isinstance(a, Tensor)}
    program = torch.export.export(Call(), (), kwargs=tensors)
    assert any(op.name in target for target in ours(program))
    plain = program.run_decompositions(decompositions())
    assert not ours(plain)
    for actual, expected in zip(plain.module()(**tensors), case.run(arguments, "reference"), strict=True):
        assert relative_error(actual, expected) < 1e-12


@pytest.mark.sampled(8)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_onnx_of_every_op(case: Case, generator: torch.Generator) -> None:
    """Programs that hold the ops themselves, by `onnx_table`."""
    pytest.importorskip("onnxscript")
    arguments = converted(case.make(generator), torch.float32)
    tensors = {n: a for n, a in arguments.items() if isinstance(a, Tensor)}

    class Call(nn.Module):
        def forward(self, **tensors: Tensor) -> tuple[Tensor, ...]:
            return case.run({**arguments, **tensors}, "reference")

    program = torch.export.export(Call(), (), kwargs=tensors)
    exported = torch.onnx.export(program, dynamo=True, custom_translation_table=onnx_table(), verbose=False)
    assert exported is not None
    session = pytest.importorskip("onnxruntime").InferenceSession(exported.model_proto.SerializeToString())
    actual = session.run(None, {i.name: tensors[i.name].numpy() for i in session.get_inputs()})
    for a, e in zip(actual, case.run(arguments, "reference"), strict=True):
        assert relative_error(torch.from_numpy(a), e) < 1e-6


def test_every_public_op_has_a_formula_and_onnx() -> None:
    forward = {spec.op for spec in SPECS.values()}
    assert {name for name, op in OPS.items() if op.formula is not None} == forward
    backward = {name for name in OPS if name.endswith("_backward")}
    if importlib.util.find_spec("onnxscript"):
        assert set(onnx_table()) == {OPS[name].overload for name in forward}
    assert set(OPS) == forward | backward | {spec.op for spec in INFERENCE_SPECS.values()}


def test_mixed_dtypes_keep_one_rounding() -> None:
    x, weight = torch.randn(4, 40).bfloat16(), torch.randn(40)
    expected = internvit.ops.rms_norm(x, weight, backend="reference")
    traced = torch.jit.trace(lambda x: internvit.ops.rms_norm(x, weight), x)
    assert torch.equal(traced(x), expected)
