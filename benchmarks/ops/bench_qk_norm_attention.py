"""Attention with QK-norm over all heads inside, forward and backward, next to eager norms and SDPA."""

from torch import Tensor

from internvit.benchmarks.harness.cases import BenchmarkCase, Setting, attention_cases, attention_sizes
from internvit.benchmarks.harness.peers import sdpa
from internvit.ops.core.spec import SPECS


def _norms_then_sdpa(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
    q, k, v = qkv.unbind(2)
    q, k = SPECS["qk_norm"].formula(q, k, q_weight, k_weight)
    return sdpa(q, k, v)


def cases(setting: Setting) -> list[BenchmarkCase]:
    peers = {"eager QK-norm + SDPA": lambda: _norms_then_sdpa}
    sizes = attention_sizes(setting, (25, 128))
    return attention_cases(setting, "qk_norm_attention_qkvpacked", sizes, "qk_norm_attention", peers)


def test_qk_norm_attention(timed) -> None:
    timed()
