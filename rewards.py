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
import unicodedata
from decimal import Decimal
from fractions import Fraction

from infra.rouge import SPACELESS, _stems, _words, rouge, word_error_rate

PROBLEM_TYPES = ("multiple choice", "numerical", "OCR", "free-form", "regression")

# How an option is named
OPTION = re.compile(r"\s*\(?([A-Z])[.):]")  # the letter of an option in a record
LATEX = re.compile(
    r"\\(?:boxed|fbox|text[a-z]*|math[a-z]*)\s*(?=\{)|\\(?=[()\[\],])"
)  # leaves {5} of \boxed{5}, (5) of \(5\)
MARKUP = re.compile(
    r"""[*_`$"“”„«»「」『』#~|\\]|</?(?:b|i|u|em|strong|code)>|(?<!\w)['‘’]|['‘’](?!\w)"""
)
LEAD = re.compile(  # "So, the answer is option", "It is", "答案是", and whatever is no letter or digit
    r"(?:\W*(?:\b(?:(?:the|my|final|correct|right|best)\s+)*(?:answer|option|choice|letter)\b(?:\s+is\b)?"
    r"|\b(?:so|thus|hence|therefore|(?:it|that|this)\s+is|it['’]s)\b|[正确確的答案选選择擇項项是为為应應该該故我这這]))*\W*",
    re.IGNORECASE,
)
LETTER = re.compile(  # a letter that is no part of a word, and the mark that tells it from a word; "e.g." has none
    r"([A-Za-z])(?!\w)(?P<mark>\s*(?:[:,;!)\]}。、]|\.(?![A-Za-z]\b)|\n)|\s+[-–—](?=\s)"
    r"|(?=\s+is\s+(?:the\s+)?(?:correct|right|best|answer)\b|\s*(?:是\s+)?正\s+[确確]))?"
)
NO_NOUN = set("and or nor but is as may might could also too not if because".split())

# How a number is written
NUMBER = re.compile(
    r"(?P<before>[\s(\[{$*_`\"'“‘«「]*)"
    r"(?P<number>(?:[+-] ?)?(?=\.?\d)(?:\d{1,3}(?P<comma>[, ])\d{3}(?:(?P=comma)\d{3})*|\d+)?(?:\.\d+)?(?:[eE][+-]?\d{1,3})?)"
    r"(?P<after>[\s)\]}$*_`\"'”’»」.。]*)"
)
DASHES = str.maketrans("‐‒–—−", "-----")
CLOSING = str.maketrans("([{“‘«「", ")]}”’»」", ".。")

# What tells apart texts of the same words: symbols, and marks beside numbers (3.5 is not 3 5) and variables (a/b, -x)
SYMBOLS = "".join(
    c
    for c in map(chr, range(0x3000))
    if unicodedata.category(c) in ("Sm", "Sc", "No") and c not in "|~$"
)
WORD, VARIABLE = r"[^\W\d_]{2}", r"[^\W\d_]\b"
SIGN = re.compile(
    rf"""(
    [{re.escape(SYMBOLS)}^%] | !(?==)              # a < b, 50%, €5, x², a != b; $, ~ and | are markup
    | (?<=\d)[.:](?=\d) | (?<![\w.])\.(?=\d)       # 3.5, 10:30, .5
    | (?<=\d),(?=\d)(?!\d{{3}}(?!\d))              # 1,2 but not 1,000
    | (?<!{WORD})[-/](?=\s*[({{$]*\.?\d)           # -5, x - 5, 1/2 but not COVID-19
    | (?<!{WORD})(?<!{WORD}\s(?=[-/]\s))[-/](?=\s*[({{$]*{VARIABLE})  # -x, a/b but not Rome - a city
    | (?<!{WORD})(?<=\w)-(?!\w)                    # A- but not pre- and post-
    | (?<=\w)\*(?=\w) | (?<=\s)\*(?=\s)            # 2*3, a * b
    )""",
    re.VERBOSE,
)
SPELLINGS = str.maketrans({"≤": "<=", "≥": ">=", "≠": "!=", "×": "*", "÷": "/"})


def extract_answer(response):
    """The text inside the last <answer> </answer> block, stripped; None without one (which is never an answer)."""
    blocks = re.findall(r"<answer>((?:(?!</?answer>).)*)</answer>", response, re.DOTALL)
    return blocks[-1].strip() if blocks else None


def choice_letter(text, options):
    """The option that an answer names, as its capital letter, or None if it names none, several, or
    one that is not there.

    options: with their letters, "A. left", "A) left", "(A) left", "A: left" or "A.left"; [] if they
    are not known, and then any letter will do, alone.
    Markup, brackets, quotes and words such as "The answer is" are read past. The letter that follows
    is the answer, unless what stands after it names another option, by its letter or by its text.
    With the options A. left, B. right, C. a man walks:

        B   b   (B)   B.   **B**   $B$   \\boxed{B}   Option B   The answer is B.   Ｂ   is B
        It is B   Letter B   So, the answer is B   答案：B   选B   B is correct       is B
        B. right   B.right   (B)right   B right   B, right   B: it goes that way     is B
        C. A man              is C, whose text begins so
        B. A lady turns       is B, for an article is no letter
        A or B   A, B   A: b  is None: two letters
        A. left or right      is None: the text of another option, among other words
        B. left               is None: the text of another option
        C. a man (not right)  is None, and so is "D. A, B and C" where D is "All of the above": what an
                              answer says of other options is not read
        B turns   A lady      is None: without a mark (. : , ; ! bracket, dash, new line) it may be a word
        right   right, B   D  is None: no letter at the start, or none that is there
    """
    texts = {m[1]: _said(_bare(o[m.end() :])) for o in options if (m := OPTION.match(o))}
    text = _bare(text)
    named = LETTER.match(text, LEAD.match(text).end())
    if not named or (texts and named[1].upper() not in texts):
        return None
    letter, rest = named[1].upper(), text[named.end() :]
    said, own = _said(rest), texts.get(letter)
    if said in ("", own):
        return letter
    if own is None or named["mark"] is None:
        return None
    others = {t for other, t in texts.items() if other != letter and t != own}
    if len(said) > 1 and f"{own} ".startswith(f"{said} "):
        return None if said in others else letter
    another = (_letters(rest) & set(texts)) - {letter} or others & _found(texts.values(), said)
    return None if another else letter


def _visible(text, form="NFKC"):
    """The text in a Unicode normal form (in NFKC full-width letters and digits are ASCII), without
    characters that are not seen: zero-width ones, controls, variation selectors."""
    return "".join(
        c
        for c in unicodedata.normalize(form, text)
        if c.isspace() or not (unicodedata.category(c) in ("Cc", "Cf") or "\ufe00" <= c <= "\ufe0f")
    )


def _bare(text):
    """The visible text with spaces for markup, and around characters of scripts without spaces."""
    text = MARKUP.sub(" ", LATEX.sub("", _visible(text)))
    return re.sub(f"[{SPACELESS}]", r" \g<0> ", text)


def _said(text):
    """The words of a text with one space between them; a minus sign and % are words: an option may
    be -5 where another is 5."""
    text = re.sub(r"(?<!\w)-(?=\d)", " minus ", text.translate(DASHES)).replace("%", " percent ")
    return " ".join(_words(text))


def _letters(text):
    """The letters that stand alone in a text, as capitals. Those of "a.m.", "I'm", "°C" and "T-shirt"
    do not, nor does "a" or "I" before a word that it can go with: in "A man", not in "A or"."""
    tokens = re.findall(r"\w(?:\.\w)+|°?\w+(?:['’-]\w+)*|[^\w\s]", text)
    alone = [(t, after) for t, after in zip(tokens, [*tokens[1:], ""]) if len(t) == 1]
    return {t.upper() for t, after in alone if t not in "aAI" or not _may_follow(after)}


def _may_follow(token):
    """Can "a" or "I" go with this next word, or is it the end, a sign, a letter or an "or"?"""
    return (len(token) > 1 or token.isdigit()) and token.lower() not in NO_NOUN


def _found(texts, said):
    """The set of those texts that stand in what is said, the longest first: "red and blue" holds no
    "red". All as of _said. A text of one letter is not looked for: alone it is an option's letter."""
    texts = sorted((t for t in texts if not re.fullmatch("[a-z]?", t)), key=len, reverse=True)
    return (
        set(re.findall(rf"(?<!\S)(?:{'|'.join(map(re.escape, texts))})(?!\S)", said))
        if texts
        else set()
    )


def _decimal(text):
    """The number that a text is, with the decimals that it is written with; None if it is none."""
    found = NUMBER.fullmatch(LATEX.sub("", _visible(text).replace("{,}", ",")).translate(DASHES))
    if not found or any(unicodedata.category(c) == "No" for c in text):  # 10² is not 102
        return None
    before, after = (
        "".join(found[side].translate(CLOSING).split()) for side in ("before", "after")
    )
    return Decimal(re.sub("[, ]", "", found["number"])) if before[::-1] == after else None


def parse_number(text):
    """A number, or None. Read past: brackets, quotes and markup on both sides, commas or spaces
    between thousands, a full stop. Units and words are not.

        5   5.0   5.   5。   (5)   $5$   **5**   \\boxed{5}   1,000   1{,}000   1 000   –3   - 3   1e3   ５   numbers
        5 m   50%   $5   five   4 or 5   1,00   10²   3-5   inf                            None
    """
    number = _decimal(text)
    value = math.inf if number is None else float(number)
    return value if math.isfinite(value) else None


def normalize_answer(text, sample):
    """What an answer says, in a form that compares with ==: a letter, a number, or text; None if it says nothing valid.

    A numerical answer is rounded to as many decimals as the sample's own has, at least 2: 0.0034 is
    right for 0.003, 0 is not. A sample's own with more than 6 decimals is a computed float: then to as
    many as show three of its significant digits, at least 2: 66.67 is right for 66.66666666666667.
    """
    if text is None:
        return None
    if sample.problem_type == "multiple choice":
        return choice_letter(text, sample.options)
    if sample.problem_type == "regression":
        return parse_number(text)
    if sample.problem_type == "numerical":
        number = parse_number(text)
        return None if number is None else round(number, _decimals(_decimal(sample.answer)))
    return " ".join(_visible(text, "NFC").split()) or None


def _decimals(gold):
    """To how many decimals a numerical answer is compared with the sample's own (a Decimal, or None)."""
    decimals = -gold.as_tuple().exponent if gold else 0
    return max(2, 2 - gold.adjusted() if decimals > 6 else decimals)


def accuracy_reward(response, sample):
    """Is the response's answer right? In [0, 1], by the sample's problem type; 0 for a response without a valid answer."""
    return grade(normalize_answer(extract_answer(response), sample), sample)


def grade(answer, sample):
    """How right a normalised answer is, in [0, 1]; 1 if it equals the sample's; 0 for None, which is no answer.

        multiple choice  1 or 0, by the letter
        numerical        1 or 0, after rounding to the decimals of the sample's answer (normalize_answer)
        regression       1 - relative error
        OCR              1 - word error rate
        free-form        1 for the same words, whatever their case and punctuation; 0 if the words are the same, but not the
                         numbers, signs or operators (-0.5 for 0.5, a < b for a > b, 1/2 for 1.2, 50 for 50%); otherwise the
                         mean F1 of ROUGE-1, -2 and -L (of one word at most 2/3: ROUGE-2 compares pairs)
    Numbers have no unit and no %. Texts are compared by words, by characters in scripts without spaces; a text of symbols
    only ("+") is right or wrong.
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
    return 0.0


def format_reward(response):
    """1 if the whole response is <think>...</think>, optional white space, <answer>...</answer>, each tag once; else 0."""
    once = all(response.count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>"))
    return float(
        once
        and re.fullmatch(r"<think>.*</think>\s*<answer>.*</answer>", response, re.DOTALL)
        is not None
    )


def length_reward(num_tokens, accuracy, *, lo=320, hi=512, bonus=0.2):
    """`bonus` for a right answer (accuracy > 0.1) of lo to hi tokens, else 0 (Video-R1's paper; its release also asks for a
    second right answer in the group)."""
    return bonus if accuracy > 0.1 and lo <= num_tokens <= hi else 0.0


def mean_relative_accuracy(pred, target, *, inclusive=False):
    """MRA of VSI-Bench (arXiv 2412.14171): the mean over thresholds 0.50, 0.55, ..., 0.95 of [relative error < 1 - threshold].

    inclusive: <=, as VSI-Bench's own script has it where its paper, and Video-R1, have <. pred, target: any int or float,
    compared as the decimals that they print as, so that no rounding decides: the error of 1.15 against 1 is 0.15. Of a
    target of 0 only 0 is right; an infinite or undefined number is not.
    """
    if pred == target:
        return 1.0
    if not target or any(isinstance(x, float) and not math.isfinite(x) for x in (pred, target)):
        return 0.0
    pred, target = (
        Fraction(str(x)) if isinstance(x, float) else Fraction(x) for x in (pred, target)
    )
    error = abs(pred - target) / abs(target)
    bounds = [Fraction(k, 20) for k in range(1, 11)]
    return sum(error < bound or (inclusive and error == bound) for bound in bounds) / 10


# ---- texts


def free_form(text, reference):
    """How right a free answer is: 1 or 0 where the words are the same, by the signs between them; else ROUGE."""
    if _stems(text) == _stems(reference) and _signed(text) != _signed(reference):
        return 0.0
    words = _words(text)
    return 1.0 if words and words == _words(reference) else rouge(text, reference)


def _signed(text):
    """The stemmed words of a text as lists, and between these its signs: "x = -5" is [x], =, [], -, [5]."""
    plain = "".join(
        c if unicodedata.category(c) == "No" else unicodedata.normalize("NFKC", c) for c in text
    )
    parts = SIGN.split(LATEX.sub("", plain).translate(DASHES).translate(SPELLINGS))
    return [part if i % 2 else _stems(part) for i, part in enumerate(parts)]
