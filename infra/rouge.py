"""Texts compared by words: word error rate and ROUGE."""

import re
import unicodedata
from collections import Counter

from infra.stem import stem

# Thai, Lao, Burmese, Khmer, kana, ideographs: scripts without spaces, of which every character counts as a word
SPACELESS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u312f\u31f0-\u31ff\u3400-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
TOKEN = re.compile(rf"[{SPACELESS}]|[^\s{SPACELESS}]+")


def word_error_rate(text, reference):
    """Fewest words to insert, delete or replace to turn the text into the reference, over the reference's words. Can exceed 1.

    A word is what stands between spaces; in scripts without spaces (SPACELESS) it is a character.
    """
    a, b = TOKEN.findall(text), TOKEN.findall(reference)
    row = list(range(len(b) + 1))  # row[j]: distance of the words of a read so far to b[:j]
    for i, word in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
    return row[-1] / len(b) if b else float(bool(a))


def rouge(text, reference):
    """The mean F1 of ROUGE-1, -2 and -L (Lin 2004) over stemmed words: shared words, word pairs, longest common subsequence."""
    a, b = _stems(text), _stems(reference)
    pairs = lambda x: list(zip(x, x[1:]))
    shared = lambda x, y: sum((Counter(x) & Counter(y)).values())
    f1 = lambda hits, total: 2 * hits / total if hits else 0.0
    total = len(a) + len(b)
    return (
        f1(shared(a, b), total) + f1(shared(pairs(a), pairs(b)), total - 2) + f1(_lcs(a, b), total)
    ) / 3


def _lcs(a, b):
    row = [0] * (
        len(b) + 1
    )  # row[j]: longest common subsequence of the words of a read so far and b[:j]
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


def _words(text):
    """Lower case, letters and digits only: "It's 5 m" is it, s, 5, m. A character is a word in scripts without spaces."""
    kept = (
        c if unicodedata.category(c)[0] in "LM" or c.isdecimal() else " " for c in text.casefold()
    )
    return TOKEN.findall("".join(kept))


def _stems(text):
    """The words of a text, longer ones stemmed: in ASCII as the rouge-score package does. Letters beyond ASCII, which that
    package takes for spaces, are letters here: "café" is one word, and not "caf"."""
    return [stem(word) if len(word) > 3 else word for word in _words(text)]
