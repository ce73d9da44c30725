"""GRPO on tensors (arXiv 2402.03300, section 4.1): group advantages, KL estimators, the loss.

For one prompt the policy samples G responses o_1 ... o_G with rewards r_1 ... r_G:
    1. A_i = (r_i - mean r) / (std r + eps)            compared with its own group: no value network
    2. rho_it = exp(log pi(o_it) - log pi_old(o_it))   pi_old is the policy that sampled
    3. loss = -mean_i mean_t [ min(rho A, clip(rho, 1 - low, 1 + high) A) - beta KL(pi || ref) ]
With a single update per rollout, rho = 1: nothing is clipped, and the gradient is that of REINFORCE
with the group's mean as baseline.

    Dr. GRPO   norm "none", average "constant"
    DAPO       average "token", clip_high 0.28, beta 0, groups with equal rewards dropped, truncated
               responses masked
    GSPO       variant "gspo", clip_low 3e-4, clip_high 4e-4
    CISPO      variant "cispo"

Pure functions. Shapes: B prompts, G responses, N = B * G, R tokens.
"""

import torch

NORMS = ("std", "none", "batch")
KL_ESTIMATORS = ("k1", "k2", "k3")
VARIANTS = ("grpo", "gspo", "cispo")
AVERAGES = ("sequence", "token", "constant")


def group_advantages(rewards, norm="std", eps=1e-4):
    """rewards (B, G) -> advantages (B, G): each response against its own group's mean.

    norm: "std"   divides by the group's unbiased standard deviation + eps (GRPO);
          "none"  does not divide (Dr. GRPO, arXiv 2503.20783: dividing favours questions that are
                  nearly always right or nearly always wrong);
          "batch" divides by the standard deviation of all the centred rewards of the batch.
    A group whose rewards are all equal gets zeros: it teaches nothing. So does G = 1, which has no
    baseline.
    """
    if norm not in NORMS:
        raise ValueError(f"norm {norm!r}, expected one of {NORMS}")
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    # equal rewards: exactly 0, not the rounding of a mean
    centred = torch.where(zero_std(rewards)[:, None], 0.0, centred)
    if norm == "none" or rewards.shape[1] == 1 or not len(rewards):
        return centred
    std = rewards.std(dim=1, keepdim=True) if norm == "std" else centred.square().mean().sqrt()
    return centred / (std + eps)


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
    variant="grpo",
    clip_low=0.2,
    clip_high=0.2,
    dual_clip=0.0,
    average="sequence",
    denominator=None,
):
    """The policy loss with its KL penalty -> (loss, sums).

    logp (N, R): log-probs under pi, with gradient.  old_logp (N, R): under pi_old, which sampled.
    ref_logp (N, R): under the frozen reference, when beta > 0.  advantages (N,).
    mask (N, R): 1 on response tokens, the EOS included.
    variant, dual_clip: see `policy_objective`.
    average, denominator: see `average_loss`.
    sums: "tokens", and over these tokens "ratio", "clipped" (where a clip acts) and, when beta > 0,
    "kl"; detached.
    """
    mask = mask.to(logp.dtype)
    ratio, objective, clipped = policy_objective(
        logp, old_logp, advantages, mask, variant, clip_low, clip_high, dual_clip
    )
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


def policy_objective(logp, old_logp, advantages, mask, variant, clip_low, clip_high, dual_clip):
    """What the policy maximises at each token -> (ratio, objective, clipped), each (N, R).

    variant: "grpo"   the ratio of each token, clipped to [1 - clip_low, 1 + clip_high];
             "gspo"   one ratio for a response, exp(mean_t log rho) (arXiv 2507.18071; its clips are
                      3e-4 and 4e-4);
             "cispo"  sg(min(rho, 1 + clip_high)) A log pi: a clipped token keeps its gradient
                      (arXiv 2506.13585).
             On pi_old (rho = 1, a first update) all three have the same gradient, GSPO only with
             average "sequence". They differ from a rollout's second update on.
    dual_clip: c > 1 bounds the loss of a token with A < 0 at -c A (arXiv 1912.09729, c = 3). It
    acts only where rho > c; 0 is off.
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
