"""The options of a multiple-choice question and their letters: "A. left", "B. right"."""

import re
import unicodedata
from reprlib import repr as short_repr

from infra.errors import DataError

OPTION = re.compile(r"\s*\(?([A-Z])[.):]")  # "A. x", "A) x", "(A) x", "A: x"
OTHER_STYLE = re.compile(  # the other ways in which data sets write an option with its letter
    r"""
    [\W_]*?                                          # - A. x
    (?P<open> [*_`]* )                               # **A. x**
    (?: (?:option|choice|answer)\s+\(? )?            # Option A: x
    (?P<letter> [A-ZＡ-Ｚ] )                           # also a. x, Ａ．x
    (?P<mark>
        [*_`]* \s*
        (?: [.):\]}、．）：］】] (?!\w\.)               # [A] x, A、x, but not the "A." of "A.M."
          | [-–—] (?=\s) )                           # A - x, but not A-roll
        [*_`]*                                       # **A.** x
      | (?P=open) (?<=[*_`]) (?=\s*\S)               # **A** x
      | (?P<space> \s ) (?=\s*\S)                    # A x, which may be a word
    )
    \s*
    """,
    re.VERBOSE | re.IGNORECASE,
)
MOST = 26


def lettered(options, where):
    """Options with or without letters -> options with the letters A, B, C ... in order.

    "A. x", "A) x", "(A) x" and "A: x" stay as they are. Letters in another style (OTHER_STYLE) are
    rewritten as "A. x", and the prompt shows them so. "A left", "B right" count as letters only if
    all options begin so, in order. If only some begin with a letter ("A. left", "right"), the
    record is ambiguous and refused. "J. Smith", "K. Brown" and "A.M.", "P.M." are text, and get
    letters. Raises DataError, naming `where`.
    """
    if not (isinstance(options, list) and all(isinstance(o, str) for o in options)):
        raise DataError(f"{where}: 'options' is {short_repr(options)}, expected a list of strings")
    if len(options) > MOST or not all(o.strip() for o in options):
        raise DataError(
            f"{where}: {len(options)} options, expected at most {MOST}, none of them empty"
        )
    options, letters = [o.lstrip() for o in options], _letters(len(options))
    if [_letter(o) for o in options] == letters:
        return options
    begins = [OTHER_STYLE.match(o) for o in options]
    found = [unicodedata.normalize("NFKC", m["letter"]).upper() if m else None for m in begins]
    if found == letters:
        texts = [_text_after(m) for m in begins]
        return [f"{letter}. {text}" for letter, text in zip(letters, texts)]
    marked = {letter for letter, m in zip(found, begins) if m and not m["space"]}
    if not marked.isdisjoint(letters):
        found = ", ".join(map(short_repr, options))
        raise DataError(
            f"{where}: the options {found}, expected the letters A, B, C ... in order "
            "before all of them, or before none"
        )
    return [f"{letter}. {o}" for letter, o in zip(letters, options)]


def split_options(question):
    """Splits a question that ends with its options, one a line, as in Video-RTS and
    LongVideo-Reason -> (question, options).

    No options are split off if an earlier line also begins with one of their letters.
    """
    lines = [line.strip() for line in question.splitlines() if line.strip()]
    found = [_letter(line) for line in lines]
    for i in range(max(0, len(lines) - MOST), len(lines) - 1):
        letters = _letters(len(lines) - i)
        if found[i:] == letters and set(found[:i]).isdisjoint(letters):
            return "\n".join(lines[:i]), lines[i:]
    return question, []


def _letters(n):
    return [chr(ord("A") + i) for i in range(n)]


def _letter(option):
    """The letter that an option begins with, in the usual style; None without one."""
    found = OPTION.match(option)
    return found[1] if found else None


def _text_after(begin):
    """The text after an option's letter. begin: its match of OTHER_STYLE."""
    text = begin.string[begin.end() :]
    closed = begin["open"] in begin["mark"]  # "**A.** x", not "**A. x**"
    return text if closed else text.removesuffix(begin["open"])
