"""The one attention function: who may attend to whom when G responses share a prompt.

GRPO samples G responses o_1 ... o_G from one prompt, and with video the prompt is nearly everything. So it is never
repeated. Training packs whole groups into one row,

    [ prompt | o_1 | o_2 | ... | o_G | prompt' | o'_1 | ... ]

where o_i attends to its prompt and to itself (`PackedRow`), and decoding keeps one copy of each prompt's keys and
values beside the keys and values that each response has produced (`DecodeCache`). Both equal G separate sequences up
to rounding (cf. Prefix Grouper, arXiv 2506.05433; Hydragen, 2402.05099): an attention layer sees the same scores and
the same softmax set, and everything else in a transformer works on one token at a time.

transformers calls a registered attention function with K and V after RoPE, not repeated for grouped-query heads, builds
no mask for it, and hands every extra keyword of the model call down to it. The keyword `plan` is all we need.
"""

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from infra.flash import BlockAttention, _flash, blocks

NAME = "shared_prefix"
SEGMENTS = (
    "segments_flash"  # "flash" in its name has transformers hand over the whole row and its bounds
)
CACHE_TOKENS = (
    2**19
)  # prompts are decoded together up to so many tokens of keys and values: 28 GB for a 7B in bf16
LOGITS_PER_CHUNK = 2**27  # fp32 numbers of one chunk of log-softmax: 512 MB


def shared_prefix_attention(module, query, key, value, attention_mask, *, plan, scaling, **_):
    """The registered function: hands one layer's heads to the plan of the row.

    query (1 or N, Hq, S, d), key and value (1 or N, Hkv, S, d) -> output (1 or N, S, Hq, d), and no weights.
    `plan` is required: without one, transformers would silently attend across packed sequences.
    """
    query, key = (
        query.to(value.dtype),
        key.to(value.dtype),
    )  # autocast leaves q and k in fp32 after the fp32 RoPE
    last = module.layer_idx + 1 == module.config.num_hidden_layers
    return plan.attend(module.layer_idx, query, key, value, scaling, last), None


AttentionInterface.register(NAME, shared_prefix_attention)


def segment_attention(
    module, query, key, value, attention_mask, *, scaling, cu_seq_lens_q=None, **_
):
    """The vision tower's: each segment of the row (a window, or a 2-frame grid) attends to itself. Segments of equal length go
    together, where transformers' own SDPA path takes them one by one.

    query, key, value (1, H, S, d), cu_seq_lens_q (segments + 1,) bounds, None for one segment -> output (1, S, H, d), and no
    weights.
    """
    if cu_seq_lens_q is None:
        return F.scaled_dot_product_attention(query, key, value, scale=scaling).transpose(
            1, 2
        ), None
    if not hasattr(
        cu_seq_lens_q, "tokens"
    ):  # one look at the bounds for all layers: they are on the GPU
        bounds, by_length = cu_seq_lens_q.tolist(), {}
        for a, b in zip(bounds, bounds[1:]):
            by_length.setdefault(b - a, []).append(a)
        cu_seq_lens_q.tokens = [
            (torch.tensor(starts)[:, None] + torch.arange(n)).to(query.device)
            for n, starts in by_length.items()
            if n
        ]  # (segments of this length, length)
    out = query.new_empty(query.shape[2], query.shape[1], query.shape[3])
    for tokens in cu_seq_lens_q.tokens:
        q, k, v = (
            x[0][:, tokens].transpose(0, 1) for x in (query, key, value)
        )  # (segments, H, length, d)
        out = out.index_put(
            (tokens,), F.scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2)
        )
    return out[None], None


AttentionInterface.register(SEGMENTS, segment_attention)


def layer_blocks(squares, rectangles, read, device):
    """A row's blocks -> (of a layer, of the last layer: there a span begins with its first query that is read).

    squares: causal spans.  rectangles: lists of other spans; in each list a query stands once.  read: bool of every token.
    """

    def unread(q, n):
        return int(read[q : q + n].to(torch.uint8).argmax()) if read[q : q + n].any() else n

    trimmed, before = [], []
    for q, n, k, _ in squares:
        skip = unread(q, n)
        trimmed.append((q + skip, n - skip, k + skip, n - skip))
        before.append((q + skip, n - skip, k, skip))
    after = [
        [(q + unread(q, n), n - unread(q, n), k, keys) for q, n, k, keys in spans]
        for spans in rectangles
    ]
    every = lambda squares, others: (
        blocks(squares, True, device) + sum((blocks(spans, False, device) for spans in others), [])
    )
    return every(squares, rectangles), every(trimmed, [before, *after])


class PackedRow:
    """A packed row of groups: prompt lengths and response lengths say who attends to whom.

    lengths: for each group (P, [R_1, ..., R_G]); [] responses is a plain prompt (prefill).
    cache: a DecodeCache that receives the prompts' keys and values, prompt i of the row in slot `first_slot` + i.
    reads: the tokens whose last hidden state predicts another token; the last layer computes no others (model.last_layer).
    `own`, `find` and `collect` matter where a row is dealt over ranks (mrsp.ShardedRow); here all tokens are at hand.
    """

    own = slice(None)

    def __init__(self, lengths, device, cache=None, first_slot=0):
        self.cache, self.first_slot, self.prompts = cache, first_slot, []
        squares, across, start = [], [], 0
        read = torch.zeros(sum(P + sum(responses) for P, responses in lengths), dtype=torch.bool)
        for P, responses in lengths:
            first, others = sum(responses[:1]), responses[1:]
            self.prompts.append((start, start + P))
            squares.append(
                (start, P + first, start, P + first)
            )  # the prompt and o_1: an ordinary causal sequence
            across.append((start + P + first, sum(others), start, P))
            read[start + P - 1 : start + P + max(0, first - 1)] = (
                True  # a response's last token predicts none
            )
            start += P + first
            for R in others:
                squares.append((start, R, start, R))
                read[start : start + R - 1] = True
                start += R
        self.blocks = layer_blocks(squares, [across], read, device)
        self.reads = read.nonzero()[:, 0].to(device)

    def attend(self, layer, q, k, v, scale, last=False):
        return self.attend_row(layer, *(x[0].transpose(0, 1) for x in (q, k, v)), scale, last)

    def attend_row(self, layer, q, k, v, scale, last):
        """q (n, Hq, d) of the tokens that are here, k and v (S, Hkv, d) of all -> (1, n, Hq, d)."""
        if self.cache is not None:
            for i, (a, b) in enumerate(self.prompts):
                self.cache.store_prompt(
                    layer, self.first_slot + i, k[a:b].transpose(0, 1), v[a:b].transpose(0, 1)
                )
        return BlockAttention.apply(q, k, v, self.blocks[last], scale)[None]

    def find(self, tokens):
        """Of the given tokens of the row, all of them read: the indices of those that are here, and where their hidden states
        are."""
        return slice(None), torch.searchsorted(self.reads, tokens)

    def collect(self, x, tokens):
        """x (k, ...) of what `find` gave -> (len(tokens), ...) of all tokens."""
        return x


class DecodeCache:
    """Keys and values of B prompts, once each, and of the G responses of each prompt.

    lengths: of the prompts, ascending; those of equal length are attended to together, and none is padded.
    Rows are laid out [B, G] (row b * G + g decodes a response of prompt b) and step together. `keep` drops rows that have
    finished, so that they stop costing. t (1,): tokens that each response has in the cache; it is on the device, and a step has
    no shape that depends on it: responses are attended to up to `width` tokens, what is not there yet masked.
    Sizes: prompts 2 * L * sum(P) * Hkv * d, responses 2 * L * B * G * Hkv * max_new * d numbers.
    """

    reads = slice(None)  # every token's hidden state predicts the next

    def __init__(self, config, lengths, G, max_new, *, device, dtype):
        L, heads, d = (
            config.num_hidden_layers,
            config.num_key_value_heads,
            config.hidden_size // config.num_attention_heads,
        )
        new = lambda *shape: torch.zeros(
            *shape, device=device, dtype=dtype
        )  # zeros: a masked NaN would still be a NaN
        pair = lambda *shape: (new(*shape), new(*shape))
        self.G, self.width, self.t = G, max_new, torch.zeros(1, dtype=torch.long, device=device)
        self.sizes = [(P, lengths.count(P)) for P in dict.fromkeys(lengths)]
        self.slots = [
            (i, j) for i, (_, n) in enumerate(self.sizes) for j in range(n)
        ]  # of each prompt: which buffer, where
        self.prompt_kv = [[pair(n, heads, P, d) for P, n in self.sizes] for _ in range(L)]
        self.own_kv = [pair(len(lengths) * G, heads, max_new, d) for _ in range(L)]
        self.tokens = torch.arange(max_new, device=device)

    def store_prompt(self, layer, slot, k, v):
        i, j = self.slots[slot]
        for buffer, x in zip(self.prompt_kv[layer][i], (k, v)):
            buffer[j] = x

    def attend(self, layer, q, k, v, scale, last=False):
        """One token per row, as in BlockAttention: all rows of a prompt read it together, then each what it has written; scores
        in fp32, since a bf16 score of 50 is off by 0.1. q (N, Hq, 1, d), k and v (N, Hkv, 1, d) -> (N, 1, Hq, d)."""
        N, H, _, d = k.shape
        for buffer, x in zip(self.own_kv[layer], (k, v)):
            buffer.index_copy_(2, self.t, x)
        exact = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            read, of_length = [], q.view(N, H, -1, d).split([n * self.G for _, n in self.sizes])
            for q_p, (k_p, v_p) in zip(
                of_length, self.prompt_kv[layer]
            ):  # all query heads of a K/V head, and all rows, together
                q_p = q_p.unflatten(0, (-1, self.G)).transpose(1, 2)  # (n, Hkv, G, Hq / Hkv, d)
                out, lse, _ = _flash(q_p.flatten(2, 3), k_p, v_p, False, scale)
                read.append(
                    [
                        x.unflatten(2, (self.G, -1)).transpose(1, 2).flatten(0, 1).flatten(1, 2)
                        for x in (out, lse)
                    ]
                )
            out, lse = (torch.cat(part).to(exact) for part in zip(*read))  # (N, Hq, d), (N, Hq)
            k_o, v_o = (x[:, :, : self.width] for x in self.own_kv[layer])  # (N, Hkv, width, d)
            scores = (q.view(N, H, -1, d).to(exact) * scale) @ k_o.to(
                exact
            ).mT  # query heads that share a K/V head side by side
            scores = scores.masked_fill(self.tokens[: self.width] > self.t, float("-inf")).flatten(
                1, 2
            )  # (N, Hq, width)
            total = torch.logaddexp(lse, scores.logsumexp(2))[..., None]  # (N, Hq, 1)
            own = (scores - total).exp().view(N, H, -1, self.width).to(v.dtype) @ v_o
            out = out * (lse[..., None] - total).exp() + own.flatten(1, 2)
        return out.to(v.dtype)[:, None]

    def keep(self, prompts, rows, G, t):
        """Keeps the given prompts (indices into B, ascending) and rows (indices into B * G, prompt-major, G for each prompt), and
        of these the first t tokens."""
        kept = [self.slots[p] for p in prompts.tolist()]
        if len(kept) < len(self.slots):
            which = [[j for i, j in kept if i == n] for n in range(len(self.sizes))]
            some = lambda x, w: x if len(w) == len(x) else x[w]
            for layer, of_length in enumerate(
                self.prompt_kv
            ):  # one after the other: old and new stand in memory for a layer
                self.prompt_kv[layer] = [
                    (some(k, w), some(v, w)) for (k, v), w in zip(of_length, which) if w
                ]
            self.sizes = [(P, len(w)) for (P, _), w in zip(self.sizes, which) if w]
            self.slots = [(i, j) for i, (_, n) in enumerate(self.sizes) for j in range(n)]
        for layer, kv in enumerate(self.own_kv):
            self.own_kv[layer] = tuple(self._rows(x, rows, t) for x in kv)
        self.G = G

    @staticmethod
    def _rows(x, rows, t):
        """Rows of a response buffer, copying only the tokens that exist."""
        out = x.new_zeros(len(rows), *x.shape[1:])
        out[:, :, :t] = x[rows, :, :t]
        return out
