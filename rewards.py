"""The rule rewards (Video-R1, arXiv 2503.21776, section 3.2): each a number per response.

    extract_answer           the text inside <answer> </answer>
    accuracy_reward          in [0, 1], by problem type: is the answer right?
    accuracies               the same of a step's responses; free-form ones by a judge (--judge)
    format_reward            0 or 1: one <think> block, one <answer> block, nothing else
    length_reward            a small bonus for a right answer of the wanted length
    mean_relative_accuracy   VSI-Bench's score of a number, for evaluation
    temporal_iou             the overlap of two time spans, for grounding
    normalize_answer         what an answer says: the form in which rewards, votes and evaluation
                             compare answers

Pure functions of strings, but for `accuracies` with a judge: every response gets a number in range,
never an exception.

A reward of your own, without a change here: --reward my_file.py:score (infra/reward_file.py).
To add one here: write a function of the response, like format_reward (it may be negative), or of
its accuracy too, like length_reward. In train.py, add its weight and values to score_group, a flag
to reward_flags, and the flag to `warn`. Add its name to TAKEN in infra/reward_file.py, so that no
function of --reward can have it. Logs and report then show it, and --resume compares the flag; add
its name by hand to the chart "parts of the reward" in report.html and to the tables of docs/log.md.
To add a problem type: name it in PROBLEM_TYPES, say how its answers are read (normalize_answer) and
graded (grade; in evaluation, eval.score and constant_answer). In data.py, say what the prompt asks
for (CLOSING) and which answers of records are refused (_answer). If it has options: _options in
data.py, `kind` in ask.py, `answers` in report.html.

    >>> extract_answer("<think>It turns.</think><answer>(b)</answer>")
    '(b)'
    >>> choice_letter("(b)", ["A. left", "B. right"])
    'B'
    >>> choice_letter("A or B", ["A. left", "B. right"]) is None
    True
"""

import math
import re
from fractions import Fraction

from infra.answer_text import (
    choice_letter,
    decimal,
    parse_number,
    parse_times,
    plain,
    signed_words,
)
from infra.judge import Question
from infra.rouge import rouge, stems, word_error_rate, words

PROBLEM_TYPES = ("multiple choice", "numerical", "OCR", "free-form", "regression", "grounding")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def extract_answer(response):
    """The text inside the last <answer> </answer> block, stripped; None without one."""
    blocks = re.findall(r"<answer>((?:(?!</?answer>).)*)</answer>", response, re.DOTALL)
    return blocks[-1].strip() if blocks else None


# ---- the rules


def accuracy_reward(response, sample):
    """How right the response's answer is, in [0, 1]; 0 without a valid answer."""
    return grade(normalize_answer(extract_answer(response), sample), sample)


def accuracies(texts, samples, judge=None):
    """Responses (B, G) and the samples of the groups (B,) -> accuracies (B, G).

    judge: an infra.judge.Judge, which grades the free-form answers in place of the rule.
    """
    found = [[accuracy_reward(text, s) for text in of] for of, s in zip(texts, samples)]
    if judge is None:
        return found
    places, questions = [], []
    for b, (of_group, s) in enumerate(zip(texts, samples)):
        for g, text in enumerate(of_group):
            answer = normalize_answer(extract_answer(text), s)
            if s.problem_type == "free-form" and answer is not None:
                places.append((b, g))
                questions.append(Question(s.name, s.question, s.answer, answer))
    for (b, g), score in zip(places, judge(questions)):
        if score is not None:
            found[b][g] = score
    return found


def grade(answer, sample):
    """How right a normalised answer is, in [0, 1]. It is 1 if it equals the sample's answer, and 0
    if it is None, which is no valid answer. In between:

        multiple choice  nothing
        numerical        nothing; both are rounded first (normalize_answer)
        regression       1 - relative error
        OCR              1 - word error rate
        free-form        by words and signs (free_form)
        grounding        the overlap of the two time spans (temporal_iou)
    A unit or a % after a number is ignored.
    """
    target = normalize_answer(sample.answer, sample)
    if answer is None or target is None:
        return 0.0
    if answer == target:
        return 1.0
    if sample.problem_type == "regression":
        return max(0.0, 1.0 - abs(answer - target) / (abs(target) + 1e-9))
    if sample.problem_type == "OCR":
        return max(0.0, 1.0 - word_error_rate(answer, target))
    if sample.problem_type == "free-form":
        return free_form(answer, target)
    if sample.problem_type == "grounding":
        return temporal_iou(answer, target)
    return 0.0


def format_reward(response):
    """1 if the whole response is <think>...</think>, optional white space, <answer>...</answer>,
    each tag once; else 0."""
    if any(response.count(tag) != 1 for tag in TAGS):
        return 0.0
    blocks = re.fullmatch(r"<think>.*</think>\s*<answer>.*</answer>", response, re.DOTALL)
    return float(blocks is not None)


def length_reward(num_tokens, accuracy, *, lo=320, hi=512, bonus=0.2):
    """`bonus` for an accuracy above 0.1 (whatever --correct says) in lo to hi tokens, else 0.

    As in Video-R1's paper; its released code also requires a second right answer in the group.
    """
    return bonus if accuracy > 0.1 and lo <= num_tokens <= hi else 0.0


def mean_relative_accuracy(pred, target, *, inclusive=False):
    """MRA of VSI-Bench (arXiv 2412.14171): the mean over thresholds 0.50, 0.55, ..., 0.95 of
    [relative error < 1 - threshold].

    inclusive: <= as in VSI-Bench's own script; its paper and Video-R1 have <.
    pred, target: int or float. Compared as the decimals that they print as, so that no rounding
    decides: the relative error of 1.15 to 1 is 0.15. For a target of 0 only 0 is right; infinite or
    NaN is wrong.
    """
    if pred == target:
        return 1.0
    if not target or not _finite(pred) or not _finite(target):
        return 0.0
    error = abs(_exact(pred) - _exact(target)) / abs(_exact(target))
    bounds = [Fraction(k, 20) for k in range(1, 11)]  # 1 - threshold: 0.05, 0.10, ..., 0.50
    return sum(error < bound or (inclusive and error == bound) for bound in bounds) / 10


def temporal_iou(answer, other):
    """The temporal IoU of two time spans, in [0, 1]: the seconds in both / the seconds in either
    (arXiv 2512.03043, equation 3).

    answer, other: normalised, "12.3 to 18.9". Computed in whole milliseconds, so that no rounding
    decides whether a threshold is reached: 0 to 3 and 0 to 10 have an IoU of 0.3.
    """
    a, b = (round(1000 * t) for t in parse_times(answer))
    c, d = (round(1000 * t) for t in parse_times(other))
    both = max(0, min(b, d) - max(a, c))
    return both / (b - a + d - c - both)


def _finite(x):
    return not isinstance(x, float) or math.isfinite(x)  # an int may exceed all floats


def _exact(x):
    return Fraction(str(x)) if isinstance(x, float) else Fraction(x)


# ---- how answers are read and compared


def normalize_answer(text, sample):
    """What an answer says, as text or a number that compares with ==; None if it says nothing
    valid. (It is counted as a vote, and written as JSON.)

    multiple choice: the option's letter. regression, numerical: a number. OCR, free-form: the text.
    grounding: "start to end" in seconds.
    A numerical answer is rounded to the decimals of the sample's answer (_decimals).
    """
    if text is None:
        return None
    if sample.problem_type == "multiple choice":
        return choice_letter(text, sample.options)
    if sample.problem_type == "regression":
        return parse_number(text)
    if sample.problem_type == "numerical":
        number = parse_number(text)
        return None if number is None else round(number, _decimals(sample.answer))
    if sample.problem_type == "grounding":
        return normalize_times(text)
    return plain(text) or None


def normalize_times(text):
    """A time span in one form, "12.3 to 18.9" in seconds; None if it is none (parse_times)."""
    times = parse_times(text)
    if times is None:
        return None
    start, end = (f"{t:.3f}".rstrip("0").rstrip(".") for t in times)
    return f"{start} to {end}"


def _decimals(gold):
    """To how many decimals a numerical answer is compared: as many as the sample's answer has, at
    least 2. For 0.003, 0.0034 is right and 0 is not.

    More than 6 decimals are those of a computed float: then as many as show three of its
    significant digits, at least 2. For 66.66666666666667, 66.67 is right.
    """
    number = decimal(gold)
    if not number:  # zero, or not a number
        return 2
    decimals = -number.as_tuple().exponent
    return max(2, 2 - number.adjusted() if decimals > 6 else decimals)


def free_form(text, reference):
    """How right a free answer is, in [0, 1]. Texts are compared by words, in scripts without spaces
    by characters.

    Same words, whatever their case and punctuation: 1; but 0 if numbers, signs or operators differ
    (-0.5 and 0.5, a < b and a > b, 1/2 and 1.2, 50 and 50%). Otherwise the mean F1 of ROUGE-1, -2
    and -L. A single word that is not the same gets at most 2/3: it has no pairs for ROUGE-2. A text
    of symbols only ("+") is right or wrong.
    """
    if stems(text) == stems(reference) and signed_words(text) != signed_words(reference):
        return 0.0
    if words(text) and words(text) == words(reference):
        return 1.0
    return rouge(text, reference)
