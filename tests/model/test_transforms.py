"""torch.func, forward-mode AD, torch.jit.trace, torch.export and torch.fx on whole models, patched ones too."""

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.export import Dim
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap

import internvit
from internvit import InternViT
from internvit.numerics import relative_error
from tests.support.models import CONFIGS, counted, images, random_weights, timm_judge, transformers_judge

both_norms = pytest.mark.parametrize("norm_type", ["layer_norm", "rms_norm"])


def pair(norm_type: str, **changes) -> tuple[InternViT, nn.Module]:
    """A model and the reference with its weights, in float64 for comparisons of derivatives."""
    config = CONFIGS[f"tiny-{norm_type}"].replace(num_hidden_layers=2, **changes)
    reference = internvit.reference.InternViT(config).eval()
    random_weights(reference)
    model = InternViT(config).eval()
    model.load_state_dict(reference.state_dict())
    return model.double(), reference.double()


def pixels_for(model: InternViT, batch: int = 2) -> Tensor:
    return images(model.config, batch).double()


def loss_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.tanh(model(x).last_hidden_state).square().mean()


@both_norms
@pytest.mark.parametrize("mode", ["none", "selective", "block"])
def test_functional_gradients(norm_type, mode) -> None:
    model, reference = pair(norm_type)
    model.train().set_gradient_checkpointing(mode)
    pixels = pixels_for(model)
    expected = grad(loss_of(reference))(pixels)
    assert relative_error(grad(loss_of(model))(pixels), expected) < 1e-9
    _, pullback = vjp(loss_of(model), pixels)
    assert relative_error(pullback(torch.ones((), dtype=torch.float64))[0], expected) < 1e-9
    jacobians = [jacrev(lambda x, m=m: m(x).pooler_output[:, :3].sum(0))(pixels) for m in (model, reference)]
    assert relative_error(*jacobians) < 1e-9


@both_norms
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["none", "selective", "block", "patched"])
def test_gradients_in_a_batch(norm_type, dtype, mode) -> None:
    """As the Jacobian of `torch.autograd.functional`: a backward gets all gradients at once."""
    model, reference = pair(norm_type)
    if mode == "patched":
        model = transformers_judge(model.config, reference.state_dict())  # type: ignore[assignment]
        internvit.patch(model)
    else:
        model.train().set_gradient_checkpointing(mode)
    model.to(dtype)
    pixels = images(reference.config, 2).to(dtype).requires_grad_()
    inputs = [pixels, *model.parameters()]
    output = model(pixels).last_hidden_state
    wanted = torch.randn(3, *output.shape, dtype=dtype)
    together = torch.autograd.grad(output, inputs, wanted, is_grads_batched=True, retain_graph=True, allow_unused=True)
    apart = [torch.autograd.grad(output, inputs, one, retain_graph=True, allow_unused=True) for one in wanted]
    largest = max(float(g.norm()) for g in together if g is not None)
    for ours, expected in zip(together, zip(*apart, strict=True), strict=True):
        assert (ours is None) == (expected[0] is None)
        if ours is None:
            continue
        right = torch.stack(expected)
        if dtype is torch.float64 and right.norm() < 1e-13 * largest:  # a key's bias: 0 but for rounding
            assert ours.norm() < 1e-13 * largest
        else:
            assert relative_error(ours, right) < (1e-9 if dtype is torch.float64 else 0.01)


@both_norms
def test_gradients_of_each_image_and_of_parameters(norm_type) -> None:
    model, reference = pair(norm_type)
    pixels = pixels_for(model)
    by_image = [vmap(grad(lambda x, m=m: loss_of(m)(x[None])))(pixels) for m in (model, reference)]
    assert relative_error(*by_image) < 1e-9
    parameters = dict(model.named_parameters())

    def loss(m: nn.Module, p: dict[str, Tensor]) -> Tensor:
        return functional_call(m, p, (pixels,)).last_hidden_state.square().mean()

    ours, theirs = (grad(lambda p, m=m: loss(m, p))(parameters) for m in (model, reference))
    for name, gradient in ours.items():
        if not name.endswith("qkv.bias"):  # k's part is zero but for rounding
            assert relative_error(gradient, theirs[name]) < 1e-8, name


@both_norms
def test_forward_mode_derivatives(norm_type) -> None:
    model, reference = pair(norm_type)
    pixels = pixels_for(model)
    tangent = torch.randn_like(pixels)
    (value, ours), (_, theirs) = (jvp(loss_of(m), (pixels,), (tangent,)) for m in (model, reference))
    assert theirs.abs() > 1e-6
    assert relative_error(ours, theirs) < 1e-9
    assert torch.allclose(value, loss_of(model)(pixels))
    expected = jvp(lambda x: reference(x).last_hidden_state, (pixels,), (tangent,))[1]
    with forward_ad.dual_level(), torch.no_grad():
        dual = model(forward_ad.make_dual(pixels, tangent)).last_hidden_state
        assert relative_error(forward_ad.unpack_dual(dual).tangent, expected) < 1e-9
    name = "encoder.layers.0.norm2.weight"
    weight = dict(model.named_parameters())[name].detach()

    def by_weight(m: nn.Module) -> Tensor:
        return jvp(
            lambda w: functional_call(m, {name: w}, (pixels,)).pooler_output, (weight,), (torch.ones_like(weight),)
        )[1]

    assert relative_error(by_weight(model), by_weight(reference)) < 1e-9


def test_forward_over_reverse_and_jacfwd() -> None:
    model, reference = pair("layer_norm")
    pixels = pixels_for(model, 1)
    tangent = torch.randn_like(pixels)
    products = [jvp(grad(loss_of(m)), (pixels,), (tangent,))[1] for m in (model, reference)]
    assert relative_error(*products) < 1e-8
    along = lambda m: lambda t: loss_of(m)(pixels + (t * tangent[None]).sum(0))  # noqa: E731
    steps = torch.zeros(3, 1, 1, 1, 1, dtype=torch.float64)
    assert relative_error(*(jacfwd(along(m))(steps) for m in (model, reference))) < 1e-8


@pytest.mark.parametrize("judge", [transformers_judge, timm_judge])
def test_patched_models(judge) -> None:
    config = CONFIGS["tiny-layer_norm"]
    reference = internvit.reference.InternViT(config)
    random_weights(reference)
    model = judge(config, reference.state_dict()).double()
    if hasattr(model, "set_attn_implementation"):  # PyTorch's fused attention has no forward derivative
        model.set_attn_implementation("eager")
    for module in model.modules():
        module.fused_attn = False
    pixels, tangent = images(config, 2).double(), images(config, 2).double()

    def loss(x: Tensor) -> Tensor:
        out = model.forward_features(x) if hasattr(model, "forward_features") else model(x).last_hidden_state
        return torch.tanh(out).square().mean()

    expected = grad(loss)(pixels), jvp(loss, (pixels,), (tangent,))[1]
    by_image = vmap(grad(lambda x: loss(x[None])))(pixels)
    with internvit.patch(model), counted() as ran:
        assert relative_error(grad(loss)(pixels), expected[0]) < 1e-9
        assert relative_error(vmap(grad(lambda x: loss(x[None])))(pixels), by_image) < 1e-9
        assert ran
        ran.clear()
        assert relative_error(jvp(loss, (pixels,), (tangent,))[1], expected[1]) < 1e-9
        assert not ran, "the blocks run their own forward under forward-mode AD"


@both_norms
@pytest.mark.parametrize("gradients", [True, False])
def test_a_trace_takes_another_batch_and_keeps_gradients(norm_type, gradients) -> None:
    model, _ = pair(norm_type)
    pixels = pixels_for(model, 2)
    with contextlib.nullcontext() if gradients else torch.no_grad():
        traced = torch.jit.trace(model, pixels)
        more = pixels_for(model, 3)
        expected = model(more).last_hidden_state
        last, pooled = traced(more)
        assert relative_error(last, expected) < 1e-9
        assert torch.equal(pooled, last[:, 0])
    if gradients:
        parameters = list(model.parameters())
        ours = torch.autograd.grad(last.square().mean(), parameters)
        theirs = torch.autograd.grad(expected.square().mean(), parameters)
        for a, b in zip(ours, theirs, strict=True):
            assert (a - b).norm() <= 1e-9 * b.norm() + 1e-12


@pytest.mark.sampled(4)
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("mode", ["float32", "param_dtype", "antialias"])
def test_one_exported_program_takes_every_size(native, mode) -> None:
    """Exported at the native size or at another; sides of two patches and more (torch specialises on one)."""
    config = CONFIGS["tiny-rms_norm"].replace(num_hidden_layers=1, pos_embed_mode=mode)
    model = InternViT(config).eval()
    random_weights(model)
    example = torch.randn(2, 3, 56, 56) if native else torch.randn(2, 3, 42, 84)
    rows, columns = Dim("rows", min=2, max=64), Dim("columns", min=2, max=64)
    shapes = {"pixel_values": {0: Dim("batch"), 2: 14 * rows, 3: 14 * columns}}
    program = torch.export.export(model, (example,), dynamic_shapes=shapes).module()
    with torch.no_grad():
        for size in ((2, 3, 56, 56), (1, 3, 56, 56), (3, 3, 70, 98), (2, 3, 28, 56), (1, 3, 126, 28)):
            pixels = torch.randn(size)
            assert relative_error(program(pixels).last_hidden_state, model(pixels).last_hidden_state) < 1e-6


def test_second_derivatives_by_reverse_mode_are_right_or_refused() -> None:
    """Under torch.func the ops are plain PyTorch; their own backward has no derivative, and says so."""
    model, reference = pair("rms_norm")
    pixels = pixels_for(model, 1)

    def gradient_norm(m: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: grad(loss_of(m))(x).square().sum()

    assert relative_error(*(grad(gradient_norm(m))(pixels) for m in (model, reference))) < 1e-8
    pixels.requires_grad_()
    seconds = [torch.autograd.grad(gradient_norm(m)(pixels), pixels)[0] for m in (model, reference)]
    assert relative_error(*seconds) < 1e-8
    (first,) = torch.autograd.grad(loss_of(model)(pixels), pixels, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not implemented"):
        first.square().sum().backward()


def test_a_trace_of_a_patched_model() -> None:
    config = CONFIGS["tiny-layer_norm"]
    reference = internvit.reference.InternViT(config)
    random_weights(reference)
    model = timm_judge(config, reference.state_dict())
    more = images(config, 3)
    expected = model.forward_features(more)
    model.forward = model.forward_features
    with internvit.patch(model), counted() as ran:
        traced = torch.jit.trace(model, images(config, 2))
        assert ran
    assert relative_error(traced(more), expected) < 1e-5


def test_exported_backbones_take_every_size_too() -> None:
    model = InternViT(CONFIGS["tiny-layer_norm"].replace(num_hidden_layers=2)).eval()
    backbone = internvit.InternViTBackbone.from_model(model, out_indices=(0, 1))
    rows, columns = Dim("rows", min=2, max=64), Dim("columns", min=2, max=64)
    shapes = {"pixel_values": {0: Dim("batch"), 2: 14 * rows, 3: 14 * columns}}
    program = torch.export.export(backbone, (torch.randn(2, 3, 56, 56),), dynamic_shapes=shapes).module()
    pixels = torch.randn(1, 3, 70, 98)
    for ours, theirs in zip(program(pixels), backbone(pixels), strict=True):
        assert relative_error(ours, theirs) < 1e-6


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_optimised_model_is_its_model_where_code_is_transformed(dtype) -> None:
    """Packed weights must not be baked into programs, and have no derivatives."""
    config = CONFIGS["tiny-layer_norm"].replace(num_hidden_layers=2)
    model = InternViT(config, dtype=dtype).eval()
    random_weights(model)
    fast, pixels, more = (
        internvit.optimize_for_inference(model),
        images(config, 2).to(dtype),
        images(config, 3).to(dtype),
    )
    with torch.no_grad():
        expected = model(more).last_hidden_state
    assert relative_error(torch.jit.trace(fast, pixels)(more)[0], expected) < 0.02
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(more).last_hidden_state, expected) < 0.02
    program = torch.export.export(fast, (more,)).module()
    model.encoder.layers[0].mlp.fc1.weight.data.mul_(1.5)
    program.load_state_dict({f"model.{k}": v for k, v in model.state_dict().items()}, strict=True)
    assert relative_error(program(more).last_hidden_state, model(more).last_hidden_state) < 0.02
    tangents = [jvp(lambda x, m=m: m(x).pooler_output.float(), (pixels,), (pixels,))[1] for m in (fast, model)]
    assert torch.equal(*tangents)
    assert tangents[0].any()


def test_torch_fx_is_told_what_works() -> None:
    model, _ = pair("layer_norm")
    with pytest.raises(TypeError, match=r"cannot be traced symbolically.*model\.forward_intermediates\(pixels"):
        torch.fx.symbolic_trace(model)
    feature_extraction = pytest.importorskip("torchvision.models.feature_extraction")
    with pytest.raises(TypeError, match="register forward hooks"):
        feature_extraction.create_feature_extractor(model, ["encoder.layers.0"])
