r"""What an answer says: the letter of an option, a number, two times, or words and the signs
between them.

Policies decorate their answers: **B**, \boxed{B}, "The answer is (b).", 答案：B. The functions here
see through that.

    choice_letter   the option that an answer names             "Option B: right"  -> "B"
    parse_number    the number that an answer is                r"\boxed{1,000}"   -> 1000.0
    parse_times     the start and the end that an answer is     "[12.3s, 18.9s]"  -> (12.3, 18.9)
    plain           a text without invisible characters, one space between words
    signed_words    words and the signs between them            "x = -5"           -> [x] = [] - [5]

Pure functions that accept any string.
"""

import math
import re
import unicodedata
from decimal import Decimal

from infra.options import OPTION
from infra.rouge import SPACELESS, stems, words

LATEX = re.compile(
    r"""
      \\(?:boxed|fbox|text[a-z]*|math[a-z]*)\s*(?=\{)   # \boxed{5} -> {5}, \textbf{B} -> {B}
    | \\(?=[()\[\],])                                   # \(5\) -> (5), 1\,000 -> 1,000
    """,
    re.VERBOSE,
)
DASHES = str.maketrans("‐‒–—−", "-----")

# ---- characters


def visible(text, form="NFKC"):
    """The text in a Unicode normal form, without invisible characters: zero-width characters,
    controls, variation selectors. NFKC also turns full-width letters and digits into ASCII."""
    kept = []
    for c in unicodedata.normalize(form, text):
        invisible = unicodedata.category(c) in ("Cc", "Cf") or "\ufe00" <= c <= "\ufe0f"
        if c.isspace() or not invisible:
            kept.append(c)
    return "".join(kept)


def plain(text):
    """The visible text with one space between words; its letters stay as they are."""
    return " ".join(visible(text, "NFC").split())


# ---- a letter

MARKUP = re.compile(
    r"""
      [*_`$"“”„«»「」『』#~|\\]             # **B**, `B`, $B$, "B", 「B」, ### B
    | </?(?:b|i|u|em|strong|code)>         # <b>B</b>
    | (?<!\w)['‘’] | ['‘’](?!\w)           # 'B', but not the apostrophe of It's
    """,
    re.VERBOSE,
)
LEAD = re.compile(  # what may stand before the letter
    r"""
    (?: \W*
        (?: \b (?:(?:the|my|final|correct|right|best)\s+)*
               (?:answer|option|choice|letter)\b (?:\s+is\b)?    # "The correct answer is", "Option"
          | \b (?:so|thus|hence|therefore
               | (?:it|that|this)\s+is | it['’]s )\b             # "So", "Therefore", "It is"
          | [正确確的答案选選择擇項项是为為应應该該故我这這]  # 答案是: the answer is; 选: choose
        )
    )* \W*
    """,
    re.VERBOSE | re.IGNORECASE,
)
LETTER = re.compile(
    r"""
    ([A-Za-z]) (?!\w)                                            # B, but not the B of "Back"
    (?P<mark>                                                    # what no word has after it:
        \s* (?: [:,;!)\]}。、] | \. (?![A-Za-z]\b) | \n )          # B: B, (B) B. but not e.g.
      | \s+ [-–—] (?=\s)                                         # B - right
      | (?= \s+is\s+ (?:the\s+)? (?:correct|right|best|answer)\b # B is correct
          | \s* (?:是\s+)? 正\s+[确確] )                           # B正确
    )?
    """,
    re.VERBOSE,
)
NO_NOUN = set("and or nor but is as may might could also too not if because".split())


def choice_letter(text, options):
    """The option that an answer names, as its capital letter; None if it names none, several, or
    one that does not exist.

    options: with their letters, "A. left", "A) left", "(A) left", "A: left" or "A.left". If they
    are not known ([]), any letter counts, if it stands alone.

    Markup, brackets, quotes and words such as "The answer is" are skipped. The next letter is the
    answer, unless the text after it names another option, by its letter or by its text.
    With the options A. left, B. right, C. a man walks:

        B   b   (B)   B.   **B**   $B$   \\boxed{B}   Option B   The answer is B.   Ｂ   -> B
        It is B   Letter B   So, the answer is B   答案：B   选B   B is correct       -> B
        B. right   B.right   (B)right   B right   B, right   B: it goes that way     -> B
        C. A man              -> C: its option begins like this
        B. A lady turns       -> B: here "A" is an article, not an option
        A or B   A, B   A: b  -> None: two letters
        A. left or right      -> None: contains the text of another option
        B. left               -> None: the text of another option
        C. a man (not right)  -> None: what an answer says about other options is not interpreted;
                                 so is "D. A, B and C" where D is "All of the above"
        B turns   A lady      -> None: without a mark (. : , ; ! bracket, dash, new line) after it,
                                 the letter may be a word
        right   right, B   D  -> None: no letter at the start, or no such option
    """
    texts = {m[1]: _said(_bare(o[m.end() :])) for o in options if (m := OPTION.match(o))}
    text = _bare(text)
    named = LETTER.match(text, LEAD.match(text).end())
    if not named:
        return None
    letter, rest = named[1].upper(), text[named.end() :]
    if texts and letter not in texts:
        return None

    said, own = _said(rest), texts.get(letter)
    if said in ("", own):  # the letter alone, or with the whole text of its option
        return letter
    if own is None or named["mark"] is None:  # nothing to compare with; or a word, as in "A lady"
        return None
    others = {t for other, t in texts.items() if other != letter and t != own}
    if len(said) > 1 and f"{own} ".startswith(f"{said} "):  # "C. A man" of "C. a man walks"
        return None if said in others else letter
    other_letters = _lone_letters(rest) & (texts.keys() - {letter})
    return None if other_letters or others & _contained(texts.values(), said) else letter


def _bare(text):
    """The visible text with spaces for markup, and spaces around the characters of scripts without
    spaces."""
    text = MARKUP.sub(" ", LATEX.sub("", visible(text)))
    return re.sub(f"[{SPACELESS}]", r" \g<0> ", text)


def _said(text):
    """The words of a text, joined by spaces. A minus sign and % count as words: one option may be
    -5, another 5."""
    text = re.sub(r"(?<!\w)-(?=\d)", " minus ", text.translate(DASHES)).replace("%", " percent ")
    return " ".join(words(text))


def _lone_letters(text):
    """The letters that stand alone in a text, as capitals. Not those of "a.m.", "I'm", "°C" and
    "T-shirt", nor "a" or "I" before a word that can follow them: in "A man", but not in "A or"."""
    tokens = re.findall(r"\w(?:\.\w)+|°?\w+(?:['’-]\w+)*|[^\w\s]", text)
    letters = set()
    for token, following in zip(tokens, [*tokens[1:], ""]):
        if len(token) == 1 and not (token in "aAI" and _continues(following)):
            letters.add(token.upper())
    return letters


def _continues(token):
    """Can this token follow "a" or "I"? A word or number can; a sign, a letter, "or" cannot."""
    return (len(token) > 1 or token.isdigit()) and token.lower() not in NO_NOUN


def _contained(texts, said):
    """The set of those texts that an answer contains, longest first: "red and blue" does not also
    contain "red". All texts are _said's. One-letter texts are not searched for: a lone letter is an
    option's letter."""
    texts = sorted((t for t in texts if not re.fullmatch("[a-z]?", t)), key=len, reverse=True)
    if not texts:
        return set()
    any_text = "|".join(map(re.escape, texts))
    return set(re.findall(rf"(?<!\S)(?:{any_text})(?!\S)", said))


# ---- a number

NUMBER = re.compile(
    r"""
    (?P<before> [\s(\[{$*_`"'“‘«「]* )                # ($ in ($5$)
    (?P<number>
        (?: [+-][ ]? )?                              # -5, - 5
        (?= \.?\d )                                  # at least one digit
        (?: \d{1,3} (?P<comma>[, ]) \d{3} (?: (?P=comma)\d{3} )*    # 1,000,000 or 1 000, not 1,00
          | \d+ )?                                   # 1000
        (?: \.\d+ )?                                 # 3.5, .5
        (?: [eE][+-]?\d{1,3} )?                      # 1e3
    )
    (?P<after> [\s)\]}$*_`"'”’»」.。]* )              # $) in ($5$), the stop in 5.
    """,
    re.VERBOSE,
)
MIRRORED = str.maketrans("([{“‘«「", ")]}”’»」", ".。")  # opening marks as closing ones; no stops


def decimal(text):
    """The number that a text is, as a Decimal with the decimals it is written with; None if it is
    not a number."""
    plain_form = visible(text).replace("{,}", ",")
    found = NUMBER.fullmatch(LATEX.sub("", plain_form).translate(DASHES))
    if not found or any(unicodedata.category(c) == "No" for c in text):  # 10² is not 102
        return None
    before = "".join(found["before"].translate(MIRRORED).split())
    after = "".join(found["after"].translate(MIRRORED).split())
    if before != after[::-1]:  # (5 or 5$
        return None
    return Decimal(re.sub("[, ]", "", found["number"]))


def parse_number(text):
    """A number as float, or None. Skipped: brackets, quotes and markup around it, commas or spaces
    between thousands, a full stop. Not skipped: units and words.

        5   5.0   5.   5。   (5)   $5$   **5**   \\boxed{5}   ５    -> 5.0
        1,000   1{,}000   1 000   1e3   –3   - 3                    -> 1000.0, -3.0
        5 m   50%   $5   five   4 or 5   1,00   10²   3-5   inf     -> None
    """
    number = decimal(text)
    if number is None or not math.isfinite(float(number)):
        return None
    return float(number)


# ---- two times

AROUND = re.compile(r"[\s\[\](){}<>*_`$\"'“”‘’「」]+")  # brackets, quotes and markup, as one space
TIME = r"((?:\d+:){0,2}\d+(?:\.\d+)?|\.\d+)"  # 12, 12.3, .5, 1:02.5, 0:01:02
UNIT = r"(?: ?(?:s|secs?|seconds?))?"
TIMES = re.compile(rf"(?:from |between )?{TIME}{UNIT} ?(?:to|until|and|-|,) ?{TIME}{UNIT}\.?")


def parse_times(text):
    """A time span -> (start, end) in seconds, rounded to milliseconds; None for anything else.

    Two times with to, until, and, a dash or a comma between them, in seconds or as minutes:seconds
    or hours:minutes:seconds. Skipped: s, sec and seconds, from and between before the times, a full
    stop after them, brackets, quotes and markup. A comma is never a decimal comma. None if the end
    is not after the start.

        12.3 to 18.9   12.3 - 18.9   12.3s–18.9s   [12.3, 18.9]   from 12.3 to 18.9 seconds.
        <12.3 seconds> to <18.9 seconds>   00:12.3 to 00:18.9            -> (12.3, 18.9)
        12.3   18.9 to 12.3   12 to 12   -1 to 5   1 min to 2 min
        00:75 to 01:30   3 to 5 to 9   It lasts from 3 to 5              -> None
    """
    if any(unicodedata.category(c) == "No" for c in text):  # 1² is not 12
        return None
    plain_form = LATEX.sub("", visible(text)).translate(DASHES).lower()
    found = TIMES.fullmatch(AROUND.sub(" ", plain_form).strip())
    if not found:
        return None
    start, end = (_seconds(time) for time in found.groups())
    if start is None or end is None or start >= end:
        return None
    return start, end


def _seconds(time):
    """The seconds of a TIME; None beyond 1e9, or if what is after a colon reaches 60."""
    first, *rest = (float(part) for part in time.split(":"))
    total = first
    for part in rest:
        if part >= 60:
            return None
        total = 60 * total + part
    return round(total, 3) if total <= 1e9 else None


# ---- words and signs
# The same words may differ in symbols, or in marks beside numbers (3.5) and variables (a/b, -x).

SYMBOLS = "".join(
    c
    for c in map(chr, range(0x3000))
    if unicodedata.category(c) in ("Sm", "Sc", "No") and c not in "|~$"  # these are markup
)
WORD, VARIABLE = r"[^\W\d_]{2}", r"[^\W\d_]\b"
SIGN = re.compile(
    rf"""(
      [{re.escape(SYMBOLS)}^%] | !(?==)            # a < b, 50%, €5, x², a != b
    | (?<=\d)[.:](?=\d) | (?<![\w.])\.(?=\d)       # 3.5, 10:30, .5
    | (?<=\d),(?=\d)(?!\d{{3}}(?!\d))              # 1,2 but not 1,000
    | (?<!{WORD})[-/](?=\s*[({{$]*\.?\d)           # -5, x - 5, 1/2 but not COVID-19
    | (?<!{WORD})(?<!{WORD}\s(?=[-/]\s))[-/]      # -x, a/b but not Rome - a city
      (?=\s*[({{$]*{VARIABLE})
    | (?<!{WORD})(?<=\w)-(?!\w)                    # A- but not pre- and post-
    | (?<=\w)\*(?=\w) | (?<=\s)\*(?=\s)            # 2*3, a * b
    )""",
    re.VERBOSE,
)
SPELLINGS = str.maketrans({"≤": "<=", "≥": ">=", "≠": "!=", "×": "*", "÷": "/"})


def signed_words(text):
    """The stemmed words of a text as lists, and between them its signs: "x = -5" -> [x], =, [], -,
    [5]."""
    kept = ""
    for c in text:  # ² stays, which NFKC would turn into 2
        kept += c if unicodedata.category(c) == "No" else unicodedata.normalize("NFKC", c)
    parts = SIGN.split(LATEX.sub("", kept).translate(DASHES).translate(SPELLINGS))
    return [part if i % 2 else stems(part) for i, part in enumerate(parts)]
