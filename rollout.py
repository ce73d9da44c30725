"""Rollout: G responses from one prompt. Encode once, prefill once, decode all.

encode   visual embeddings of every prompt (model.Policy.encode, shared with the log-prob passes of the step)
prefill  every prompt once through the language model, its keys and values kept in ONE copy (of every rank of policy.sp,
         which deals the responses: mrsp.py)
decode   the groups of all prompts together, one token a step, against that copy (attention.DecodeCache)
sample   by inverse transform: token = first whose cumulative probability exceeds u. The u of (prompt, response, step)
         come from the prompt's own seed, so a rollout does not depend on which rank or batch it ran in.
"""

from dataclasses import dataclass, field
from functools import singledispatch

import torch

from attention import CACHE_TOKENS, DecodeCache
from data import Prompt
from infra.errors import ModelError

WINDOW = 64  # a CUDA graph is good for so many tokens, and attends to up to so many that are not there yet
COMPACT_EVERY = 4  # decode steps between two looks at who has finished: each look is a host sync
PREFILL_TOKENS = 16384  # of one packed row of prompts


@dataclass(eq=False)
class Group:
    """G responses to one prompt. responses: token ids (R_i,), the EOS included, no padding. logps: their log-probs (R_i,)
    under the policy at the sampling temperature, without top-p. truncated: cut at max_new before an EOS. entropies: of
    the policy's distribution at each token (R_i,), as logps."""

    prompt: Prompt
    responses: list[torch.Tensor] = field(default_factory=list)
    logps: list[torch.Tensor] = field(default_factory=list)
    truncated: list[bool] = field(default_factory=list)
    entropies: list[torch.Tensor] = field(default_factory=list)


@torch.no_grad()
def generate(
    policy, prompts, G, *, max_new=768, temperature=1.0, top_p=1.0, seeds=None, visual_embeds=None
):
    """Samples G responses for every prompt -> list[Group], in order; all tensors on the CPU.

    temperature 0 is greedy (log-probs are then those at temperature 1). top_p < 1 samples from a truncated distribution,
    while the log-probs stay those of the whole one: for evaluation, biased in training. seeds: one int per prompt.
    visual_embeds: what policy.encode(prompts) gave; encoded here otherwise.
    """
    if not prompts:
        return []
    seeds = list(range(len(prompts))) if seeds is None else list(seeds)
    training = policy.training
    policy.eval()  # in train mode activation checkpointing would be on for nothing
    visual_embeds = policy.encode(prompts) if visual_embeds is None else visual_embeds
    order = sorted(
        range(len(prompts)), key=lambda i: len(prompts[i].ids)
    )  # prompts of one length are decoded together
    most = max(1, CACHE_TOKENS // (len(prompts[order[-1]].ids) + G * max_new))
    groups = [Group(prompt) for prompt in prompts]
    for first in range(0, len(order), most):
        part = order[first : first + most]
        of_part = lambda x: [x[i] for i in part]
        dealt = policy.sp.exchange(
            decode(
                policy,
                of_part(prompts),
                of_part(visual_embeds),
                of_part(seeds),
                G,
                max_new,
                temperature,
                top_p,
            )
        )
        for b, group in enumerate(of_part(groups)):
            for i in range(G):  # response i was decoded by rank i % size
                response, logp, entropy = (x[b, i // len(dealt)] for x in dealt[i % len(dealt)])
                n = int((response >= 0).sum())
                group.responses.append(response[:n].clone())
                group.logps.append(logp[:n].clone())
                group.entropies.append(entropy[:n].clone())
                group.truncated.append(int(response[n - 1]) not in policy.eos_ids)
                if not group.logps[-1].isfinite().all():
                    raise ModelError(
                        f"logits that are not finite: the weights are broken (the policy began as {policy.folder})"
                    )
    policy.train(training)
    return groups


@singledispatch
def decode(policy, prompts, visual_embeds, seeds, G, max_new, temperature, top_p):
    """What this rank of policy.sp decodes, every size-th response of each prompt -> tokens, log-probs, entropies (B, G of
    this rank, max_new), -1, 0 and 0 after the end, on the CPU. The prompts' lengths ascend."""
    mine = slice(policy.sp.rank, None, policy.sp.size)
    uniform = torch.stack(
        [
            torch.rand(G, max_new, dtype=torch.float64, generator=torch.Generator().manual_seed(s))
            for s in seeds
        ]
    )[:, mine]  # (B, G, max_new)
    B, G, _ = uniform.shape
    cache = DecodeCache(
        policy.config.text_config,
        [len(p.ids) for p in prompts],
        G,
        max_new,
        device=policy.device,
        dtype=policy.compute_dtype,
    )
    hidden, following = prefill(policy, prompts, visual_embeds, cache)
    decoding = Decoding(
        policy, cache, following, uniform.flatten(0, 1).to(policy.device), temperature, top_p
    )
    if G:
        decoding.sample(
            hidden.repeat_interleave(G, dim=0)
        )  # the last prompt token predicts the first token of every response
        decoding.run(max_new)
    return tuple(
        x.cpu().view(B, G, max_new) for x in (decoding.tokens, decoding.logps, decoding.entropies)
    )


def prefill(policy, prompts, visual_embeds, cache):
    """Runs every prompt once, in packed rows, and fills the cache -> last hidden states (B, D), next positions (B,)."""
    last, following, i = [], [], 0
    while i < len(prompts):
        end, total = i + 1, len(prompts[i].ids)
        while end < len(prompts) and total + len(prompts[end].ids) <= PREFILL_TOKENS:
            end, total = end + 1, total + len(prompts[end].ids)
        hidden, plan, nexts = policy.run_row(
            prompts[i:end], [[] for _ in range(i, end)], visual_embeds[i:end], cache, first_slot=i
        )
        ends = (
            torch.tensor([len(p.ids) for p in prompts[i:end]], device=policy.device).cumsum(0) - 1
        )
        last.append(plan.collect(hidden[plan.find(ends)[1]], ends))
        following += nexts
        i = end
    return torch.cat(last), torch.tensor(following, device=policy.device)


class Decoding:
    """State of N responses; each step adds one token: tokens, logps, entropies (N, max_new), -1, 0 and 0 after the end.

    A step reads nothing back from the device and makes no tensor that outlives it, so that it can be a CUDA graph
    (policy.cuda_graph): recorded once for each number of rows and each `WINDOW` of tokens, then replayed.
    """

    def __init__(self, policy, cache, following, uniform, temperature, top_p):
        self.policy, self.cache, self.uniform, self.temperature, self.top_p = (
            policy,
            cache,
            uniform,
            temperature,
            top_p,
        )
        (N, max_new), device = uniform.shape, uniform.device
        self.head = policy.head()
        self.eos = torch.tensor(policy.eos_ids, device=device)
        self.tokens = torch.full((N, max_new), -1, device=device)
        self.logps, self.entropies = torch.zeros(
            2, N, max_new, dtype=self.head.dtype, device=device
        )
        self.rows = torch.arange(
            N, device=device
        )  # the response that each row of the cache decodes
        self.position = following.repeat_interleave(cache.G)
        self.done = torch.zeros(N, dtype=torch.bool, device=device)
        self.token = torch.zeros(N, dtype=torch.long, device=device)

    def sample(self, hidden):
        """Draws token t of every row, t of the cache, from hidden states (N, D)."""
        t = self.cache.t
        logits = self.policy.logits(hidden, self.head)
        token, logp, entropy = sample(
            logits, self.uniform[self.rows, t], self.temperature, self.top_p
        )
        self.tokens[self.rows, t] = torch.where(self.done, -1, token)
        self.logps[self.rows, t] = torch.where(self.done, 0.0, logp)
        self.entropies[self.rows, t] = torch.where(self.done, 0.0, entropy)
        self.token.copy_(token)
        self.done |= torch.isin(token, self.eos)

    def step(self):
        """Runs the tokens drawn last, and draws the next."""
        x = self.policy.embed(self.token[:, None])
        hidden = self.policy.run_text(
            x, (self.position + self.cache.t).expand(3, -1)[..., None], self.cache
        )[:, 0]
        self.cache.t += 1
        self.sample(hidden)

    def run(self, max_new):
        """Steps until every response has ended or has max_new tokens."""
        window = WINDOW if self.policy.cuda_graph else 1
        recorded = replay = None
        for drawn in range(1, max_new):  # tokens of every row; the last is not in the cache yet
            if drawn % COMPACT_EVERY == 0:
                if self.done.all():
                    break
                self.compact(drawn)
            self.cache.width = min(max_new, -(-drawn // window) * window)
            if not self.policy.cuda_graph:
                self.step()
            elif recorded != (shape := (len(self.rows), self.cache.width)):
                recorded, replay = shape, None
                self.step()  # warms up
            else:
                replay = replay or record(self.step)
                replay()

    def compact(self, drawn):
        """Drops finished rows and finished prompts, when that saves at least a quarter of the rows.

        Every prompt that is left keeps as many rows as the one with most unfinished responses.
        """
        G = self.cache.G
        alive = (~self.done).view(-1, G).sum(1)
        prompts, most = alive.nonzero()[:, 0], int(alive.max())
        if len(prompts) * most > 0.75 * len(self.rows):
            return
        order = (
            self.done.view(-1, G).to(torch.int8).argsort(dim=1, stable=True)[prompts, :most]
        )  # unfinished rows first
        kept = (prompts[:, None] * G + order).flatten()
        self.cache.keep(prompts, kept, most, drawn - 1)
        self.rows, self.position, self.done, self.token = (
            x[kept] for x in (self.rows, self.position, self.done, self.token)
        )


def record(step):
    """The step as a CUDA graph: the call that replays it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def sample(logits, uniform, temperature, top_p):
    """One token per row of logits (N, vocabulary) -> tokens, log-probs, entropies, each (N,). uniform: (N,) in [0, 1).
    Log-probs and entropies are those of the whole distribution at `temperature`, at 1 where that is 0, whatever top_p is."""
    logp = (logits / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        probs = logp.double().exp()
        if top_p < 1:  # the smallest set of tokens whose probability reaches top_p
            ordered, index = probs.sort(dim=-1, descending=True)
            ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
            probs = torch.zeros_like(probs).scatter(-1, index, ordered)
        total = probs.cumsum(-1)
        token = torch.searchsorted(total, uniform[:, None] * total[:, -1:], right=True)[:, 0]
        token = token.clamp(max=logits.shape[-1] - 1)
    return token, logp.gather(-1, token[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
