"""GRPO on tensors (arXiv 2402.03300, section 4.1): group advantages, KL estimators, the clipped policy loss.

For one prompt the policy samples G responses o_1 ... o_G with rewards r_1 ... r_G:
    1. A_i = (r_i - mean r) / (std r + eps)          better or worse than its own group: no value network
    2. rho_it = exp(log pi(o_it) - log mu(o_it))     mu is the policy that sampled
    3. loss = -mean_i mean_t [ min(rho A, clip(rho, 1 - low, 1 + high) A) - beta KL(pi || ref) ]
Pure functions; shapes: B prompts, G responses, N = B * G, R tokens. A single update per rollout has rho = 1: nothing is
clipped then and the gradient is that of REINFORCE with the group's mean as baseline.

    Dr. GRPO   norm "none", average "constant"
    DAPO       average "token", clip_high 0.28, beta 0, groups with equal rewards dropped, truncated responses masked
    GSPO       variant "gspo", clip_low 3e-4, clip_high 4e-4          CISPO   variant "cispo"
"""

import torch

NORMS = ("std", "none", "batch")
KL_ESTIMATORS = ("k1", "k2", "k3")
VARIANTS = ("grpo", "gspo", "cispo")
AVERAGES = ("sequence", "token", "constant")


def group_advantages(rewards, norm="std", eps=1e-4):
    """rewards (B, G) -> advantages (B, G): each response against its own group's mean.

    norm: "std"   divides by the group's unbiased standard deviation + eps (GRPO);
          "none"  does not divide (Dr. GRPO, arXiv 2503.20783: dividing favours questions that are nearly always right or wrong);
          "batch" divides by the standard deviation of all the centred rewards of the batch.
    A group whose rewards are all equal gets zeros: it teaches nothing. G = 1 has no baseline and gets zeros too.
    """
    if norm not in NORMS:
        raise ValueError(f"norm {norm!r}, expected one of {NORMS}")
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    centred = torch.where(
        zero_std(rewards)[:, None], 0.0, centred
    )  # equal rewards: exactly 0, not the rounding of a mean
    if norm == "none" or rewards.shape[1] == 1:
        return centred
    std = rewards.std(dim=1, keepdim=True) if norm == "std" else centred.square().mean().sqrt()
    return centred / (std + eps)


def zero_std(rewards):
    """(B, G) -> (B,) bool: the groups whose rewards are all equal."""
    return rewards.max(dim=1).values == rewards.min(dim=1).values


def kl_penalty(logp, ref_logp, estimator="k3"):
    """Per-token estimate of KL(pi || ref) from the sampled tokens (joschu.net/blog/kl-approx). Any shape, the same back.

    k1 = log pi - log ref (unbiased; as a loss on on-policy samples its gradient is zero on average),
    k2 = k1^2 / 2 (as a loss: the gradient of KL(pi || ref)), k3 = exp(-k1) - 1 + k1 (never negative; that of KL(ref || pi)).
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
    """The policy loss with its KL penalty -> (loss, stats).

    logp (N, R): log-probs under the policy, with gradient.  old_logp (N, R): under the policy that sampled.
    ref_logp (N, R): under the frozen reference, when beta > 0.  advantages (N,).  mask (N, R): 1 on response tokens (EOS too).
    variant: "grpo"   the ratio of each token, clipped to [1 - clip_low, 1 + clip_high];
             "gspo"   one ratio for a response, exp(mean_t log rho) (arXiv 2507.18071; its clips are 3e-4 and 4e-4);
             "cispo"  -sg(min(rho, 1 + clip_high)) A log pi: a clipped token keeps its gradient (arXiv 2506.13585).
             On the policy that sampled (rho = 1, a first update) all three have the same gradient, GSPO's with average
             "sequence" only; they differ from the second update of a rollout on.
    dual_clip: c > 1 bounds the loss of a token with A < 0 at -c A (arXiv 1912.09729, c = 3); acts only where rho > c. 0: off.
    average: "sequence"  the mean over a response's tokens, then over responses (GRPO);
             "token"     the sum over all tokens / their number: long responses weigh more (DAPO, arXiv 2503.14476);
             "constant"  the sum over all tokens / a constant, e.g. N * max length: no length bias (Dr. GRPO).
             The same up to a factor when all responses have one length.
    denominator: of the outer mean, when these N responses are a part of a larger batch: its number of responses
    ("sequence") or of tokens ("token"); always needed for "constant".
    stats: "kl", "clipped" (tokens where a clip acts), "ratio": sums over tokens, detached, to be divided by "tokens".
    """
    mask = mask.to(logp.dtype)
    A = advantages[:, None]
    log_ratio = torch.where(mask > 0, logp - old_logp, 0.0)
    if variant == "gspo":
        log_ratio = (
            log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        ).expand_as(logp)
    ratio = log_ratio.exp()  # (N, R)
    if variant == "cispo":
        weight = ratio.detach().clamp(max=1 + clip_high)
        objective, clipped = weight * A * logp, ratio > 1 + clip_high
    elif variant in ("grpo", "gspo"):
        objective = torch.minimum(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)
        if dual_clip:
            objective = torch.where(A < 0, torch.maximum(objective, dual_clip * A), objective)
        clipped = objective != ratio * A
    else:
        raise ValueError(f"variant {variant!r}, expected one of {VARIANTS}")
    loss = -torch.where(mask > 0, objective, 0.0)
    stats = {"tokens": mask.sum(), "ratio": (ratio * mask).sum(), "clipped": (clipped * mask).sum()}
    if beta:
        kl = kl_penalty(logp, ref_logp, estimator)
        loss = loss + beta * torch.where(mask > 0, kl, 0.0)
        stats["kl"] = (kl * mask).sum()
    if average == "sequence":
        loss = loss.sum(1) / mask.sum(1).clamp(min=1)  # (N,)
        loss = loss.sum() / (len(logp) if denominator is None else denominator)
    elif average == "token":
        loss = loss.sum() / (mask.sum() if denominator is None else denominator)
    elif average == "constant":
        if denominator is None:
            raise ValueError(
                "average 'constant' needs its denominator, e.g. responses * max length"
            )
        loss = loss.sum() / denominator
    else:
        raise ValueError(f"average {average!r}, expected one of {AVERAGES}")
    return loss, {name: value.detach() for name, value in stats.items()}
