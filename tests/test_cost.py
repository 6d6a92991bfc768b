"""The planner's bytes against live storages of a real run, its FLOPs against torch's counter."""

import gc
import subprocess
import sys
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from internvit import VARIANTS, InternViT, InternViTConfig
from internvit.cost import cost, flops, plan
from internvit.ops import linear
from internvit.ops.linear_gelu import _run as run_linear_gelu
from internvit.ops.linear_gelu import _run_backward as run_linear_gelu_backward
from tests.support import ROOT
from tests.support.models import CONFIGS


class Peak(TorchDispatchMode):
    """The most bytes of storages made while active that were alive at once; of tensors with `tokens` rows if given.

    Products are zeros: their values do not matter, and take most of the time.
    """

    INSIDE: ClassVar = {  # so that the pre-activation and its gradient are seen
        torch.ops.internvit.linear_gelu.default: run_linear_gelu,
        torch.ops.internvit.linear_gelu_backward.default: run_linear_gelu_backward,
    }

    PRODUCTS: ClassVar = (
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.matmul.default,
        torch.ops.aten.linear.default,
        torch.ops.aten.convolution.default,
        torch.ops.internvit.linear_layer_scale.default,
        torch.ops.internvit.linear_layer_scale_backward.default,
    )

    def __init__(self, tokens: int | None = None) -> None:
        super().__init__()
        self.tokens = tokens
        self.alive: list[tuple[StorageWeakRef, int]] = []
        self.known: set[int] = set()
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func in self.INSIDE:
            with self:
                out = self.INSIDE[func](*args)
        elif func in self.PRODUCTS:
            shapes = func(*tree_map_only(Tensor, lambda t: t.to("meta"), args), **(kwargs or {}))
            out = tree_map_only(Tensor, lambda t: torch.zeros_like(t, device="cpu"), shapes)
        else:
            out = func(*args, **(kwargs or {}))
        self.alive = [(r, n) for r, n in self.alive if not r.expired()]
        known = {r.cdata for r, _ in self.alive}
        inputs = {a.untyped_storage()._cdata for a in args if isinstance(a, Tensor)}
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor) and self.tokens in (None, *t.shape):
                storage = t.untyped_storage()
                if storage._cdata not in known and storage._cdata not in inputs:
                    known.add(storage._cdata)
                    self.alive.append((StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, self.now())
        return out

    def now(self) -> int:
        return sum(n for r, n in self.alive if not r.expired())


@pytest.fixture(autouse=True)
def products_of_the_dtype(monkeypatch) -> None:
    """As on a CPU with bfloat16 products; others widen the operands of one product at a time."""
    monkeypatch.setattr(linear, "cpu_multiplies", lambda dtype: True)


sizes = pytest.mark.parametrize("size", [224, pytest.param(448, marks=pytest.mark.slow)])


def network(name: str, layers: int, size: int) -> tuple[InternViT, Tensor]:
    """Of the 6B at half the size, for time."""
    size = size // 2 if name.startswith("6b") else size
    config = CONFIGS[name].replace(num_hidden_layers=layers, image_size=size)
    return InternViT(config, dtype=torch.bfloat16), torch.randn(1, 3, *config.image_hw).bfloat16()


@sizes
@pytest.mark.parametrize("name", ["300m-2-layers", "6b-2-layers"])
def test_bytes_for_backward_agree_with_a_run(name, size) -> None:
    layers = 4 if name.startswith("300m") else 1
    model, pixels = network(name, layers, size)
    model.train()
    with Peak() as peak:
        out = model(pixels).last_hidden_state
    gc.collect()
    expected = cost(model.config, model.config.image_hw, 1, torch.bfloat16)
    width = model.config.hidden_size
    working = (2 * model.config.intermediate_size / width + 2) * out.numel() * 2
    assert peak.now() == pytest.approx(expected.training - working, rel=0.05)
    assert out.requires_grad


@sizes
@pytest.mark.sampled(2)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize(
    ("mode", "folded", "field"),
    [
        ("none", False, "training"),
        ("none", True, "folded"),
        ("selective", False, "selective"),
        ("block", False, "checkpointing"),
    ],
)
def test_the_peak_of_training_agrees_with_a_run(mode, folded, field, layers, size) -> None:
    """Of activations and their gradients: those of the parameters count among the optimizer's bytes."""
    model, pixels = network("300m-2-layers", layers, size)
    model.train().set_gradient_checkpointing(mode)
    model.set_layer_scale_folding(folded)
    with Peak(model.config.num_tokens) as peak:
        out = model(pixels).last_hidden_state
        out.float().sum().backward()  # float(): a gradient of its own, not a scalar expanded
    expected = getattr(cost(model.config, model.config.image_hw, 1, torch.bfloat16), field)
    assert peak.peak == pytest.approx(expected, rel=0.05)


@sizes
@pytest.mark.sampled(4)
def test_bytes_of_inference_agree_with_a_run(size) -> None:
    """In a process of its own: after a torch.compile that failed, PyTorch 2.14 keeps a later model's tensor alive."""
    code = f"""
from tests.test_cost import *
linear.cpu_multiplies = lambda dtype: True
for name in ("300m-2-layers", "6b-2-layers"):
    model, pixels = network(name, 2, {size})
    with torch.no_grad(), Peak() as peak:
        model.eval()(pixels)
    expected = cost(model.config, model.config.image_hw, 1, torch.bfloat16).inference
    assert peak.peak == pytest.approx(expected, rel=0.05), name
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_flops_agree_with_torchs_counter() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = CONFIGS["tiny-rms_norm"]
    model = InternViT(config, device="meta")
    from internvit import reference

    plain = reference.InternViT(config).to("meta")
    with FlopCounterMode(display=False) as counter:
        plain(torch.empty(1, 3, 56, 84, device="meta"))
    assert flops(config, (56, 84)) == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 56, 84, device="meta"))
    assert flops(config, (56, 84)) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "size", "gmac"),
    [
        ("internvit-6b-224px", 224, 1536.6),
        ("internvit-6b-448px-v2.5", 448, 5972),
        ("internvit-6b-224px", 504, 8169),
        ("internvit-300m-448px", 448, 362),
    ],
)
def test_published_costs(name, size, gmac) -> None:
    assert flops(VARIANTS[name], (size, size)) / 2e9 == pytest.approx(gmac, rel=1e-3)


def test_choices_and_bad_input() -> None:
    assert plan("simple", memory=2**40).choice == "internvit-6b-448px-v2.5"
    assert plan("simple", memory=4 * 2**30).choice == "internvit-300m-448px-v2.5"
    small = plan("detection", batch=32, memory=2**30)
    assert small.choice is None
    assert "lower --batch" in small.why
    for gib, how in ((16, "yes"), (10, "with selective checkpointing"), (7, "with checkpointing"), (5, "no")):
        tight = plan("simple", batch=16, train=True, memory=gib * 2**30)
        assert tight.fits["internvit-300m-448px-v2.5"] == how
    for arguments, message in (
        ({"task": "sing"}, "task: expected one of simple"),
        ({"task": "simple", "batch": 0}, "batch: expected at least 1"),
        ({"task": "simple", "size": (448, 450)}, "size: expected multiples of 14, got 448x450"),
    ):
        with pytest.raises(ValueError, match=message):
            plan(**arguments)
    assert InternViTConfig.from_name("internvit-6b-224px").name in {c.variant for c in plan("simple").costs}
