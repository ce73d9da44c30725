"""Rollout: G responses from one prompt. Encode once, prefill once, decode all.

    encode   visual embeddings of every prompt (Policy.encode), shared with the rest of the step
    prefill  each prompt once through the language model; its keys and values are kept in ONE copy
    decode   the responses to all prompts together, one token a step, against that copy
             (attention.DecodeCache)
    sample   by inverse transform: the first token whose cumulative probability exceeds u

The u of (prompt, response, token) come from the prompt's own random seed, so a rollout does not
depend on the rank or the batch that it ran in. With sequence parallelism (policy.sp, mrsp.py) every
rank holds the prompts' keys and values and decodes its share of the responses.

Shapes: B prompts, G responses, N = B * G responses, R tokens of a response, D hidden.
"""

import warnings
from dataclasses import dataclass, field
from functools import singledispatch
from pathlib import Path

import torch

from attention import CACHE_TOKENS, DecodeCache
from data import Prompt
from infra.errors import ModelError
from infra.packing import pack
from infra.ranks import say

PREFILL_TOKENS = 16384  # prompt tokens of one packed row of a prefill
COMPACT_EVERY = 4  # decode steps between two checks of who has finished; each is a host sync
WINDOW = 256  # tokens that one CUDA graph serves; it masks those that are not yet written


@dataclass(eq=False)
class Group:
    """G responses to one prompt; lists of G items, tensors on the CPU."""

    prompt: Prompt
    responses: list[torch.Tensor] = field(default_factory=list)  # token ids (R_i,), EOS included
    # (R_i,) log pi_old at the sampling temperature, of the whole distribution whatever top_p is
    logps: list[torch.Tensor] = field(default_factory=list)
    truncated: list[bool] = field(default_factory=list)  # stopped at max_new, before an EOS
    entropies: list[torch.Tensor] = field(default_factory=list)  # (R_i,) of pi_old at each token


@torch.no_grad()
def generate(
    policy,
    prompts,
    G,
    *,
    max_new=768,
    temperature=1.0,
    top_p=1.0,
    seeds=None,
    visual_embeds=None,
):
    """Samples G responses to every prompt -> list[Group], in order.

    temperature: 0 is greedy, and log-probs are then those at temperature 1.
    top_p: below 1, samples come from a truncated distribution while log-probs stay those of the
    whole one. Use it for evaluation; it biases training.
    seeds: one int for each prompt.  visual_embeds: of policy.encode(prompts); None encodes here.
    Raises ModelError: logits that are not finite.
    """
    if not prompts:
        return []
    seeds = list(range(len(prompts))) if seeds is None else list(seeds)
    training = policy.training
    policy.eval()  # in train mode, activation checkpointing would be on for nothing
    if visual_embeds is None:
        visual_embeds = policy.encode(prompts)
    shortest_first = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    longest = max(len(p.ids) for p in prompts)
    together = max(1, CACHE_TOKENS // (longest + G * max_new))
    groups = {}
    for first in range(0, len(prompts), together):
        part = shortest_first[first : first + together]
        batch = [prompts[i] for i in part]
        embeds = [visual_embeds[i] for i in part]
        part_seeds = [seeds[i] for i in part]
        decoded = decode(policy, batch, embeds, part_seeds, G, max_new, temperature, top_p)
        decoded = policy.sp.all_gather_objects(decoded)  # of each rank of the team
        for b, i in enumerate(part):
            groups[i] = make_group(policy, prompts[i], decoded, b, G)
    policy.train(training)
    return [groups[i] for i in range(len(prompts))]


def make_group(policy, prompt, decoded, b, G):
    """Prompt b's responses from what the ranks decoded -> Group. Rank r decoded every response i
    with i mod ranks = r."""
    group = Group(prompt)
    for i in range(G):
        of_rank = decoded[i % len(decoded)]
        response, logp, entropy = (x[b, i // len(decoded)] for x in of_rank)  # (max_new,)
        n = int((response >= 0).sum())
        group.responses.append(response[:n].clone())
        group.logps.append(logp[:n].clone())
        group.entropies.append(entropy[:n].clone())
        group.truncated.append(int(response[n - 1]) not in policy.eos_ids)
        if not group.logps[-1].isfinite().all():
            raise ModelError(
                f"the logits are not finite: the weights are broken (loaded from {policy.folder})"
            )
    return group


def uniform_draws(seeds, G, max_new):
    """One u in [0, 1) for each token of each response -> (B, G, max_new) float64."""
    draws = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        draws.append(torch.rand(G, max_new, dtype=torch.float64, generator=generator))
    return torch.stack(draws)


@singledispatch
def decode(policy, prompts, visual_embeds, seeds, G, max_new, temperature, top_p):
    """What this rank of policy.sp decodes: every size-th response to each prompt.

    prompts: their lengths ascend. Returns tokens, log-probs and entropies on the CPU, each
    (B, G of this rank, max_new); after a response's end -1, 0 and 0. Another class of policy can
    register its own way (experiments/plain.py does).
    """
    mine = slice(policy.sp.rank, None, policy.sp.size)
    uniform = uniform_draws(seeds, G, max_new)[:, mine]
    B, G, _ = uniform.shape  # G: from here on, of this rank
    lengths = [len(p.ids) for p in prompts]
    where = dict(device=policy.device, dtype=policy.compute_dtype)
    cache = DecodeCache(policy.config.text_config, lengths, G, max_new, **where)
    hidden, next_positions = prefill(policy, prompts, visual_embeds, cache)  # (B, D), (B,)
    uniform = uniform.flatten(0, 1).to(policy.device)  # (N, max_new)
    decoding = Decoding(policy, cache, next_positions, uniform, temperature, top_p)
    if G:  # the last prompt token predicts the first token of every response
        decoding.draw(hidden.repeat_interleave(G, dim=0))
        decoding.run(max_new)
    out = (decoding.tokens, decoding.logps, decoding.entropies)
    return tuple(x.cpu().view(B, G, max_new) for x in out)


def prefill(policy, prompts, visual_embeds, cache):
    """Runs every prompt once, in packed rows, and fills the cache -> last hidden states (B, D),
    next positions (B,)."""
    last, next_positions = [], []
    lengths = [len(p.ids) for p in prompts]
    for row in pack(range(len(prompts)), lengths, PREFILL_TOKENS):
        in_row = slice(row[0], row[-1] + 1)
        no_responses = [[] for _ in row]
        hidden, plan, nexts = policy.run_row(
            prompts[in_row], no_responses, visual_embeds[in_row], cache, first_prompt=row[0]
        )
        ends = torch.tensor(lengths[in_row]).cumsum(0) - 1
        _, places = plan.find(ends)
        last.append(plan.from_all_ranks(hidden[places.to(policy.device)], ends))
        next_positions += nexts
    return torch.cat(last), torch.tensor(next_positions, device=policy.device)


class Decoding:
    """State of N responses; each step adds one token.

    tokens, logps, entropies (N, max_new): after a response's end -1, 0 and 0.
    A step reads nothing back from the device and makes no tensor that outlives it, so it can be a
    CUDA graph (policy.cuda_graph): recorded once for each number of responses and each WINDOW of
    tokens, then replayed.
    """

    def __init__(self, policy, cache, next_positions, uniform, temperature, top_p):
        self.policy, self.cache, self.uniform = policy, cache, uniform
        self.temperature, self.top_p = temperature, top_p
        (N, max_new), device = uniform.shape, uniform.device
        self.head = policy.lm_head_weight()
        self.eos = torch.tensor(policy.eos_ids, device=device)
        self.tokens = torch.full((N, max_new), -1, device=device)
        figures = torch.zeros(2, N, max_new, dtype=self.head.dtype, device=device)
        self.logps, self.entropies = figures
        # one entry for each of the n responses that still decode:
        self.alive = torch.arange(N, device=device)  # its number
        self.position = next_positions.repeat_interleave(cache.G)  # M-RoPE id of the first token
        self.done = torch.zeros(N, dtype=torch.bool, device=device)
        self.token = torch.zeros(N, dtype=torch.long, device=device)  # the last token drawn

    def draw(self, hidden):
        """Draws token t = cache.t of every response from hidden states (n, D)."""
        t = self.cache.t
        logits = self.policy.logits(hidden, self.head)
        uniform = self.uniform[self.alive, t]
        token, logp, entropy = sample(logits, uniform, self.temperature, self.top_p)
        self.tokens[self.alive, t] = torch.where(self.done, -1, token)
        self.logps[self.alive, t] = torch.where(self.done, 0.0, logp)
        self.entropies[self.alive, t] = torch.where(self.done, 0.0, entropy)
        self.token.copy_(token)
        self.done |= (token[:, None] == self.eos).any(dim=1)  # torch.isin may wait for the GPU

    def step(self):
        """Runs the tokens drawn last, and draws the next."""
        self.cache.open_slot()
        x = self.policy.embed(self.token[:, None])  # (N, 1, D)
        positions = (self.position + self.cache.t).expand(3, -1)[..., None]  # (3, N, 1)
        hidden = self.policy.run_layers(x, positions, self.cache)[:, 0]
        self.cache.t += 1
        self.draw(hidden)

    def run(self, max_new):
        """Steps until every response has ended or has max_new tokens.

        policy.on_tokens, if set, gets each step's tokens (N,) as they are drawn: -1 after an end.
        """
        on_tokens = self.policy.on_tokens
        if on_tokens:
            on_tokens(self.tokens[:, 0])
        # A CPU reads only the slots that are written. A GPU reads windows and masks, with and
        # without CUDA graphs, so that both give the same bits.
        window = 1 if self.tokens.device.type == "cpu" and not self.policy.cuda_graph else WINDOW
        self.cache.masked = window > 1
        recorded = replay = None
        # drawn: tokens sampled so far for every response; the last enters the cache in `step`
        for drawn in range(1, max_new):
            if drawn % COMPACT_EVERY == 0:
                G = self.cache.G
                unfinished = (~self.done).view(-1, G).sum(1).tolist()  # of each prompt; a host sync
                if not any(unfinished):
                    break
                self.compact(unfinished, drawn)
            slots = len(self.cache.mask)
            self.cache.width = min(slots, -(-drawn // window) * window)
            shape = (len(self.alive), self.cache.width)
            if not self.policy.cuda_graph:
                self.step()
            elif recorded != shape:
                recorded, replay = shape, None
                self.warm_up()
            else:
                replay = replay or self.record()
                replay()
            if on_tokens:
                on_tokens(self.tokens[:, drawn])

    def warm_up(self):
        """A step before the one that is recorded. If it waits for the GPU, prints where, and every
        step from here on runs eagerly: a recording that fails would leave torch's random numbers
        and its allocator broken."""
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            self.step()
            torch.cuda.set_sync_debug_mode(mode)
        waits = [w for w in caught if "called a synchronizing" in str(w.message)]
        if waits:
            where = f"{Path(waits[0].filename).name}:{waits[0].lineno}"
            say(f"decoding without CUDA graphs: a step waits for the GPU at {where}")
            self.policy.cuda_graph = False

    def record(self):
        """Records the step as a CUDA graph -> the function that replays it."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads may call CUDA meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.step()
        return graph.replay

    def compact(self, unfinished, drawn):
        """Drops finished responses and prompts if that saves at least a quarter of the responses.

        Every remaining prompt keeps as many responses as the one with most unfinished ones.
        unfinished: (B,) of each prompt.  drawn: tokens sampled so far for every response.
        """
        G, most = self.cache.G, max(unfinished)
        prompts = [b for b, n in enumerate(unfinished) if n]
        if len(prompts) * most > 0.75 * len(self.alive):
            return
        unfinished_first = self.done.view(-1, G).to(torch.int8).argsort(dim=1, stable=True)
        numbers = torch.arange(len(self.done), device=self.done.device).view(-1, G)  # (B, G)
        kept = numbers.gather(1, unfinished_first)[prompts, :most].flatten()
        self.cache.keep(prompts, kept, most, drawn - 1)
        self.alive, self.position = self.alive[kept], self.position[kept]
        self.done, self.token = self.done[kept], self.token[kept]


def sample(logits, uniform, temperature, top_p):
    """Logits (N, vocabulary) -> one token of each, its log-prob, the entropy: each (N,).

    uniform: (N,) in [0, 1). Log-probs and entropies are those of the whole distribution at
    `temperature` (at 1 where that is 0), whatever top_p is.
    """
    logp = (logits / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        probs = logp.double().exp()
        if top_p < 1:
            probs = nucleus(probs, top_p)
        total = probs.cumsum(-1)
        token = torch.searchsorted(total, uniform[:, None] * total[:, -1:], right=True)[:, 0]
        token = token.clamp(max=logits.shape[-1] - 1)
    entropy = -(logp.exp() * logp).sum(-1)
    return token, logp.gather(-1, token[:, None])[:, 0], entropy


def nucleus(probs, top_p):
    """Keeps the smallest set of tokens whose probability reaches top_p; the others get 0."""
    ordered, index = probs.sort(dim=-1, descending=True)
    ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
    return torch.zeros_like(probs).scatter(-1, index, ordered)
