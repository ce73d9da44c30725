"""Sparse-to-dense test-time scaling (Video-RTS, arXiv 2507.06485, section 3.3): more frames until the answers agree.

    1. show n = `start` frames, uniform over the whole video
    2. draw m responses
    3. all m agree: that is the answer. Otherwise n <- 2n, at most `cap`, and again
    4. no agreement at the cap: the answer with most votes in the last round
No model and no file here: what a video shows is behind `ask`, and a vote is what the shared normaliser read in a response
(rewards.normalize_answer), None if that is no valid answer. Ours, where the release is silent or wrong:
    - a response without a valid answer is no vote: agreement needs all m valid and equal, five failures are no consensus
    - ties: most votes over all rounds, then the response of the highest mean token log-prob, then the earliest
    - a video with fewer frames than a round asks for ends the search there: no round is shown the same frames again

    >>> scripted = iter(["ABAAC", "BBABA", "BBBBB"])
    >>> result = sparse_to_dense(lambda num_frames, m: list(next(scripted)), start=8, cap=64)
    >>> result.answer, [round.frames for round in result.rounds]
    ('B', [8, 16, 32])
"""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple


class Vote(NamedTuple):
    """What one response says: a normalised answer, None if not valid, and the mean log-prob of the response's tokens."""

    answer: object
    logp: float = 0.0


@dataclass
class Round:
    """One round: the number of frames shown, and of each of the m responses its answer (None: not valid) and log-prob."""

    frames: int
    votes: list
    logps: list[float]


class Search:
    """One question's search, a round at a time, so that the rounds of many questions can be drawn together.

    Ask with `frames` frames and `tell` the votes, until `frames` is None; then `answer` stands (None: never a valid vote).
    A fixed number of frames, start = cap, is self-consistency; with m = 1 it is a single response.
    """

    def __init__(self, *, start, cap, m):
        if not 1 <= start <= cap or m < 1:
            raise ValueError(
                f"start {start}, cap {cap}, m {m}: expected 1 <= start <= cap and m >= 1"
            )
        self.frames, self.cap, self.m = start, cap, m
        self.answer, self.rounds = None, []

    def clamp(self, available):
        """The video has `available` frames to show, and no round shows more."""
        self.cap = min(self.cap, available)
        self.frames = min(self.frames, available)

    def add_votes(self, votes):
        """The m votes at `frames` frames, each an answer or a Vote. Raises ValueError for another number of votes."""
        votes = [v if isinstance(v, Vote) else Vote(v) for v in votes]
        if len(votes) != self.m:
            raise ValueError(f"{len(votes)} votes at {self.frames} frames, expected {self.m}")
        self.rounds.append(Round(self.frames, [v.answer for v in votes], [v.logp for v in votes]))
        first = votes[0].answer
        agreed = first is not None and all(v.answer == first for v in votes)
        if agreed or self.frames == self.cap:
            self.answer, self.frames = first if agreed else plurality(self.rounds), None
        else:
            self.frames = min(2 * self.frames, self.cap)


def plurality(rounds):
    """The answer with most votes in the last round; ties as in the module's first lines. None without a valid vote."""
    last, overall, best = Counter(), Counter(), {}
    for r in rounds:
        for answer, logp in zip(r.votes, r.logps):
            if answer is not None:
                overall[answer] += 1
                last[answer] += r is rounds[-1]
                best[answer] = max(best.get(answer, logp), logp)
    return max(overall, key=lambda a: (last[a], overall[a], best[a]), default=None)


def sparse_to_dense(ask, *, start=32, cap=128, m=5, available=None):
    """Asks with more and more frames until all m responses agree -> Search with .answer and .rounds.

    ask(num_frames, m): m votes of responses to the video at num_frames frames, each an answer (None: not valid) or a Vote.
    available: frames that the video has, where it may be fewer than start or cap.
    """
    search = Search(start=start, cap=cap, m=m)
    if available is not None:
        search.clamp(available)
    while search.frames is not None:
        search.add_votes(ask(search.frames, m))
    return search


def self_consistency(ask, *, frames=128, m=5):
    """The most frequent of m answers at a fixed number of frames (Wang et al. 2203.11171), in the shape of sparse_to_dense."""
    return sparse_to_dense(ask, start=frames, cap=frames, m=m)


def single(ask, *, frames=128):
    """One answer at a fixed number of frames (greedy, if ask decodes so), in the shape of sparse_to_dense."""
    return sparse_to_dense(ask, start=frames, cap=frames, m=1)
