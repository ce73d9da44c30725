"""The attention of a group: who sees whom when G responses share one prompt.

GRPO samples G responses o_1 ... o_G from one prompt, and a video prompt is far longer than its
responses. So the prompt is never repeated:

    visible       the mask as a definition, for reading and for the tests: no step builds it
    PackedRow     training: whole groups in a row, [prompt | o_1 | ... | o_G | prompt' | o'_1 | ...]
    DecodeCache   sampling: one copy of a prompt's keys and values, read by all of its responses

Both equal G separate sequences up to rounding: attention sees the same scores under the same
softmax, and every other layer of a transformer works on one token at a time. (Prefix Grouper, arXiv
2506.05433; Hydragen, arXiv 2402.05099.)
"""

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from infra.flash import BlockAttention, flash, flash_masked, make_blocks, to_device
from infra.model_folder import head_size

CACHE_TOKENS = 2**19  # of prompts and responses decoded together: 30 GB of a 7B's K and V in bf16
LOGITS_PER_CHUNK = 2**27  # fp32 logits computed at a time: 537 MB


def visible(lengths):
    """The attention mask of a packed row: bool (S, S), True where query i sees key j.

    lengths: [(P, [R_1, ..., R_G]), ...], the prompt and the responses of each group in the row.

    >>> visible([(2, [1, 2])]).int()
    tensor([[1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [1, 1, 1, 0, 0],
            [1, 1, 0, 1, 0],
            [1, 1, 0, 1, 1]], dtype=torch.int32)
    """
    parts = [(g, i, n) for g, (P, Rs) in enumerate(lengths) for i, n in enumerate([P, *Rs])]
    group, owner, n = torch.tensor(parts).T
    group, owner = group.repeat_interleave(n), owner.repeat_interleave(n)  # (S,): 0 is the prompt
    same_group = group[:, None] == group
    prompt_or_itself = (owner == 0) | (owner == owner[:, None])
    return (same_group & prompt_or_itself).tril()  # causal


# ---- training


class PackedRow:
    """Attention of a packed row: the blocks of `visible`, without the mask (infra/flash.py).

               prompt   o_1   o_2   o_3
    prompt     causal
    o_1        causal   causal
    o_2        full           causal
    o_3        full                 causal

    The prompt and o_1 are one causal span. o_2 ... o_G see the prompt in one full span, and each
    sees itself in a causal one.

    lengths: [(P, [R_1, ..., R_G]), ...]; a plain prompt has no responses (prefill).
    cache: a DecodeCache that keeps the prompts' keys and values. The row's first prompt is its
    prompt number `first_prompt`.

    `held`, `find` and `from_all_ranks` matter where ranks share a row (mrsp.ShardedRow). Here
    this rank holds every token. Their indices stay on the CPU, so that nobody waits for a GPU.
    """

    held = slice(None)  # which tokens of the row this rank holds

    def __init__(self, lengths, device, cache=None, first_prompt=0):
        self.cache, self.first_prompt, self.prompts = cache, first_prompt, prompt_bounds(lengths)
        # spans: (first query, number of queries, first key, number of keys)
        causal, full = [], []
        for (start, _), (P, responses) in zip(self.prompts, lengths):
            n = P + sum(responses[:1])
            causal.append((start, n, start, n))
            others = responses[1:]
            full.append((start + n, sum(others), start, P))
            start += n
            for R in others:
                causal.append((start, R, start, R))
                start += R
        self.blocks = make_blocks(causal, [full], device)

    def attend(self, layer, q, k, v, scale):
        """One layer: q (1, Hq, S, d), k and v (1, Hkv, S, d) -> (1, S, Hq, d)."""
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        return self.attend_row(layer, q, k, v, scale)

    def attend_row(self, layer, q, k, v, scale):
        """q (n, Hq, d) of this rank, k and v (S, Hkv, d) of the whole row -> (1, n, Hq, d)."""
        if self.cache is not None:
            for prompt, (start, end) in enumerate(self.prompts, self.first_prompt):
                self.cache.store_prompt(layer, prompt, k[start:end], v[start:end])
        return BlockAttention.apply(q, k, v, self.blocks, scale)[None]

    def find(self, indices):
        """Which of some tokens this rank holds, and where.

        indices: of tokens in the row. Returns (which, where): indices[which] are held by this rank,
        and their hidden states are hidden[where].
        """
        return slice(None), indices

    def from_all_ranks(self, x, indices):
        """x: a value for each token that `find(indices)` found on this rank -> the values for all
        of `indices`, in order, on every rank."""
        return x


def prompt_bounds(lengths):
    """Where the prompts of a packed row are: [(start, end), ...], end exclusive."""
    bounds, start = [], 0
    for P, responses in lengths:
        bounds.append((start, start + P))
        start += P + sum(responses)
    return bounds


def predictors(lengths):
    """For every response token of a packed row, in order, the token that predicts it (T,).

    The last token of the prompt predicts the first token of EVERY response, token t - 1 of a
    response its token t.

    >>> predictors([(2, [1, 3])])  # p p a b b b
    tensor([1, 1, 3, 4])
    """
    parts = []
    for (_, end), (_, responses) in zip(prompt_bounds(lengths), lengths):
        last_of_prompt, start = torch.tensor([end - 1]), end
        for R in responses:
            parts += [last_of_prompt, torch.arange(start, start + R - 1)]
            start += R
    return torch.cat(parts)


# ---- sampling


class DecodeCache:
    """Keys and values of B prompts, once each, and of the G responses to each prompt.

    prompt_kv[layer][i]   k and v of the n prompts of length P, (n, Hkv, P, d) each
    response_kv[layer]    k and v of all responses, (B * G, Hkv, slots, d) each; slots: max_new,
                          rounded up to a multiple of 8

                                                          /  o_1  [ k k k . . ]
        prompt 0    [ k k k k k k k ]  <-- is read by ---+   o_2  [ k k k . . ]
                                                          /  o_1  [ k k k . . ]
        prompt 1    [ k k k k k k k k k k ]  <-----------+   o_2  [ k k k . . ]
                                                                        ^ t = 3 tokens

    Responses are laid out [B, G]: number b * G + g is response g to prompt b. All step together, by
    one token. Prompts of equal length are attended to together; none is padded. `keep` drops
    finished ones. No shape in a step depends on t, so that a step can be a CUDA graph: a response
    sees its first `width` slots, and with `masked` not those of them that are not written yet.
    Buffers start as zeros, because a masked NaN would still be a NaN.

    lengths: of the prompts, ascending.
    Size: 2 * L * Hkv * d * (sum(P) + B * G * slots) numbers.
    """

    def __init__(self, config, lengths, G, max_new, *, device, dtype):
        Hkv, d = config.num_key_value_heads, head_size(config)
        slots = -(-max_new // 8) * 8  # a GPU reads masks 8 numbers at a time
        self.G, self.width, self.masked = G, slots, True
        self.t = torch.zeros(1, dtype=torch.long, device=device)
        self.mask = torch.full((slots,), float("-inf"), device=device, dtype=dtype)  # 0 if written
        self.sizes = [(P, lengths.count(P)) for P in dict.fromkeys(lengths)]  # (length, prompts)
        self._number_prompts()

        def keys_and_values(n, tokens):
            return tuple(
                torch.zeros(n, Hkv, tokens, d, device=device, dtype=dtype) for _ in range(2)
            )

        self.prompt_kv, self.response_kv = [], []
        for _ in range(config.num_hidden_layers):
            self.prompt_kv.append([keys_and_values(n, P) for P, n in self.sizes])
            self.response_kv.append(keys_and_values(len(lengths) * G, slots))

    def _number_prompts(self):
        """places: for each prompt, which buffer of a layer holds it, and where in that buffer."""
        self.places = [(i, j) for i, (_, n) in enumerate(self.sizes) for j in range(n)]

    def store_prompt(self, layer, prompt, k, v):
        """Keeps k and v (P, Hkv, d) of a prompt, given by its number."""
        i, j = self.places[prompt]
        k_buffer, v_buffer = self.prompt_kv[layer][i]
        k_buffer[j], v_buffer[j] = k.transpose(0, 1), v.transpose(0, 1)

    def attend(self, layer, q, k, v, scale):
        """One token of every response: q (N, Hq, 1, d), k and v (N, Hkv, 1, d) -> (N, 1, Hq, d)."""
        N, Hkv, _, d = k.shape
        k_all, v_all = self.response_kv[layer]
        k_all.index_copy_(2, self.t, k)
        v_all.index_copy_(2, self.t, v)
        q = q.view(N, Hkv, -1, d)  # query heads beside the K/V head they share: (N, Hkv, r, d)
        with torch.autocast(q.device.type, enabled=False):
            out_prompt, lse_prompt = self.attend_to_prompt(layer, q, scale)
            out_response, lse_response = self.attend_to_responses(layer, q, scale)
            # of the whole softmax, the prompt's share; flash.merge without a new log-sum-exp
            share = (lse_prompt - lse_response).sigmoid()  # (N, Hkv, r)
            out = torch.lerp(out_response, out_prompt, share[..., None])
        return out.to(v.dtype).flatten(1, 2)[:, None]

    def attend_to_prompt(self, layer, q, scale):
        """All responses to a prompt, and all their query heads, read it together.

        q (N, Hkv, r, d) -> out (N, Hkv, r, d), log-sum-exp (N, Hkv, r).
        """
        at_least_fp32 = torch.promote_types(q.dtype, torch.float32)
        outs, lses = [], []
        q_by_length = q.split([n * self.G for _, n in self.sizes])
        for q_n, (k, v) in zip(q_by_length, self.prompt_kv[layer]):
            q_n = q_n.unflatten(0, (-1, self.G)).transpose(1, 2)  # (n, Hkv, G, r, d)
            out, lse, _ = flash(q_n.flatten(2, 3), k, v, False, scale)  # (n, Hkv, G * r, d)
            outs.append(out.unflatten(2, (self.G, -1)).transpose(1, 2))  # (n, G, Hkv, r, d)
            lses.append(lse.unflatten(2, (self.G, -1)).transpose(1, 2))
        out, lse = torch.cat(outs).flatten(0, 1), torch.cat(lses).flatten(0, 1)
        return out.to(at_least_fp32), lse.to(at_least_fp32)

    def attend_to_responses(self, layer, q, scale):
        """Each response reads itself.

        q (N, Hkv, r, d) -> out (N, Hkv, r, d), log-sum-exp (N, Hkv, r).
        """
        k, v = (x[:, :, : self.width] for x in self.response_kv[layer])  # (N, Hkv, width, d)
        if self.masked:
            out, lse = flash_masked(q, k, v, self.mask[: self.width], scale)
        else:
            out, lse, _ = flash(q, k, v, False, scale)
        at_least_fp32 = torch.promote_types(q.dtype, torch.float32)
        return out.to(at_least_fp32), lse.to(at_least_fp32)

    def open_slot(self):
        """Lets responses see slot t, which the token drawn last fills in every layer."""
        self.mask.index_fill_(0, self.t, 0.0)

    def keep(self, prompts, responses, G, t):
        """Keeps some prompts and responses, and of these responses the first t tokens.

        prompts: a list of indices into B, ascending.  responses: indices into B * G, G for each
        kept prompt in order.
        """
        kept = [self.places[p] for p in prompts]
        if len(kept) < len(self.places):
            which = [[j for i, j in kept if i == n] for n in range(len(self.sizes))]
            for layer, buffers in enumerate(self.prompt_kv):  # old and new coexist for one layer
                self.prompt_kv[layer] = [
                    (select(k, w), select(v, w)) for (k, v), w in zip(buffers, which) if w
                ]
            self.sizes = [(P, len(w)) for (P, _), w in zip(self.sizes, which) if w]
            self._number_prompts()
        for layer, (k, v) in enumerate(self.response_kv):
            self.response_kv[layer] = (
                copy_responses(k, responses, t),
                copy_responses(v, responses, t),
            )
        self.G = G


def select(x, indices):
    """x[indices], without a copy where that is all of x."""
    return x if len(indices) == len(x) else x[indices]


def copy_responses(x, indices, t):
    """Some responses of a buffer (N, Hkv, slots, d); only their first t tokens are copied."""
    out = x.new_zeros(len(indices), *x.shape[1:])
    out[:, :, :t] = x[indices, :, :t]
    return out


# ---- what transformers calls
# A registered attention function gets K and V after RoPE, one per K/V head, no mask, and every
# extra keyword of the model call: here `plan`, a PackedRow or a DecodeCache.

NAME = "shared_prefix"
SEGMENTS = "segments_flash"  # "flash" in its name: transformers passes the whole row and its bounds


def shared_prefix_attention(module, query, key, value, attention_mask, *, plan, scaling, **_):
    """The language model's attention, as `plan` has it.

    query (1 or N, Hq, S, d), key and value (1 or N, Hkv, S, d) -> (1 or N, S, Hq, d).

    `plan` is required: without one, transformers would silently attend across the sequences of a
    row.
    """
    dtype = value.dtype  # under autocast, Qwen3-VL's norms of query and key leave them in fp32
    out = plan.attend(module.layer_idx, query.to(dtype), key.to(dtype), value, scaling)
    return out, None


def segment_attention(
    module, query, key, value, attention_mask, *, scaling, cu_seq_lens_q=None, **_
):
    """The vision tower's attention: each segment (a window, or a 2-frame grid) sees itself.

    Segments of equal length are computed together, where transformers' SDPA path loops over all of
    them. query, key, value (1, H, S, d); cu_seq_lens_q (segments + 1,): bounds, on the CPU (see
    model.tower_indices), None for one segment -> (1, S, H, d).
    """
    if cu_seq_lens_q is None:
        out = F.scaled_dot_product_attention(query, key, value, scale=scaling)
        return out.transpose(1, 2), None
    if not hasattr(cu_seq_lens_q, "segments"):  # all layers get this tensor
        cu_seq_lens_q.segments = to_device(segments_by_length(cu_seq_lens_q), query.device)
    q, k, v = query[0], key[0], value[0]  # (H, S, d)
    out = q.new_empty(q.shape[1], q.shape[0], q.shape[2])  # (S, H, d)
    for tokens in cu_seq_lens_q.segments:  # (segments, length)
        # each (segments, H, length, d)
        q_s, k_s, v_s = (x[:, tokens].transpose(0, 1) for x in (q, k, v))
        attended = F.scaled_dot_product_attention(q_s, k_s, v_s, scale=scaling)
        out = out.index_put((tokens,), attended.transpose(1, 2))
    return out[None], None


def segments_by_length(bounds):
    """Bounds (segments + 1,) -> for each length, the tokens of its segments (n, length)."""
    starts = {}
    edges = bounds.tolist()
    for first, last in zip(edges, edges[1:]):
        starts.setdefault(last - first, []).append(first)
    segments = []
    for length, firsts in starts.items():
        if length:
            segments.append(torch.tensor(firsts)[:, None] + torch.arange(length))
    return segments


# cuDNN's attention prepares a plan for every new shape, and videos have many: flash does not
torch.backends.cuda.enable_cudnn_sdp(False)
AttentionInterface.register(NAME, shared_prefix_attention)
AttentionInterface.register(SEGMENTS, segment_attention)
