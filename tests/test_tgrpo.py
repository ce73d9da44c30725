"""The temporal reward by hand, the property that a reader must know, and shuffles that shuffle."""

import pytest
import torch

import data
import grpo
import tgrpo

ORDERED = torch.tensor(
    [[1.0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0.6, 0.4, 0.5, 1]],
    dtype=torch.float64,
)
SHUFFLED = torch.tensor([[1.0, 0], [1, 0], [0, 0], [1, 0], [0.9, 0.2]], dtype=torch.float64)


def test_bonus_by_hand():
    """p = 1/2, 1/4, 0, 0, 1/2 (0.6 and 1 are right, 0.5 is not) and p~ = 1/2, 1/2, 0, 1/2, 1/2."""
    passed, vacuous = tgrpo.temporal_test(ORDERED, SHUFFLED)
    assert passed.tolist() == [True, False, True, False, True] and vacuous.tolist() == [
        False,
        False,
        True,
        False,
        False,
    ]
    expected = [[0.3, 0, 0.3, 0], [0.0] * 4, [0.0] * 4, [0.0] * 4, [0.3, 0, 0, 0.3]]
    assert tgrpo.temporal_bonus(ORDERED, SHUFFLED).tolist() == expected


def test_mu_alpha_and_correct():
    assert tgrpo.temporal_test(ORDERED, SHUFFLED, mu=0.5)[0].tolist() == [
        True,
        True,
        True,
        False,
        True,
    ]
    assert tgrpo.temporal_test(ORDERED, SHUFFLED, mu=1.5)[0].tolist() == [
        False,
        False,
        True,
        False,
        False,
    ]
    assert tgrpo.temporal_bonus(ORDERED, SHUFFLED, alpha=1.0, correct=0.1)[4].tolist() == [
        1,
        1,
        1,
        1,
    ]
    assert tgrpo.temporal_bonus(ORDERED.float(), SHUFFLED.float()).dtype == torch.float32


def test_a_tie_passes_whatever_rounding_makes_of_it():
    """8/12 of the ordered and 5/6 of the shuffled at mu 0.8, and all other counts of G = 12 and
    G' = 6, in integers."""

    def right(n, of):
        return (torch.arange(of) < n).double()[None]

    for tenths in range(1, 21):
        for n in range(1, 13):
            for m in range(1, 7):
                passed, _ = tgrpo.temporal_test(right(n, 12), right(m, 6), mu=tenths / 10)
                assert passed.item() == (10 * 6 * n >= tenths * 12 * m), (n, m, tenths)


@pytest.mark.parametrize("alpha", [0.3, 10.0])
def test_the_published_bonus_cancels_for_binary_accuracy_and_constant_format(alpha):
    """(R - mean) / std of R = accuracy + format + bonus is that of R without the bonus (up to the
    1e-4 beside the std)."""
    accuracy, shuffled = ORDERED[:2], SHUFFLED[:2]  # one group that passes, one that does not
    bonus = tgrpo.temporal_bonus(accuracy, shuffled, alpha=alpha)
    assert bonus[0].any() and not bonus[1].any()
    with_bonus = grpo.group_advantages(accuracy + 1.0 + bonus, eps=0.0)
    torch.testing.assert_close(
        with_bonus, grpo.group_advantages(accuracy + 1.0, eps=0.0), atol=1e-12, rtol=0
    )


def test_where_the_bonus_does_act():
    """Where format varies too, without division by the std, and when added to the advantage."""
    accuracy, shuffled = ORDERED[:1], SHUFFLED[:1]
    bonus = tgrpo.temporal_bonus(accuracy, shuffled)
    mixed = accuracy + torch.tensor([[1.0, 1, 0, 1]], dtype=torch.float64)
    assert (grpo.group_advantages(mixed + bonus) - grpo.group_advantages(mixed)).abs().max() > 0.05
    assert (
        grpo.group_advantages(accuracy + bonus, "none") - grpo.group_advantages(accuracy, "none")
    ).abs().max() > 0.1
    in_advantage = grpo.group_advantages(accuracy) + bonus
    torch.testing.assert_close(
        in_advantage.sum(), bonus.sum()
    )  # no longer centred: right responses are pushed up on the whole


def test_contrast_by_hand():
    """Probabilities 0.5, 0.2 and 0.8 become 0.15, 0.15 and 0.9."""
    logp = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64).log()
    shuffled = torch.tensor([0.15, 0.15, 0.9], dtype=torch.float64).log()
    lost = tgrpo.probability_drop(logp, shuffled)
    torch.testing.assert_close(lost, torch.tensor([0.7, 0.25, 0.0], dtype=torch.float64))
    accuracy = torch.tensor([[1.0, 1, 1], [0, 0.6, 0.5]], dtype=torch.float64)
    expected = torch.tensor([[0.21, 0.075, 0], [0, 0.075, 0]], dtype=torch.float64)
    torch.testing.assert_close(tgrpo.contrast_bonus(accuracy, lost.expand(2, 3)), expected)
    assert not tgrpo.contrast_bonus(accuracy, lost.expand(2, 3), correct=0.7)[1].any()


def test_contrast_tells_right_responses_of_a_group_apart():
    """Where the published bonus changes no advantage, and where there are none without it."""
    accuracy = torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.float64)
    lost = torch.tensor([[0.8, 0.0, 0.8, 0.0]] * 2, dtype=torch.float64)
    advantages = grpo.group_advantages(accuracy + tgrpo.contrast_bonus(accuracy, lost))
    assert advantages[0, 0] > advantages[0, 1] > 0 and advantages[0, 2] == advantages[0, 3] < 0
    assert advantages[1].sign().tolist() == [1, -1, 1, -1]


def test_a_permutation_is_seeded_and_never_the_identity():
    for n in (2, 3, 16):
        orders = [tgrpo.permutation(n, seed).tolist() for seed in range(50)]
        assert all(sorted(order) == list(range(n)) != order for order in orders)
        assert orders == [tgrpo.permutation(n, seed).tolist() for seed in range(50)]
    assert len({tuple(tgrpo.permutation(16, seed).tolist()) for seed in range(50)}) > 45
    with pytest.raises(ValueError, match="1 frames or grids"):
        tgrpo.permutation(1, 0)


def test_shuffling_frames_changes_their_order_and_nothing_else(prompts):
    frames = prompts[0].media[0].frames
    order = tgrpo.permutation(16, 3)
    assert torch.equal(tgrpo.reorder(frames, order), frames[order]) and not torch.equal(
        frames[order], frames
    )
    grids = tgrpo.reorder(frames, torch.tensor([7, 6, 5, 4, 3, 2, 1, 0]))
    assert torch.equal(grids[:4], frames[[14, 15, 12, 13]])


def test_permuted_embeddings_are_the_embeddings_of_the_permuted_video(policy, prompts):
    """No second pass through the vision tower; to the last bits of the matrix library."""
    prompt = prompts[3]
    media = prompt.media[0]
    with torch.no_grad():
        embeds = policy.encode([prompt])[0]
        order = tgrpo.permutation(media.grid[0], 5)
        frames, permuted = tgrpo.reorder(media.frames, order), tgrpo.reorder(embeds, order)
        again = policy.encode(
            [
                data.Prompt(
                    prompt.sample, prompt.ids, [data.Media(frames, "video", media.seconds_per_grid)]
                )
            ]
        )[0]
    assert not torch.equal(permuted, embeds) and not torch.equal(frames, media.frames)
    torch.testing.assert_close(permuted, again, atol=1e-12, rtol=0)
