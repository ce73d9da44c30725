"""Flash attention over blocks of the attention matrix, joined exactly."""

from typing import NamedTuple

import torch


class Blocks(NamedTuple):
    """Blocks of the attention matrix, of one shape, computed together: n times `a` queries against `b` keys.

    q (n, a), k (n, b): which tokens. causal: query j of a block sees its keys up to j (a = b); otherwise all of them.
    A block of fewer queries is padded with any token: `real` (m,) are the queries, of n * a, that count, `tokens` (m,) whose
    they are, and `padding` (n, a) is true where there is none.
    """

    q: torch.Tensor
    k: torch.Tensor
    causal: bool
    real: torch.Tensor
    tokens: torch.Tensor
    padding: torch.Tensor


def blocks(spans, causal, device):
    """spans: [(first query, queries, first key, keys), ...] -> [Blocks, ...] for all of them, few calls for many spans.

    A query must stand in one span only. Spans go together when less than a third is padding, causal ones of any length (a padded
    key is seen by padded queries only), the others of equally many keys.
    """
    out, spans = [], sorted((s for s in spans if s[1] and s[3]), key=lambda s: (s[3], s[1]))
    while spans:
        _, most, _, longest = spans[-1]
        together = [s for s in spans if (causal or s[3] == longest) and 4 * s[1] >= 3 * most]
        spans = spans[: -len(together)]
        first_q, queries, first_k, keys = torch.tensor(together).T[..., None]  # (n, 1) each
        real = torch.arange(most) < queries  # (n, a)
        q = (first_q + torch.arange(most)).where(real, first_q)
        k = first_k + torch.arange(longest).clamp(max=keys - 1)  # (n, b)
        parts = (x.to(device) for x in (real.flatten().nonzero()[:, 0], q[real], ~real))
        out.append(Blocks(q.to(device), k.to(device), causal, *parts))
    return out


class BlockAttention(torch.autograd.Function):
    """Attention of a row whose queries each see one or more blocks of keys: flash attention on every block, joined exactly.

    A block gives an output o and the log of its softmax's denominator, lse. With L = log sum exp lse over the blocks of a query,
    the whole is sum exp(lse - L) o. Backward, each block's own flash kernel gets the whole output and L, and so recomputes the
    probabilities exp(score - L) of the whole softmax: gradients of the blocks add up. No mask, no copy of K and V for each
    response or query head, no score ever stored. (Hydragen does the forward half; arXiv 2402.05099, section 3.1.)

    q (S, Hq, d), k and v (S', Hkv, d) -> (S, Hq, d); zeros for a query without any block. Half precision on a GPU.
    """

    @staticmethod
    def forward(ctx, q, k, v, blocks, scale):
        exact = torch.promote_types(q.dtype, torch.float32)
        out, total = (
            torch.zeros_like(q, dtype=exact),
            q.new_full(q.shape[:2], float("-inf"), dtype=exact),
        )  # total: L, (S, Hq)
        ctx.states = []
        for b in blocks:
            o, lse, state = _flash(
                *(x[i].transpose(1, 2) for x, i in ((q, b.q), (k, b.k), (v, b.k))), b.causal, scale
            )
            o, lse = (x.transpose(1, 2).flatten(0, 1)[b.real].to(exact) for x in (o, lse))
            ctx.states.append(state)
            if not b.causal:  # a token's causal block is its first
                before, block = total[b.tokens], lse
                lse = torch.logaddexp(before, block)
                o = (
                    o * (block - lse).exp()[..., None]
                    + out[b.tokens] * (before - lse).exp()[..., None]
                )
            total[b.tokens], out[b.tokens] = lse, o
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, total)
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, total = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        for b, state in zip(
            ctx.blocks, ctx.states
        ):  # of padding: no gradient, and probabilities of 0
            g = grad[b.q].masked_fill(b.padding[..., None, None], 0)
            lse = total[b.q].masked_fill(b.padding[..., None], float("inf"))
            g, q_b, k_b, v_b, o, lse = (
                x.transpose(1, 2) for x in (g, q[b.q], k[b.k], v[b.k], out[b.q], lse)
            )
            gradients = _flash_backward(
                g, q_b, k_b, v_b, o, lse.contiguous(), b.causal, ctx.scale, state
            )
            dq_b, dk_b, dv_b = (x.transpose(1, 2).flatten(0, 1) for x in gradients)
            dq.index_add_(0, b.tokens, dq_b[b.real])
            dk.index_add_(0, b.k.flatten(), dk_b)
            dv.index_add_(0, b.k.flatten(), dv_b)
        return dq, dk, dv, None, None


def _flash(q, k, v, causal, scale):
    """Flash attention that also gives its denominators: out (n, Hq, a, d), their logs (n, Hq, a), and what the backward pass
    wants besides."""
    if q.device.type == "cpu":
        return *torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, is_causal=causal, scale=scale
        ), ()
    out, lse, *state = torch.ops.aten._scaled_dot_product_flash_attention(
        q, k, v, is_causal=causal, scale=scale
    )
    return out, lse, state[:6]


def _flash_backward(grad, q, k, v, out, lse, causal, scale, state):
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, scale=scale
        )
    first_q, first_k, max_q, max_k, seed, offset = state
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad,
        q,
        k,
        v,
        out,
        lse,
        first_q,
        first_k,
        max_q,
        max_k,
        0.0,
        causal,
        seed,
        offset,
        scale=scale,
    )
