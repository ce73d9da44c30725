"""tts.py on scripted votes: what each round asks for, when the search ends, what the answer is."""

import doctest

import pytest

import tts
from tts import Vote, sparse_to_dense


def ask_from(script):
    """ask(), which returns the rounds of the script in turn, and the list of what it was asked."""
    asked, rounds = [], iter(script)

    def ask(num_frames, m):
        asked.append((num_frames, m))
        return list(next(rounds))

    return ask, asked


def search(script, **kw):
    ask, asked = ask_from(script)
    result = sparse_to_dense(ask, **kw)
    assert [(r.frames, len(r.votes)) for r in result.rounds] == asked and len(asked) == len(script)
    return result.answer, [n for n, _ in asked]


def test_the_example_in_the_module():
    assert doctest.testmod(tts) == (0, 3)


def test_five_equal_answers_end_the_search():
    assert search(["AAAAA"]) == ("A", [32])


def test_more_frames_until_they_agree():
    assert search(["AAAAB", "CCCCC"]) == ("C", [32, 64])


def test_never_agreed_is_the_plurality_of_the_last_round():
    assert search(["AAAAB", "AAAAB", "AABBB"]) == ("B", [32, 64, 128])


def test_an_invalid_answer_does_not_vote_and_prevents_agreement():
    assert search([["A", "A", None, "A", "A"], "BBBBB"]) == ("B", [32, 64])
    assert search([["A", None, None, None, "A"]] * 3) == ("A", [32, 64, 128])


def test_five_invalid_answers_are_not_a_consensus():
    assert search([[None] * 5, [None] * 5, [None] * 5]) == (None, [32, 64, 128])
    assert search([[None] * 5, "CCCCC"]) == ("C", [32, 64])
    assert search(["AABBB", [None] * 5, [None] * 5]) == (
        "B",
        [32, 64, 128],
    )  # no vote in the last round: those of all rounds


def test_ties_go_to_most_votes_over_all_rounds_then_to_the_surest_response_then_to_the_earliest():
    assert (
        search(["CAAAB", "ABCBB", "AABBC"], m=5)[0] == "A"
    )  # overall A 3 + 1 + 2, B 1 + 3 + 2: the earliest
    assert search(["CABBB", "ABCBB", "AABBC"], m=5)[0] == "B"
    tied = [Vote("A", -0.5), Vote("B", -0.9), Vote("B", -0.1), Vote("A", -0.4)]
    assert search([tied], start=8, cap=8, m=4)[0] == "B"  # its surest response has -0.1
    assert search([[Vote("A", -0.2), Vote("B", -0.3)]], start=8, cap=8, m=2)[0] == "A"


def test_the_last_round_is_at_the_cap_whatever_the_start():
    assert search(["AB", "AB", "AB"], start=32, cap=100, m=2)[1] == [32, 64, 100]
    assert search(["AB"], start=32, cap=32, m=2)[1] == [32]


def test_a_short_video_shows_what_it_has_and_no_round_twice():
    assert search(["AB"], m=2, available=20) == ("A", [20])
    assert search(["AB"], m=2, available=32) == ("A", [32])
    assert search(["AB", "AB"], m=2, available=40)[1] == [32, 40]
    assert search(["AB", "AB", "AB"], m=2, available=1000)[1] == [32, 64, 128]


def test_numbers_vote_by_value():
    assert search([[5.0, 5, 5.0]], m=3) == (5.0, [32])


def test_start_at_the_cap_is_self_consistency_and_one_response_is_its_own_answer():
    ask, asked = ask_from(["ABBCC", "X"])
    assert sparse_to_dense(ask, start=64, cap=64, m=5).answer == "B"
    assert sparse_to_dense(ask, start=16, cap=16, m=1).answer == "X"
    assert asked == [(64, 5), (16, 1)]


def test_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match="4 votes at 32 frames, expected 5"):
        sparse_to_dense(lambda n, m: ["A"] * 4)
    with pytest.raises(ValueError, match="start 64, cap 32"):
        sparse_to_dense(lambda n, m: ["A"] * m, start=64, cap=32)
