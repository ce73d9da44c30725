"""One step: from this rank's prompts to its share of the gradient, for every algorithm.

    sft_step    the log-prob of the reasoning and answer that a record holds goes up
    grpo_step   rollout, rewards, advantages, then grpo_gradient; with T-GRPO's shuffled responses for --algo tgrpo
Rewards are gathered from all ranks before advantages are taken, and every loss is divided by a count over the whole batch, so
that any split of the step over ranks and rows gives the same gradient.
"""

import contextlib
import random
from dataclasses import replace

import torch
from torch.nn.utils.rnn import pad_sequence

import grpo
import rewards
import tgrpo
from rollout import generate
from run import WORLD, gather, timed

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


def sft_step(policy, prompts, args):
    """One supervised step's gradient: mean negative log-prob of all response tokens of the batch, prompts excluded.

    prompts: [(position in the step, Prompt)] of this rank. Returns (log entry, samples to log: none, response tokens).
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
    shown = torch.tensor(sum(gather([p.frames_x_pixels for p in prompts]), []), dtype=torch.float64).mean(0)
    return {"loss": sum(gather(sum(total))), "response_length": tokens / sum(gather(len(prompts))),
            "frames": float(shown[0]), "pixels": float(shown[1])}, [], tokens


def grpo_step(policy, reference, prompts, builder, step, args):
    """One GRPO step's gradient, from rollouts on. Arguments and result as in sft_step; reference: frozen, when beta > 0."""
    core = policy.module if WORLD > 1 else policy
    with timed("encode"), torch.no_grad():
        features = core.encode([p for _, p in prompts])
    sampling = dict(max_new=args.max_new, temperature=args.temperature, top_p=args.top_p)
    with timed("rollout"):
        seeds = [seed(args.seed, step, i) for i, _ in prompts]
        groups = generate(core, [p for _, p in prompts], args.group, seeds=seeds, features=features, **sampling)
    shuffled = {}  # position -> accuracies of the shuffled responses
    if args.algo == "tgrpo":
        with timed("shuffled"):
            shuffled = shuffled_rollout(core, prompts, features, builder, step, sampling, args)
    with timed("reward"):
        texts = [[builder.decode(r) for r in g.responses] for g in groups]
        parts = [[score(text, len(r), g.prompt.sample, args) for text, r in zip(ts, g.responses)] for g, ts in zip(groups, texts)]
        scored = [dict(position=i, lengths=[len(r) for r in g.responses], truncated=g.truncated, shown=g.prompt.frames_x_pixels,
                       shuffled=shuffled.get(i), **{k: [p[k] for p in ps] for k in PARTS})
                  for (i, _), g, ps in zip(prompts, groups, parts)]
        scored = sorted(sum(gather(scored), []), key=lambda s: s["position"])  # all groups of the step, on every rank
    column = lambda name: torch.tensor([s[name] for s in scored], dtype=torch.float64)  # (B, G)
    reward, length, truncated = column("reward"), column("lengths"), column("truncated")
    bonus, temporal = temporal_bonus(scored, args)
    if args.temporal == "reward":
        reward = reward + bonus
    advantages, equal = grpo.group_advantages(reward, args.norm), grpo.zero_std(reward)
    if args.temporal == "advantage":
        advantages = advantages + bonus
    used = 1 - truncated if args.mask_truncated else torch.ones_like(reward)
    if args.drop_zero_std:
        used = used * ~equal[:, None]
    denominator = {"sequence": used.sum(), "token": (used * length).sum(), "constant": used.sum() * args.max_new}[args.average]

    batch = []  # (group, features, advantages (G,), used (G,)) of this rank; no advantage and no KL is no gradient: no pass
    for (i, _), group, feature in zip(prompts, groups, features):
        b = next(b for b, s in enumerate(scored) if s["position"] == i)
        if used[b].any() and (args.beta or advantages[b].any()):
            batch.append((group, None if args.train_vision else feature, advantages[b], used[b]))
    with timed("train"):
        totals = grpo_gradient(policy, reference, batch, max(float(denominator), 1.0), args)
    totals = {name: sum(t[name] for t in gather(totals)) for name in totals}
    per_token = {name: totals[name] / max(totals["tokens"], 1) for name in ("kl", "entropy", "clipped", "mismatch")}
    frames, pixels = column("shown").mean(0).tolist()
    entry = {**{k: float(column(k).mean()) for k in PARTS}, **temporal, "loss": totals["loss"], **per_token,
             "response_length": float(length.mean()), "truncated": float(truncated.mean()),
             "zero_std_groups": float(equal.double().mean()), "frames": frames, "pixels": pixels}
    samples = [dict(step=step + 1, id=s.id, path=s.path, question=s.question, answer=s.answer, response=text, **part)
               for g, ts, ps in zip(groups[:2], texts, parts) for s in [g.prompt.sample] for text, part in zip(ts[:2], ps)]
    return entry, samples, int(length.sum())


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


def temporal_bonus(scored, args):
    """T-GRPO's bonus of every response (B, G), 0 for images, and its log entry: shares of all groups of the step."""
    accuracy = torch.tensor([s["accuracy"] for s in scored], dtype=torch.float64)
    bonus = torch.zeros_like(accuracy)
    rows = [b for b, s in enumerate(scored) if s["shuffled"]]
    if args.algo != "tgrpo":
        return bonus, {}
    entry = {"temporal_passed": 0.0, "temporal_vacuous": 0.0, "temporal_not_applicable": 1 - len(rows) / len(scored),
             "temporal_bonus": 0.0}
    if rows:
        shuffled = torch.tensor([scored[b]["shuffled"] for b in rows], dtype=torch.float64)
        bonus[rows] = tgrpo.temporal_bonus(accuracy[rows], shuffled, alpha=args.alpha, mu=args.mu, correct=args.correct)
        passed, vacuous = tgrpo.temporal_test(accuracy[rows], shuffled, mu=args.mu, correct=args.correct)
        entry |= {"temporal_passed": int(passed.sum()) / len(scored), "temporal_vacuous": int(vacuous.sum()) / len(scored),
                  "temporal_bonus": float(bonus.mean()), "shuffled_accuracy": float(shuffled.mean())}
    return bonus, entry


def grpo_gradient(policy, reference, batch, denominator, args):
    """Accumulates the gradient of the policy loss of this rank's groups, packed into rows -> sums for the log.

    batch: [(group, features or None, advantages (G,), used (G,)), ...]. The ratio's old log-probs are the sampler's own.
    """
    totals = dict.fromkeys(("loss", "tokens", "ratio", "clipped", "kl", "entropy", "mismatch"), 0.0)

    def loss(row):
        prompts, responses = [g.prompt for g, *_ in row], [g.responses for g, *_ in row]
        features = None if args.train_vision else [f for _, f, _, _ in row]
        logp, entropy = policy(prompts, responses, features, args.temperature)  # (N, R)
        if not row:
            return logp.sum()
        pad = lambda xs: pad_sequence(list(xs), batch_first=True).to(logp)
        old = pad(x for g, *_ in row for x in g.logps)
        mask = pad(torch.ones(len(r)) * u for g, _, _, used in row for r, u in zip(g.responses, used))
        ref_logp = None
        if args.beta:
            with torch.no_grad():
                ref_logp, _ = reference(prompts, responses, features, args.temperature)
        value, stats = grpo.grpo_loss(
            logp, old, torch.cat([a for *_, a, _ in row]).to(logp), mask, ref_logp=ref_logp, beta=args.beta, estimator=args.kl,
            clip_low=args.clip_low, clip_high=args.clip_high, average=args.average, denominator=denominator)
        mismatch = ((logp.detach() - old).abs() * mask).sum()
        stats |= {"loss": value.detach(), "entropy": (entropy * mask).sum(), "mismatch": mismatch}
        for name, x in stats.items():
            totals[name] += float(x)
        return value

    lengths = [len(g.prompt.ids) + sum(map(len, g.responses)) for g, *_ in batch]
    backward(policy, pack(batch, lengths, args.row_tokens), loss)
    return totals


def score(text, tokens, sample, args):
    """The reward of one response and its parts."""
    accuracy, format_ = rewards.accuracy_reward(text, sample), rewards.format_reward(text)
    bonus = rewards.length_reward(tokens, accuracy, lo=args.len_lo, hi=args.len_hi, bonus=args.len_bonus)
    return dict(zip(PARTS, (args.w_accuracy * accuracy + args.w_format * format_ + bonus, accuracy, format_, bonus)))
