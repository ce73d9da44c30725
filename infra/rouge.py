"""Texts compared by words: word error rate, and ROUGE (Lin 2004, "ROUGE: a package for automatic
evaluation of summaries").

    >>> word_error_rate("no entry", "No entry today")
    0.6666666666666666
"""

import re
import unicodedata
from collections import Counter

from infra.stem import stem

# scripts without spaces, in which each character counts as a word: Thai, Lao, Burmese, Khmer, kana,
# ideographs
SPACELESS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u312f\u31f0-\u31ff\u3400-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
TOKEN = re.compile(rf"[{SPACELESS}]|[^\s{SPACELESS}]+")


def words(text):
    """The words of a text: lower case, letters and digits only. "It's 5 m" -> it, s, 5, m."""
    kept = ""
    for c in text.casefold():
        kept += c if unicodedata.category(c)[0] in "LM" or c.isdecimal() else " "
    return TOKEN.findall(kept)


def stems(text):
    """The words of a text; those of more than three letters stemmed, as in the rouge-score package.
    That package treats letters beyond ASCII as spaces; here they are letters: "café" is one word,
    not "caf"."""
    return [stem(word) if len(word) > 3 else word for word in words(text)]


def word_error_rate(text, reference):
    """The fewest insertions, deletions and replacements of words that turn the text into the
    reference, divided by the number of words of the reference. Can exceed 1.

    Words are separated by spaces; in scripts without spaces (SPACELESS) each character is one.
    """
    a, b = TOKEN.findall(text), TOKEN.findall(reference)
    row = list(range(len(b) + 1))  # row[j]: distance from the words of a so far to b[:j]
    for i, word in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            replaced = diagonal + (word != other)
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, replaced)
    return row[-1] / len(b) if b else float(bool(a))


def rouge(text, reference):
    """The mean F1 of ROUGE-1, -2 and -L over stemmed words: shared words, shared word pairs,
    longest common subsequence."""
    a, b = stems(text), stems(reference)
    pairs_a, pairs_b = list(zip(a, a[1:])), list(zip(b, b[1:]))
    total = len(a) + len(b)
    rouge_1 = _f1(_shared(a, b), total)
    rouge_2 = _f1(_shared(pairs_a, pairs_b), total - 2)
    rouge_l = _f1(_common_subsequence(a, b), total)
    return (rouge_1 + rouge_2 + rouge_l) / 3


def _f1(hits, total):
    """total: the items of both texts together."""
    return 2 * hits / total if hits else 0.0


def _shared(a, b):
    return sum((Counter(a) & Counter(b)).values())


def _common_subsequence(a, b):
    """The length of the longest common subsequence."""
    row = [0] * (len(b) + 1)  # row[j]: that of the words of a so far and b[:j]
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            longer = diagonal + 1 if word == other else max(row[j], row[j - 1])
            diagonal, row[j] = row[j], longer
    return row[-1]
