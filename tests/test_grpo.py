"""Group advantages, KL and the clipped loss against numbers worked out by hand."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

import grpo
from conftest import flags, run

REWARDS = torch.tensor(
    [[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0], [0.0, 3.0, 0.0, 0.0]], dtype=torch.float64
)


def test_advantages_divide_by_the_unbiased_std_of_the_group():
    a = grpo.group_advantages(REWARDS)
    std0, std2 = math.sqrt(4 * 0.25 / 3), math.sqrt((2.25**2 + 3 * 0.75**2) / 3)
    expected = [
        [0.5 / (std0 + 1e-4) * s for s in (1, -1, -1, 1)],
        [0.0] * 4,
        [x / (std2 + 1e-4) for x in (-0.75, 2.25, -0.75, -0.75)],
    ]
    torch.testing.assert_close(a, torch.tensor(expected, dtype=torch.float64))


def test_advantages_none_only_subtracts_the_mean_and_batch_uses_one_std():
    centred = [[0.5, -0.5, -0.5, 0.5], [0, 0, 0, 0], [-0.75, 2.25, -0.75, -0.75]]
    torch.testing.assert_close(
        grpo.group_advantages(REWARDS, "none"), torch.tensor(centred, dtype=torch.float64)
    )
    std = math.sqrt((4 * 0.25 + 2.25**2 + 3 * 0.75**2) / 12)
    torch.testing.assert_close(
        grpo.group_advantages(REWARDS, "batch"),
        torch.tensor(centred, dtype=torch.float64) / (std + 1e-4),
    )
    with pytest.raises(ValueError, match="norm 'max'"):
        grpo.group_advantages(REWARDS, "max")


KINDS = ["multiple choice", "grounding", "multiple choice"]


def test_the_moments_of_each_problem_type_move_over_steps():
    """Of multiple choice: eight rewards 1 0 0 1, 0 3 0 0, whose mean is 5 / 8 and mean square
    11 / 8. Then 2 2 2 2 is added with a weight of 1 - decay."""
    first = grpo.moving_moments({}, REWARDS, KINDS)
    assert first == {
        "multiple choice": pytest.approx((5 / 8, 11 / 8)),
        "grounding": pytest.approx((2, 4)),
    }
    std = math.sqrt(11 / 8 - (5 / 8) ** 2)
    assert grpo.moving_std(first, KINDS).tolist() == pytest.approx([std, 0, std])
    second = grpo.moving_moments(first, REWARDS[1:2], ["multiple choice"], decay=0.9)
    assert second["multiple choice"] == pytest.approx((0.9 * 5 / 8 + 0.2, 0.9 * 11 / 8 + 0.4))
    assert second["grounding"] == first["grounding"]  # no group of it
    assert first["multiple choice"] == pytest.approx((5 / 8, 11 / 8))  # not changed in place
    usual = grpo.moving_moments(first, REWARDS[1:2], ["multiple choice"])
    assert usual["multiple choice"][0] == pytest.approx(0.99 * 5 / 8 + 0.01 * 2)
    assert grpo.moving_moments(first, REWARDS[:0], []) == first
    assert grpo.moving_std(first, []).shape == (0,)


def test_moments_survive_json_bit_for_bit():
    rewards = torch.rand(9, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moments, kept = {}, {}
    for row in rewards:
        moments = grpo.moving_moments(moments, row[None], ["OCR"])
        kept = grpo.moving_moments(json.loads(json.dumps(kept)), row[None], ["OCR"])
    assert kept == moments


def test_advantages_ema_divide_by_the_std_they_are_given_and_are_clipped():
    std = torch.tensor([0.25, 0.0, 0.05], dtype=torch.float64)
    a = grpo.group_advantages(REWARDS, "ema", eps=1e-12, std=std)
    expected = [[2, -2, -2, 2], [0] * 4, [-5, 5, -5, -5]]  # not -15 and 45
    torch.testing.assert_close(a, torch.tensor(expected, dtype=torch.float64))
    with pytest.raises(ValueError, match="norm 'ema' needs the moving std"):
        grpo.group_advantages(REWARDS, "ema")


def test_when_ema_equals_another_norm():
    """In a first step of one problem type: batch, if all groups have one mean; std up to the
    biased std's factor, if there is one group. Later, none times a factor."""
    one_mean = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.5, 0.25, 0.75, 0.5]], dtype=torch.float64)

    def ema(rewards, moments):
        kinds = ["OCR"] * len(rewards)
        moments = grpo.moving_moments(moments, rewards, kinds)
        return grpo.group_advantages(
            rewards, "ema", eps=0.0, std=grpo.moving_std(moments, kinds)
        ), moments

    a, moments = ema(one_mean, {})
    torch.testing.assert_close(a, grpo.group_advantages(one_mean, "batch", eps=0.0))
    one_group, _ = ema(REWARDS[:1], {})
    torch.testing.assert_close(
        one_group, grpo.group_advantages(REWARDS[:1], "std", eps=0.0) * math.sqrt(4 / 3)
    )
    later, _ = ema(REWARDS / 2, moments)
    none = grpo.group_advantages(REWARDS / 2, "none")
    torch.testing.assert_close(later, later[0, 0] / none[0, 0] * none)


def test_equal_rewards_give_exactly_zero():
    rewards = torch.full((1, 7), 0.1)  # the mean of seven 0.1s is not 0.1 in fp32
    assert grpo.group_advantages(rewards).abs().max() == 0
    assert grpo.zero_std(REWARDS).tolist() == [False, True, False]
    assert grpo.group_advantages(torch.tensor([[3.0]])).item() == 0


def test_kl_estimators_by_hand():
    logp, ref = torch.tensor([-1.0, -2.0, 0.0]), torch.tensor([-1.5, -1.0, -100.0])
    torch.testing.assert_close(
        grpo.kl_penalty(logp, ref, "k1"), torch.tensor([0.5, -1.0, 10.0])
    )  # the last is clamped
    torch.testing.assert_close(grpo.kl_penalty(logp, ref, "k2"), torch.tensor([0.125, 0.5, 50.0]))
    expected = torch.tensor(
        [math.exp(-0.5) - 1 + 0.5, math.exp(1.0) - 1 - 1, math.exp(-10) - 1 + 10]
    )
    torch.testing.assert_close(grpo.kl_penalty(logp, ref), expected)


@pytest.mark.parametrize(
    "estimator, direction", [("k1", None), ("k2", "pi||ref"), ("k3", "ref||pi")]
)
def test_kl_gradients_are_the_ones_documented(estimator, direction):
    """Its mean over the policy: zero for k1, that of KL(pi||ref) for k2, of KL(ref||pi) for k3."""
    logits = torch.tensor([0.3, -0.2, 1.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([0.1, 0.5, -0.4], dtype=torch.float64).log_softmax(0)
    logp = logits.log_softmax(0)
    penalty = (
        logp.detach().exp() * grpo.kl_penalty(logp, ref, estimator)
    ).sum()  # tokens sampled from pi, sampling not differentiated
    (got,) = torch.autograd.grad(penalty, logits)
    logp = logits.log_softmax(0)
    exact = {
        None: 0 * logp.sum(),
        "pi||ref": (logp.exp() * (logp - ref)).sum(),
        "ref||pi": (ref.exp() * (ref - logp)).sum(),
    }[direction]
    torch.testing.assert_close(got, torch.autograd.grad(exact, logits)[0])


def test_loss_by_hand_two_responses():
    """rho = (1.5, 1), A = 1: clipped to (1.2, 1). rho = 0.5, A = -2: clipped to 0.8.
    Padding does not count."""
    old = torch.tensor([[-1.0, -2.0], [-1.0, 7.0]], dtype=torch.float64)
    logp = old + torch.tensor([[math.log(1.5), 0.0], [math.log(0.5), 1e9]], dtype=torch.float64)
    mask, A = torch.tensor([[1, 1], [1, 0]]), torch.tensor([1.0, -2.0], dtype=torch.float64)

    def loss(**kw):
        return float(grpo.grpo_loss(logp, old, A, mask, **kw)[0])

    assert loss() == pytest.approx((-(1.2 + 1) / 2 + 1.6) / 2)
    assert loss(average="token") == pytest.approx((-1.2 - 1 + 1.6) / 3)
    assert loss(average="constant", denominator=8) == pytest.approx((-1.2 - 1 + 1.6) / 8)
    assert loss(clip_high=0.6) == pytest.approx((-(1.5 + 1) / 2 + 1.6) / 2)
    assert loss(clip_low=0.6) == pytest.approx((-(1.2 + 1) / 2 + 1.0) / 2)
    stats = grpo.grpo_loss(logp, old, A, mask)[1]
    assert [float(stats[k]) for k in ("tokens", "ratio", "clipped")] == pytest.approx([3, 3.0, 2])
    with pytest.raises(ValueError, match="denominator"):
        loss(average="constant")


def test_loss_adds_beta_times_kl():
    logp, A = torch.tensor([[-1.0, -0.5]], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    ref = torch.tensor([[-1.5, -0.5]], dtype=torch.float64)
    loss, stats = grpo.grpo_loss(logp, logp, A, torch.ones(1, 2), ref_logp=ref, beta=0.1)
    kl = math.exp(-0.5) - 1 + 0.5
    assert float(loss) == pytest.approx(0.1 * kl / 2) and float(stats["kl"]) == pytest.approx(kl)


def test_on_policy_gradient_is_reinforce():
    """One update per rollout: rho = 1, the loss is -A whatever the clip, its gradient that of
    -A log pi."""
    logp = torch.tensor([[-1.0, -2.0], [-0.3, -0.7]], dtype=torch.float64, requires_grad=True)
    A, mask = (
        torch.tensor([0.8, -1.3], dtype=torch.float64),
        torch.tensor([[1.0, 1.0], [1.0, 0.0]], dtype=torch.float64),
    )
    (got,) = torch.autograd.grad(grpo.grpo_loss(logp, logp.detach(), A, mask)[0], logp)
    torch.testing.assert_close(got, -A[:, None] * mask / mask.sum(1, keepdim=True) / 2)


@pytest.mark.parametrize("average", ["sequence", "token"])
def test_parts_of_a_batch_add_up_with_global_denominators(average):
    g = torch.Generator().manual_seed(0)
    logp, old = (torch.randn(6, 5, generator=g, dtype=torch.float64) for _ in range(2))
    A, mask = (
        torch.randn(6, generator=g, dtype=torch.float64),
        torch.arange(5) < torch.tensor([5, 1, 3, 2, 5, 4])[:, None],
    )
    whole = grpo.grpo_loss(logp, old, A, mask, average=average)[0]
    denominator = 6 if average == "sequence" else int(mask.sum())
    parts = [
        grpo.grpo_loss(logp[i], old[i], A[i], mask[i], average=average, denominator=denominator)[0]
        for i in (slice(0, 2), slice(2, 6))
    ]
    torch.testing.assert_close(sum(parts), whole)


# ---- the variants, on a policy small enough for plain numbers: two prompts, three responses each,
# a vocabulary of two tokens

P_NEW, P_OLD = (
    0.6,
    0.5,
)  # the policy gives token 1 this probability everywhere; the policy that sampled gave 0.5
TOKENS = [[1, 1], [0], [1, 0], [0, 0], [1], [1, 1]]
REWARDS_2x3 = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]], dtype=torch.float64)


def small_batch():
    """(logp with gradient to one logit, old, advantages, mask, logit). A = +-1.1547, +-0.57735."""
    logit = torch.tensor(math.log(P_NEW / (1 - P_NEW)), dtype=torch.float64, requires_grad=True)
    one, zero = torch.nn.functional.logsigmoid(logit), torch.nn.functional.logsigmoid(-logit)

    def pad(rows):
        rows = [torch.stack(row) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    logp = pad([[one if t else zero for t in row] for row in TOKENS])
    mask = pad([[torch.ones(()) for _ in row] for row in TOKENS])
    old = torch.full_like(logp, math.log(P_OLD)).detach()
    return logp, old, grpo.group_advantages(REWARDS_2x3, eps=0.0).flatten(), mask, logit


UP, DOWN = P_NEW / P_OLD, (1 - P_NEW) / P_OLD  # ratios of token 1 and of token 0: 1.2 and 0.8
A = [
    2 / math.sqrt(3),
    -1 / math.sqrt(3),
    -1 / math.sqrt(3),
    -2 / math.sqrt(3),
    1 / math.sqrt(3),
    1 / math.sqrt(3),
]


@pytest.mark.parametrize(
    "settings, per_response",
    [
        # per-token objective, its mean over each response;
        # clip_low = clip_high = 0.1 holds rho A between 0.9 A and 1.1 A
        (
            dict(),
            [
                1.1 * A[0],
                0.9 * A[1],
                (UP * A[2] + 0.9 * A[2]) / 2,
                0.9 * A[3],
                1.1 * A[4],
                1.1 * A[5],
            ],
        ),
        (
            dict(clip_high=0.5),
            [UP * A[0], 0.9 * A[1], (UP * A[2] + 0.9 * A[2]) / 2, 0.9 * A[3], UP * A[4], UP * A[5]],
        ),
        # one ratio for a response: 1.2, 0.8, sqrt(1.2 * 0.8), 0.8, 1.2, 1.2
        (
            dict(variant="gspo"),
            [
                1.1 * A[0],
                0.9 * A[1],
                math.sqrt(UP * DOWN) * A[2],
                0.9 * A[3],
                1.1 * A[4],
                1.1 * A[5],
            ],
        ),
        # min(rho, 1.1) A log pi
        (
            dict(variant="cispo"),
            [
                1.1 * A[0] * math.log(0.6),
                0.8 * A[1] * math.log(0.4),
                (1.1 * A[2] * math.log(0.6) + 0.8 * A[2] * math.log(0.4)) / 2,
                0.8 * A[3] * math.log(0.4),
                1.1 * A[4] * math.log(0.6),
                1.1 * A[5] * math.log(0.6),
            ],
        ),
        # 4 / tau * sigmoid(tau (rho - 1)) A, tau 2 for A > 0 and 4 for A < 0: sigmoid(0.4) of token
        # 1 and sigmoid(-0.4) of token 0, sigmoid(0.8) and sigmoid(-0.8)
        (
            dict(variant="sapo", tau_pos=2.0, tau_neg=4.0),
            [
                2 * 0.598687660 * A[0],
                1 * 0.310025519 * A[1],
                (0.689974481 + 0.310025519) * A[2] / 2,
                1 * 0.310025519 * A[3],
                2 * 0.598687660 * A[4],
                2 * 0.598687660 * A[5],
            ],
        ),
        # a bound of 1.15 on the ratio where A < 0:
        # only the first token of the third response exceeds it
        (
            dict(dual_clip=1.15),
            [
                1.1 * A[0],
                0.9 * A[1],
                (1.15 * A[2] + 0.9 * A[2]) / 2,
                0.9 * A[3],
                1.1 * A[4],
                1.1 * A[5],
            ],
        ),
    ],
)
def test_variants_by_hand(settings, per_response):
    logp, old, advantages, mask, _ = small_batch()
    assert advantages.tolist() == pytest.approx(A)
    settings = dict(clip_low=0.1, clip_high=0.1) | settings
    lengths = [len(row) for row in TOKENS]

    def loss(**kw):
        return grpo.grpo_loss(logp, old, advantages, mask, **settings, **kw)[0].item()

    assert loss() == pytest.approx(-sum(per_response) / 6)
    total = sum(x * n for x, n in zip(per_response, lengths))
    assert loss(average="token") == pytest.approx(-total / 10)
    assert loss(average="constant", denominator=6 * 4) == pytest.approx(-total / 24)


@pytest.mark.parametrize("average", ["sequence", "token"])
def test_on_the_sampling_policy_variants_have_one_gradient(average):
    """rho = 1: GRPO = CISPO = SAPO = REINFORCE for every average; GSPO too when averaged per
    response."""
    gradients = {}
    for variant in grpo.VARIANTS:
        logp, _, advantages, mask, logit = small_batch()
        loss, _ = grpo.grpo_loss(
            logp, logp.detach(), advantages, mask, variant=variant, average=average, dual_clip=3.0
        )
        (gradients[variant],) = torch.autograd.grad(loss, logit)
    assert gradients["grpo"].abs() > 1e-3
    torch.testing.assert_close(gradients["cispo"], gradients["grpo"])
    torch.testing.assert_close(gradients["sapo"], gradients["grpo"])
    if average == "sequence":
        torch.testing.assert_close(gradients["gspo"], gradients["grpo"])


def test_a_clipped_token_keeps_its_gradient_in_cispo_only():
    for variant, moves in (("grpo", False), ("cispo", True)):
        logp = torch.tensor([[math.log(0.9)]], dtype=torch.float64, requires_grad=True)
        old, advantage = (
            torch.tensor([[math.log(0.5)]], dtype=torch.float64),
            torch.ones(1, dtype=torch.float64),
        )
        loss, stats = grpo.grpo_loss(logp, old, advantage, torch.ones(1, 1), variant=variant)
        assert (torch.autograd.grad(loss, logp)[0].abs() > 0).item() == moves and stats[
            "clipped"
        ] == 1
    with pytest.raises(ValueError, match="variant 'x'"):
        grpo.grpo_loss(logp, old, advantage, torch.ones(1, 1), variant="x")


def ratios(*rho):
    """(logp (1, R) with gradient, old (1, R)) of some ratios."""
    old = torch.full((1, len(rho)), -1.0, dtype=torch.float64)
    logp = old + torch.tensor([rho], dtype=torch.float64).log()
    return logp.requires_grad_(), old


def gradient(logp, old, A, **how):
    """Of the loss by the log-probs, times minus the number of tokens: per token (R,)."""
    loss, sums = grpo.grpo_loss(logp, old, torch.tensor([A]).double(), torch.ones_like(old), **how)
    assert sums["clipped"] == 0
    return -logp.shape[1] * torch.autograd.grad(loss, logp)[0][0]


@pytest.mark.parametrize("A", [1.5, -0.5])
def test_the_gradient_of_sapo_is_the_written_one(A):
    """w rho A with w = 4 p (1 - p) = 1 / cosh(tau (rho - 1) / 2)^2."""
    rho = torch.tensor([0.1, 0.5, 0.9, 1.0, 1.1, 2.0, 9.0], dtype=torch.float64)
    logp, old = ratios(*rho)
    tau = 1.3 if A > 0 else 2.7
    w = torch.cosh(tau * (rho - 1) / 2) ** -2
    got = gradient(logp, old, A, variant="sapo", tau_pos=1.3, tau_neg=2.7)
    torch.testing.assert_close(got, w * rho * A)
    assert got[3] == pytest.approx(A)  # rho = 1: that of GRPO
    usual = gradient(logp, old, A, variant="sapo")
    w = torch.cosh((1.0 if A > 0 else 1.05) * (rho - 1) / 2) ** -2
    torch.testing.assert_close(usual, w * rho * A)


def test_the_limits_of_sapo():
    """tau -> 0: GRPO without a clip; a large tau: no gradient but at rho = 1."""
    logp, old = ratios(0.5, 1.0, 3.0)
    for A in (1.5, -0.5):
        soft = gradient(logp, old, A, variant="sapo", tau_pos=1e-5, tau_neg=1e-5)
        unclipped = gradient(logp, old, A, clip_low=1.0, clip_high=1e9)
        torch.testing.assert_close(soft, unclipped, rtol=1e-9, atol=0)
        sharp = gradient(logp, old, A, variant="sapo", tau_pos=1e3, tau_neg=1e3)
        torch.testing.assert_close(sharp, torch.tensor([0.0, A, 0.0], dtype=torch.float64))


@pytest.mark.slow
def test_the_moving_std_is_the_same_after_a_resume_and_on_two_ranks(tmp_path, world, cold_start):
    """state.json keeps the moments of each problem type: a run cut after one of two steps ends bit
    for bit as if it had not been."""
    how = dict(steps=2, model=cold_start, prompts=6, norm="ema", save_every=1)
    run(*flags(world, tmp_path / "one", **how))
    shutil.copytree(tmp_path / "one", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-000002")
    run(*flags(world, tmp_path / "cut", **how), "--resume")
    run(*flags(world, tmp_path / "two", **how), ranks=2)
    last, logged = {}, {}
    for name in ("one", "cut", "two"):
        last[name] = tmp_path / name / "checkpoint-000002"
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        logged[name] = [json.loads(line)["reward_std"] for line in lines]
    state = {name: json.loads((folder / "state.json").read_text()) for name, folder in last.items()}
    assert state["one"]["moments"].keys() == {"multiple choice", "numerical"}
    assert state["one"] == state["cut"] and logged["one"] == logged["cut"]
    a, b = (load_file(last[name] / "model.safetensors") for name in ("one", "cut"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    # what the last step divided by is the std of the moments that it saved
    std = {k: math.sqrt(sq - m * m) for k, (m, sq) in state["one"]["moments"].items()}
    assert {k: pytest.approx(std[k]) for k in logged["one"][1]} == logged["one"][1]
    assert logged["two"][0] == logged["one"][0]
