"""One step: from this rank's prompts to the update, for every algorithm.

    sft_step    the log-prob of the reasoning and answer that a record holds goes up
    grpo_step   rollout and rewards (roll), advantages, gradient (grpo_gradient), update; with T-GRPO's shuffled responses
Rewards are gathered from all ranks before advantages are taken, and every loss is divided by a count over the whole batch, so
that any split of the step over ranks and rows gives the same gradient.
"""

import contextlib
import random
from dataclasses import dataclass, replace

import torch
from torch.nn.utils.rnn import pad_sequence

import grpo
import rewards
import tgrpo
from rollout import Group, generate
from run import WORLD, gather, say, timed

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


def backward(policy, rows, loss):
    """Accumulates the gradient of loss(row), each row's share of the GLOBAL loss, computed through policy's forward.

    DDP averages over ranks in the last backward, which every rank does: a rank without rows does an empty forward. DDP
    divides by the number of ranks, so each share is multiplied by it.
    """
    rows = rows or [[]]
    for i, row in enumerate(rows):
        last = WORLD == 1 or i + 1 == len(rows)
        with contextlib.nullcontext() if last else policy.no_sync():
            (loss(row) * WORLD).backward()


def sft_step(policy, prompts, optimize, args):
    """One supervised step: mean negative log-prob of all response tokens of the batch, prompts excluded.

    prompts: [(position in the step, Prompt)] of this rank. Returns as grpo_step; there are no samples to log.
    """
    prompts = [p for _, p in prompts]
    tokens = sum(gather(sum(len(p.target) for p in prompts)))
    total = []

    def loss(row):
        logp, _ = policy(row, [[p.target] for p in row])
        total.append(-float(logp.detach().sum()) / tokens)
        return -logp.sum() / tokens

    with timed("train"):
        backward(policy, pack(prompts, [len(p.ids) + len(p.target) for p in prompts], args.row_tokens), loss)
    with timed("optimizer"):
        entry = optimize()
    shown = torch.tensor(sum(gather([p.frames_x_pixels for p in prompts]), []), dtype=torch.float64).mean(0)
    return {"loss": sum(gather(sum(total))), "response_length": tokens / sum(gather(len(prompts))),
            "frames": float(shown[0]), "pixels": float(shown[1]), **entry}, [], tokens


def grpo_step(policy, reference, prompts, more, builder, step, optimize, args):
    """One GRPO step: rollouts, rewards, advantages, and args.updates times a gradient and an update.

    prompts: as in sft_step.  more(k): the prompts of refill k (DAPO's dynamic sampling).  reference: frozen, when beta > 0.
    optimize: clips the gradient and steps the optimizer -> log entry. Returns (log entry, samples to log, response tokens).
    """
    core = policy.module if WORLD > 1 else policy
    mine, everyone = roll(core, prompts, builder, step, args)
    trained, rounds = everyone, 0
    if args.drop_zero_std:
        mixed = lambda: [s for s in everyone if len(set(s["reward"])) > 1]
        while len(mixed()) < args.prompts and rounds < args.refill:
            rounds += 1
            more_mine, more_everyone = roll(core, more(rounds), builder, step, args)
            mine, everyone = mine | more_mine, everyone + more_everyone
        trained = mixed()[: args.prompts]
        if args.refill and len(trained) < args.prompts:
            say(f"step {step + 1}: {len(trained)} of {args.prompts} groups have mixed rewards after {rounds} refills")
    reward = torch.tensor([s["reward"] for s in trained], dtype=torch.float64).view(len(trained), args.group)  # (B, G)
    bonus, temporal = temporal_bonus(trained, args)
    if args.temporal == "reward":
        reward = reward + bonus
    advantages = grpo.group_advantages(reward, args.norm) if trained else reward
    if args.temporal == "advantage":
        advantages = advantages + bonus

    updates = []
    for k in range(args.updates):  # update k trains on every args.updates-th group: from the second on, the ratio is not 1
        groups = [(s, A) for s, A in zip(trained[k :: args.updates], advantages[k :: args.updates])]
        with timed("train"):
            totals = grpo_gradient(policy, reference, groups, mine, args)
        with timed("optimizer"):
            updates.append(totals | optimize())
    total = lambda name: sum(u[name] for u in updates)
    per_token = {name: total(name) / max(total("tokens"), 1) for name in ("kl", "entropy", "clipped", "ratio", "mismatch")}
    column = lambda name: torch.tensor([s[name] for s in everyone], dtype=torch.float64)  # everything that was sampled
    frames, pixels = column("shown").mean(0).tolist()
    mean = lambda name: float(column(name).mean())
    entry = {**{name: mean(name) for name in PARTS}, **temporal, **per_token,
             "loss": total("loss") / args.updates, "response_length": mean("lengths"), "truncated": mean("truncated"),
             "zero_std_groups": float(grpo.zero_std(column("reward")).double().mean()), "trained_groups": len(trained),
             "refills": rounds, "frames": frames, "pixels": pixels, "grad_norm": max(u["grad_norm"] for u in updates),
             "lr": updates[-1]["lr"], "skipped_update": any(u["skipped_update"] for u in updates)}
    some = [dict(step=step + 1, id=s.id, path=s.path, question=s.question, answer=s.answer, response=text, **part)
            for m in list(mine.values())[:2] for s in [m.group.prompt.sample] for text, part in zip(m.texts[:2], m.parts)]
    return entry, some, int(column("lengths").sum())


@dataclass
class Rolled:
    """One group of this rank, with what training needs of it: its embeddings, and its responses' texts and reward parts."""
    group: Group
    features: torch.Tensor
    texts: list[str]
    parts: list[dict]


def roll(policy, prompts, builder, step, args):
    """Encodes, samples and scores -> ({position: Rolled} of this rank, [the numbers of each group of all ranks, by position])."""
    with timed("encode"), torch.no_grad():
        features = policy.encode([p for _, p in prompts])
    sampling = dict(max_new=args.max_new, temperature=args.temperature, top_p=args.top_p)
    with timed("rollout"):
        seeds = [seed(args.seed, step, i) for i, _ in prompts]
        groups = generate(policy, [p for _, p in prompts], args.group, seeds=seeds, features=features, **sampling)
    shuffled = {}  # position -> accuracies of the shuffled responses
    if args.algo == "tgrpo":
        with timed("shuffled"):
            shuffled = shuffled_rollout(policy, prompts, features, builder, step, sampling, args)
    with timed("reward"):
        mine, numbers = {}, []
        for (i, prompt), group, feature in zip(prompts, groups, features):
            texts = [builder.decode(r) for r in group.responses]
            parts = [score(text, len(r), prompt.sample, args) for text, r in zip(texts, group.responses)]
            mine[i] = Rolled(group, feature, texts, parts)
            numbers.append(dict(position=i, lengths=[len(r) for r in group.responses], truncated=group.truncated,
                                shuffled=shuffled.get(i), shown=prompt.frames_x_pixels,
                                **{name: [p[name] for p in parts] for name in PARTS}))
        return mine, sorted(sum(gather(numbers), []), key=lambda s: s["position"])


def seed(*parts):
    """A seed from the run's seed, the step, and whatever else tells this random choice from all others."""
    return random.Random(" ".join(map(str, parts))).getrandbits(62)


def shuffled_rollout(policy, prompts, features, builder, step, sampling, args):
    """T-GRPO's G/2 responses to every video with its frames in another order -> {position: accuracies}; images have none."""
    shuffled, embedded, seeds, positions = [], [], [], []
    for (i, prompt), feature in zip(prompts, features):
        media, = prompt.media
        if media.kind == "image" or (args.shuffle == "grid" and media.grid[0] < 2):
            continue
        for k in range(args.shuffles):
            order = seed(args.seed, step, i, "order", k)
            if args.shuffle == "grid":
                frames, feature_k = tgrpo.shuffle_grids(media.frames, feature, order)
                embedded.append(feature_k)
            else:
                frames = tgrpo.shuffle_frames(media.frames, order)
            shuffled.append(replace(prompt, media=[replace(media, frames=frames)]))
            seeds.append(seed(args.seed, step, i, "shuffled", k))
            positions.append(i)
    accuracies = {i: [] for i in positions}
    groups = generate(policy, shuffled, args.group // 2 // args.shuffles, seeds=seeds, features=embedded or None, **sampling)
    for i, group in zip(positions, groups):
        accuracies[i] += [rewards.accuracy_reward(builder.decode(r), group.prompt.sample) for r in group.responses]
    return accuracies


def temporal_bonus(groups, args):
    """T-GRPO's bonus of every response (B, G), 0 for images, and its log entry: shares of the step's groups."""
    accuracy = torch.tensor([s["accuracy"] for s in groups], dtype=torch.float64).view(len(groups), args.group)
    bonus = torch.zeros_like(accuracy)
    rows = [b for b, s in enumerate(groups) if s["shuffled"]]
    if args.algo != "tgrpo" or not groups:
        return bonus, {}
    entry = {"temporal_passed": 0.0, "temporal_vacuous": 0.0, "temporal_not_applicable": 1 - len(rows) / len(groups),
             "temporal_bonus": 0.0}
    if rows:
        shuffled = torch.tensor([groups[b]["shuffled"] for b in rows], dtype=torch.float64)
        bonus[rows] = tgrpo.temporal_bonus(accuracy[rows], shuffled, alpha=args.alpha, mu=args.mu, correct=args.correct)
        passed, vacuous = tgrpo.temporal_test(accuracy[rows], shuffled, mu=args.mu, correct=args.correct)
        entry |= {"temporal_passed": int(passed.sum()) / len(groups), "temporal_vacuous": int(vacuous.sum()) / len(groups),
                  "temporal_bonus": float(bonus.mean()), "shuffled_accuracy": float(shuffled.mean())}
    return bonus, entry


def grpo_gradient(policy, reference, groups, mine, args):
    """Accumulates the gradient of the policy loss on `groups`, [(numbers, advantages (G,)), ...] of all ranks -> log sums.

    This rank packs its own share (`mine`) into rows. The ratio's old log-probs are the sampler's own. Groups without any
    advantage have no gradient when beta = 0, and get no pass.
    """
    used = [torch.tensor([not (args.mask_truncated and cut) for cut in s["truncated"]], dtype=torch.float64) for s, _ in groups]
    responses = float(sum(u.sum() for u in used))
    tokens = float(sum((u * torch.tensor(s["lengths"])).sum() for u, (s, _) in zip(used, groups)))
    denominator = max(1.0, {"sequence": responses, "token": tokens, "constant": responses * args.max_new}[args.average])
    batch = [(mine[s["position"]], A, u) for u, (s, A) in zip(used, groups)
             if s["position"] in mine and u.any() and (args.beta or A.any())]
    totals = dict.fromkeys(("loss", "tokens", "ratio", "clipped", "kl", "entropy", "mismatch"), 0.0)

    def loss(row):
        prompts, responses = [m.group.prompt for m, _, _ in row], [m.group.responses for m, _, _ in row]
        features = None if args.train_vision else [m.features for m, _, _ in row]
        logp, entropy = policy(prompts, responses, features, args.temperature)  # (N, R)
        if not row:
            return logp.sum()
        pad = lambda xs: pad_sequence(list(xs), batch_first=True).to(logp)
        old = pad(x for m, _, _ in row for x in m.group.logps)
        mask = pad(torch.ones(len(r)) * x for m, _, u in row for r, x in zip(m.group.responses, u))
        ref_logp = None
        if args.beta:
            with torch.no_grad():
                ref_logp, _ = reference(prompts, responses, features, args.temperature)
        value, stats = grpo.grpo_loss(
            logp, old, torch.cat([A for _, A, _ in row]).to(logp), mask, ref_logp=ref_logp, beta=args.beta, estimator=args.kl,
            variant=args.variant, clip_low=args.clip_low, clip_high=args.clip_high, dual_clip=args.dual_clip,
            average=args.average, denominator=denominator)
        mismatch = ((logp.detach() - old).abs() * mask).sum()
        stats |= {"loss": value.detach(), "entropy": (entropy * mask).sum(), "mismatch": mismatch}
        for name, x in stats.items():
            totals[name] += float(x)
        return value

    lengths = [len(m.group.prompt.ids) + sum(map(len, m.group.responses)) for m, _, _ in batch]
    backward(policy, pack(batch, lengths, args.row_tokens), loss)
    return {name: sum(t[name] for t in gather(totals)) for name in totals}


def score(text, tokens, sample, args):
    """The reward of one response and its parts."""
    accuracy, format_ = rewards.accuracy_reward(text, sample), rewards.format_reward(text)
    bonus = rewards.length_reward(tokens, accuracy, lo=args.len_lo, hi=args.len_hi, bonus=args.len_bonus)
    return dict(zip(PARTS, (args.w_accuracy * accuracy + args.w_format * format_ + bonus, accuracy, format_, bonus)))
