"""MR-SP, multi-modal reinforcement sequence parallelism (LongVILA-R1, arXiv 2507.07966, section 4): one long video, many GPUs.

`size` neighbouring ranks form a group that works on the same prompts; WORLD / size groups work beside each other.

    load      every video is decoded by one rank, then the prompts are exchanged within the group   (SequenceParallel.exchange)
    stage 1   the 2-frame grids of all videos are dealt by cost; every rank encodes its share, embeddings are gathered, and used
              by every rollout and (of a frozen tower) every log-prob pass of the step                (encode, EmbeddingCache)
    stage 2   the packed row [prompt | o_1 ... o_G] is dealt in blocks; every rank computes its own tokens, and attends with
              them to the keys and values of all, gathered layer by layer                             (deal, ShardedRow)
    rollout   the prompt is prefilled as in stage 2, which leaves its keys and values on every rank; then the responses are
              dealt, and every rank decodes its own                                                   (rollout.generate)

Who holds what in stage 2, on 2 ranks (the blocks of a prompt grow dearer to the right, so the first goes with the last):

    rank 0    [ block 0 |         |         | block 3 | responses, first half  |                        ]
    rank 1    [         | block 1 | block 2 |         |                        | responses, second half ]

Gathering K and V instead of exchanging heads (Ulysses) sets no limit on the number of heads or ranks (28 heads on 8 GPUs), and
with grouped-query attention moves no more for up to 8 ranks. Decoding reads the prompt's keys and values from every rank's own
memory (8 GB for an hour of video on a 3B): left sharded, every token of every layer would wait for a collective.
"""

import contextlib
from functools import lru_cache

import torch
import torch.distributed as dist
import torch.nn.functional as F

from attention import CACHE_TOKENS, LOGITS_PER_CHUNK, PackedRow, layer_blocks
from infra.memory import device_memory
from infra.ranks import WORLD, gather, say

ALL_GATHER = getattr(
    dist, "all_gather_single", dist.all_gather_into_tensor
)  # their names from torch 2.13 on, and before
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

# ---- groups


class SequenceParallel:
    """The ranks that share a row: this is `rank` of `size`. A group of one communicates with nobody."""

    def __init__(self, size=1, rank=0, tensors=None, objects=None):
        self.size, self.rank, self._tensors, self._objects = size, rank, tensors, objects

    def gather(self, x):
        """x (n, ...) of every rank -> (size, n, ...). In the backward pass, x gets the sum of what all ranks want of it."""
        return x[None] if self.size == 1 else _Gather.apply(x, self, True)

    def join(self, x):
        """As gather, for values from which every rank goes on to compute the same loss: x gets this rank's gradient only."""
        return x[None] if self.size == 1 else _Gather.apply(x, self, False)

    def exchange(self, x):
        """The objects of the group's ranks, as a list; one after the other, so that large ones stand in memory once."""
        out = []
        for r in range(self.size):
            box = [x if r == self.rank else None]
            if self.size > 1:
                dist.broadcast_object_list(box, group=self._objects, group_src=r)
            out += box
        return out


class _Gather(torch.autograd.Function):
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


UNSHARDED = SequenceParallel()


@lru_cache
def sequence_parallel(size, timeout=None):
    """This rank's group of `size` neighbours. Every rank must ask for the same sizes in the same order. timeout: a timedelta."""
    if size == 1:
        return UNSHARDED
    world, me = dist.get_world_size(), dist.get_rank()
    if world % size:
        raise ValueError(f"{world} ranks cannot be split into groups of {size}")
    for first in range(0, world, size):
        ranks = list(range(first, first + size))
        made = (
            dist.new_group(ranks, timeout),
            dist.new_group(ranks, timeout, backend="gloo"),
        )  # frames go through the CPU
        if me in ranks:
            mine = made
    return SequenceParallel(size, me % size, *mine)


@contextlib.contextmanager
def share_rows(sp, *policies):
    for policy in policies:
        if policy is not None:
            policy.sp = sp
    try:
        yield
    finally:
        for policy in policies:
            if policy is not None:
                policy.sp = UNSHARDED


# ---- stage 1: embeddings


def encode(policy, prompts):
    """Visual embeddings of each prompt's media in order -> [(V, D), ...], each medium encoded once, by policy.sp together.

    With gradients under torch.enable_grad, for a vision tower that is trained: what all ranks want of an embedding flows back
    to the rank that encoded it. Under torch.no_grad, policy.embedding_cache is asked first, if there is one.
    """
    sp, cache = policy.sp, None if torch.is_grad_enabled() else policy.embedding_cache
    same = {
        m: m.key or id(m) for p in prompts for m in p.media
    }  # two questions about one video share its embedding
    media = {key: m for m, key in same.items()}
    known = {}
    if cache:
        found = {key: cache.get(m) for key, m in media.items()}
        everywhere = zip(
            *sp.exchange([x is not None for x in found.values()])
        )  # an entry may go between two looks
        known = {
            key: x.to(policy.device)
            for (key, x), hits in zip(found.items(), everywhere)
            if all(hits)
        }
    missing = {key: m for key, m in media.items() if key not in known}
    grids = [(m, i) for m in missing.values() for i in range(m.grid[0])]
    costs = [m.grid[1] * m.grid[2] for m, _ in grids]
    owners = share_out(costs, sp.size)
    own = policy.encode_grids([grid for grid, owner in zip(grids, owners) if owner == sp.rank])
    merged = [c // policy.merge**2 for c in costs]  # visual tokens of a grid
    counts = [sum(n for n, owner in zip(merged, owners) if owner == r) for r in range(sp.size)]
    if grids:
        padded = F.pad(own, (0, 0, 0, max(counts) - len(own)))
        everything = torch.cat([x[:n] for x, n in zip(sp.gather(padded), counts)])
        known |= dict(zip(missing, everything.split([m.tokens for m in missing.values()])))
    if cache and sp.rank == 0:
        for key, m in missing.items():
            cache.put(m, known[key])
    return [
        torch.cat([known[same[m]] for m in p.media]) if p.media else own.new_zeros(0, own.shape[1])
        for p in prompts
    ]


def share_out(costs, size):
    """Owners (one of `size` ranks for every item) of contiguous shares of nearly equal cost."""
    total, before, owners = sum(costs), 0, []
    for cost in costs:
        owners.append(int((before + cost / 2) / total * size))
        before += cost
    return owners


# ---- stage 2: the row


def deal(lengths, size):
    """Deals a packed row over ranks -> for each rank its spans [(first, last), ...] of the row, three for every group.

    lengths: [(P, [R_1, ..., R_G]), ...]. A prompt is cut into 2 * size blocks, rank r has blocks r and 2 * size - 1 - r; the
    responses together are cut into `size` parts. Every token is somebody's, and ranks differ by 3 tokens a group at most.
    """
    cut = lambda n, k, at: [at + n * i // k for i in range(k + 1)]
    spans, start = [[] for _ in range(size)], 0
    for P, responses in lengths:
        T = sum(responses)
        p, o = cut(P, 2 * size, start), cut(T, size, start + P)
        for r in range(size):
            spans[r] += [(p[r], p[r + 1]), (p[2 * size - 1 - r], p[2 * size - r]), (o[r], o[r + 1])]
        start += P + T
    return spans


class ShardedRow(PackedRow):
    """One rank's part of a PackedRow: its own tokens attend to the keys and values of the whole row.

    own: (n,) which tokens of the row this rank has, in the order of its hidden states; n is the same on all ranks of the
    group, the shorter ones repeat token 0 at the tail, where nobody attends to it and nobody reads it.
    """

    def __init__(self, lengths, device, sp, cache=None, first_slot=0):
        self.sp, self.cache, self.first_slot, self.prompts = sp, cache, first_slot, []
        spans = deal(lengths, sp.size)
        counts = [sum(b - a for a, b in s) for s in spans]
        self.n = max(counts)
        tokens = [torch.cat([torch.arange(a, b) for a, b in s]) for s in spans]
        slot = torch.empty(
            sum(counts), dtype=torch.long
        )  # of every token of the row, in what gather gives
        for r, t in enumerate(tokens):
            slot[t] = r * self.n + torch.arange(len(t))
        self.slot, self.own = (
            slot.to(device),
            F.pad(tokens[sp.rank], (0, self.n - counts[sp.rank])).to(device),
        )

        squares, across, earlier, start, here, mine = [], [], [], 0, 0, iter(spans[sp.rank])
        read = torch.zeros(len(slot), dtype=torch.bool)
        for P, responses in lengths:
            self.prompts.append((start, start + P))
            for a, b in (
                next(mine),
                next(mine),
            ):  # a block of the prompt sees itself, and all of the prompt before it
                squares.append((here, b - a, a, b - a))
                across.append((here, b - a, start, a - start))
                here += b - a
            a, b = next(mine)
            across.append((here, b - a, start, P))
            read[start + P - 1] = True
            start += P
            for R in (
                responses
            ):  # what this rank has of a response sees itself, and what others have of it before
                first, last = max(a, start), min(b, start + R)
                if first < last:
                    squares.append((here + first - a, last - first, first, last - first))
                    earlier.append((here + first - a, last - first, start, first - start))
                read[start : start + R - 1] = True
                start += R
            here += b - a
        read = read[tokens[sp.rank]]
        self.blocks = layer_blocks(squares, [across, earlier], read, device)
        self.reads, self.place = read.nonzero()[:, 0].to(device), (read.cumsum(0) - 1).to(device)

    def attend(self, layer, q, k, v, scale, last=False):
        kv = self.sp.gather(torch.cat([k, v]))  # (size, 2, Hkv, n, d)
        k, v = (
            kv.permute(1, 0, 3, 2, 4).flatten(1, 2).index_select(1, self.slot)
        )  # (S, Hkv, d) each, in the row's order
        return self.attend_row(layer, q[0].transpose(0, 1), k, v, scale, last)

    def find(self, tokens):
        """Of the given tokens of the row, all of them read: the indices of those that are here, and where their hidden states
        are."""
        here = (self.slot[tokens] // self.n == self.sp.rank).nonzero()[:, 0]
        return here, self.place[self.slot[tokens[here]] % self.n]

    def collect(self, x, tokens):
        """x (k, ...) of the tokens that `find` gave this rank -> (len(tokens), ...) of all, on every rank."""
        owner = self.slot[tokens] // self.n
        counts = owner.bincount(minlength=self.sp.size)
        width = int(counts.max())
        order = owner.argsort(stable=True)  # tokens of rank 0, then of rank 1, ...
        place = torch.empty_like(order)
        place[order] = torch.cat(
            [r * width + torch.arange(n, device=x.device) for r, n in enumerate(counts.tolist())]
        )
        padded = F.pad(x, (*(0, 0) * (x.ndim - 1), 0, width - len(x)))
        return self.sp.join(padded).flatten(0, 1)[place]


# ---- which degree


def turn(rank, world, sp):
    """When a rank's turn to load a prompt comes, so that few prompts land in different groups. For a degree that is not fixed:
    first a rank of each half, then of each quarter, and so on (exact where world / degree is a power of 2)."""
    if sp != "auto":
        return rank // int(sp) + world // int(sp) * (rank % int(sp))
    if world == 1:
        return 0
    parts = next(n for n in range(2, world + 1) if world % n == 0)
    share = world // parts
    return rank // share + parts * turn(rank % share, share, sp)


def memory(policy, reference, *, row, prompts, decoded, answers, size, shards=1):
    """Bytes that a step needs on each GPU of a group of `size`, without the vision tower's activations -> {term: bytes}.

    In tokens, at most: row, of a packed row; prompts, of all prompts of the group; answers, of the responses to one prompt;
    decoded, of prompts that are decoded together, and of the responses to these: a pair.
    shards: ranks that the parameters are cut over (fsdp.py). Gathered are, in training, what is no layer, and two layers, with
    gradients and an fp32 copy of these to be averaged; all parameters in decoding.
    """
    c, bytes_ = (
        policy.config.text_config,
        2 if policy.device.type == "cuda" else 4,
    )  # bf16 under autocast, or fp32
    count = lambda module, only=False: sum(
        p.numel() for p in module.parameters() if p.requires_grad >= only
    )
    total, trained, tower, layers = (
        count(policy),
        count(policy, True),
        count(policy.net.model.visual),
        count(policy.text.layers),
    )
    recomputed = sum(layer.gradient_checkpointing for layer in policy.text.layers)
    L, D, heads, own = c.num_hidden_layers, c.hidden_size, c.num_attention_heads, row / size
    kv = 2 * D * c.num_key_value_heads / heads * bytes_  # of a token in one layer
    activations = own * (6 * D + 3 * c.intermediate_size) * bytes_
    every_kv = 2 * row * kv  # gathered, and cut into blocks
    train = {
        "layer inputs": recomputed * own * D * bytes_,
        "kept activations": (L - recomputed) * (activations + every_kv),
        "one layer's activations": 2 * activations,
        "one layer's K/V": 2 * every_kv,  # with their gradients
        "logits": 4 * min(answers / size * c.vocab_size, LOGITS_PER_CHUNK) * 4,
    }
    decode = {"prompts' K/V": L * decoded[0] * kv, "responses' K/V": L * decoded[1] / size * kv}
    if shards > 1:
        train["gathered weights and gradients"] = (trained - layers + 2 * layers / L) * (
            2 * bytes_ + 4
        )
        decode["gathered weights"] = trained * bytes_
        if bytes_ == 2:  # Policy.head
            train["head in fp32"], decode["head in fp32"] = (
                8 * c.vocab_size * D,
                4 * c.vocab_size * D,
            )
    return {
        "weights, gradients, moments": 16 * trained / shards
        + 4 * (total - trained),  # a frozen tower is whole
        "copies in bf16": 2 * trained * (bytes_ == 2 and shards == 1),
        "reference": ((total - tower) / shards + tower) * bytes_ * (reference is not None),
        "embeddings": prompts * D * bytes_,
        **max(train, decode, key=lambda terms: sum(terms.values())),
    }  # training and decoding come one after the other


def smallest_group(policy, reference, lengths, limit, args, world):
    """The smallest degree with no more groups than prompts whose estimate fits 90 % of `limit` bytes, else the largest
    -> (degree, the estimate as text). lengths: of the step's prompts. All ranks must give the same arguments.

    Sharding costs time where it is not needed (the paper's figure: below 256 frames), so --sp auto shards no more than it must.
    """
    divisors = [
        d
        for d in range(1, world + 1)
        if world % d == 0 and (d == world or world // d <= len(lengths))
    ]
    degrees = divisors if args.sp == "auto" else [int(args.sp)]
    longest, answers = max(lengths, default=0), args.group * args.max_new
    for size in degrees:
        share = -(-len(lengths) * size // world)  # prompts of a group
        together = min(share, max(1, CACHE_TOKENS // (longest + answers)))
        prompts = sum(sorted(lengths, reverse=True)[:share])
        row = max(longest + answers, min(args.row_tokens, prompts + share * answers))
        terms = memory(
            policy,
            reference,
            row=row,
            prompts=prompts,
            answers=answers,
            size=size,
            decoded=(together * longest, together * answers),
            shards=world if args.fsdp else 1,
        )
        if sum(terms.values()) < 0.9 * limit:
            break
    listed = " + ".join(f"{name} {x / 1e9:.2f}" for name, x in terms.items() if x)
    return size, (
        f"a row of up to {row} tokens takes an estimated {sum(terms.values()) / 1e9:.2f} GB "
        f"of {limit / 1e9:.1f} on each rank ({listed})"
    )


class RowSharing:
    """Which ranks share each row of a step (py): --sp of them, or as few as memory allows."""

    def __init__(self, policy, reference, patience, args):
        self.policy, self.reference, self.patience, self.args = policy, reference, patience, args
        self.sp, self.shown = UNSHARDED, None
        self.memory = min(gather(device_memory(policy.device, WORLD)))  # the same on all ranks

    def choose(self, prompts):
        """Sets `sp`, this rank's group, from the lengths of all ranks' prompts."""
        lengths = sum(gather([len(p.ids) for _, p in prompts]), [])
        size, estimate = smallest_group(
            self.policy, self.reference, lengths, self.memory, self.args, WORLD
        )
        self.sp = sequence_parallel(size, self.patience)
        if WORLD > 1 and lengths and size != self.shown:
            self.shown = size
            shared = f"sequence parallelism: {size} ranks share each row"
            say(f"memory: {estimate}" if self.args.sp == "1" else f"{shared}; {estimate}")

    def rows(self):
        """A context: inside, the policy and the reference shard their rows over `sp`."""
        return share_rows(self.sp, self.policy, self.reference)

    def exchange(self, prompts):
        """The prompts of all ranks that share rows, by position; each rank loaded some of them."""
        return sorted(sum(self.sp.exchange(prompts), []), key=lambda p: p[0])
