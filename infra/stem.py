"""The Porter stemmer (Porter 1980, "An algorithm for suffix stripping"): ROUGE compares stems.

With the changes of NLTK's version. The rouge-score package uses that one, and so does Video-R1's
reward for free-form answers.

    >>> stem("connections"), stem("happily"), stem("skies")
    ('connect', 'happili', 'sky')
"""

IRREGULAR = dict(
    skies="sky",
    dying="die",
    lying="lie",
    tying="tie",
    innings="inning",
    outings="outing",
    cannings="canning",
)
UNCHANGED = {"sky", "news", "inning", "outing", "canning", "howe", "proceed", "exceed", "succeed"}
STEP_2 = dict(
    ational="ate",
    tional="tion",
    enci="ence",
    anci="ance",
    izer="ize",
    bli="ble",
    alli="al",
    entli="ent",
    eli="e",
    ousli="ous",
    ization="ize",
    ation="ate",
    ator="ate",
    alism="al",
    iveness="ive",
    fulness="ful",
    ousness="ous",
    aliti="al",
    iviti="ive",
    biliti="ble",
    fulli="ful",
)
STEP_3 = dict(icate="ic", ative="", alize="al", iciti="ic", ical="ic", ful="", ness="")
STEP_4 = "al ance ence er ic able ible ant ement ment ent ion ou ism ate iti ous ive ize".split()


def stem(word):
    """The Porter stem of a lower-case word: the same for connect, connected, connection."""
    if len(word) <= 2 or word in UNCHANGED or word in IRREGULAR:
        return IRREGULAR.get(word, word)
    return _step_5(_step_4(_step_3(_step_2(_step_1c(_step_1b(_step_1a(word)))))))


def _shape(word):
    """A word as consonants c and vowels v: "toy" -> "cvc". y is a vowel after a consonant."""
    shape = ""
    for letter in word:
        shape += "v" if letter in "aeiou" or (letter == "y" and shape.endswith("c")) else "c"
    return shape


def _measure(word):
    """How often a consonant follows a vowel: the m of [C](VC)^m[V]."""
    return _shape(word).count("vc")


def _short(word):
    """Does it end in consonant, vowel, consonant other than w, x, y; or is it vowel, consonant?"""
    shape = _shape(word)
    return shape == "vc" or (shape.endswith("cvc") and word[-1] not in "wxy")


def _step_1a(word):  # plurals
    if word.endswith("ies"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("sses"):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def _step_1b(word):  # past and present participles
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) else word
    rest = word[:-2] if word.endswith("ed") else word[:-3] if word.endswith("ing") else ""
    if "v" not in _shape(rest):
        return word
    if rest.endswith(("at", "bl", "iz")):
        return rest + "e"
    if len(rest) > 1 and rest[-1] == rest[-2] and _shape(rest)[-1] == "c":
        return rest if rest[-1] in "lsz" else rest[:-1]
    return rest + "e" if _measure(rest) == 1 and _short(rest) else rest


def _step_1c(word):  # y after a consonant
    if word.endswith("y") and len(word) > 2 and _shape(word[:-1])[-1] == "c":
        return word[:-1] + "i"
    return word


def _step_2(word):
    if word.endswith("alli") and _measure(word[:-4]):
        return _step_2(word[:-2])
    for suffix, other in STEP_2.items():
        if word.endswith(suffix):
            return word[: -len(suffix)] + other if _measure(word[: -len(suffix)]) else word
    return word[:-1] if word.endswith("logi") and _measure(word[:-3]) else word


def _step_3(word):
    for suffix, other in STEP_3.items():
        if word.endswith(suffix):
            return word[: -len(suffix)] + other if _measure(word[: -len(suffix)]) else word
    return word


def _step_4(word):
    for suffix in STEP_4:
        if word.endswith(suffix):
            rest = word[: -len(suffix)]
            removable = suffix != "ion" or rest.endswith(("s", "t"))
            return rest if removable and _measure(rest) > 1 else word
    return word


def _step_5(word):
    if word.endswith("e"):
        m = _measure(word[:-1])
        if m > 1 or (m == 1 and not _short(word[:-1])):
            word = word[:-1]
    return word[:-1] if word.endswith("ll") and _measure(word[:-1]) > 1 else word
