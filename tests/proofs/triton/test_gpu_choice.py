"""Which GPUs and inputs get Triton under `auto`, and what those say that ask for it by name."""

import logging

import pytest
import torch

from internvit.kernels.common import launch
from internvit.ops.backends import registry
from internvit.ops.core import select


class Properties:
    """`torch.cuda` as it answers on a machine with GPUs of the given compute capabilities."""

    def __init__(self, monkeypatch, *capabilities):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])


@pytest.fixture
def starting(monkeypatch):
    monkeypatch.setattr(launch, "failure_to_start", lambda: None)


def resolve(op="rms_norm", asked="auto", dtype=torch.bfloat16, head_dim=0, channels=1024):
    return select._resolve_once.__wrapped__(op, "cuda", dtype, head_dim, False, op, asked, "auto", channels)


@pytest.mark.usefixtures("starting")
@pytest.mark.parametrize("capabilities", [[(7, 5)], [(7, 0)], [(8, 6), (7, 5)]], ids=str)
@pytest.mark.parametrize(("op", "head_dim"), [("rms_norm", 0), ("attention", 64), ("gelu", 0)])
def test_below_8_0_auto_never_takes_triton(capabilities, op, head_dim, monkeypatch):
    Properties(monkeypatch, *capabilities)
    assert resolve(op, head_dim=head_dim) != "triton"
    with pytest.raises(ValueError, match=r"it needs compute capability 8\.0 or higher, GPU \d has 7\.[05]: Triton"):
        resolve(op, "triton", head_dim=head_dim)


def test_below_8_0_the_compiled_library_is_not_taken(monkeypatch):
    """It has no code for it."""
    reason = registry.BACKENDS["cuda"].unsupported_reason
    Properties(monkeypatch, (8, 0), (7, 5))
    assert "needs compute capability 8.0 or higher, GPU 1 has 7.5" in reason("cuda", torch.bfloat16, 64)
    Properties(monkeypatch, (8, 0), (9, 0))
    assert reason("cuda", torch.bfloat16, 64) is None


@pytest.mark.usefixtures("starting")
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_from_8_0_on_auto_takes_triton(capability, monkeypatch):
    Properties(monkeypatch, capability)
    assert resolve() == resolve("attention", head_dim=64) == resolve(asked="triton") == "triton"


@pytest.fixture
def broken(monkeypatch):
    """A machine with a GPU on which no kernel compiles."""

    class Kernel:
        def __getitem__(self, grid):
            raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nmore")

    Properties(monkeypatch, (8, 0))
    monkeypatch.setattr(launch, "probe_kernel", Kernel())
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: None)
    launch.failure_to_start.cache_clear()
    yield
    launch.failure_to_start.cache_clear()


@pytest.mark.usefixtures("broken")
def test_where_no_kernel_starts_auto_takes_the_next_backend_and_says_so_once(caplog):
    with caplog.at_level(logging.WARNING, "internvit"):
        taken = {resolve("rms_norm"), resolve("layer_norm"), resolve("attention", head_dim=64)}
    assert "triton" not in taken
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "Triton is not used: Triton starts no kernel here: RuntimeError: Failed to find C compiler. Please "
        "specify via CC environment variable."
    ]
    with pytest.raises(
        ValueError, match=r"rms_norm: backend 'triton' cannot take this input: .*Failed to find C compiler"
    ):
        resolve("rms_norm", "triton")


@pytest.mark.usefixtures("starting")
@pytest.mark.parametrize(
    "op", ["rms_norm", "layer_norm", "layer_scale_residual", "layer_scale_residual_norm", "qk_norm"]
)
def test_rows_wider_than_a_program_fall_back(op, monkeypatch):
    Properties(monkeypatch, (9, 0))
    assert resolve(op, channels=8192) == "triton"
    assert resolve(op, channels=8193) != "triton"
    with pytest.raises(ValueError, match=f"{op}: .* rows of at most 8192 channels, got 8200"):
        resolve(op, "triton", channels=8200)


def test_channels_are_those_that_a_row_holds():
    x, heads = torch.empty(2, 3, 9000), torch.empty(2, 3, 80, 128)
    assert select._channels("rms_norm", x) == 9000
    assert select._channels("qk_norm", heads) == select._channels("qk_norm_attention", heads) == 80 * 128
    assert select._channels("linear_gelu", x) == select._channels("attention", heads) == 0
