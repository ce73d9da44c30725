"""Sparse-to-dense test-time scaling (Video-RTS, arXiv 2507.06485, section 3.3).

More frames until the answers agree:
    1. show n frames, uniform over the whole video; at first n = start
    2. draw m responses; each votes for its answer
    3. if all m agree, that is the answer
    4. if n = cap, the answer with most votes in this round wins
    5. otherwise n <- min(2n, cap), back to 1

Two answers agree if they are the same. Time spans (grounding questions) hardly ever are, so they
have a `similarity`, their temporal IoU: all m agree if that of every two exceeds 0.5, and a vote
counts for each answer as much as the two are alike. So the one that overlaps the votes most wins.

Pure: no model and no file. The video is behind `ask`; a vote is what rewards.normalize_answer reads
in a response, None if invalid. Where the paper and its release are silent, or the release is wrong:
    - an invalid answer does not vote; five invalid answers are not a consensus
    - ties: most votes over all rounds, then the highest mean token log-prob, then the earliest
    - the search ends at all the frames that the video has: no round shows the same frames again

    >>> scripted = iter(["ABAAC", "BBABA", "BBBBB"])
    >>> result = sparse_to_dense(lambda num_frames, m: list(next(scripted)), start=8, cap=64)
    >>> result.answer, [round.frames for round in result.rounds]
    ('B', [8, 16, 32])
"""

from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple


def same(a, b):
    """The similarity of two answers that agree only if they are equal."""
    return float(a == b)


def sparse_to_dense(ask, *, start=32, cap=128, m=5, available=None, similarity=same):
    """Asks with more and more frames until m answers agree -> Search, with .answer and .rounds.

    ask(num_frames, m) -> m votes, each an answer (None: invalid) or a Vote.
    available: frames of the video, where they may be fewer than `cap`.
    similarity: of two valid answers, in [0, 1].
    """
    search = Search(start=start, cap=cap, m=m, similarity=similarity)
    if available is not None:
        search.clamp(available)
    while search.frames is not None:
        search.add_votes(ask(search.frames, m))
    return search


class Vote(NamedTuple):
    """A normalised answer (None: invalid), and the mean log-prob of the response's tokens."""

    answer: object
    logp: float = 0.0


@dataclass
class Round:
    """The number of frames shown; the m answers (None: invalid); the m log-probs."""

    frames: int
    votes: list
    logps: list[float]


class Search:
    """One question's search, a round at a time, so that many questions can share a batch.

    frames: of the next round; None once the search has ended.  answer: then the answer, None if no
    vote was ever valid.  rounds: list of Round.
    start = cap is self-consistency at a fixed number of frames; m = 1 is a single response.
    """

    def __init__(self, *, start, cap, m, similarity=same):
        if not 1 <= start <= cap or m < 1:
            raise ValueError(
                f"start {start}, cap {cap}, m {m}: expected 1 <= start <= cap and m >= 1"
            )
        self.frames, self.cap, self.m = start, cap, m  # step 1
        self.similarity = similarity
        self.answer, self.rounds = None, []

    def clamp(self, available):
        """Limits all rounds to the number of frames that the video has."""
        self.cap = min(self.cap, available)
        self.frames = min(self.frames, available)

    def add_votes(self, votes):
        """Takes the m votes of a round: answers or Votes. Raises ValueError for another number."""
        votes = [v if isinstance(v, Vote) else Vote(v) for v in votes]  # step 2
        if len(votes) != self.m:
            raise ValueError(f"{len(votes)} votes at {self.frames} frames, expected {self.m}")
        self.rounds.append(Round(self.frames, [v.answer for v in votes], [v.logp for v in votes]))
        if self.agree() or self.frames == self.cap:  # steps 3 and 4
            self.answer, self.frames = plurality(self.rounds, self.similarity), None
        else:  # step 5
            self.frames = min(2 * self.frames, self.cap)

    def agree(self):
        """Whether the votes of the last round are valid, and every two of them are alike."""
        votes = self.rounds[-1].votes
        if None in votes:
            return False
        return all(self.similarity(a, b) > 0.5 for a, b in combinations(votes, 2))


def plurality(rounds, similarity=same):
    """The answer with most votes in the last round, ties as above; None without a valid vote.

    A vote counts for an answer as much as the two are alike: wholly or not at all, if they have to
    be the same.
    """
    best = {}  # answer: its highest log-prob; in the order in which they were given
    for r in rounds:
        for answer, logp in zip(r.votes, r.logps):
            if answer is not None:
                best[answer] = max(best.get(answer, logp), logp)

    def support(answer, rounds):
        valid = [vote for r in rounds for vote in r.votes if vote is not None]
        return sum(similarity(answer, vote) for vote in valid)

    def rank(answer):
        return support(answer, rounds[-1:]), support(answer, rounds), best[answer]

    return max(best, key=rank, default=None)
