"""T-GRPO (Video-R1, arXiv 2503.21776, section 3.1): a reward for using the order of frames.

For a video, G responses are sampled on the frames in order and G/2 on the same frames shuffled. If the ordered group is right
at least as often, the policy may be using time, and every right response of the ordered group gets a bonus:
    p, p~ = share of right responses, ordered and shuffled
    r_t   = alpha if p >= mu * p~, else 0          (paper: mu = 1, alpha = 0.3; its release: mu = 0.8)
    R_i   = r_i + r_t for every right response o_i
The shuffled responses are only counted; they never enter the loss. Images have no order: the test does not apply to them.

**What a reader should know before using it.** With accuracies of 0 and 1 and an otherwise constant reward, R = r + r_t * [right]
is (1 + r_t) * accuracy + a constant, and (R - mean) / std does not see the factor: the published bonus then leaves every
advantage as it was. It acts only where the rest of the reward varies within the group (format, length, graded accuracies), or
where advantages are not divided by the group's std. The paper remarks that the term could be added to the advantages
directly; `--temporal advantage` does that: A_i + r_t for every right response, after the normalisation.

The published test is about the group: within it, a right guess from a still frame gets the bonus of a right answer from motion.
`--temporal contrast`, ours and not the paper's, tells them apart. It generates no shuffled responses, but scores the ordered ones
again with the frames shuffled, one more packed forward pass:
    c_i   = max(0, 1 - pi(o_i | shuffled) / pi(o_i | ordered))       the share of its probability that the order is good for
    R_i   = r_i + alpha * c_i for every right response o_i
This varies within a group, so the normalisation does not cancel it; it also teaches where all responses are right. The
probability is that of the whole response: its reasoning is where a look at the frames shows, its answer often only repeats it.
Long responses lose nearly all of theirs to any shuffle, and there the bonus tells less.

Pure functions; shapes: B prompts, G ordered and G' shuffled responses, K orders of the frames, T frames.
"""

import random

import torch


def temporal_test(ordered_acc, shuffled_acc, *, mu=1.0, correct=0.5):
    """Is the ordered group right at least mu times as often? ordered_acc (B, G), shuffled_acc (B, G') accuracies in [0, 1].

    A response is right if its accuracy exceeds `correct`. A tie passes, whatever rounding makes of it: 8/12 is 0.8 * 5/6.
    Returns (passed, vacuous), (B,) bool each; vacuous: passed because neither group had a right response, so that the test
    says nothing (and there is nothing to give a bonus to).
    """
    p, p_shuffled = ((acc > correct).double().mean(dim=1) for acc in (ordered_acc, shuffled_acc))
    return p >= mu * p_shuffled - 1e-9, (p == 0) & (p_shuffled == 0)


def temporal_bonus(ordered_acc, shuffled_acc, *, alpha=0.3, mu=1.0, correct=0.5):
    """The bonus of every ordered response (B, G): alpha where it is right and its group passed the test, else 0."""
    passed, _ = temporal_test(ordered_acc, shuffled_acc, mu=mu, correct=correct)
    return alpha * (passed[:, None] & (ordered_acc > correct)).to(ordered_acc.dtype)


def probability_drop(logp, shuffled_logp):
    """c of every response: logp (G,) with the frames in order, shuffled_logp (K, G) of the same responses in K other orders, all
    summed over a response's tokens -> (G,) in [0, 1], by its mean probability over the orders."""
    return (1 - (shuffled_logp - logp).exp().mean(dim=0)).clamp(min=0)


def contrast_bonus(ordered_acc, lost, *, alpha=0.3, correct=0.5):
    """The bonus of every ordered response (B, G): alpha * probability_drop (B, G) where it is right, else 0."""
    return alpha * lost * (ordered_acc > correct).to(lost.dtype)


def permutation(n, seed):
    """A random order of n >= 2 things that is not the one they are in -> LongTensor (n,)."""
    if n < 2:
        raise ValueError(f"{n} frames or grids cannot be shuffled, at least 2 are needed")
    rng, order = random.Random(seed), list(range(n))
    while order == sorted(order):
        rng.shuffle(order)
    return torch.tensor(order)


def reorder(x, order):
    """The rows of x, in as many equal runs as `order` is long, in that order.

    On frames (T, 3, H, W): with T numbers frames are shuffled, before the model's 2-frame grids are formed (as published);
    with T / 2 numbers whole grids are. On embeddings (V, D), with T / 2 numbers: the vision tower of Qwen2-VL and Qwen2.5-VL
    sees one grid at a time, so this equals encoding the permuted video, without a second pass. Neighbouring frames then stay
    together, which hides less of the order.
    """
    return x.unflatten(0, (len(order), -1))[order].flatten(0, 1)
