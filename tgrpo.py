"""T-GRPO (Video-R1, arXiv 2503.21776, section 3.1): a reward for using the order of frames.

For each video the policy samples G responses on the frames in order, and G // 2 on the same frames
shuffled. If the ordered group is right at least as often, the policy may be using the order, and
every right response of the ordered group gets a bonus:

    p, p~ = share of right responses, ordered and shuffled; right: accuracy > 0.5 (release: > 0.1)
    r_t   = alpha if p >= mu * p~, else 0        (paper: mu = 1, alpha = 0.3; release: mu = 0.8)
    R_i   = r_i + r_t for every right response o_i       (t: temporal, one number for the group)

The shuffled responses are only counted; they never enter the loss. Text, images and, with
`--shuffle grid`, videos of two frames have no order, so the test does not apply to them.

**When the bonus cancels.** Advantages are (R - mean) / std of a response's own group, which sees no
shift and no scale. So (up to the 1e-4 beside the std) the bonus changes no advantage of a group

  - if no response is right, or the group failed the test: there is no bonus;
  - if all responses are right: the bonus is a shift;
  - if r takes one value on right responses and a lower one on wrong ones: the bonus is a shift and
    a scale. This is the common case: accuracies are 0 or 1, and all else in the reward is constant.

It acts where r varies among the right responses or among the wrong ones (by format, length, graded
accuracy), or where a right response gets no more than a wrong one. It also acts in groups with
right and wrong responses if they are not divided by their own std: with `--norm none`, and with
`batch` and `ema`, where it also changes the std that other groups are divided by. The paper remarks
that the term could be added to the advantages directly; `--temporal advantage` does that: A_i + r_t
for every right response. That never cancels.

**A bonus per response.** The published test is about the group: within it, a right guess from one
still frame gets the same bonus as a right answer from motion. `--temporal contrast`, ours and not
the paper's, tells them apart. It samples no shuffled responses, but scores the ordered ones twice,
without a gradient, on the frames in order and on the shuffled ones:

    c_i   = max(0, 1 - pi(o_i | shuffled) / pi(o_i | ordered))      the probability drop of o_i
    R_i   = r_i + alpha * c_i for every right response o_i

Where c varies among right responses, the normalisation does not cancel it, and it also teaches
where all responses are right. It cancels where c is the same for all of them: if only one is right,
or if every c is about 1. The probability is that of the whole response: its reasoning is where a
look at the frames shows; its answer often only repeats the reasoning. Almost any shuffle takes
nearly all of a long response's probability, so the longer responses are, the less c tells.

The first half of this file is pure; the second half shuffles videos and runs the policy on them.
Shapes: B prompts, G ordered and G' shuffled responses, T frames, V visual tokens, D hidden.
"""

import random
from dataclasses import dataclass, replace

import torch

from data import Prompt
from infra.packing import pack
from infra.ranks import seed
from rewards import accuracies
from rollout import generate

# ---- the formulas


def temporal_test(ordered_acc, shuffled_acc, *, mu=1.0, correct=0.5):
    """Is the ordered group right at least mu times as often as the shuffled one?

    ordered_acc (B, G), shuffled_acc (B, G'): accuracies in [0, 1]; above `correct`, a response
    counts as right. A tie passes, whatever rounding does: 8/12 = 0.8 * 5/6, but not in
    floating point.
    Returns (passed, vacuous), each (B,) bool. vacuous: passed with no right response on either
    side, so the test says nothing, and no response gets a bonus.
    """
    p = (ordered_acc > correct).double().mean(dim=1)
    p_shuffled = (shuffled_acc > correct).double().mean(dim=1)
    return p >= mu * p_shuffled - 1e-9, (p == 0) & (p_shuffled == 0)


def temporal_bonus(ordered_acc, shuffled_acc, *, alpha=0.3, mu=1.0, correct=0.5):
    """The bonus of each ordered response (B, G): alpha if it is right and its group passed."""
    passed, _ = temporal_test(ordered_acc, shuffled_acc, mu=mu, correct=correct)
    return alpha * (passed[:, None] & (ordered_acc > correct)).to(ordered_acc.dtype)


def probability_drop(logp, shuffled_logp):
    """c of each response: logp (G,) on ordered frames, shuffled_logp (G,) on shuffled ones, both
    summed over a response's tokens -> (G,) in [0, 1]."""
    return (1 - (shuffled_logp - logp).exp()).clamp(min=0)


def contrast_bonus(ordered_acc, drop, *, alpha=0.3, correct=0.5):
    """The bonus of each ordered response (B, G): alpha * drop (B, G) if it is right."""
    return alpha * drop * (ordered_acc > correct).to(drop.dtype)


def permutation(n, seed):
    """A random order of n >= 2 items that differs from 0, 1, 2, ... -> LongTensor (n,)."""
    if n < 2:
        raise ValueError(f"{n} frames or grids cannot be shuffled, at least 2 are needed")
    rng, order = random.Random(seed), list(range(n))
    while order == sorted(order):
        rng.shuffle(order)
    return torch.tensor(order)


def reorder(x, order):
    """Splits the rows of x into len(order) equal runs and puts these in the given order.

    On frames (T, 3, H, W): with T numbers the frames are shuffled before the model forms its
    2-frame grids, as published; with T / 2 numbers whole grids are shuffled.
    On embeddings (V, D), with T / 2 numbers: the vision tower of a Qwen-VL sees one grid at a
    time, so this equals encoding the shuffled video, without a second pass.
    Shuffled grids keep the order within each pair of frames, so they are a weaker shuffle.
    """
    return x.unflatten(0, (len(order), -1))[order].flatten(0, 1)


# ---- the shuffled videos


@dataclass
class ShuffleEffect:
    """What shuffling a video's frames did. Either accuracies or drops are set."""

    order: list[int]  # of the frames, or grids
    accuracies: list[float] | None = None  # (G',) of the responses to the shuffled video
    drops: list[float] | None = None  # (G,) of the ordered responses, with --temporal contrast


@dataclass
class ShuffledPrompt:
    """A prompt of the step whose video has its frames in another order."""

    position: int  # of the prompt in the step
    order: list[int]
    prompt: Prompt
    visual_embeds: torch.Tensor | None  # (V, D) if known without encoding the video again


def shuffle_prompts(prompts, visual_embeds, step, args):
    """The videos of a step, each in one other order -> [ShuffledPrompt]. Images and text are left
    out.

    Only pixels move. The times that a Qwen3-VL's prompt names stay in order, so that it reads as
    the prompt of an ordinary video.

    prompts: [(position in the step, Prompt)].  visual_embeds: (V, D) of each.
    """
    shuffled = []
    for (position, prompt), embeds in zip(prompts, visual_embeds):
        if not prompt.media:
            continue
        (media,) = prompt.media
        units = media.grid[0] if args.shuffle == "grid" else len(media.frames)
        if media.kind == "image" or units < 2:
            continue
        # "0", here and below: earlier versions drew several orders; the draws stay the same
        order = permutation(units, seed(args.seed, step, position, "order 0"))
        frames = reorder(media.frames, order)
        # key=None keeps the shuffled video out of the embedding cache
        shuffled_media = replace(media, frames=frames, key=None)
        embeds = reorder(embeds, order) if args.shuffle == "grid" else None
        other = replace(prompt, media=[shuffled_media])
        shuffled.append(ShuffledPrompt(position, order.tolist(), other, embeds))
    return shuffled


def run_on_shuffled(policy, prompts, groups, visual_embeds, builder, step, args, judge=None):
    """Runs the policy on this rank's shuffled videos -> {position: ShuffleEffect}.

    groups: the ordered responses to each prompt, as rollout.generate returned them.
    judge: of free-form answers, see rewards.accuracies.
    """
    shuffled = shuffle_prompts(prompts, visual_embeds, step, args)
    if args.temporal == "contrast":
        ordered = {}
        for (position, _), group, embeds in zip(prompts, groups, visual_embeds):
            ordered[position] = group, embeds
        return rescore(policy, shuffled, ordered, args)
    return respond_to_shuffled(policy, shuffled, builder, step, args, judge)


def respond_to_shuffled(policy, shuffled, builder, step, args, judge=None):
    """Samples G // 2 responses to each shuffled video, and judges them -> {position:
    ShuffleEffect}."""
    shuffled_groups = generate(
        policy,
        [s.prompt for s in shuffled],
        args.group // 2,
        max_new=args.max_new,
        temperature=args.temperature,
        top_p=args.top_p,
        seeds=[seed(args.seed, step, s.position, "shuffled 0") for s in shuffled],
        visual_embeds=known_embeds(shuffled),
    )
    texts = [[builder.decode(r) for r in group.responses] for group in shuffled_groups]
    accuracy = accuracies(texts, [s.prompt.sample for s in shuffled], judge)  # (videos, G')
    found = {}
    for s, of_group in zip(shuffled, accuracy):
        found[s.position] = ShuffleEffect(s.order, accuracies=of_group)
    return found


@torch.no_grad()
def rescore(policy, shuffled, ordered, args):
    """Scores the ordered responses on the ordered and on the shuffled videos -> {position:
    ShuffleEffect}.

    ordered: {position: (rollout.Group, visual embeddings (V, D))}.

    The sampler's log-probs would not do for the ordered videos. In bf16 the sampler rounds
    otherwise than the scorer, by 0.01 to 0.03 a token: summed over a response, that would look
    like a drop.
    """
    found, lengths = {}, []
    for s in shuffled:
        group, _ = ordered[s.position]
        lengths.append(len(s.prompt.ids) + sum(map(len, group.responses)))
    for row in pack(shuffled, lengths, args.row_tokens):
        groups, embeds = zip(*[ordered[s.position] for s in row])
        prompts, responses = [g.prompt for g in groups], [g.responses for g in groups]
        logp = response_logps(policy, prompts, responses, embeds, args)
        prompts = [s.prompt for s in row]
        shuffled_logp = response_logps(policy, prompts, responses, known_embeds(row), args)
        for s, of_ordered, of_shuffled in zip(row, logp, shuffled_logp):
            drops = probability_drop(of_ordered, of_shuffled).tolist()  # (G,)
            found[s.position] = ShuffleEffect(s.order, drops=drops)
    return found


def response_logps(policy, prompts, responses, visual_embeds, args):
    """Log-probs of whole responses, (G,) of each group, on the CPU."""
    logp, _ = policy(prompts, responses, visual_embeds, args.temperature)  # (N, R)
    return logp.double().sum(1).cpu().split(args.group)


def known_embeds(shuffled):
    """The embeddings of all these prompts, or None if their videos have to be encoded."""
    embeds = [s.visual_embeds for s in shuffled]
    return None if any(x is None for x in embeds) else embeds


# ---- the bonus of a step


def step_bonus(groups, args):
    """The bonus of every response of a step -> (B, G); 0 where nothing was shuffled.

    groups: train.ScoredGroup of all ranks, with .accuracy (G,) and .shuffle_effect (None where
    nothing was shuffled).
    """
    accuracy = torch.tensor([g.accuracy for g in groups], dtype=torch.float64)  # (B, G)
    bonus = torch.zeros_like(accuracy)
    tested = [b for b, g in enumerate(groups) if g.shuffle_effect]
    if tested and args.temporal == "contrast":
        drop = torch.tensor([groups[b].shuffle_effect.drops for b in tested], dtype=torch.float64)
        how = dict(alpha=args.alpha, correct=args.correct)
        bonus[tested] = contrast_bonus(accuracy[tested], drop, **how)
    elif tested:
        shuffled_acc = shuffled_accuracies(groups)  # (videos, G')
        how = dict(alpha=args.alpha, mu=args.mu, correct=args.correct)
        bonus[tested] = temporal_bonus(accuracy[tested], shuffled_acc, **how)
    return bonus


def step_metrics(groups, bonus, args):
    """What a step logs of T-GRPO: shares of the step's groups, and means."""
    tested = [g for g in groups if g.shuffle_effect]
    metrics = {
        "temporal_not_applicable": 1 - len(tested) / len(groups),
        "temporal_bonus": float(bonus.mean()),
    }
    if args.temporal == "contrast":
        drops = torch.tensor([g.shuffle_effect.drops for g in tested], dtype=torch.float64)
        return metrics | ({"probability_drop": float(drops.mean())} if tested else {})
    metrics |= {"temporal_passed": 0.0, "temporal_vacuous": 0.0}
    if tested:
        accuracy = torch.tensor([g.accuracy for g in tested], dtype=torch.float64)
        shuffled_acc = shuffled_accuracies(groups)  # (videos, G')
        passed, vacuous = temporal_test(accuracy, shuffled_acc, mu=args.mu, correct=args.correct)
        metrics["temporal_passed"] = int(passed.sum()) / len(groups)
        metrics["temporal_vacuous"] = int(vacuous.sum()) / len(groups)
        metrics["shuffled_accuracy"] = float(shuffled_acc.mean())
    return metrics


def shuffled_accuracies(groups):
    """(videos, G') accuracies of the responses to the shuffled videos."""
    found = [g.shuffle_effect.accuracies for g in groups if g.shuffle_effect]
    return torch.tensor(found, dtype=torch.float64)
