"""Flash attention on blocks of the attention matrix, joined exactly: any mask, without building it.

The caller describes the mask as spans, (first query, number of queries, first key, number of keys):

    causal span   the diagonal: query j of the span sees its keys 0 ... j; as many keys as queries
    full span     a rectangle: every query sees every key

A span gives an output o and its log-sum-exp, the log of its softmax's denominator. `merge` joins
two of them into what one softmax over both would give. (Hydragen, arXiv 2402.05099, section 3.1,
does this for the forward pass.)
"""

from typing import NamedTuple

import torch


class Blocks(NamedTuple):
    """n spans that run in one kernel call, each padded to `a` queries and `b` keys.

    causal: all of them are causal spans (a = b), or all are full ones.  q (n, a), k (n, b): the
    tokens of each.  padding (n, a): True for a padded query.  unpadded (m,): indices into n * a of
    the others; tokens (m,): their tokens.
    """

    causal: bool
    q: torch.Tensor
    k: torch.Tensor
    unpadded: torch.Tensor
    tokens: torch.Tensor
    padding: torch.Tensor


def make_blocks(causal, full, device):
    """Spans -> [Blocks, ...], for BlockAttention.

    causal: spans; each query is in one of them at most.
    full: lists of spans; each query is in one span of a list at most.
    """
    batches = [(True, indices) for indices in batch_spans(causal, True)]
    for spans in full:
        batches += [(False, indices) for indices in batch_spans(spans, False)]
    moved = iter(to_device([x for _, indices in batches for x in indices], device))
    return [Blocks(causal, *[next(moved) for _ in indices]) for causal, indices in batches]


def to_device(tensors, device):
    """Integer or bool tensors on the CPU -> the same on the device.

    They move as one, because the host waits for each copy.
    """
    if not tensors:
        return []
    moved = torch.cat([x.flatten().long() for x in tensors]).to(device)
    parts = moved.split([x.numel() for x in tensors])
    return [part.view(x.shape).to(x.dtype) for part, x in zip(parts, tensors)]


def batch_spans(spans, causal):
    """Spans -> [[q, k, unpadded, tokens, padding], ...] as in Blocks, few calls for many spans.

    A query must be in one span only.

    Spans run together if each has at least 3/4 as many queries as the longest: causal spans with
    any numbers of keys (only padded queries see padded keys), full spans with equally many.
    """
    out = []
    spans = [span for span in spans if span[1] and span[3]]
    spans = sorted(spans, key=lambda span: (span[3], span[1]))
    while spans:
        _, a, _, b = spans[-1]  # the longest
        together = [s for s in spans if (causal or s[3] == b) and 4 * s[1] >= 3 * a]
        spans = spans[: -len(together)]
        first_q, queries, first_k, keys = torch.tensor(together).T[..., None]  # (n, 1) each
        unpadded = torch.arange(a) < queries  # (n, a)
        # (n, a), padded by the first query
        q = (first_q + torch.arange(a)).where(unpadded, first_q)
        k = first_k + torch.arange(b).clamp(max=keys - 1)  # (n, b), padded by the last key
        unpadded_indices = unpadded.flatten().nonzero()[:, 0]
        out.append([q, k, unpadded_indices, q[unpadded], ~unpadded])
    return out


def merge(out_a, lse_a, out_b, lse_b):
    """Attention to keys a and to keys b -> attention to both.

    out (..., d) and log-sum-exp (...) of each -> out (..., d), log-sum-exp (...).
    """
    lse = torch.logaddexp(lse_a, lse_b)
    out = out_a * (lse_a - lse).exp()[..., None] + out_b * (lse_b - lse).exp()[..., None]
    return out, lse


class BlockAttention(torch.autograd.Function):
    """Attention of queries that each see one or more blocks of keys.

    Backward, each block's own flash kernel gets each query's output and log-sum-exp over ALL of its
    blocks, and so recomputes the probabilities exp(score - lse) of the whole softmax: the gradients
    of the blocks add up. There is no mask and no stored score; K and V are copied once for each
    block, not for each response or query head.

    q (S, Hq, d), k and v (S', Hkv, d) -> (S, Hq, d); zeros for a query that no block has. Half
    precision on a GPU.
    """

    @staticmethod
    def forward(ctx, q, k, v, blocks, scale):
        at_least_fp32 = torch.promote_types(q.dtype, torch.float32)
        out = torch.zeros_like(q, dtype=at_least_fp32)  # (S, Hq, d)
        # (S, Hq): log-sum-exp so far
        whole_lse = q.new_full(q.shape[:2], float("-inf"), dtype=at_least_fp32)
        ctx.states = []
        for b in blocks:
            q_b, k_b, v_b = (x.transpose(1, 2) for x in (q[b.q], k[b.k], v[b.k]))
            o, lse, state = flash(q_b, k_b, v_b, b.causal, scale)
            ctx.states.append(state)
            o, lse = (x.transpose(1, 2).flatten(0, 1)[b.unpadded] for x in (o, lse))
            o, lse = o.to(at_least_fp32), lse.to(at_least_fp32)
            if not b.causal:  # causal blocks come first, so they have nothing to be merged with
                o, lse = merge(o, lse, out[b.tokens], whole_lse[b.tokens])
            out[b.tokens], whole_lse[b.tokens] = o, lse
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, whole_lse)
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, whole_lse = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        for b, state in zip(ctx.blocks, ctx.states):
            # a padded query has no gradient, and exp(score - inf) = 0
            g = grad[b.q].masked_fill(b.padding[..., None, None], 0)
            lse = whole_lse[b.q].masked_fill(b.padding[..., None], float("inf"))
            parts = (g, q[b.q], k[b.k], v[b.k], out[b.q], lse)
            g, q_b, k_b, v_b, o, lse = (x.transpose(1, 2) for x in parts)
            gradients = flash_backward(
                g, q_b, k_b, v_b, o, lse.contiguous(), b.causal, ctx.scale, state
            )
            dq_b, dk_b, dv_b = (x.transpose(1, 2).flatten(0, 1) for x in gradients)
            dq.index_add_(0, b.tokens, dq_b[b.unpadded])
            dk.index_add_(0, b.k.flatten(), dk_b)
            dv.index_add_(0, b.k.flatten(), dv_b)
        return dq, dk, dv, None, None


def flash(q, k, v, causal, scale):
    """q (n, Hq, a, d), k and v (n, Hkv, b, d) -> out as q, log-sum-exp (n, Hq, a), state."""
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, is_causal=causal, scale=scale
        )
        return out, lse, ()
    out, lse, *state = torch.ops.aten._scaled_dot_product_flash_attention(
        q, k, v, is_causal=causal, scale=scale
    )
    return out, lse, state[:6]


def flash_masked(q, k, v, mask, scale):
    """As `flash`, with a mask (b,) of the keys, 0 or -inf, in the dtype of q -> out, log-sum-exp.

    Without a gradient.
    """
    n, H, a, _ = q.shape
    mask = mask.expand(n, H, a, -1)
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, attn_mask=mask, scale=scale
        )
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, mask, True, scale=scale
    )
    return out, lse[:, :, :a]  # padded to a multiple of 32 queries


def flash_backward(grad, q, k, v, out, lse, causal, scale, state):
    """The gradients of q, k and v, from that of out."""
    tensors = (grad, q, k, v, out, lse)
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *tensors, 0.0, causal, scale=scale
        )
    cum_seq_q, cum_seq_k, max_q, max_k, seed, offset = state
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        *tensors, cum_seq_q, cum_seq_k, max_q, max_k, 0.0, causal, seed, offset, scale=scale
    )
