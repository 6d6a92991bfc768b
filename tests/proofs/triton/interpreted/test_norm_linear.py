"""Norms inside GEMMs: the ops of their own contracts, on every distribution, and whole models."""

import copy

import pytest
import torch

import internvit
from internvit.kernels import norm_linear as kernels
from internvit.kernels.common import launch
from internvit.numerics import DISTRIBUTIONS, relative_error
from internvit.ops.core.spec import INFERENCE_SPECS, Inputs, Size, as_tuple
from tests.ops.test_inference_ops import registered
from tests.proofs.triton.interpreted.byte_count import counting
from tests.proofs.triton.interpreted.harness import DTYPES, Memory, run, skip_unless_numpy_rows_are_alike

BACKEND = "triton_gemm"
BACKENDS = {"fold_norm": "triton", "norm_linear": "triton_gemm", "norm_qkv": "triton_gemm"}
BACKENDS["linear_residual_stats"] = "triton_gemm"
SIZES = (Size(2, 3, 2, 20), Size(1, 67, 3, 64), Size(1, 2, 1, 3))
CASES = [(name, variant) for name in BACKENDS for variant in INFERENCE_SPECS[name].examples]


DATA = [
    pytest.param(t, d, marks=() if t == "bfloat16" or (t, d) == ("float32", "large_mean") else pytest.mark.slow)
    for t in DTYPES
    for d in DISTRIBUTIONS
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("dtype", "distribution"), DATA)
@pytest.mark.parametrize(("name", "variant"), CASES, ids=[f"{n}-{v}" for n, v in CASES])
def test_the_contract(name, variant, dtype, distribution, generator):
    spec = INFERENCE_SPECS[name]
    for size in SIZES if dtype == "bfloat16" and distribution == "massive" else SIZES[::2]:
        arguments = spec.examples[variant](Inputs(size, generator, getattr(torch, dtype), distribution=distribution))
        memory = Memory()
        placed = {n: memory.place(t) if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}
        outputs = run(memory, name, *registered(spec, placed)[1], backend=BACKENDS[name])
        assert not spec.violations(arguments, outputs, spec.truth(arguments), outputs), size
        for ours, reference in zip(outputs, spec.run(arguments, "reference"), strict=True):
            assert (ours.shape, ours.dtype) == (reference.shape, reference.dtype)


@pytest.mark.parametrize(("name", "variant"), [c for c in CASES if c[0] != "fold_norm"])
def test_layouts_and_batches(name, variant, generator):
    """Strided and empty inputs; an image has the same bits at another place of other tiles."""
    spec, backend = INFERENCE_SPECS[name], BACKENDS[name]
    arguments = spec.examples[variant](Inputs(Size(3, 50, 2, 20), generator, torch.bfloat16))
    whole = spec.run(arguments, backend)
    strided = {n: twice(t) if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}
    for a, b in zip(spec.run(strided, backend), whole, strict=True):
        assert torch.equal(a, b)
    batched = [n for n in ("x", "residual", "mean", "rstd") if arguments.get(n) is not None]
    for images in (slice(0, 0), slice(1, 2)):
        if images.stop > 0:
            skip_unless_numpy_rows_are_alike()
        some = spec.run(arguments | {n: arguments[n][images] for n in batched}, backend)
        for a, b in zip(some, whole, strict=True):
            assert torch.equal(a, b[images])


def twice(t):
    return t.repeat_interleave(2, -1)[..., ::2]


def test_columns_of_two_parts_in_a_tile_are_read_again(generator, monkeypatch):
    """A width that tiles do not divide: QK-norm's statistics are those of a pass of their own."""
    spec, read = INFERENCE_SPECS["norm_qkv"], []
    seen = kernels.project_qkv
    monkeypatch.setattr(kernels, "_add_pieces", lambda *args: read.append(args))
    arguments = spec.examples["rms_norm"](Inputs(Size(1, 5, 2, 20), generator, torch.bfloat16))
    assert seen(*registered(spec, arguments)[1]) is None
    spec.run(arguments, "triton_gemm")
    assert not read


def test_an_eps_that_hides_nothing_is_refused_or_read_again(generator):
    arguments = INFERENCE_SPECS["linear_residual_stats"].examples["rms_norm"](Inputs(SIZES[0], generator))
    with pytest.raises(ValueError, match=r"linear_residual_stats: eps must be at least 1e-29 .*, got 0"):
        internvit.ops.linear_residual_stats(**arguments, eps=0.0, backend="triton_gemm")
    spec = INFERENCE_SPECS["norm_qkv"]
    arguments = spec.examples["rms_norm"](Inputs(SIZES[1], generator)) | {"eps": 0.0}
    outputs = spec.run(arguments, "triton_gemm")
    assert not spec.violations(arguments, outputs, spec.truth(arguments), outputs)


def test_compiled_graphs_keep_the_backend(generator):
    for name, variant in CASES[::3]:
        spec, backend = INFERENCE_SPECS[name], BACKENDS[name]
        arguments = spec.examples[variant](Inputs(SIZES[0], generator))
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda s=spec, a=arguments, b=backend: s.run(a, b), fullgraph=True, backend="aot_eager"
        )
        for a, b in zip(as_tuple(compiled()), spec.run(arguments, backend), strict=True):
            assert torch.equal(a, b)


def tiny(norm_type, dtype, heads=2, **changes):
    config = internvit.InternViTConfig(
        hidden_size=64 * heads,
        num_attention_heads=heads,
        intermediate_size=96,
        num_hidden_layers=3,
        image_size=28,
        norm_type=norm_type,
        **changes,
    )
    model = internvit.InternViT(config).eval().to(dtype)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.3)
    return model


def launched(monkeypatch):
    """The kernels that run from now on."""
    names, run = [], launch.run

    def spy(kernel, *args, **constants):
        names.append(kernel.fn.__name__)
        return run(kernel, *args, **constants)

    monkeypatch.setattr(launch, "run", spy)
    return names


@pytest.mark.sampled(2)
@pytest.mark.parametrize("qk_normalization", [True, False])
@pytest.mark.parametrize("norm_type", ["rms_norm", "layer_norm"])
def test_a_model_has_its_norms_inside_its_gemms(norm_type, qk_normalization, monkeypatch):
    """As exact as norms of their own, and none of them runs."""
    torch.manual_seed(torch.randint(1000, ()).item())
    model = tiny(norm_type, torch.bfloat16, qk_normalization=qk_normalization, qkv_bias=True)
    exact, pixels = copy.deepcopy(model).double(), torch.randn(2, 3, 28, 28).bfloat16()
    with torch.no_grad(), internvit.backend("reference"):
        truth = exact(pixels.double()).last_hidden_state
    fast = internvit.optimize_for_inference(model, pack=False, residual_dtype=None, fold_norms=True)
    plain = internvit.optimize_for_inference(model, pack=False, residual_dtype=None)
    with internvit.backend(BACKEND):
        names = launched(monkeypatch)
        folded = fast(pixels).last_hidden_state
        kernels_of_blocks = set(names)
        error = relative_error(folded, truth)
        unfolded = relative_error(plain(pixels).last_hidden_state, truth)
    rest = {"linear_kernel", "attention_kernel"}
    assert kernels_of_blocks == {"norm_linear_kernel", "add_pieces_kernel", "fold_norm_kernel"} | rest
    assert names.count("norm_linear_kernel") == 3 * 4 - 1, "the last block has no norm behind it"
    assert error <= 1.3 * unfolded


def test_a_model_folds_where_it_was_asked_to_alone(monkeypatch):
    model, pixels = tiny("layer_norm", torch.float32), torch.randn(2, 3, 28, 28)
    fast = internvit.optimize_for_inference(model, pack=False, fold_norms=True)
    names = launched(monkeypatch)
    with internvit.backend("triton"):
        expected = fast(pixels).last_hidden_state
    assert "norm_linear_kernel" not in names
    with internvit.backend(BACKEND):
        torch.testing.assert_close(model(pixels).last_hidden_state, expected, rtol=1e-4, atol=1e-4)
        assert "norm_linear_kernel" not in names
        torch.testing.assert_close(fast(pixels).last_hidden_state, expected, rtol=1e-4, atol=1e-4)
        assert names.count("norm_linear_kernel") == 11
        # weights are read at each call, and a layer with a hook is called
        with torch.no_grad():
            model.encoder.layers[1].norm2.weight.mul_(2.0)
        changed = fast(pixels).last_hidden_state
        torch.testing.assert_close(changed, model(pixels).last_hidden_state, rtol=1e-4, atol=1e-4)
        model.encoder.layers[1].mlp.register_forward_hook(lambda *_: None)
        names.clear()
        torch.testing.assert_close(fast(pixels).last_hidden_state, changed, rtol=1e-4, atol=1e-4)
        assert names.count("norm_linear_kernel") == 3 + 3, "the sums before the hook and at the end have no norm"


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float16, "fused"), (torch.bfloat16, "reference")])
def test_what_folding_would_round_otherwise_keeps_its_norms(dtype, rounding, monkeypatch):
    model, pixels = tiny("rms_norm", dtype), torch.randn(1, 3, 28, 28).to(dtype)
    model.set_rounding(rounding)
    names = launched(monkeypatch)
    with internvit.backend(BACKEND):
        settings = {"pack": False, "residual_dtype": None}
        folded = internvit.optimize_for_inference(model, fold_norms=True, **settings)(pixels).last_hidden_state
        plain = internvit.optimize_for_inference(model, **settings)(pixels).last_hidden_state
    assert "norm_linear_kernel" not in names
    assert torch.equal(folded, plain)


def test_bytes():
    """The stream is read and written once; its statistics cost 8 bytes for 64 columns, twice."""
    memory, rows, width = Memory(), 24, 256
    x, residual = (memory.place(torch.randn(rows, width).bfloat16()) for _ in range(2))
    weight, vector = memory.place(torch.randn(width, width).bfloat16()), memory.place(torch.randn(width).bfloat16())
    with counting() as moved:
        args = x, weight, vector, vector, residual, 1e-6, "layer_norm"
        y, mean, rstd = run(memory, "linear_residual_stats", *args, backend=BACKEND)
    assert moved.within([residual, y]) == 2 * y.nbytes
    known = moved.within([x, weight, vector, residual, y, mean, rstd])
    assert moved.total() - known == 2 * rows * 8 * width // 64
    assert moved.within([mean, rstd]) == mean.nbytes + rstd.nbytes
    with counting() as moved:
        folded = run(memory, "fold_norm", weight, vector, vector, vector, True)
    assert moved.within([weight, folded[0]]) == 2 * weight.nbytes


@pytest.mark.sampled(2)
def test_packed_images_and_a_float32_stream():
    model = tiny("rms_norm", torch.bfloat16)
    images = [torch.randn(3, n, 28).bfloat16() for n in (28, 42)]
    with internvit.backend(BACKEND):
        fast = internvit.optimize_for_inference(model, pack=False, residual_dtype=None, fold_norms=True)
        packed = fast(images).last_hidden_state
        for image, ours in zip(images, packed.unbind() if hasattr(packed, "unbind") else packed, strict=True):
            assert torch.equal(ours, fast(image[None]).last_hidden_state[0])
        wide = internvit.optimize_for_inference(model, pack=False, residual_dtype=torch.float32, fold_norms=True)
        assert wide(images[0][None]).last_hidden_state.isfinite().all()
