"""One step: from this rank's prompts to the update, for every algorithm.

    sft_step    the log-prob of the reasoning and answer that a record holds goes up
    grpo_step   rollout and rewards (roll), advantages, gradient (grpo_gradient), update; with T-GRPO's shuffled responses
Rewards are gathered from all ranks before advantages are taken, and every loss is divided by a count over the whole batch, so
that any split of the step over ranks and rows gives the same gradient. The ranks of a sequence-parallel group (mrsp.py) have the
same prompts here, compute the same losses, and their gradients add up; their numbers are counted once.
"""

import contextlib
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence

import grpo
import rewards
import tgrpo
from data import Prompt
from infra import fsdp
from infra.clock import timed
from infra.ranks import WORLD, gather, say, seed
from rollout import Group, generate

PARTS = ("reward", "accuracy", "format", "length_bonus")  # what score() gives for a response


def pack(items, lengths, budget):
    """Splits items into rows of at most `budget` tokens, in order; an item longer than that gets a row of its own."""
    rows, total = [], 0
    for item, n in zip(items, lengths):
        if not rows or total + n > budget:
            rows.append([])
            total = 0
        rows[-1].append(item)
        total += n
    return rows


def unwrap(policy):
    """The Policy inside DistributedDataParallel; a sharded one is the Policy itself."""
    return policy.module if isinstance(policy, DistributedDataParallel) else policy


def backward(policy, rows, loss):
    """Accumulates the gradient of loss(row), each row's share of the GLOBAL loss, computed through policy's forward.

    Ranks do the same number of passes: one that has fewer rows does empty ones. DDP averages over ranks in the last backward,
    a sharded policy (fsdp.py) in each; both divide by the number of ranks, so each share is multiplied by it.
    """
    torch.clear_autocast_cache()  # before torch 2.10, weights that were cast without gradient stay without
    most = max(gather(len(rows)))
    for i, row in enumerate(rows + [[]] * (most - len(rows))):
        later = isinstance(policy, DistributedDataParallel) and i + 1 < most
        with policy.no_sync() if later else contextlib.nullcontext():
            (loss(row) * WORLD).backward()


def sft_step(policy, prompts, optimize, args):
    """One supervised step: mean negative log-prob of all response tokens of the batch, prompts excluded.

    prompts: [(position in the step, Prompt)] of this rank. Returns as grpo_step; there are no samples to log.
    """
    prompts, size = [p for _, p in prompts], unwrap(policy).sp.size
    tokens = sum(gather(sum(len(p.target) for p in prompts), size))
    total = []

    def loss(row):
        visual_embeds = None if args.train_vision else [embeds for _, embeds in row]
        logp, _ = policy([p for p, _ in row], [[p.target] for p, _ in row], visual_embeds)
        total.append(-float(logp.detach().sum()) / tokens)
        return -logp.sum() / tokens

    with (
        timed("encode"),
        torch.no_grad(),
    ):  # a tower that is trained is encoded with gradient, row by row
        visual_embeds = (
            [None] * len(prompts) if args.train_vision else unwrap(policy).encode(prompts)
        )
    with timed("train"):
        lengths = [len(p.ids) + len(p.target) for p in prompts]
        backward(policy, pack(list(zip(prompts, visual_embeds)), lengths, args.row_tokens), loss)
    with timed("optimizer"):
        entry = optimize()
    shown = torch.tensor(
        sum(gather([p.frames_x_pixels for p in prompts], size), []), dtype=torch.float64
    )
    return (
        {
            "loss": sum(gather(sum(total), size)),
            "response_length": tokens / len(shown),
            "frames": float(shown[:, 0].mean()),
            "pixels": float(shown[:, 1].mean()),
            **counted([entry]),
        },
        [],
        tokens,
    )


def grpo_step(policy, reference, prompts, more, builder, step, optimize, args):
    """One GRPO step: rollouts, rewards, advantages, and up to args.minibatches times a gradient and an update.

    prompts: as in sft_step.  more(k): the prompts of refill k (DAPO's dynamic sampling).  reference: frozen, when beta > 0.
    optimize: clips the gradient and steps the optimizer -> log entry. Returns (log entry, samples to log, response tokens).
    """
    mine, everyone = roll(unwrap(policy), prompts, builder, step, args)
    temporal, refills = temporal_bonus(everyone, args), 0
    while (
        args.drop_zero_std
        and len(teaching(everyone, args)) < args.prompts
        and refills < args.refill
    ):
        refills += 1
        with timed("data"):
            extra = more(refills)
        more_mine, more_everyone = roll(unwrap(policy), extra, builder, step, args)
        mine, everyone = mine | more_mine, everyone + more_everyone
        temporal = temporal_bonus(everyone, args)
    taught = teaching(everyone, args)
    if args.refill and len(taught) < args.prompts:
        say(
            f"step {step + 1}: {len(taught)} of {args.prompts} groups have mixed rewards after {refills} refills"
        )
    trained = taught[: args.prompts] if args.drop_zero_std else everyone
    advantages = advantages_of(trained, args)
    for s, A in zip(trained, advantages.tolist()):
        s["advantage"] = A

    updates = []
    for part in shares(
        [has_gradient(s, A, args) for s, A in zip(trained, advantages)], args.minibatches
    ):
        with timed("train"):  # from the second update on, the ratio is not 1
            totals = grpo_gradient(
                policy, reference, [(trained[i], advantages[i]) for i in part], mine, args
            )
        with timed(
            "optimizer"
        ):  # no token had a gradient: no step, which would only move by momentum and weight decay
            updates.append(
                totals
                | (optimize() if totals["tokens"] else {"grad_norm": 0.0, "skipped_update": True})
            )
    column = lambda name: torch.tensor(
        [s[name] for s in everyone], dtype=torch.float64
    )  # everything that was sampled
    frames, pixels = column("shown").mean(0).tolist()
    mean = lambda name: float(column(name).mean())
    entry = {
        **{name: mean(name) for name in PARTS},
        **temporal,
        **trained_tokens(updates),
        **counted(updates),
        "entropy": float(column("entropy").sum() / column("lengths").sum()),
        "response_length": mean("lengths"),
        "truncated": mean("truncated"),
        "zero_std_groups": (len(everyone) - len(taught)) / len(everyone),
        "trained_groups": len(trained),
        "refills": refills,
        "frames": frames,
        "pixels": pixels,
    }
    logged = [
        line
        for s in everyone[:2]
        if s["position"] in mine
        for line in sample_lines(s, mine[s["position"]], step, args)
    ]
    logged = sum(gather(logged, unwrap(policy).sp.size), [])
    return entry, sorted(logged, key=lambda line: line["position"]), int(column("lengths").sum())


def advantages_of(groups, args):
    """What the gradient sees of groups with their "bonus": (B, G), of the reward and the bonus, or the bonus added after."""
    if not groups:
        return torch.zeros(0, args.group, dtype=torch.float64)
    reward, bonus = (
        torch.tensor([s[name] for s in groups], dtype=torch.float64) for name in ("reward", "bonus")
    )
    if args.temporal == "advantage":
        return grpo.group_advantages(reward, args.norm) + bonus
    return grpo.group_advantages(reward + bonus, args.norm)


def teaching(groups, args):
    """The groups in which a response has an advantage."""
    return [s for s, A in zip(groups, advantages_of(groups, args)) if A.any()]


def used(s, args):
    """(G,): 1 for the responses of a group that are trained, 0 for the others."""
    return torch.tensor(
        [not (args.mask_truncated and cut) for cut in s["truncated"]], dtype=torch.float64
    )


def has_gradient(s, A, args):
    """Whether a group with these advantages has a gradient: from them, or from the KL penalty."""
    return bool(used(s, args).any()) and bool(args.beta or A.any())


def shares(learnable, updates):
    """The groups of each update, as lists of their numbers, the same on all ranks. learnable: of each group, whether it has a
    gradient. Every update gets a like share of those that have one and of those that have none, and at least one that has; where
    there are fewer of these than updates, there are as many updates as these. Neighbours stay together: they are on many ranks.

    >>> shares([True] * 8, 5)
    [[0, 1], [2, 3], [4], [5, 6], [7]]
    >>> shares([False, False, True, True], 3)
    [[0, 2], [1, 3]]
    """
    n = max(1, min(updates, sum(learnable)))
    parts = [[] for _ in range(n)]
    for kind in (True, False):
        groups = [i for i, x in enumerate(learnable) if x == kind]
        for k, part in enumerate(parts):
            part += groups[-(-k * len(groups) // n) : -(-(k + 1) * len(groups) // n)]
    return [sorted(part) for part in parts]


def counted(updates):
    """Log entry of the updates of a step, each as `optimize` gives it: how many were made, and how many were skipped."""
    skipped = sum(u["skipped_update"] for u in updates)
    return {
        "grad_norm": max(u["grad_norm"] for u in updates),
        "updates": len(updates) - skipped,
        "skipped_updates": skipped,
        "skipped_update": skipped == len(updates),
    }


def trained_tokens(updates):
    """Log entry of the loss, the mean over the updates that were made, and of what was seen of the trained tokens. Without a
    trained token there is nothing to log but a KL of 0."""
    made = [u for u in updates if not u["skipped_update"]] or updates
    total = lambda name: sum(u[name] for u in updates)
    if not total("tokens"):
        return {"kl": 0.0}
    per_token = {name: total(name) / total("tokens") for name in ("kl", "clipped", "ratio")}
    first = next(u for u in updates if u["tokens"])  # before the policy has moved
    return {
        "loss": sum(u["loss"] for u in made) / len(made),
        **per_token,
        "entropy_trained": total("entropy") / total("tokens"),
        "mismatch": first["mismatch"] / first["tokens"],
    }


def sample_lines(s, rolled, step, args):
    """The lines of samples.jsonl of a group, one for each response. s: the group's numbers."""
    sample = rolled.group.prompt.sample
    about = dict(
        step=step + 1,
        position=s["position"],
        id=sample.id,
        path=sample.path,
        data_type=sample.data_type,
        fps=sample.fps,
        segment=sample.segment,
        question=sample.question,
        options=sample.options,
        answer=sample.answer,
    )
    if s["orders"]:
        seen = "probability_drops" if args.temporal == "contrast" else "shuffled_accuracies"
        about |= {"orders": s["orders"], seen: s["shuffled"]}
    return [
        about | dict(response=text, **part, temporal_bonus=bonus, advantage=advantage)
        for text, part, bonus, advantage in zip(
            rolled.texts, rolled.parts, s["bonus"], s["advantage"], strict=True
        )
    ]


@dataclass
class Rolled:
    """One group of this rank, with what training needs of it: its embeddings, and its responses' texts and reward parts."""

    group: Group
    visual_embeds: torch.Tensor
    texts: list[str]
    parts: list[dict]


def roll(policy, prompts, builder, step, args):
    """Encodes, samples and scores -> ({position: Rolled} of this rank, [the numbers of each group of all ranks, by position])."""
    sampling = dict(max_new=args.max_new, temperature=args.temperature, top_p=args.top_p)
    with fsdp.gathered(policy):
        with timed("encode"), torch.no_grad():
            visual_embeds = policy.encode([p for _, p in prompts])
        with timed("rollout"):
            seeds = [seed(args.seed, step, i) for i, _ in prompts]
            groups = generate(
                policy,
                [p for _, p in prompts],
                args.group,
                seeds=seeds,
                visual_embeds=visual_embeds,
                **sampling,
            )
        shuffled = {}  # position -> (accuracies of the shuffled responses or shares lost, the orders their frames were in)
        if args.algo == "tgrpo":
            with timed("shuffled"):
                others = shuffled_prompts(prompts, visual_embeds, step, args)
                if args.temporal == "contrast":
                    shuffled = rescored(
                        policy, {i: group for (i, _), group in zip(prompts, groups)}, others, args
                    )
                else:
                    shuffled = shuffled_rollout(policy, others, builder, step, sampling, args)
    with timed("reward"):
        mine, numbers = {}, []
        for (i, prompt), group, embeds in zip(prompts, groups, visual_embeds):
            texts = [builder.decode(r) for r in group.responses]
            parts = [
                score(text, len(r), prompt.sample, args) for text, r in zip(texts, group.responses)
            ]
            mine[i] = Rolled(group, embeds, texts, parts)
            numbers.append(
                dict(
                    position=i,
                    lengths=[len(r) for r in group.responses],
                    truncated=group.truncated,
                    entropy=[float(x.double().sum()) for x in group.entropies],
                    advantage=[0.0] * args.group,
                    **dict(zip(("shuffled", "orders"), shuffled.get(i, (None, None)))),
                    shown=prompt.frames_x_pixels,
                    **{name: [p[name] for p in parts] for name in PARTS},
                )
            )
        return mine, sorted(sum(gather(numbers, policy.sp.size), []), key=lambda s: s["position"])


class Shuffled(NamedTuple):
    """The prompt at a position of the step, its video's frames in another order, the k-th.  embeds: its embeddings, if known."""

    position: int
    k: int
    order: list[int]
    prompt: Prompt
    embeds: torch.Tensor | None


def shuffled_prompts(prompts, visual_embeds, step, args):
    """Every video in args.shuffles other orders -> [Shuffled]; images have none."""
    out = []
    for (i, prompt), embeds in zip(prompts, visual_embeds):
        (media,) = prompt.media
        if media.kind == "image" or (args.shuffle == "grid" and media.grid[0] < 2):
            continue
        for k in range(args.shuffles):
            units = media.grid[0] if args.shuffle == "grid" else len(media.frames)
            order = tgrpo.permutation(units, seed(args.seed, step, i, "order", k))
            other = replace(
                prompt, media=[replace(media, frames=tgrpo.reorder(media.frames, order), key=None)]
            )
            out.append(
                Shuffled(
                    i,
                    k,
                    order.tolist(),
                    other,
                    tgrpo.reorder(embeds, order) if args.shuffle == "grid" else None,
                )
            )
    return out


def shuffled_rollout(policy, shuffled, builder, step, sampling, args):
    """T-GRPO's G/2 responses to every shuffled video -> {position: (their accuracies, orders)}."""
    visual_embeds, out = [s.embeds for s in shuffled] if args.shuffle == "grid" else None, {}
    seeds = [seed(args.seed, step, s.position, "shuffled", s.k) for s in shuffled]
    groups = generate(
        policy,
        [s.prompt for s in shuffled],
        args.group // 2 // args.shuffles,
        seeds=seeds,
        visual_embeds=visual_embeds,
        **sampling,
    )
    for s, group in zip(shuffled, groups):
        accuracies, orders = out.setdefault(s.position, ([], []))
        accuracies.extend(
            rewards.accuracy_reward(builder.decode(r), s.prompt.sample) for r in group.responses
        )
        orders.append(s.order)
    return out


@torch.no_grad()
def rescored(policy, groups, shuffled, args):
    """The ordered responses, {position: Group}, scored on the shuffled videos -> {position: (their shares lost, orders)}."""
    logps, orders = {}, {}
    lengths = [len(s.prompt.ids) + sum(map(len, groups[s.position].responses)) for s in shuffled]
    for row in pack(shuffled, lengths, args.row_tokens):
        visual_embeds = [s.embeds for s in row] if args.shuffle == "grid" else None
        logp, _ = policy(
            [s.prompt for s in row],
            [groups[s.position].responses for s in row],
            visual_embeds,
            args.temperature,
        )
        for s, x in zip(row, logp.double().sum(1).cpu().split(args.group)):
            logps.setdefault(s.position, []).append(x)
            orders.setdefault(s.position, []).append(s.order)
    before = {i: torch.stack([x.double().sum() for x in groups[i].logps]) for i in logps}
    return {
        i: (tgrpo.probability_drop(before[i], torch.stack(logps[i])).tolist(), orders[i])
        for i in logps
    }


def temporal_bonus(groups, args):
    """Gives every group its "bonus", [G] numbers, 0 for images and without T-GRPO -> log entry: shares of the step's groups."""
    accuracy = torch.tensor([s["accuracy"] for s in groups], dtype=torch.float64)  # (B, G)
    bonus = torch.zeros_like(accuracy)
    rows = [b for b, s in enumerate(groups) if s["shuffled"]]
    tests = {} if args.temporal == "contrast" else {"temporal_passed": 0.0, "temporal_vacuous": 0.0}
    entry = {**tests, "temporal_not_applicable": 1 - len(rows) / len(groups), "temporal_bonus": 0.0}
    shuffled = torch.tensor([groups[b]["shuffled"] for b in rows], dtype=torch.float64)
    if rows and args.temporal == "contrast":
        bonus[rows] = tgrpo.contrast_bonus(
            accuracy[rows], shuffled, alpha=args.alpha, correct=args.correct
        )
        entry |= {"temporal_bonus": float(bonus.mean()), "probability_drop": float(shuffled.mean())}
    elif rows:
        bonus[rows] = tgrpo.temporal_bonus(
            accuracy[rows], shuffled, alpha=args.alpha, mu=args.mu, correct=args.correct
        )
        passed, vacuous = tgrpo.temporal_test(
            accuracy[rows], shuffled, mu=args.mu, correct=args.correct
        )
        entry |= {
            "temporal_passed": int(passed.sum()) / len(groups),
            "temporal_vacuous": int(vacuous.sum()) / len(groups),
            "temporal_bonus": float(bonus.mean()),
            "shuffled_accuracy": float(shuffled.mean()),
        }
    for s, b in zip(groups, bonus.tolist()):
        s["bonus"] = b
    return entry if args.algo == "tgrpo" else {}


def grpo_gradient(policy, reference, groups, mine, args):
    """Accumulates the gradient of the policy loss on `groups`, [(numbers, advantages (G,)), ...] of all ranks -> log sums.

    This rank packs its own share (`mine`) into rows. The ratio's old log-probs are the sampler's own. Groups without any
    advantage have no gradient when beta = 0, and get no pass.
    """
    responses = float(sum(used(s, args).sum() for s, _ in groups))
    tokens = float(sum((used(s, args) * torch.tensor(s["lengths"])).sum() for s, _ in groups))
    longest = len(groups) * args.group * args.max_new
    denominator = max(
        1.0, {"sequence": responses, "token": tokens, "constant": longest}[args.average]
    )
    batch = [
        (mine[s["position"]], A, used(s, args))
        for s, A in groups
        if s["position"] in mine and has_gradient(s, A, args)
    ]
    totals = dict.fromkeys(("loss", "tokens", "ratio", "clipped", "kl", "entropy", "mismatch"), 0.0)

    def loss(row):
        prompts, responses = (
            [m.group.prompt for m, _, _ in row],
            [m.group.responses for m, _, _ in row],
        )
        visual_embeds = None if args.train_vision else [m.visual_embeds for m, _, _ in row]
        logp, entropy = policy(prompts, responses, visual_embeds, args.temperature)  # (N, R)
        ref_logp = None
        if args.beta:
            with torch.no_grad():
                ref_logp, _ = reference(prompts, responses, visual_embeds, args.temperature)
        if not row:
            return logp.sum()
        pad = lambda xs: pad_sequence(list(xs), batch_first=True).to(logp)
        old = pad(x for m, _, _ in row for x in m.group.logps)
        mask = pad(torch.ones(len(r)) * x for m, _, u in row for r, x in zip(m.group.responses, u))
        value, stats = grpo.grpo_loss(
            logp,
            old,
            torch.cat([A for _, A, _ in row]).to(logp),
            mask,
            ref_logp=ref_logp,
            beta=args.beta,
            estimator=args.kl,
            variant=args.variant,
            clip_low=args.clip_low,
            clip_high=args.clip_high,
            dual_clip=args.dual_clip,
            average=args.average,
            denominator=denominator,
        )
        mismatch = ((logp.detach() - old).abs() * mask).sum()
        stats |= {"loss": value.detach(), "entropy": (entropy * mask).sum(), "mismatch": mismatch}
        for name, x in stats.items():
            totals[name] += float(x)
        return value

    lengths = [len(m.group.prompt.ids) + sum(map(len, m.group.responses)) for m, _, _ in batch]
    backward(policy, pack(batch, lengths, args.row_tokens), loss)
    every = gather(totals, unwrap(policy).sp.size)
    return {name: sum(t[name] for t in every) for name in totals}


def score(text, tokens, sample, args):
    """The reward of one response and its parts."""
    accuracy, format_ = rewards.accuracy_reward(text, sample), rewards.format_reward(text)
    bonus = rewards.length_reward(
        tokens, accuracy, lo=args.len_lo, hi=args.len_hi, bonus=args.len_bonus
    )
    return dict(
        zip(
            PARTS,
            (
                args.w_accuracy * accuracy + args.w_format * format_ + bonus,
                accuracy,
                format_,
                bonus,
            ),
        )
    )
