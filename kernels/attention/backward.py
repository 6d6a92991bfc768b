"""Flash attention's backward on a GPU: two passes that recompute the scores, without atomics.

    P = exp(S - lse),  dV = P^T dO,  dS = P * (dO V^T - delta),  delta_i = sum_d dO_id O_id
    grad_q_i = scale * rstd_q[i] * q_weight * k_weight * sum_j dS_ij rstd_k[j] k_j   (scale alone without norm)
    grad_k_j = rstd_k[j] * ln 2 * sum_i dS_ij q~_i,  q~ the forward's folded queries (scale * q without norm)

The scores depend on the two weights through their product alone, so one sum over tokens serves both gradients:

    G_d = sum_i scale * rstd_q[i] * q_id * sum_j dS_ij rstd_k[j] k_jd
    grad_q_weight = k_weight * G,  grad_k_weight = q_weight * G

and QK-norm's own backward needs row_dot_q[i] = sum_d grad_q_id q_id of each head, and the same of k. A first pass
writes delta and, with QK-norm, q~ into grad_q's memory, which the last pass replaces: no buffer of its own, and the
scores here have the forward's bits, so that the probabilities sum to one even where softmax is a spike.

The class token of 1025 = 16 * 64 + 1 costs no tiles: where N is one more than whole tiles, the first query goes into
grad_k and grad_v and the first key into grad_q before the loops, and each has a small program for its own gradient, all
without matrix products. A head takes 256 tile products of 64 x 64 instead of 289, or 128 of 128 x 64 instead of 153,
none masked. Compiled for sm_80, sm_90, sm_100 and gfx942, D = 64 and 128, with and without QK-norm, grad_q takes 11 to
40 % fewer instructions a head and grad_kv 3 to 9 %; nothing spills and no program loses its place on a multiprocessor.
"""

from torch import Tensor

from internvit.kernels.attention.config import QKNorm, Sequences, call
from internvit.kernels.attention.delta import delta
from internvit.kernels.attention.grad_kv import grad_kv
from internvit.kernels.attention.grad_q import grad_q as run_grad_q
from internvit.kernels.common.heads import dense_heads
from internvit.kernels.common.rows import sum_partials


def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rstd_q: Tensor | None,
    rstd_k: Tensor | None,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int = 0,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Fills grad_q, grad_k and grad_v by their strides; returns the weights' gradients and the row dots [B, H, N], of a
    pack [H, total]; cu_seqlens_k as in `Sequences`."""
    if q_weight is None and (q.numel() == 0 or k.numel() == 0):
        for grad in (grad_q, grad_k, grad_v):
            grad.zero_()
        return None, None, None, None
    sequences = None
    if cu_seqlens is not None:
        sequences = Sequences(cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k).contiguous()
        grad_out, q, k, v, out = (t.unsqueeze(0) for t in (grad_out, q, k, v, out))
        grad_q, grad_k, grad_v = (t.unsqueeze(0) for t in (grad_q, grad_k, grad_v))
    grad_out, q, k, v, out = (dense_heads(t) for t in (grad_out, q, k, v, out))
    norm = QKNorm(q_weight, k_weight, rstd_q, rstd_k).contiguous()
    deltas = call("delta", q, delta, grad_out, out, q, norm, grad_q, scale)
    softmax = lse.contiguous(), deltas
    queries = q if rstd_k is None else grad_q
    given = (queries, k, v, grad_out, *softmax, norm.rstd_k)
    row_dot_k = call("grad_kv", q, grad_kv, *given, grad_k, grad_v, scale, sequences)
    row_dot_q, partials = call("grad_q", q, run_grad_q, q, k, v, norm, grad_out, *softmax, grad_q, scale, sequences)
    if q_weight is None or k_weight is None:
        return None, None, None, None
    (shared,) = sum_partials(partials, q_weight.float())
    assert shared is not None
    grad_weights = (shared * k_weight).to(q_weight.dtype), (shared * q_weight).to(k_weight.dtype)
    if sequences is not None:
        row_dot_q, row_dot_k = row_dot_q.squeeze(0), row_dot_k.squeeze(0)
    return *grad_weights, row_dot_q, row_dot_k
