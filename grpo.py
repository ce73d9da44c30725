"""GRPO on tensors (arXiv 2402.03300, section 4.1): group advantages, KL estimators, the loss.

For one prompt the policy samples G responses o_1 ... o_G with rewards r_1 ... r_G:
    1. A_i = (r_i - mean r) / (std r + eps)            compared with its own group: no value network
    2. rho_it = exp(log pi(o_it) - log pi_old(o_it))   pi_old is the policy that sampled
    3. loss = -mean_i mean_t [ min(rho A, clip(rho, 1 - low, 1 + high) A) - beta KL(pi || ref) ]
With a single update per rollout, rho = 1 up to rounding: nothing is clipped, and the gradient is
that of REINFORCE with the group's mean as baseline. (In bf16, rounding exceeds GSPO's narrow clips:
watch `clipped` in the log.)

    Dr. GRPO   norm "none", average "constant"
    DAPO       average "token", clip_high 0.28, beta 0, groups with equal rewards dropped, truncated
               responses masked
    GSPO       variant "gspo", clip_low 3e-4, clip_high 4e-4
    CISPO      variant "cispo"
    SAPO       variant "sapo"
    EMA-GRPO   norm "ema"

Pure functions. Shapes: B prompts, G responses, N = B * G, R tokens.
"""

import torch

NORMS = ("std", "none", "batch", "ema")
KL_ESTIMATORS = ("k1", "k2", "k3")
VARIANTS = ("grpo", "gspo", "cispo", "sapo")
AVERAGES = ("sequence", "token", "constant")


def group_advantages(rewards, norm="std", eps=1e-4, *, std=None):
    """rewards (B, G) -> advantages (B, G): each response against its own group's mean.

    norm: "std"   divides by the group's unbiased standard deviation + eps (GRPO);
          "none"  does not divide (Dr. GRPO, arXiv 2503.20783: dividing favours questions that are
                  nearly always right or nearly always wrong);
          "batch" divides by the standard deviation of all the centred rewards of the batch;
          "ema"   divides by `std` (B,), that of the rewards of each group's problem type, moving
                  over steps (`moving_std`), and clips to [-5, 5] (EMA-GRPO, arXiv 2512.03043).
    With one problem type, "ema" is "none" times a factor that moves slowly. In its first step it is
    "batch", up to the clip and eps, if all groups have the same mean; and "std" times
    sqrt(G / (G - 1)), if there is one group.
    A group whose rewards are all equal gets zeros: it teaches nothing. So does G = 1, which has no
    baseline.
    """
    if norm not in NORMS:
        raise ValueError(f"norm {norm!r}, expected one of {NORMS}")
    if norm == "ema" and std is None:
        raise ValueError("norm 'ema' needs the moving std of each group (B,)")
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    # equal rewards: exactly 0, not the rounding of a mean
    centred = torch.where(zero_std(rewards)[:, None], 0.0, centred)
    if norm == "none" or rewards.shape[1] == 1 or not len(rewards):
        return centred
    if norm == "ema":
        return (centred / (std[:, None] + eps)).clamp(-5, 5)
    std = rewards.std(dim=1, keepdim=True) if norm == "std" else centred.square().mean().sqrt()
    return centred / (std + eps)


def moving_moments(moments, rewards, kinds, decay=0.99):
    """The first two moments of the rewards of each problem type, moved on by a step (arXiv
    2512.03043, equation 9) -> {kind: (mean of r, mean of r^2)}.

    moments: those after the step before; {} before the first.  rewards (B, G).  kinds: of each of
    the B groups, its problem type. A type that is new starts with its own moments, so no bias has
    to be corrected; one without a group in the step keeps those it has.
    """
    moved = dict(moments)
    for kind in sorted(set(kinds)):
        of_kind = rewards[[k == kind for k in kinds]].double()
        now = float(of_kind.mean()), float(of_kind.square().mean())
        before = moments.get(kind, now)
        moved[kind] = tuple(decay * old + (1 - decay) * new for old, new in zip(before, now))
    return moved


def moving_std(moments, kinds):
    """The standard deviation of the rewards of each kind (equation 10) -> (B,). It includes how
    much the means of groups differ."""
    pairs = [moments[kind] for kind in kinds]
    mean, square = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2).unbind(1)  # (B,) each
    return (square - mean.square()).clamp(min=0).sqrt()


def zero_std(rewards):
    """(B, G) -> (B,) bool: the groups whose rewards are all equal."""
    return rewards.max(dim=1).values == rewards.min(dim=1).values


def kl_penalty(logp, ref_logp, estimator="k3"):
    """Estimate of KL(pi || ref) at each sampled token (joschu.net/blog/kl-approx), in any shape.

    k1 = log pi - log ref     unbiased; as a loss, its on-policy gradient is zero on average
    k2 = k1^2 / 2             as a loss: the gradient of KL(pi || ref)
    k3 = exp(-k1) - 1 + k1    never negative; as a loss: the gradient of KL(ref || pi)
    The difference is clamped to +-10, as in Video-R1's release.
    """
    k1 = (logp - ref_logp).clamp(-10, 10)
    if estimator == "k1":
        return k1
    if estimator == "k2":
        return k1.square() / 2
    if estimator == "k3":
        return torch.expm1(-k1) + k1
    raise ValueError(f"KL estimator {estimator!r}, expected one of {KL_ESTIMATORS}")


def grpo_loss(
    logp,
    old_logp,
    advantages,
    mask,
    *,
    ref_logp=None,
    beta=0.0,
    estimator="k3",
    average="sequence",
    denominator=None,
    **how,
):
    """The policy loss with its KL penalty -> (loss, sums).

    logp (N, R): log-probs under pi, with gradient.  old_logp (N, R): under pi_old, which sampled.
    ref_logp (N, R): under the frozen reference, when beta > 0.  advantages (N,).
    mask (N, R): 1 on tokens that are trained, the EOS included; 0 beyond a response's end, and on
    a response that is left out.
    average, denominator: see `average_loss`.  how: keywords of `policy_objective`.
    sums: "tokens", and over these tokens "ratio", "clipped" (where a clip acts) and, when beta > 0,
    "kl"; detached.
    """
    mask = mask.to(logp.dtype)
    ratio, objective, clipped = policy_objective(logp, old_logp, advantages, mask, **how)
    loss = -torch.where(mask > 0, objective, 0.0)  # (N, R)
    sums = {
        "tokens": mask.sum(),
        "ratio": (ratio * mask).sum(),
        "clipped": (clipped * mask).sum(),
    }
    if beta:
        kl = kl_penalty(logp, ref_logp, estimator)
        loss = loss + beta * torch.where(mask > 0, kl, 0.0)
        sums["kl"] = (kl * mask).sum()
    loss = average_loss(loss, mask, average, denominator)
    return loss, {name: value.detach() for name, value in sums.items()}


def policy_objective(
    logp,
    old_logp,
    advantages,
    mask,
    *,
    variant="grpo",
    clip_low=0.2,
    clip_high=0.2,
    dual_clip=0.0,
    tau_pos=1.0,
    tau_neg=1.05,
):
    """What the policy maximises at each token -> (ratio, objective, clipped), each (N, R).

    variant: "grpo"   the ratio of each token, clipped to [1 - clip_low, 1 + clip_high];
             "gspo"   one ratio for a response, exp(mean_t log rho) (arXiv 2507.18071; its clips are
                      3e-4 and 4e-4);
             "cispo"  sg(min(rho, 1 + clip_high)) A log pi: a clipped token keeps its gradient
                      (arXiv 2506.13585);
             "sapo"   4 / tau * sigmoid(tau (rho - 1)) A, tau = tau_pos where A > 0, else tau_neg: a
                      soft clip (arXiv 2511.20347). Its gradient is that of rho A without a clip,
                      times 4 p (1 - p), p = sigmoid(tau (rho - 1)): 1 at rho = 1, and less the
                      farther rho is from 1. tau -> 0: no clip at all (rho A, up to a constant);
                      tau -> infinity: no gradient but at rho = 1.
             On pi_old (rho = 1 exactly) all four have the same gradient, GSPO only with
             average "sequence". They differ from a rollout's second update on. (The objective of
             "sapo" is 2 / tau A there, not A.)
    dual_clip: c > 1 bounds the loss of a token with A < 0 at -c A (arXiv 1912.09729, c = 3). It
    acts only where rho > c; 0 is off. Not in "cispo" and "sapo".
    clipped: where a clip acts; nowhere in "sapo".
    """
    A = advantages[:, None]
    log_ratio = torch.where(mask > 0, logp - old_logp, 0.0)
    if variant == "gspo":
        log_ratio = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        log_ratio = log_ratio.expand_as(logp)
    ratio = log_ratio.exp()  # (N, R)
    if variant == "cispo":
        weight = ratio.detach().clamp(max=1 + clip_high)
        return ratio, weight * A * logp, ratio > 1 + clip_high
    if variant == "sapo":
        tau = torch.full_like(A, tau_neg).masked_fill(A > 0, tau_pos)  # (N, 1)
        gate = 4 / tau * torch.sigmoid(tau * (ratio - 1))  # (N, R)
        return ratio, gate * A, torch.zeros_like(ratio)
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}, expected one of {VARIANTS}")
    objective = torch.minimum(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)
    if dual_clip:
        objective = torch.where(A < 0, torch.maximum(objective, dual_clip * A), objective)
    return ratio, objective, objective != ratio * A


def average_loss(loss, mask, average, denominator=None):
    """Token losses (N, R), 0 outside the mask -> the loss of the batch, a scalar.

    average: "sequence"  the mean over a response's tokens, then over responses (GRPO);
             "token"     the sum over all tokens / their number: long responses weigh more (DAPO,
                         arXiv 2503.14476);
             "constant"  the sum over all tokens / a constant, e.g. N * max length: no length bias
                         (Dr. GRPO).
             All the same, up to a factor, when all responses have one length.
    denominator: of the outer mean, when these N responses are part of a larger batch: its number of
    responses ("sequence") or of tokens ("token"); always needed for "constant".
    """
    if average == "sequence":
        per_response = loss.sum(1) / mask.sum(1).clamp(min=1)  # (N,)
        return per_response.sum() / (len(loss) if denominator is None else denominator)
    if average == "token":
        return loss.sum() / (mask.sum() if denominator is None else denominator)
    if average == "constant":
        if denominator is None:
            raise ValueError("average 'constant' needs a denominator, e.g. N * max length")
        return loss.sum() / denominator
    raise ValueError(f"average {average!r}, expected one of {AVERAGES}")
