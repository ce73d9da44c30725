"""What a GRPO step logs: means over all samples, means over trained tokens, lines of samples.jsonl.

Groups are train.ScoredGroup (the numbers of a group, known to all ranks) and train.LocalGroup.
Shapes: B groups, G responses.
"""

from dataclasses import dataclass, fields

import torch

from infra.ranks import gather


@dataclass
class LossTotals:
    """Sums over the trained tokens of a minibatch; `loss` is the loss itself."""

    loss: float = 0.0
    tokens: float = 0.0
    ratio: float = 0.0  # rho
    clipped: float = 0.0  # tokens where a clip acts
    kl: float = 0.0
    entropy: float = 0.0
    mismatch: float = 0.0  # |log-prob of the scorer - of the sampler|

    def __add__(self, other):
        names = [f.name for f in fields(self)]
        return LossTotals(**{x: getattr(self, x) + getattr(other, x) for x in names})


def read_totals(sums):
    """Sums on the device by name -> LossTotals. The host waits for the device once."""
    if not sums:
        return LossTotals()
    numbers = torch.stack(list(sums.values())).tolist()
    return LossTotals(**{name: x for name, x in zip(sums, numbers)})


def column(groups, name):
    """One figure of every group -> float64 (B, G), or (B,) of a figure of the whole group."""
    values = [getattr(g, name) for g in groups]
    return torch.tensor(values, dtype=torch.float64)


def sampled_metrics(groups, teaching):
    """Means over everything that was sampled. teaching: (B,) groups with an advantage."""
    metrics = {"reward": float(column(groups, "reward").mean())}
    for name in groups[0].parts:
        part = torch.tensor([g.parts[name] for g in groups], dtype=torch.float64)  # (B, G)
        metrics[name] = float(part.mean())
    metrics["truncated"] = float(column(groups, "truncated").mean())
    metrics |= shown_metrics([(g.frames, g.pixels) for g in groups])
    lengths = column(groups, "lengths")  # (B, G)
    metrics["response_length"] = float(lengths.mean())
    metrics["entropy"] = float(column(groups, "entropy").sum() / lengths.sum())
    metrics["zero_std_groups"] = int((~teaching).sum()) / len(groups)
    return metrics


def shown_metrics(shown):
    """Means of [(frames, pixels of a frame), ...] over the prompts that have a medium; {} if none
    has."""
    shown = [x for x in shown if x != (0, 0)]  # text
    if not shown:
        return {}
    frames, pixels = torch.tensor(shown, dtype=torch.float64).mean(dim=0).tolist()
    return {"frames": frames, "pixels": pixels}


def trained_metrics(totals, updates):
    """Means over the trained tokens; the loss over the updates that were made. Without a trained
    token there is only a KL of 0."""
    total = sum(totals, LossTotals())
    if not total.tokens:
        return {"kl": 0.0}
    made = [t for t, u in zip(totals, updates) if not u.skipped] or totals
    first = next(t for t in totals if t.tokens)  # before the policy has moved
    return {
        "loss": sum(t.loss for t in made) / len(made),
        "kl": total.kl / total.tokens,
        "clipped": total.clipped / total.tokens,
        "ratio": total.ratio / total.tokens,
        "entropy_trained": total.entropy / total.tokens,
        "mismatch": first.mismatch / first.tokens,
    }


def update_metrics(updates):
    """The updates of a step: how many were made and skipped, and the largest gradient norm."""
    skipped = sum(u.skipped for u in updates)
    return {
        "grad_norm": max(u.grad_norm for u in updates),
        "updates": len(updates) - skipped,
        "skipped_updates": skipped,
        "skipped_update": skipped == len(updates),
    }


def sample_lines(local, groups, bonus, A, step, sp_size):
    """The lines of samples.jsonl for these groups, one a response, by position.

    bonus, A: (B, G); row b is that of groups[b]. Each rank gives the lines of its `local` groups;
    `sp_size` ranks have the same ones.
    """
    lines = []
    for b, scored in enumerate(groups):
        if scored.position not in local:
            continue
        mine = local[scored.position]
        about = about_group(mine, step)
        for i, text in enumerate(mine.texts):
            figures = {
                "response": text,
                "reward": scored.reward[i],
                **{name: values[i] for name, values in scored.parts.items()},
                "temporal_bonus": float(bonus[b, i]),
                "advantage": float(A[b, i]),
            }
            lines.append(about | figures)
    lines = sum(gather(lines, every=sp_size), [])
    return sorted(lines, key=lambda line: line["position"])


def about_group(mine, step):
    """What the lines of a LocalGroup have in common."""
    sample, effect = mine.group.prompt.sample, mine.scored.shuffle_effect
    about = {"step": step + 1, "position": mine.scored.position}
    names = "id path data_type problem_type fps segment question options answer".split()
    about |= {name: getattr(sample, name) for name in names}
    if effect:
        about["orders"] = [effect.order]
        if effect.drops is not None:
            about["probability_drops"] = effect.drops
        else:
            about["shuffled_accuracies"] = effect.accuracies
    return about
