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

from functools import partial

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

NAME = "shared_prefix"
SEGMENTS = "segments_flash"  # "flash" in its name has transformers hand over the whole row and its bounds
CACHE_TOKENS = 2**19  # prompts are decoded together up to so many tokens of keys and values: 28 GB for a 7B in bf16
LOGITS_PER_CHUNK = 2**27  # fp32 numbers of one chunk of log-softmax: 512 MB


def shared_prefix_attention(module, query, key, value, attention_mask, *, plan, scaling, **_):
    """The registered function: hands one layer's heads to the plan of the row.

    query (1 or N, Hq, S, d), key and value (1 or N, Hkv, S, d) -> output (1 or N, S, Hq, d), and no weights.
    `plan` is required: without one, transformers would silently attend across packed sequences.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves q and k in fp32 after the fp32 RoPE
    out = plan.attend(module.layer_idx, query, key, value, scaling)
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, shared_prefix_attention)


def segment_attention(module, query, key, value, attention_mask, *, scaling, cu_seq_lens_q=None, **_):
    """The vision tower's: each segment of the row (a window, or a 2-frame grid) attends to itself. Segments of equal length go
    together, where transformers' own SDPA path takes them one by one.

    query, key, value (1, H, S, d), cu_seq_lens_q (segments + 1,) bounds, None for one segment -> output (1, S, H, d), and no
    weights.
    """
    if cu_seq_lens_q is None:
        return F.scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2), None
    if not hasattr(cu_seq_lens_q, "tokens"):  # one look at the bounds for all layers: they are on the GPU
        bounds, by_length = cu_seq_lens_q.tolist(), {}
        for a, b in zip(bounds, bounds[1:]):
            by_length.setdefault(b - a, []).append(a)
        cu_seq_lens_q.tokens = [(torch.tensor(starts)[:, None] + torch.arange(n)).to(query.device)
                                for n, starts in by_length.items() if n]  # (segments of this length, length)
    out = query.new_empty(query.shape[2], query.shape[1], query.shape[3])
    for tokens in cu_seq_lens_q.tokens:
        q, k, v = (x[0][:, tokens].transpose(0, 1) for x in (query, key, value))  # (segments, H, length, d)
        out = out.index_put((tokens,), F.scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2))
    return out[None], None


AttentionInterface.register(SEGMENTS, segment_attention)


class PackedRow:
    """A packed row of groups: prompt lengths and response lengths say who attends to whom.

    lengths: for each group (P, [R_1, ..., R_G]); [] responses is a plain prompt (prefill).
    cache: a DecodeCache that receives the prompts' keys and values, prompt i of the row in slot `first_slot` + i.
    `own`, `find` and `collect` matter where a row is dealt over ranks (mrsp.ShardedRow); here all tokens are at hand.
    """
    own = slice(None)

    def __init__(self, lengths, device, cache=None, first_slot=0):
        self.cache, self.first_slot = cache, first_slot
        self.groups = []  # (tokens of the prompt, of the responses, mask of the responses)
        for P, responses in lengths:
            owner = torch.repeat_interleave(torch.arange(len(responses)), torch.tensor(responses, dtype=torch.long))
            own = owner[:, None].eq(owner).tril()  # (T, T): same response, not later
            mask = torch.cat([torch.ones(len(own), P, dtype=torch.bool), own], dim=1)  # (T, P + T)
            self.groups.append((P, len(own), mask.to(device)))

    def attend(self, layer, q, k, v, scale):
        attention = partial(F.scaled_dot_product_attention, scale=scale)
        per_kv = q.shape[1] // k.shape[1]  # query heads that share a K/V head
        pieces = ([P + T for P, T, _ in self.groups], 2)  # split once: a slice's backward writes the whole row's gradient
        out = []
        for i, (q_g, k_g, v_g) in enumerate(zip(q.split(*pieces), k.split(*pieces), v.split(*pieces))):
            P, T, mask = self.groups[i]
            k_p, v_p = k_g[:, :, :P], v_g[:, :, :P]
            if self.cache is not None:
                self.cache.store_prompt(layer, self.first_slot + i, k_p[0], v_p[0])
            out.append(attention(q_g[:, :, :P], k_p, v_p, is_causal=True, enable_gqa=True))
            if T:  # the responses, all G against one copy of the prompt (with a mask, fused kernels want K/V for every head)
                k_g, v_g = (x.repeat_interleave(per_kv, dim=1) for x in (k_g, v_g))
                out.append(attention(q_g[:, :, P:], k_g, v_g, attn_mask=mask))
        return torch.cat(out, dim=2)

    def find(self, tokens):
        """Of the given tokens of the row: the indices of those that are here, and where their hidden states are."""
        return slice(None), tokens

    def collect(self, x, tokens):
        """x (k, ...) of what `find` gave -> (len(tokens), ...) of all tokens."""
        return x


class DecodeCache:
    """Keys and values of B prompts, once each, and of the G responses of each prompt.

    Rows are laid out [B, G] (row b * G + g decodes a response of prompt b) and step together. `keep` drops rows that have
    finished, so that they stop costing. Prompts of unequal length are padded on the right and masked.
    Sizes: prompts 2 * L * B * Hkv * max(P) * d, responses 2 * L * B * G * Hkv * max_new * d numbers.
    """

    def __init__(self, config, lengths, G, max_new, *, device, dtype):
        L, heads, d = config.num_hidden_layers, config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        B, P = len(lengths), max(lengths)
        self.G, self.t = G, 0  # responses of a prompt; tokens that each has in the cache
        new = lambda *shape: torch.zeros(*shape, device=device, dtype=dtype)  # zeros: a masked NaN would still be a NaN
        self.prompt_kv = [(new(B, heads, P, d), new(B, heads, P, d)) for _ in range(L)]
        self.own_kv = [(new(B * G, heads, max_new, d), new(B * G, heads, max_new, d)) for _ in range(L)]
        self.padding = torch.arange(P, device=device) >= torch.tensor(lengths, device=device)[:, None]  # (B, P)

    def store_prompt(self, layer, slot, k, v):
        for buffer, x in zip(self.prompt_kv[layer], (k, v)):
            buffer[slot, :, : x.shape[1]] = x

    def attend(self, layer, q, k, v, scale):
        """One token per row: one softmax over [prompt | own tokens], scores in fp32: a bf16 score of 50 is off by 0.1."""
        k_p, v_p = self.prompt_kv[layer]  # (B, Hkv, P, d)
        B, H, P, d = k_p.shape
        for buffer, x in zip(self.own_kv[layer], (k, v)):
            buffer[:, :, self.t] = x[:, :, 0]
        k_o, v_o = (x[:, :, : self.t + 1] for x in self.own_kv[layer])  # (N, Hkv, t + 1, d)

        N, rep, exact = len(q), q.shape[1] // H, torch.promote_types(q.dtype, torch.float32)
        to_prompts = lambda x: x.view(B, self.G, H, rep, -1).transpose(1, 2).reshape(B, H, self.G * rep, -1)
        to_rows = lambda x: x.view(B, H, self.G, rep, -1).transpose(1, 2).reshape(N, H, rep, -1)
        with torch.autocast(q.device.type, enabled=False):
            q_o = q.reshape(N, H, rep, d).to(exact) * scale  # query heads that share a K/V head side by side
            scores_p = (to_prompts(q_o) @ k_p.to(exact).mT).masked_fill(self.padding[:, None, None], float("-inf"))
            scores = torch.cat([to_rows(scores_p), q_o @ k_o.to(exact).mT], dim=3)  # (N, Hkv, rep, P + t + 1)
            w_p, w_o = scores.softmax(dim=3).to(v.dtype).split([P, self.t + 1], dim=3)
            out = to_rows(to_prompts(w_p.contiguous()) @ v_p) + w_o @ v_o
        return out.reshape(N, H * rep, 1, d)

    def keep(self, prompts, rows, G):
        """Keeps the given prompts (indices into B) and rows (indices into B * G, prompt-major, G for each prompt)."""
        if len(prompts) < len(self.padding):
            self.prompt_kv = [(k[prompts], v[prompts]) for k, v in self.prompt_kv]
            self.padding = self.padding[prompts]
        self.own_kv = [tuple(self._grow(x, rows) for x in kv) for kv in self.own_kv]
        self.G = G

    def _grow(self, x, rows):
        """Rows of a response buffer, copying only the tokens that exist."""
        out = x.new_zeros(len(rows), *x.shape[1:])
        out[:, :, : self.t] = x[rows, :, : self.t]
        return out
