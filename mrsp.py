"""MR-SP, multi-modal reinforcement sequence parallelism: one long video on many GPUs.

LongVILA-R1, arXiv 2507.07966, section 4.

    torchrun --nproc_per_node 8 train.py --sp 4 ...     4 ranks share each row
    torchrun --nproc_per_node 8 train.py --sp auto ...  as few as memory allows

`sp.size` neighbouring ranks, a team, work on the same prompts; WORLD / sp.size teams work side by
side.

    load      each rank reads some videos; the ranks of a team share the prompts
    stage 1   each rank encodes its share of all 2-frame grids (encode). The embeddings are
              gathered, and serve every rollout and (frozen tower) every log-prob pass of the step
    stage 2   each rank computes its share of the packed row's tokens (ShardedRow). Layer by layer,
              they attend to the gathered keys and values of the whole row. The backward pass
              gathers them again for each layer that it recomputes
    rollout   prefill, as in stage 2, leaves the prompts' keys and values on every rank; then each
              rank decodes its share of the responses (rollout.generate)

Who holds what in stage 2, on 2 ranks. Later pieces of a prompt cost more, because they see more.
So a prompt has 2 * size pieces, and rank r holds pieces r and 2 * size - 1 - r.

    the row        [ piece 0 | piece 1 | piece 2 | piece 3 | o_1 ... o_G               ]
    rank 0         [ piece 0 |         |         | piece 3 | first half |              ]
    rank 1         [         | piece 1 | piece 2 |         |            | second half  ]

So rank 1's hidden states are [ piece 1 | piece 2 | second half ]. The half begins anywhere, also
within a response. The rank that scores a token need not be the one that sampled it.

Gathering K and V, instead of exchanging heads (Ulysses), does not limit the ranks to the number of
heads (28 heads on 8 GPUs), and with grouped-query attention moves no more for up to 8 ranks.
Decoding reads the prompt's keys and values from each rank's own memory (8 GB for an hour of video
on a 3B): sharded, every layer would communicate for every token.
"""

import contextlib
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from attention import CACHE_TOKENS, LOGITS_PER_CHUNK, PackedRow, prompt_bounds
from infra.flash import make_blocks
from infra.memory import device_memory
from infra.model_folder import head_size
from infra.ranks import WORLD, gather, say
from rollout import PREFILL_TOKENS

# renamed in torch 2.13
ALL_GATHER = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


# ---- the ranks that share a row


class SequenceParallel:
    """The ranks that share a row; this is `rank` of `size`.

    With a size of 1, nothing communicates.
    """

    def __init__(self, size=1, rank=0, tensors=None, objects=None):
        self.size, self.rank = size, rank
        self._tensors, self._objects = tensors, objects  # process groups

    def all_gather(self, x, reduce=True):
        """x (n, ...) of every rank -> (size, n, ...).

        reduce: what x gets in the backward pass. True, for keys and values: the sum of all ranks'
        gradients, because each rank uses them for its own tokens. False, for log-probs: this rank's
        gradient, because every rank computes the same loss from all of them, and a sum would count
        it `size` times.
        """
        return x[None] if self.size == 1 else AllGather.apply(x, self, reduce)

    def concatenate(self, x, counts, reduce=True):
        """x (counts[rank], ...) of every rank -> (sum(counts), ...). reduce: as in all_gather."""
        padding = (0, 0) * (x.ndim - 1) + (0, max(counts) - len(x))
        gathered = self.all_gather(F.pad(x, padding), reduce)
        return torch.cat([part[:n] for part, n in zip(gathered, counts)])

    def all_gather_objects(self, x):
        """An object of every rank -> the list of them.

        Sent one by one, so that large ones are in memory once.
        """
        out = []
        for r in range(self.size):
            box = [x if r == self.rank else None]
            if self.size > 1:
                dist.broadcast_object_list(box, group=self._objects, group_src=r)
            out += box
        return out


class AllGather(torch.autograd.Function):
    """Its backward is a reduce-scatter, or takes this rank's part of the gradient."""

    @staticmethod
    def forward(ctx, x, sp, reduce):
        ctx.sp, ctx.reduce = sp, reduce
        out = x.new_empty(sp.size * x.shape[0], *x.shape[1:])
        ALL_GATHER(out, x.contiguous(), group=sp._tensors)
        return out.unflatten(0, (sp.size, -1))

    @staticmethod
    def backward(ctx, grad):
        if not ctx.reduce:
            return grad[ctx.sp.rank], None, None
        out = grad.new_empty(grad.shape[1:])
        REDUCE_SCATTER(out, grad.flatten(0, 1).contiguous(), group=ctx.sp._tensors)
        return out, None, None


ONE_RANK = SequenceParallel()


@lru_cache
def sequence_parallel(size, timeout=None):
    """This rank's team of `size` neighbours. All ranks must ask for the same sizes in one order.

    timeout: of each communication, a timedelta. Raises ValueError: a size that does not divide the
    number of ranks.
    """
    if size == 1:
        return ONE_RANK
    world, me = dist.get_world_size(), dist.get_rank()
    if world % size:
        raise ValueError(f"{world} ranks cannot be split into teams of {size}")
    for first in range(0, world, size):
        ranks = list(range(first, first + size))
        tensors = dist.new_group(ranks, timeout)
        objects = dist.new_group(ranks, timeout, backend="gloo")  # frames are sent from the CPU
        if me in ranks:
            mine = SequenceParallel(size, me % size, tensors, objects)
    return mine


@contextlib.contextmanager
def share_rows(sp, *policies):
    """Inside, the ranks of `sp` share each row of these policies; afterwards they are ONE_RANK.

    None is ignored.
    """
    policies = [policy for policy in policies if policy is not None]
    for policy in policies:
        policy.sp = sp
    try:
        yield
    finally:
        for policy in policies:
            policy.sp = ONE_RANK


# ---- stage 1: encode


def encode(policy, prompts):
    """Visual embeddings of each prompt's media in order -> [(V, D), ...].

    The ranks of policy.sp encode together, each medium once.

    Under torch.enable_grad, for a tower that is trained, the gradient of an embedding on all ranks
    flows back to the rank that encoded it. Under torch.no_grad, media that policy.embedding_cache
    holds are not encoded.
    """
    media = {media_key(m): m for prompt in prompts for m in prompt.media}  # unique
    cache = None if torch.is_grad_enabled() else policy.embedding_cache
    embeds = known_embeds(policy, cache, media)
    missing = {key: m for key, m in media.items() if key not in embeds}
    embeds |= encode_together(policy, missing)
    if cache and policy.sp.rank == 0:
        for key, m in missing.items():
            cache.put(m, embeds[key])
    none = torch.zeros(0, policy.visual_width, device=policy.device)
    none = none.to(policy.compute_dtype)
    out = []
    for prompt in prompts:
        parts = [embeds[media_key(m)] for m in prompt.media]
        out.append(torch.cat(parts) if parts else none)
    return out


def media_key(media):
    """The same for two Media with the same pixels: questions about one video share embeddings."""
    return media.key or id(media)


def known_embeds(policy, cache, media):
    """What the cache holds of these media, by key -> embeddings (V, D) by key.

    All ranks of policy.sp get the same keys.
    """
    if not cache:
        return {}
    found = {key: cache.get(m) for key, m in media.items()}
    hits = {key for key, x in found.items() if x is not None}
    on_all_ranks = set.intersection(
        *policy.sp.all_gather_objects(hits)
    )  # one may be evicted in between
    return {key: x.to(policy.device) for key, x in found.items() if key in on_all_ranks}


def encode_together(policy, media):
    """Encodes Media, by key -> embeddings (V, D) by key, on all ranks of policy.sp.

    Each rank encodes its share of the 2-frame grids.
    """
    grids = [(m, i) for m in media.values() for i in range(m.grid[0])]
    if not grids:
        return {}
    patches = [m.grid[1] * m.grid[2] for m, _ in grids]
    owners = share_out(patches, policy.sp.size)
    mine = [g for g, owner in zip(grids, owners) if owner == policy.sp.rank]
    counts = [0] * policy.sp.size  # visual tokens that each rank has encoded
    for n, owner in zip(patches, owners):
        counts[owner] += n // policy.merge**2
    everything = policy.sp.concatenate(policy.encode_grids(mine), counts)  # (V, D) of all media
    return dict(zip(media, everything.split([m.tokens for m in media.values()])))


def share_out(costs, size):
    """Costs of items in order -> their owners among `size` ranks, in shares of nearly equal cost.

    >>> share_out([4, 1, 1, 1, 1], 2)
    [0, 1, 1, 1, 1]
    """
    total, before, owners = sum(costs), 0, []
    for cost in costs:
        owners.append(int((before + cost / 2) / total * size))
        before += cost
    return owners


# ---- stage 2: share the row


def shares_of_row(lengths, size):
    """Shares of a packed row -> for each rank, for each group, (piece, piece, responses).

    lengths: [(P, [R_1, ..., R_G]), ...]. Each is an interval (start, end) of the row. Of 2 *
    size pieces of a prompt, rank r has r and 2 * size - 1 - r; the responses, laid end to end, are
    split into `size` parts. Every token has one owner, and ranks differ by 3 tokens a group at
    most. (The tokens that they score can differ more: a prompt's last token predicts G of them.)

    >>> shares_of_row([(8, [3, 1])], 2)
    [[((0, 2), (6, 8), (8, 10))], [((2, 4), (4, 6), (10, 12))]]
    """
    shares = [[] for _ in range(size)]
    for (start, end), (_, responses) in zip(prompt_bounds(lengths), lengths):
        pieces = split(start, end, 2 * size)
        parts = split(end, end + sum(responses), size)
        for r in range(size):
            shares[r].append((pieces[r], pieces[2 * size - 1 - r], parts[r]))
    return shares


def split(start, end, parts):
    """Splits an interval into [(start, end), ...] of nearly equal length."""
    edges = [start + (end - start) * i // parts for i in range(parts + 1)]
    return list(zip(edges, edges[1:]))


def spans_of_share(lengths, share):
    """What one rank's tokens see -> (causal, to_prompt, to_response), spans as in infra/flash.py.

    Queries count this rank's tokens in order, keys the row's.
    share: this rank's of `shares_of_row`.
    """
    causal, to_prompt, to_response = [], [], []
    query = 0
    for (start, end), (_, responses), intervals in zip(prompt_bounds(lengths), lengths, share):
        *pieces, part = intervals
        for first, last in pieces:  # sees itself, and all of the prompt before it
            causal.append((query, last - first, first, last - first))
            to_prompt.append((query, last - first, start, first - start))
            query += last - first
        first, last = part  # sees all of the prompt
        to_prompt.append((query, last - first, start, end - start))
        response = end
        for R in responses:  # this rank's piece of a response sees itself, and what is before it
            a, b = max(first, response), min(last, response + R)
            if a < b:
                q = query + a - first
                causal.append((q, b - a, a, b - a))
                to_response.append((q, b - a, response, a - response))
            response += R
        query += last - first
    return causal, to_prompt, to_response


class ShardedRow(PackedRow):
    """One rank's tokens of a PackedRow; they attend to the keys and values of the whole row.

    held: (n,) the tokens of the row that this rank holds, in the order of its hidden states. n is
    the same on all ranks: shorter shares end with a copy of token 0, whose output nobody reads.
    gathered_at: (S,) where each token of the row is among the (size, n) that are gathered.
    """

    def __init__(self, lengths, device, sp, cache=None, first_prompt=0):
        self.sp, self.cache, self.first_prompt = sp, cache, first_prompt
        self.prompts = prompt_bounds(lengths)
        shares = shares_of_row(lengths, sp.size)
        tokens = [tokens_of_share(share) for share in shares]  # of each rank
        self.n = max(len(t) for t in tokens)
        self.gathered_at = torch.empty(sum(len(t) for t in tokens), dtype=torch.long)
        for r, t in enumerate(tokens):
            self.gathered_at[t] = r * self.n + torch.arange(len(t))
        self.row_order = self.gathered_at.to(device)
        held = tokens[sp.rank]
        self.held = F.pad(held, (0, self.n - len(held)))
        causal, *full = spans_of_share(lengths, shares[sp.rank])
        self.blocks = make_blocks(causal, full, device)

    def attend(self, layer, q, k, v, scale):
        """q (1, Hq, n, d), k and v (1, Hkv, n, d) of this rank's tokens -> (1, n, Hq, d)."""
        kv = torch.cat([k, v])  # (2, Hkv, n, d)
        kv = self.sp.all_gather(kv)  # (size, 2, Hkv, n, d)
        kv = kv.permute(1, 0, 3, 2, 4).flatten(1, 2)  # (2, size * n, Hkv, d)
        k, v = kv.index_select(1, self.row_order)  # (S, Hkv, d) each, in the row's order
        return self.attend_row(layer, q[0].transpose(0, 1), k, v, scale)

    def find(self, indices):
        owner, place = self.gathered_at[indices] // self.n, self.gathered_at[indices] % self.n
        which = (owner == self.sp.rank).nonzero()[:, 0]
        return which, place[which]

    def from_all_ranks(self, x, indices):
        owner = self.gathered_at[indices] // self.n
        counts = owner.bincount(minlength=self.sp.size).tolist()
        by_rank = owner.argsort(stable=True)  # tokens of rank 0, then of rank 1, ...
        back = by_rank.argsort()  # the inverse permutation
        return self.sp.concatenate(x, counts, reduce=False)[back.to(x.device)]


def tokens_of_share(share):
    """One rank's share -> the tokens of the row that it holds, in order."""
    intervals = [interval for of_group in share for interval in of_group]
    return torch.cat([torch.arange(start, end) for start, end in intervals])


# ---- how many ranks share a row


class RowSharing:
    """Which ranks share each row of a step: --sp of them, or as few as memory allows."""

    def __init__(self, policy, reference, patience, args):
        self.policy, self.reference, self.patience, self.args = policy, reference, patience, args
        self.sp, self.shown = ONE_RANK, None
        self.memory = min(gather(device_memory(policy.device, WORLD)))  # the same on all ranks

    def choose(self, prompts):
        """Sets `sp`, this rank's team, from the lengths of all ranks' prompts."""
        lengths = sum(gather([len(p.ids) for _, p in prompts]), [])
        answers = max(gather(max([self.answers(p) for _, p in prompts], default=0)))
        about = (self.policy, self.reference, lengths, answers, self.memory, self.args, WORLD)
        size, estimate = smallest_team(*about)
        self.sp = sequence_parallel(size, self.patience)
        gpu = self.policy.device.type == "cuda"
        if (WORLD > 1 or gpu) and lengths and size != self.shown:
            self.shown = size
            shared = f"sequence parallelism: {size} ranks share each row"
            say(f"memory: {estimate}" if self.args.sp == "1" else f"{shared}; {estimate}")

    def answers(self, prompt):
        """Tokens of the responses to a prompt, at most."""
        return self.args.group * self.args.max_new if prompt.target is None else len(prompt.target)

    def rows(self):
        """A context: inside, the policy and the reference share their rows over `sp`."""
        return share_rows(self.sp, self.policy, self.reference)

    def share_prompts(self, prompts):
        """The prompts of all ranks that share rows, by position; each rank loaded some of them."""
        return sorted(sum(self.sp.all_gather_objects(prompts), []), key=lambda p: p[0])


def turn(rank, world, sp):
    """A rank's place in the order in which ranks load prompts: few prompts go to different teams.

    sp: --sp. With auto the teams are not known yet: first a rank of each half, then of each
    quarter, and so on (exact where world / size is a power of 2).
    """
    if sp != "auto":
        teams = world // int(sp)
        return rank // int(sp) + teams * (rank % int(sp))
    if world == 1:
        return 0
    parts = next(n for n in range(2, world + 1) if world % n == 0)
    share = world // parts
    return rank // share + parts * turn(rank % share, share, sp)


def smallest_team(policy, reference, lengths, answers, limit, args, world):
    """The fewest ranks that can share a row -> (sp_size, the memory estimate as text).

    The estimate must fit 90 % of `limit` bytes, and no team may be without a prompt; else all ranks
    share. lengths: of the step's prompts.  answers: tokens of the responses to a prompt,
    at most. All ranks must pass the same arguments.

    Sharing a row costs time where memory does not need it (LongVILA-R1: below 256 frames).
    """
    sizes = [int(args.sp)] if args.sp != "auto" else auto_sizes(world, len(lengths))
    for size in sizes:
        most = most_tokens(lengths, answers, size, args, world)
        phases = memory(policy, reference, most, size, world, args.fsdp)
        phase, terms = largest(phases)
        total = sum(terms.values())
        if total < 0.9 * limit:
            break
    listed = " + ".join(f"{name} {x / 1e9:.2f}" for name, x in terms.items() if x)
    return size, (
        f"a row of up to {most.row} tokens takes an estimated {total / 1e9:.2f} GB "
        f"of {limit / 1e9:.1f} on each rank, in {phase} ({listed})"
    )


def auto_sizes(world, prompts):
    """The sizes that --sp auto tries: those that leave no team without a prompt, and `world`.

    >>> auto_sizes(8, 3)
    [4, 8]
    """
    divisors = [n for n in range(1, world) if world % n == 0]
    return [n for n in divisors if world // n <= prompts] + [world]


class MostTokens(NamedTuple):
    """What ranks that share rows meet in a step, at most."""

    row: int  # tokens of a packed row
    row_prompts: int  # tokens of the prompts in it
    row_answers: int  # tokens of the responses in it
    prompts: int  # tokens of all prompts
    prefill: int  # tokens of a row of a prefill; 0 without a rollout
    decoded: tuple[int, int, int]  # together: tokens of prompts, of responses; responses


def most_tokens(lengths, answers, size, args, world):
    """MostTokens of a team of `size` ranks. lengths, answers: see smallest_team."""
    longest, share = max(lengths, default=0), -(-len(lengths) * size // world)
    prompts = sum(sorted(lengths, reverse=True)[:share])  # of a team
    row = max(longest + answers, min(args.row_tokens, prompts + share * answers))
    most = (row, min(prompts, row - answers), min(share * answers, row), prompts)
    if args.algo == "sft":
        return MostTokens(*most, 0, (0, 0, 0))
    prefill = max(longest, min(PREFILL_TOKENS, prompts))
    together = min(share, max(1, CACHE_TOKENS // max(1, longest + answers)))  # prompts
    decoded = (together * longest, together * answers, together * args.group)
    return MostTokens(*most, prefill, decoded)


def largest(phases):
    """Of {phase: {term: bytes}}, the phase that takes most, and its terms."""
    return max(phases.items(), key=lambda item: sum(item[1].values()))


class Sizes:
    """What `memory` counts with: bytes, and where it says so numbers of patches or parameters. A
    number is bf16 on a GPU, under autocast, else fp32."""

    def __init__(self, policy, shards):
        from model import PATCHES_PER_CALL  # here, because model.py imports this file

        self.patches = PATCHES_PER_CALL  # a number
        c, visual = policy.config.text_config, policy.net.model.visual
        gpu, head = policy.device.type == "cuda", policy.net.lm_head.weight
        n = self.number = 2 if gpu else 4
        self.hidden = c.hidden_size * n  # of a token
        heads = c.num_attention_heads * head_size(c)
        # what a layer computes of a token; its backward pass takes twice that, with the gradients
        self.layer = (4 * c.intermediate_size + 8 * c.hidden_size + 2 * heads) * n
        self.kv = 2 * c.num_key_value_heads * head_size(c) * n  # of a token, in one layer
        self.patch = visual.patch_embed.proj.out_channels * n  # of a patch
        self.block = 22 * self.patch  # what one block of the tower computes of it
        self.logits = 4 * c.vocab_size  # of a token
        self.head = 4 * head.numel()
        # Policy.lm_head_weight makes a copy
        self.head_copy = self.head * (gpu and (shards > 1 or head.element_size() < 4))
        # numbers of parameters: the layers'; a frozen tower's, which FSDP does not shard; the rest
        self.layers = count(policy.language_model.layers)
        self.whole = count(visual) - count(visual, trained=True)
        self.rest = count(policy) - self.layers - self.whole


def memory(policy, reference, most, size, world=1, fsdp=False):
    """Estimated bytes of a step on each of `size` ranks that share rows -> {phase: {term: bytes}}.

    One phase follows the other, so a step takes what its largest phase takes. That is 0 to 15 %
    above the peak of the step in simulate.py (tests/test_simulate.py, docs/memory.md).

    most: MostTokens.  world: all ranks; with fsdp the parameters are sharded over them.
    """
    shards = world if fsdp else 1
    visual, s = policy.net.model.visual, Sizes(policy, shards)
    total, trained, tower = count(policy), count(policy, trained=True), count(visual)
    frozen = (frozen_bytes(policy) - frozen_bytes(visual)) / shards + frozen_bytes(visual)
    whole = shards == 1
    always = {
        "weights, moments": 12 * trained / shards + frozen,
        "gradients": 4 * trained * (whole and world > 1),  # DDP's are always there
        "copies in bf16": 2 * trained * (whole and s.number == 2),
        "reference": ((total - tower) / shards + tower) * s.number * (reference is not None),
        "embeddings": most.prompts * policy.visual_width * s.number,
    }
    phases = training_phases(policy, s, most, size, shards, alone=world == 1)
    if most.prefill:
        phases |= rollout_phases(policy, s, most, size, shards)
    for phase, terms in phases.items():
        phases[phase] = always | terms
        phases[phase]["small tensors"] = 0.01 * sum(phases[phase].values())
    return phases


def rollout_phases(policy, s, most, size, shards):
    """What the phases of a rollout take beside what is always there -> {phase: {term: bytes}}.

    s: Sizes. FSDP gathers all parameters.
    """
    gathered = {"gathered weights": (s.layers + s.rest) * s.number * (shards > 1)}
    patches = min(s.patches, most.prompts * policy.merge**2 / size)
    L = len(policy.language_model.layers)
    prompts, answers, responses = most.decoded
    cache = {"prompts' K/V": L * prompts * s.kv, "responses' K/V": L * answers / size * s.kv}
    prefill = {
        "a layer's activations": most.prefill / size * s.layer,
        "a layer's K/V": 2 * most.prefill * s.kv,  # as gathered, and in blocks
    }
    decode = {
        "head in fp32": s.head_copy,
        "sampling": 8 * responses / size * s.logits,  # probabilities in fp64 among them
    }
    return {
        "encoding": gathered | {"a tower block's activations": patches * s.block},
        "prefill": gathered | cache | prefill,
        "decoding": gathered | cache | decode,
    }


def training_phases(policy, s, most, size, shards, alone):
    """What the phases of training take beside what is always there -> {phase: {term: bytes}}.

    s: Sizes. FSDP gathers two layers at a time, and what is not a layer for the whole pass. It
    averages gradients in fp32: a layer's as soon as they are there, those of the rest at the end.
    A process alone has gradients in its backward pass only; as they come, the bf16 copies go.
    """
    layers, blocks = policy.language_model.layers, policy.net.model.visual.blocks
    sharded, L, held = shards > 1, len(layers), most.row / size
    trained, trained_layers = count(policy, trained=True), count(layers, trained=True)
    recomputed = sum(layer.gradient_checkpointing for layer in layers)
    row_kv = 2 * most.row * s.kv  # as gathered, and in blocks
    patches = most.row_prompts * policy.merge**2 / size
    patches *= any(p.requires_grad for p in blocks.parameters())  # else the rollout's embeddings
    recomputed_blocks = sum(block.gradient_checkpointing for block in blocks)
    scored = min(most.row_answers / size * s.logits, 4 * LOGITS_PER_CHUNK)
    head = s.head * policy.net.lm_head.weight.requires_grad
    gathered = {"gathered weights": (s.rest + 2 * s.layers / L) * s.number * sharded}
    kept_in_tower = gathered | {
        "tower inputs": recomputed_blocks * patches * s.patch,
        "kept in the tower": (len(blocks) - recomputed_blocks) * patches * s.block,
        # of the embeddings and of each deepstack feature: an input in fp32, and three more
        "mergers": (1 + policy.family.deepstack) * patches * 5 * s.patch,
    }
    kept = kept_in_tower | {
        "layer inputs": recomputed * held * s.hidden,
        "kept activations": (L - recomputed) * (held * s.layer + row_kv),
    }
    logits = {
        "head in fp32": s.head_copy,
        # summed over chunks; or of the only one, and as bf16
        "its gradient": head * (2 if most.row_answers / size * s.logits > scored else 1.5),
        "logits": 4.5 * scored,
    }
    growing = {"gradients": (4 - 2 * (s.number == 2)) * trained} if alone else {}
    layer = growing | {
        "gradients to average": (head / 2 + 6 * trained_layers / L) * sharded,
        "a layer's activations": 2 * held * s.layer,
        "a layer's K/V": 2 * row_kv,
    }
    trained_rest, averaged = trained - trained_layers, 4 * trained_layers / shards
    tower = growing | {
        "gradients to average": (trained_rest * s.number + averaged) * sharded,
        "a tower block's activations": 2 * min(s.patches, patches) * s.block,
    }
    averaging = growing | {"gradients to average": (6 * trained_rest + averaged) * sharded}
    return {
        "the loss": kept | logits,
        "a layer's backward pass": kept | layer,
        "the tower's backward pass": kept_in_tower | tower,  # the layers' are gone by then
        "the gradients' average": averaging,
    }


def count(module, trained=False):
    """Parameters of a module, or those of them that are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def frozen_bytes(module):
    """Bytes of a module's parameters that are not trained."""
    return sum(p.numel() * p.element_size() for p in module.parameters() if not p.requires_grad)
