"""Rollout: G responses from one prompt. Encode once, prefill once, decode all.

    encode   visual embeddings of every prompt (model.Policy.encode, shared with the log-prob passes of the step)
    prefill  every prompt once through the language model, its keys and values kept in ONE copy (of every rank of policy.group,
             which deals the responses: mrsp.py)
    decode   the groups of all prompts together, one token a step, against that copy (attention.DecodeCache)
    sample   by inverse transform: token = first whose cumulative probability exceeds u. The u of (prompt, response, step)
             come from the prompt's own seed, so a rollout does not depend on which rank or batch it ran in.
"""

from dataclasses import dataclass, field

import torch

from attention import CACHE_TOKENS, DecodeCache
from data import Prompt

COMPACT_EVERY = 4  # decode steps between two looks at who has finished: each look is a host sync
PREFILL_TOKENS = 16384  # of one packed row of prompts


@dataclass(eq=False)
class Group:
    """G responses to one prompt. responses: token ids (R_i,), the EOS included, no padding. logps: their log-probs (R_i,)
    under the policy at the sampling temperature, without top-p. truncated: cut at max_new before an EOS."""
    prompt: Prompt
    responses: list[torch.Tensor] = field(default_factory=list)
    logps: list[torch.Tensor] = field(default_factory=list)
    truncated: list[bool] = field(default_factory=list)


@torch.no_grad()
def generate(policy, prompts, G, *, max_new=768, temperature=1.0, top_p=1.0, seeds=None, features=None):
    """Samples G responses for every prompt -> list[Group], in order; all tensors on the CPU.

    temperature 0 is greedy (log-probs are then those at temperature 1). top_p < 1 samples from a truncated distribution,
    while the log-probs stay those of the whole one: for evaluation, biased in training. seeds: one int per prompt.
    features: what policy.encode(prompts) gave; encoded here otherwise.
    """
    if not prompts:
        return []
    lengths, device = [len(p.ids) for p in prompts], policy.device
    seeds = list(range(len(prompts))) if seeds is None else list(seeds)
    training = policy.training
    policy.eval()  # in train mode activation checkpointing would be on for nothing
    features = policy.encode(prompts) if features is None else features
    if len(prompts) > 1 and len(prompts) * (max(lengths) + G * max_new) > CACHE_TOKENS:
        policy.train(training)
        settings = dict(max_new=max_new, temperature=temperature, top_p=top_p)
        halves = slice(len(prompts) // 2), slice(len(prompts) // 2, None)
        return sum((generate(policy, prompts[h], G, seeds=seeds[h], features=features[h], **settings) for h in halves), [])
    ranks, whole = policy.group, G
    G = len(range(ranks.rank, whole, ranks.size))  # the responses of each prompt that this rank decodes
    uniform = torch.stack([torch.rand(whole, max_new, dtype=torch.float64, generator=torch.Generator().manual_seed(s))
                           for s in seeds])[:, ranks.rank :: ranks.size].flatten(0, 1).to(device)  # (B * G, max_new)

    cache = DecodeCache(policy.config.text_config, lengths, G, max_new, device=device, dtype=policy.compute_dtype)
    last, following = prefill(policy, prompts, features, cache)
    N = len(prompts) * G
    eos = torch.tensor(policy.eos_ids, device=device)
    tokens = torch.full((N, max_new), -1, device=device)
    logps = torch.zeros(N, max_new, dtype=torch.promote_types(last.dtype, torch.float32), device=device)
    rows = torch.arange(N, device=device)  # the response that each row of the cache decodes
    position = following.repeat_interleave(G)
    done = torch.zeros(N, dtype=torch.bool, device=device)
    hidden = last.repeat_interleave(G, dim=0)  # (N, D): the last prompt token predicts the first token of every response

    for t in range(max_new if N else 0):
        token, logp = sample(policy.logits(hidden), uniform[rows, t], temperature, top_p)
        tokens[rows, t] = torch.where(done, -1, token)
        logps[rows, t] = torch.where(done, 0.0, logp.to(logps.dtype))
        done = done | torch.isin(token, eos)
        if t + 1 == max_new:
            break
        if (t + 1) % COMPACT_EVERY == 0:
            if done.all():
                break
            rows, position, done, token = compact(cache, rows, position, done, token)
        x = policy.embed(token[:, None])
        hidden = policy.run_text(x, (position + t).expand(3, -1)[..., None], cache)[:, 0]
        cache.t += 1

    policy.train(training)
    dealt = ranks.exchange(tuple(x.cpu().view(len(prompts), G, max_new) for x in (tokens, logps)))
    groups = [Group(prompt) for prompt in prompts]
    for b, group in enumerate(groups):
        for i in range(whole):
            response, logp = (x[b, i // ranks.size] for x in dealt[i % ranks.size])
            n = int((response >= 0).sum())
            group.responses.append(response[:n].clone())
            group.logps.append(logp[:n].clone())
            group.truncated.append(int(response[n - 1]) not in policy.eos_ids)
    return groups


def prefill(policy, prompts, features, cache):
    """Runs every prompt once, in packed rows, and fills the cache -> last hidden states (B, D), next positions (B,)."""
    last, following, i = [], [], 0
    while i < len(prompts):
        end, total = i + 1, len(prompts[i].ids)
        while end < len(prompts) and total + len(prompts[end].ids) <= PREFILL_TOKENS:
            end, total = end + 1, total + len(prompts[end].ids)
        hidden, plan, nexts = policy.run_row(prompts[i:end], [[] for _ in range(i, end)], features[i:end], cache, first_slot=i)
        ends = torch.tensor([len(p.ids) for p in prompts[i:end]], device=policy.device).cumsum(0) - 1
        last.append(plan.collect(hidden[plan.find(ends)[1]], ends))
        following += nexts
        i = end
    return torch.cat(last), torch.tensor(following, device=policy.device)


def sample(logits, uniform, temperature, top_p):
    """One token per row of logits (N, vocabulary) -> tokens (N,), log-probs (N,). uniform: (N,) in [0, 1)."""
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
    return token, logp.gather(-1, token[:, None])[:, 0]


def compact(cache, rows, position, done, token):
    """Drops finished rows and finished prompts from the cache, when that saves at least a quarter of the rows.

    Every prompt that is left keeps as many rows as the one with most unfinished responses.
    """
    alive = (~done).view(-1, cache.G).sum(1)
    prompts, G = alive.nonzero()[:, 0], int(alive.max())
    if len(prompts) * G > 0.75 * len(rows):
        return rows, position, done, token
    order = done.view(-1, cache.G).to(torch.int8).argsort(dim=1, stable=True)[prompts, :G]  # unfinished rows first
    kept = (prompts[:, None] * cache.G + order).flatten()
    cache.keep(prompts, kept, G)
    return rows[kept], position[kept], done[kept], token[kept]
