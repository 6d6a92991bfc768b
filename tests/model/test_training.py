"""Training from scratch: the fused model against the reference, every mode of memory, autocast and pure bfloat16.

Two correct float32 trainings that sum in another order drift apart. How far is measured here, not assumed: the
reference is trained again with its channels and hidden units shuffled, which is the same network and the same training
to every bit but those of rounding, since each sum over channels or hidden units runs in another order. The fused model
may be as far from the reference as the reference is from itself, within a factor of `SLACK`. The bias of k is left
out: softmax does not see it, so its gradient is rounding alone, of which AdamW makes whole steps.
"""

import functools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import internvit
from internvit import InternViT, InternViTConfig

STEPS, IMAGES, CLASSES, CHANNELS, SHUFFLES = 100, 8, 4, 48, 3
SLACK = 4.0
KINDS = {
    f"{norm}{', QK-norm' if qk_norm else ''}{', drop path' if drop_path else ''}": InternViTConfig(
        image_size=28,
        hidden_size=CHANNELS,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        norm_type=norm,
        qkv_bias=norm == "layer_norm",
        qk_normalization=qk_norm,
        drop_path_rate=drop_path,
    )
    for norm in ("layer_norm", "rms_norm")
    for qk_norm in (False, True)
    for drop_path in (0.0, 0.3)
}
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def one_thread():
    """Nothing here is large enough for two, and waiting for the other costs more than the work on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def start(kind: str) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """Initial weights as upstream draws them, the head's, images, and labels that a linear teacher gives them."""
    generator = torch.Generator().manual_seed(1)
    config = KINDS[kind]
    weights = {}
    for name, p in InternViT(config).state_dict().items():
        one = name.endswith(("norm1.weight", "norm2.weight", "q_norm.weight", "k_norm.weight"))
        constant = torch.full_like(p, 1.0 if one else 0.1 if name.endswith(("ls1", "ls2")) else 0.0)
        weights[name] = 0.1 * torch.randn(p.shape, generator=generator) if p.dim() > 1 else constant
    images = torch.randn(2 * IMAGES, 3, 28, 28, generator=generator)
    labels = (images.flatten(1) @ torch.randn(images[0].numel(), CLASSES, generator=generator)).argmax(1)
    return weights, 0.3 * torch.randn(CLASSES, CHANNELS, generator=generator), images, labels


def trained(
    model: nn.Module,
    kind: str,
    channels: Tensor | None = None,
    autocast: torch.dtype | None = None,
    steps: int = STEPS,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses of `steps` steps of AdamW on the class token through a linear head, and the parameters after them."""
    _, head, images, labels = start(kind)
    dtype = next(model.parameters()).dtype
    head = nn.Parameter((head if channels is None else head[:, channels]).to(dtype, copy=True))
    optimizer = torch.optim.AdamW([*model.parameters(), head], lr=1e-3, weight_decay=0.05)
    scaler = torch.amp.GradScaler("cpu", enabled=autocast == torch.float16)
    losses = []
    model.train()
    torch.manual_seed(2)  # of drop path
    for step in range(steps):
        batch = slice(0, IMAGES) if step % 2 else slice(IMAGES, None)
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            features = model(images[batch].to(dtype)).pooler_output
        loss = F.cross_entropy(F.linear(features, head.to(features.dtype)).float(), labels[batch])
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        for p in model.parameters():
            assert p.grad.dtype == p.dtype
            assert p.grad.isfinite().all()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    return torch.stack(losses), {n: p.detach().clone() for n, p in model.named_parameters()}


def fused(kind: str, **settings) -> InternViT:
    model = InternViT(KINDS[kind], **settings)
    model.load_state_dict(start(kind)[0])
    return model


def shuffled(weights: dict[str, Tensor], channels: Tensor, hidden: Tensor, back: bool = False) -> dict[str, Tensor]:
    """The same network with its channels and its MLPs' hidden units in another order, or the way back."""
    if back:
        channels, hidden = channels.argsort(), hidden.argsort()
    found = {}
    for name, p in weights.items():
        if name.endswith(("class_embedding", "position_embedding")):
            p = p[..., channels]
        elif "patch_embedding" in name or name.endswith(("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias")):
            p = p[channels]
        elif name.endswith(("ls1", "ls2", "proj.weight", "proj.bias", "fc2.weight", "fc2.bias")):
            p = p[channels][:, hidden] if name.endswith("fc2.weight") else p[channels]
        elif name.endswith("qkv.weight"):
            p = p[:, channels]
        elif name.endswith(("fc1.weight", "fc1.bias")):
            p = p[hidden][:, channels] if name.endswith("weight") else p[hidden]
        found[name] = p.clone()
    return found


def far(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The distance between two sets of parameters, without the bias of k."""
    squares = 0.0
    for name in a:
        difference = a[name].double() - b[name].double()
        if name.endswith("qkv.bias"):
            difference[CHANNELS : 2 * CHANNELS] = 0
        squares += difference.square().sum().item()
    return squares**0.5


@functools.cache
def the_reference(kind: str) -> tuple[Tensor, dict[str, Tensor], float, float]:
    """The reference's losses and final parameters, and the most that another order of summation moves each."""
    weights = start(kind)[0]

    def run(channels: Tensor | None, weights: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        model = internvit.reference.InternViT(KINDS[kind])
        model.load_state_dict(weights)
        return trained(model, kind, channels)

    losses, parameters = run(None, weights)
    loss_drift = parameter_drift = 0.0
    for seed in range(SHUFFLES):
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(CHANNELS, generator=generator), torch.randperm(96, generator=generator)
        again, moved = run(order[0], shuffled(weights, *order))
        loss_drift = max(loss_drift, (again - losses).abs().max().item())
        parameter_drift = max(parameter_drift, far(shuffled(moved, *order, back=True), parameters))
    return losses, parameters, loss_drift, parameter_drift


def learns(losses: Tensor) -> bool:
    return bool(losses[-10:].mean() < 0.5 * losses[:10].mean())


@pytest.mark.sampled(8)
@each_kind
def test_100_steps_stay_as_near_the_reference_as_another_order_of_summation(kind) -> None:
    losses, parameters, loss_drift, parameter_drift = the_reference(kind)
    assert learns(losses)
    walked = far(parameters, start(kind)[0])
    assert 0 < parameter_drift < 0.01 * walked, "the drift is of rounding"
    for what, model in (("fused", fused(kind)), ("folded", fused(kind, fold_layer_scale=True))):
        ours, final = trained(model, kind)
        loss, distance = (ours - losses).abs().max().item(), far(final, parameters)
        print(
            f"{kind}, {what}: losses within {loss:.1e} (drift {loss_drift:.1e}), parameters {distance:.1e} apart "
            f"(drift {parameter_drift:.1e}, walked {walked:.1f})"
        )
        assert loss <= SLACK * loss_drift
        assert distance <= SLACK * parameter_drift


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["layer_norm, drop path", "rms_norm, QK-norm, drop path"])
@pytest.mark.parametrize("folded", [False, True])
def test_checkpointed_training_has_the_same_bits(kind, folded) -> None:
    """In 20 steps: one bit that differs in a gradient stays in the parameters, whatever follows."""
    plain = trained(fused(kind, fold_layer_scale=folded), kind, steps=20)
    for mode in ("selective", "block"):
        model = fused(kind, fold_layer_scale=folded)
        model.set_gradient_checkpointing(mode)
        losses, final = trained(model, kind, steps=20)
        assert torch.equal(losses, plain[0])
        assert all(torch.equal(final[n], plain[1][n]) for n in final)


modes = pytest.mark.parametrize(("mode", "folded"), [("none", False), ("selective", True)])
two_kinds = pytest.mark.parametrize("kind", ["layer_norm, drop path", "rms_norm, QK-norm, drop path"])


@pytest.mark.sampled(4)
@two_kinds
@modes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(kind, mode, folded, dtype) -> None:
    """float32 parameters, gradients and residual stream; the Linears and attention in 16 bit."""
    if folded and dtype == torch.float16:
        with pytest.raises(ValueError, match="leaves float16's normal range"):
            trained(fused(kind, fold_layer_scale=True), kind, autocast=dtype)
        return
    model = fused(kind, fold_layer_scale=folded)
    model.set_gradient_checkpointing(mode)
    seen = set()
    for layer in model.encoder.layers:
        layer.attn.qkv.register_forward_hook(lambda _, args, out: seen.add(out.dtype))
        layer.register_forward_hook(lambda _, args, out: seen.add((args[0].dtype, out.dtype)))
    losses, _ = trained(model, kind, autocast=dtype)
    assert learns(losses)
    assert seen == {dtype, (torch.float32, torch.float32)}


@pytest.mark.sampled(8)
@two_kinds
@modes
@pytest.mark.parametrize("residual_dtype", [None, torch.float32], ids=str)
def test_pure_bfloat16(kind, mode, folded, residual_dtype) -> None:
    model = fused(kind, fold_layer_scale=folded, residual_dtype=residual_dtype, dtype=torch.bfloat16)
    model.set_gradient_checkpointing(mode)
    losses, final = trained(model, kind)
    assert learns(losses)
    assert {p.dtype for p in final.values()} == {torch.bfloat16}
    assert model(start(kind)[2]).last_hidden_state.dtype == (residual_dtype or torch.bfloat16)
