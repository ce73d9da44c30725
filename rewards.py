"""Rule rewards (Video-R1, arXiv 2503.21776, section 3.2) and the one answer normaliser that rewards, votes and evaluation share.

A reward is a number for a whole response:
    accuracy  in [0, 1], by problem type: is the text inside <answer> </answer> right?
    format    0 or 1: one <think> block, one <answer> block, nothing else
    length    a small bonus for a right answer of a wanted length
Pure functions of strings: any response gives a number in range, never an exception.

    >>> choice_letter("(b)", ["A. left", "B. right"]), choice_letter("A or B", ["A. left", "B. right"])
    ('B', None)
"""

import math
import re
from collections import Counter

from stem import stem

PROBLEM_TYPES = ("multiple choice", "numerical", "OCR", "free-form", "regression")


def extract_answer(response):
    """The text inside the last <answer> </answer> block, stripped; None without one (which is never an answer)."""
    blocks = re.findall(r"<answer>((?:(?!</?answer>).)*)</answer>", response, re.DOTALL)
    return blocks[-1].strip() if blocks else None


def choice_letter(text, options):
    """The option that an answer names, as its capital letter, or None if it names none, several, or one that is not there.

    A single letter may carry brackets, a full stop, or the option's text after it: B, (B), b., "B. right", "B) right".
    The text of an option alone names nothing: real data has options such as "A. C".
    """
    letters = {m[1]: o[m.end():] for o in options if (m := re.match(r"\s*\(?([A-Z])[.):]", o))}
    match = re.fullmatch(r"\(?([A-Za-z])(\)?[.:]?)(?:\s+(.*))?", text.strip(), re.DOTALL)
    if not match or (letters and match[1].upper() not in letters):
        return None
    letter, mark, rest = match[1].upper(), match[2], match[3] or ""
    bare = lambda s: re.sub(r"[\W_]+", " ", s).strip().casefold()
    if not rest or (letter in letters and bare(rest) == bare(letters[letter])):
        return letter
    marked = re.findall(r"\b([A-Z])\b|\b([a-z])[).:]|(?:\bor\b|\band\b|[,/&])\s*\(?([a-z])\b", rest)
    another = any("".join(found).upper() in letters for found in marked) or bare(rest) in map(bare, letters.values())
    return letter if mark and letters and not another else None


def parse_number(text):
    """A number, or None. Thousands commas and a closing full stop are read; units and words are not: "3.5 m" is no number."""
    text = text.strip().replace("\u2212", "-").removesuffix(".")
    if not re.fullmatch(r"[+-]?(?=\.?\d)(\d{1,3}(,\d{3})+|\d+)?(\.\d+)?([eE][+-]?\d{1,3})?", text):
        return None
    value = float(text.replace(",", ""))
    return value if math.isfinite(value) else None


def normalize_answer(text, sample):
    """What an answer says, in a form that compares with ==: a letter, a number, or text; None if it says nothing valid."""
    if text is None:
        return None
    if sample.problem_type == "multiple choice":
        return choice_letter(text, sample.options)
    if sample.problem_type == "regression":
        return parse_number(text)
    if sample.problem_type == "numerical":
        number = parse_number(text)
        return None if number is None else round(number, 2)
    return " ".join(text.split()) or None


def accuracy_reward(response, sample):
    """Is the response's answer right? In [0, 1], by the sample's problem type; 0 for a response without a valid answer."""
    return grade(normalize_answer(extract_answer(response), sample), sample)


def grade(answer, sample):
    """How right a normalised answer is, in [0, 1]; 0 for None, which is no answer.

        multiple choice, numerical   1 or 0
        regression                   1 - relative error
        OCR                          1 - word error rate
        free-form                    mean F1 of ROUGE-1, -2 and -L (at most 2/3 for one word: ROUGE-2 compares pairs)
    """
    target = normalize_answer(sample.answer, sample)
    if answer is None or target is None:
        return 0.0
    if sample.problem_type == "regression":
        return max(0.0, 1.0 - abs(answer - target) / (abs(target) + 1e-9))
    if sample.problem_type == "OCR":
        return max(0.0, 1.0 - word_error_rate(answer, target))
    if sample.problem_type == "free-form":
        return rouge(answer, target)
    return float(answer == target)


def format_reward(response):
    """1 if the whole response is <think>...</think>, optional white space, <answer>...</answer>, each tag once; else 0."""
    once = all(response.count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>"))
    return float(once and re.fullmatch(r"<think>.*</think>\s*<answer>.*</answer>", response, re.DOTALL) is not None)


def length_reward(num_tokens, accuracy, *, lo=320, hi=512, bonus=0.2):
    """`bonus` for a right answer (accuracy > 0.1) of lo to hi tokens, else 0 (Video-R1's paper; its release also asks for a
    second right answer in the group)."""
    return bonus if accuracy > 0.1 and lo <= num_tokens <= hi else 0.0


def mean_relative_accuracy(pred, target, *, inclusive=False):
    """MRA of VSI-Bench (arXiv 2412.14171): the mean over thresholds 0.50, 0.55, ..., 0.95 of [relative error < 1 - threshold].

    inclusive: <=, as VSI-Bench's own script has it where its paper, and Video-R1, have <.
    """
    error = abs(pred - target) / abs(target) if target else float(pred != target)
    bounds = [1 - (50 + 5 * i) / 100 for i in range(10)]
    return sum(error < b or (inclusive and error == b) for b in bounds) / 10


# ---- texts

def word_error_rate(text, reference):
    """Fewest words to insert, delete or replace to turn the text into the reference, over the reference's words. Can exceed 1."""
    a, b = text.split(), reference.split()
    row = list(range(len(b) + 1))  # row[j]: distance of the words of a read so far to b[:j]
    for i, word in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
    return row[-1] / len(b) if b else float(bool(a))


def rouge(text, reference):
    """The mean F1 of ROUGE-1, -2 and -L (Lin 2004) over stemmed words: shared words, word pairs, longest common subsequence."""
    a, b = _words(text), _words(reference)
    pairs = lambda x: list(zip(x, x[1:]))
    shared = lambda x, y: sum((Counter(x) & Counter(y)).values())
    f1 = lambda hits, total: 2 * hits / total if hits else 0.0
    total = len(a) + len(b)
    return (f1(shared(a, b), total) + f1(shared(pairs(a), pairs(b)), total - 2) + f1(_lcs(a, b), total)) / 3


def _lcs(a, b):
    row = [0] * (len(b) + 1)  # row[j]: longest common subsequence of the words of a read so far and b[:j]
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


def _words(text):
    """Lower case, letters and digits only, longer words stemmed: as the rouge-score package does."""
    return [stem(word) if len(word) > 3 else word for word in re.sub(r"[^a-z0-9]+", " ", text.lower()).split()]
