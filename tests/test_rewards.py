"""The answer normaliser and the rule rewards, as tables; ROUGE, word error rate and stemmer against
rouge-score, jiwer and NLTK."""

import json
import random
import re
import time

import pytest

import rewards
from conftest import ROOT, SHARED, needs_shared
from data import DataError, Sample, load_samples
from infra import stem


def sample(problem_type="multiple choice", answer="B", options=("A. left", "B. right", "C. A")):
    return Sample(
        "1",
        "?",
        list(options) if problem_type == "multiple choice" else [],
        problem_type,
        "video",
        "x.mp4",
        answer,
    )


@pytest.mark.parametrize(
    "text, letter",
    [
        ("B", "B"),
        ("b", "B"),
        (" B ", "B"),
        ("(B)", "B"),
        ("B)", "B"),
        ("B.", "B"),
        ("(b).", "B"),
        ("B:", "B"),
        ("B. right", "B"),
        ("B) right", "B"),
        ("(B) right", "B"),
        ("B right", "B"),
        ("B. Right.", "B"),
        ("B\nright", "B"),
        ("B. it turns to that side", "B"),
        ("B. left", None),
        ("C. A", "C"),
        ("C", "C"),
        ("A or B", None),
        ("A, B", None),
        ("A and B", None),
        ("A. or B.", None),
        ("a. or b.", None),
        ("(a) or (b)", None),
        ("A. or b", None),
        ("B. a turn", "B"),
        ("AB", None),
        ("A B", None),
        ("B. A", None),
        ("D", None),
        ("right", None),
        ("left", None),
        ("", None),
        ("?", None),
        ("1", None),
        ("B right left", None),
    ],
)
def test_choice_letter(text, letter):
    assert rewards.choice_letter(text, ["A. left", "B. right", "C. A"]) == letter


@pytest.mark.parametrize(
    "text",
    [
        *(
            "B.right",
            "(B)right",
            "B:right",
            "B, right",
            "B; right",
            "B、right",
            "B - right",
            "B — right",
            "B)right",
        ),
        *(
            "B,",
            "B;",
            "B!",
            "B。",
            "( B )",
            "[B]",
            "{B}",
            "<B>",
            '"B"',
            "'B'",
            "“B”",
            "「B」",
            "- B",
            "B...",
            "b).",
        ),
        *(
            "**B**",
            "**B.** right",
            "**B**right",
            "`B`",
            "__B__",
            "$B$",
            "$$B$$",
            "~~B~~",
            "<b>B</b>",
            "### B",
            "*b*: right",
        ),
        *(
            r"\boxed{B}",
            r"\text{B}",
            r"\mathrm{B}",
            r"\mathbf{(B)}",
            r"$\boxed{\text{B}}$",
            r"\(B\)",
            r"\boxed{B. right}",
        ),
        *(
            "Option B",
            "Option B: right",
            "Choice B",
            "Answer: B",
            "answer: b",
            "The answer is B.",
            "The answer is: (B)",
        ),
        *(
            "The correct answer is **B**.",
            "Final answer: B",
            "My answer is option B",
            "The best option is B. right",
        ),
        *(
            "Ｂ",
            "（B）",
            "Ｂ．right",
            "Answer:\nB",
            "\ufeffB",
            "B\u200b",
            "\u200b(\u200dB\u2060)",
            "\u00a0B\u3000",
        ),
        *(
            "B. it's at 9 a.m.",
            "B. I'm sure",
            "B. a U-turn",
            "B: a lady in a T-shirt",
            "B. righteous",
        ),
        *(
            "B\n\nBecause it turns.",
            "B. right, plan B",
            "B. at 20 °C",
            "(B) is the answer",
            "B. all in all",
        ),
        *(
            "B is correct",
            "Option B is correct.",
            "B is right",
            "**B** is the best option",
            "B is the answer: it turns",
        ),
        *(
            "So, the answer is B",
            "Thus B",
            "It is B",
            "It's (b).",
            "Letter B",
            "The correct answer is letter B: right",
        ),
        *("答案：B", "正确答案是 **B**。", "选B", "故选B。", "选项B正确", "B是正确的", "我选B"),
    ],
)
def test_a_letter_is_read_past_its_markup(text):
    assert rewards.choice_letter(text, ["A. left", "B. right", "C. up", "D. down"]) == "B"


@pytest.mark.parametrize(
    "text",
    [
        *(
            "A. left or right",
            "A. left, right, up, down",
            "A: b",
            "A. b?",
            "A. left/right",
            "A: left; maybe right",
        ),
        *(
            "A or B",
            "**A** or **B**",
            "A / B",
            "A&B",
            "A-B",
            "A, or C",
            "A. A or B",
            "(A)(B)",
            "A! B?",
            "Ａ，Ｂ",
            "A. B",
        ),
        *(
            "The answer is A or B",
            "Option A, option B",
            "A: not B",
            "A. left. B. right",
            "A. or a right turn",
            r"\boxed{A,B}",
        ),
        *(
            "right",
            "**right**",
            "The answer is right",
            "right. B",
            "not B",
            "The answer is not B",
            "answer",
            "E",
            "Option E",
        ),
        *(
            "A is right",
            "B is correct, not A",
            "B is incorrect",
            "B is not correct",
            "It is A or B",
            "So it is A. right",
        ),
        *(
            "B is up",
            "It is a man",
            "It is a right turn",
            "选A或B",
            "答案不是B",
            "不选B",
            "A正确，B错误",
        ),
        *("C. up (not down)", "C. up, then A"),  # what is said of other options is not read
        *(
            "A man walks",
            "a man",
            "a right turn",
            "B turns",
            "A.M.",
            "e.g. right",
            "D-day",
            "C'mon",
            "Bé",
            "B12",
            "()",
            "**",
        ),
    ],
)
def test_what_hedges_or_has_no_letter_is_no_answer(text):
    assert rewards.choice_letter(text, ["A. left", "B. right", "C. up", "D. down"]) is None


@pytest.mark.parametrize(
    "text, letter",
    [
        ("B. A man walks away", "B"),  # as its text begins
        ("B. A man walks away slowly", "B"),
        ("B. A man runs", "B"),  # an article
        ("B. A", None),
        ("B. Either A or B", None),
        ("B. red", None),  # the whole text of A
        ("C. red and blue", "C"),  # though it holds the text of A
        ("C. It is red and blue.", "C"),
        ("A. red and blue", None),
        ("A man", None),
        ("E. A and B", "E"),
        ("D. A, B and C", None),
        ("E", "E"),
        ("F. A and B", None),
        ("F.", "F"),
        ("G. -55 mV", "G"),
        ("G. −55 mV", "G"),
        ("G. 55 mV", None),
        ("H. -55 mV", None),
        ("I. 95.1 %", "I"),
        ("I. 95.1", None),
        ("J. 95.1%", None),
        ("J. 95.1", "J"),
    ],
)
def test_texts_that_hold_letters_and_each_other(text, letter):
    options = [
        "A. red",
        "B. A man walks away slowly",
        "C. red and blue",
        "D. none",
        "E. A and B",
        "F. ",
        "G. -55 mV",
        "H. 55 mV",
    ]
    options += ["I. 95.1%", "J. 95.1"]
    assert rewards.choice_letter(text, options) == letter


@pytest.mark.parametrize("option", ["{}. 左", "{}) 左", "({}) 左", "{}: 左", "{}.左"])
def test_options_of_any_style_and_script(option):
    options = [option.format("A"), option.format("B").replace("左", "右")]
    answers = {
        "B": "B",
        "B右": "B",
        "B。右边": "B",
        "Ｂ、右": "B",
        "A. 左": "A",
        "A。左右": None,
        "A或B": None,
        "右": None,
    }
    assert {text: rewards.choice_letter(text, options) for text in answers} == answers


def load_one(folder, **record):
    (folder / "records.json").write_text(json.dumps([dict(problem="?", path="x.mp4", **record)]))
    return load_samples(folder / "records.json")[0]


@pytest.mark.parametrize(
    "solution", ["B.right", "(B)", "**B**", "B. right", "<answer>Option B</answer>"]
)
def test_a_record_is_accepted_whose_solution_names_an_option(solution, tmp_path):
    loaded = load_one(tmp_path, options=["A. left", "B. right"], solution=solution)
    assert [rewards.accuracy_reward(f"<answer>{letter}</answer>", loaded) for letter in "AB"] == [
        0,
        1,
    ]


@pytest.mark.parametrize("solution", ["right", "A or B", "C", "A. right"])
def test_a_record_is_refused_whose_solution_names_none(solution, tmp_path):
    with pytest.raises(DataError, match="is not exactly one of the options"):
        load_one(tmp_path, options=["A. left", "B. right"], solution=solution)


def test_choice_letter_with_closing_brackets_and_many_options():
    options = [f"{c}) option" for c in "ABCDEFGHIJKLMN"]
    assert (
        rewards.choice_letter("N", options) == "N" and rewards.choice_letter("O", options) is None
    )


@pytest.mark.parametrize(
    "text, number",
    [
        ("5", 5),
        ("5.0", 5),
        ("-3.25", -3.25),
        ("1,000", 1000),
        ("12,345,678.5", 12345678.5),
        (".5", 0.5),
        ("5.", 5),
        ("+2", 2),
        ("1e3", 1000),
        ("\u22124", -4),
        ("3.5 m", None),
        ("five", None),
        ("", None),
        (".", None),
        ("1,00", None),
        ("nan", None),
        ("inf", None),
        ("1e999", None),
        ("--1", None),
        ("5%", None),
        ("4 or 5", None),
        ("1e", None),
        ("e5", None),
        ("-E3", None),
        *(
            (text, 5)
            for text in (
                "$5$",
                r"\boxed{5}",
                r"$\boxed{\text{5}}$",
                r"\(5\)",
                "5。",
                "(5)",
                "[ 5 ]",
                "“5”",
                "５",
            )
        ),
        *((text, 5) for text in ("**5**", "`5`.", "**5.**", "_5_", "「5」", "5\u200b", "\ufeff5")),
        *((text, -3) for text in ("–3", "—3", "\u20113", "－3", "(–3)", "$-3$")),
        *(
            (text, 1000)
            for text in (
                "1 000",
                "1\u2009000",
                "1\u00a0000",
                "1\u202f000",
                "１，０００",
                "1 000.0",
                r"1\,000",
            )
        ),
        *((text, 1000) for text in ("1{,}000", "$1{,}000$")),
        *((text, -3) for text in ("- 3", "− 3", "$- 3$", "-\u00a03.0")),
        *((text, None) for text in ("- -3", "10 - 3", "1{,}00", "{,}", "-", "- ")),
        ("12 345 678,5", None),
        *(
            (text, None)
            for text in (
                "$5",
                "5$",
                '5"',
                "5'",
                "50 %",
                "５％",
                "10²",
                "½",
                "①",
                "5!",
                "5)",
                "3–5",
                "x = 5",
            )
        ),
        *(
            (text, None)
            for text in (
                "1 00",
                "1 0000",
                "1,000 000",
                r"\sqrt{5}",
                r"\frac{1}{2}",
                "()",
                "$$",
                "The answer is 5",
            )
        ),
    ],
)
def test_parse_number(text, number):
    assert rewards.parse_number(text) == number


@pytest.mark.parametrize(
    "response, answer",
    [
        ("<answer>B</answer>", "B"),
        ("<think>x</think><answer> B\n</answer>", "B"),
        ("B", None),
        ("<answer>B", None),
        ("", None),
        ("<think><answer>A</answer></think><answer>B</answer>", "B"),
        ("<answer>A<answer>B</answer>", "B"),
        ("<answer></answer>", ""),
    ],
)
def test_extract_answer(response, answer):
    assert rewards.extract_answer(response) == answer


@pytest.mark.parametrize(
    "kind, gold, said, reward",
    [
        ("multiple choice", "B", "B", 1),
        ("multiple choice", "G.", "G", 0),
        ("multiple choice", "B.", "(b)", 1),
        ("multiple choice", "B", "A", 0),
        ("multiple choice", "B", "right", 0),
        ("numerical", "5", "5.0", 1),
        ("numerical", "1000", "1,000", 1),
        ("numerical", "3.43", "3.429", 1),  # to the decimals of the gold
        ("numerical", "3.429", "3.43", 0),
        ("numerical", "3.429", "3.4292", 1),
        ("numerical", "0.003", "0", 0),
        ("numerical", "0.003", "0.0034", 1),
        ("numerical", "1e-5", "0", 0),
        ("numerical", "1e-5", "0.00001", 1),
        (
            "numerical",
            "66.66666666666667",
            "66.67",
            1,
        ),  # more than 6 decimals: three digits, at least 2 decimals
        ("numerical", "66.66666666666667", "66.666667", 1),
        ("numerical", "66.66666666666667", "66.7", 0),
        ("numerical", "0.30000000000000004", "0.3", 1),
        ("numerical", "0.00012345678", "0.000123", 1),
        ("numerical", "0.00012345678", "0.00012", 0),
        ("numerical", "-1.23456789e-9", "-0.00000000123", 1),
        ("numerical", "1e-7", "0", 0),
        ("numerical", "0.0000000", "0.004", 1),
        ("numerical", "3.141593", "3.14", 0),  # 6 decimals
        ("numerical", "5", "5.004", 1),
        ("numerical", "5", "5.01", 0),
        ("numerical", "1,500.5", r"$\boxed{1500.50}$", 1),
        ("numerical", "50", "50%", 0),
        ("numerical", "3.5", "3.5 m", 0),
        ("numerical", "2", "two", 0),
        ("regression", "200", "150", 0.75),
        ("regression", "200", "500", 0),
        ("regression", "200", "200", 1),
        ("regression", "0.012", "0.008", 2 / 3),
        ("OCR", "No entry today", "No entry today", 1),
        ("OCR", "No entry today", "no entry", 1 / 3),
        ("OCR", "No entry", "a b c d e f", 0),
        ("free-form", "The dog is running", "the dog runs", (6 / 7 + 2 / 5 + 6 / 7) / 3),
        ("free-form", "A cat", "A cat!", 1),
        ("free-form", "cat", "cat", 1),
        ("free-form", "cat", "Cats", 2 / 3),  # ROUGE-2 sees no pair of words
        ("free-form", "black cat", "black cat", 1),
        ("free-form", "black cat", "cat", (2 / 3 + 0 + 2 / 3) / 3),
        ("free-form", "black cat", "a black cat", (4 / 5 + 2 / 3 + 4 / 5) / 3),
        ("free-form", "black cat", "cat black", (1 + 0 + 1 / 2) / 3),
        ("free-form", "猫在跳", "猫在跳", 1),
        ("free-form", "猫在跳", "猫在跳。", 1),
        ("free-form", "猫在跳", "狗在跳", (2 / 3 + 1 / 2 + 2 / 3) / 3),
        ("free-form", "3只猫", "3只狗", (2 / 3 + 1 / 2 + 2 / 3) / 3),
        ("free-form", "แมว", "แมว", 1),
        ("free-form", "кошка прыгает", "Кошка прыгает!", 1),
        ("free-form", "кошка прыгает", "кошка спит", (1 / 2 + 0 + 1 / 2) / 3),
        ("free-form", "кошка", "собака", 0),
        ("free-form", "القطة تقفز", "القطة تقفز", 1),
        ("free-form", "बिल्ली कूद रही", "बिल्ली सो रही", (2 / 3 + 0 + 2 / 3) / 3),
        ("free-form", "고양이", "고양이", 1),
        ("free-form", "+", "+", 1),
        ("free-form", "+", "-", 0),
        ("free-form", "π", "π", 1),
        ("free-form", "😀", " 😀\n", 1),
        ("free-form", "café noir", "cafe\u0301 noir", 1),  # one letter, or a letter and its accent
        ("free-form", "über alles", "aber alles", (1 / 2 + 0 + 1 / 2) / 3),
        ("free-form", "the 猫", "the 狗", (1 / 2 + 0 + 1 / 2) / 3),
        ("OCR", "停止前进", "停止后退", 1 / 2),
        ("OCR", "停止前进", "停止 前进", 1),
        ("OCR", "出口 EXIT", "出口 EXIT", 1),
        ("OCR", "出口 EXIT", "入口 EXIT", 2 / 3),
        ("OCR", "ทางออก", "ทางเข้า", 1 / 3),  # 6 characters, 3 replaced and 1 added
        ("OCR", "СТОП", "СТОП", 1),
        ("OCR", "+", "+", 1),
        ("OCR", "STOP", "STOP\u200b", 1),
        ("free-form", "A cat", "a dog barks", (2 / 5 + 0 + 2 / 5) / 3),
    ],
)
def test_accuracy_by_problem_type(kind, gold, said, reward):
    assert rewards.accuracy_reward(
        f"<think>t</think><answer>{said}</answer>", sample(kind, gold)
    ) == pytest.approx(reward)
    assert rewards.accuracy_reward(said, sample(kind, gold)) == 0  # no tags, no answer


SAME_WORDS = {  # gold: right answers
    "yes": ("Yes", "YES.", "“yes”!", "**Yes**"),
    "red apple": ("Red apple.", "red-apple", "Red, apple"),
    "Straße": ("STRASSE",),
    "COVID-19": ("Covid 19",),
    "pre- and post-war": ("pre and post war",),
    "Rome - a city": ("Rome, a city",),
    "1,000 people": ("1 000 people",),
    "x = -5": ("$x=-5$", "x = −5.", "X=-5"),
    "a ≤ b": ("a <= b",),
    "2 * 3": ("2*3", "2 × 3"),
    "3-5 dogs": ("3–5 dogs", "3 - 5 dogs"),
}
OTHER_SIGNS = {  # gold: wrong answers
    "-0.5": ("0.5", "0,5", "0/5"),
    "$x=-5$": ("$x=5$", "x = 5", "x-5", "-x = 5"),
    "a < b": ("a > b", "a = b", "a b", "a <= b"),
    "a = b": ("a != b", "a ≠ b"),
    "1.2": ("1/2", "1:2", "1-2", "1 2", "1,2"),
    "3.5": ("3 5", "3, 5"),
    ".5": ("5", "-5"),
    "50%": ("50",),
    "x² + 1": ("x³ + 1", "x² - 1", "x + 1"),
    "2 * 3": ("2 + 3", "2 3"),
    "C++": ("C",),
    "A-": ("A", "A+"),
    "p ∧ q": ("p ∨ q",),
    "-5 and 5": ("5 and -5",),
    "the dog runs -5 m": ("the dogs run 5 m",),  # the same stems
}


@pytest.mark.parametrize(
    "gold, said, reward",
    [
        *((gold, said, 1) for gold, right in SAME_WORDS.items() for said in right),
        *((gold, said, 0) for gold, wrong in OTHER_SIGNS.items() for said in wrong),
    ],
)
def test_the_same_words_are_right_unless_their_signs_differ(gold, said, reward):
    assert rewards.accuracy_reward(f"<answer>{said}</answer>", sample("free-form", gold)) == reward


@pytest.mark.parametrize(
    "response, reward",
    [
        ("<think>a</think><answer>B</answer>", 1),
        ("<think>a\nb</think>\n\n<answer>B</answer>", 1),
        ("<think></think> <answer></answer>", 1),
        ("<answer>B</answer>", 0),
        ("<think>a</think>", 0),
        ("<think>a</think><answer>B</answer>!", 0),
        ("x<think>a</think><answer>B</answer>", 0),
        ("<answer>B</answer><think>a</think>", 0),
        ("<think>a</think>so<answer>B</answer>", 0),
        ("<think><think>a</think></think><answer>B</answer>", 0),
        ("<think>a</think><think>b</think><answer>B</answer>", 0),
        ("<think>a</think><answer>A</answer><answer>B</answer>", 0),
        ("", 0),
    ],
)
def test_format(response, reward):
    assert rewards.format_reward(response) == reward


def test_length_bonus_needs_a_right_answer_and_both_bounds_count():
    assert [rewards.length_reward(n, 1.0) for n in (319, 320, 512, 513)] == [0, 0.2, 0.2, 0]
    assert (
        rewards.length_reward(400, 0.1) == 0
        and rewards.length_reward(5, 0.5, lo=5, hi=9, bonus=1.0) == 1.0
    )


def test_mean_relative_accuracy_by_hand():
    assert rewards.mean_relative_accuracy(100, 100) == 1
    assert rewards.mean_relative_accuracy(120, 100) == pytest.approx(
        0.6
    )  # error 0.2 < 1 - 0.50, ..., 1 - 0.75
    assert (
        rewards.mean_relative_accuracy(300, 100) == 0 and rewards.mean_relative_accuracy(0, 0) == 1
    )


@pytest.mark.parametrize(
    "pred, target, strict, inclusive",
    [
        (105, 100, 0.9, 1.0),
        (130, 100, 0.4, 0.5),
        (9, 10, 0.8, 0.9),
        (1.15, 1.0, 0.7, 0.8),
        (0.95, 1.0, 0.9, 1.0),
        (2.1, 2, 0.9, 1.0),
        (0.0014, 0.002, 0.4, 0.5),
        (-130, -100, 0.4, 0.5),
        (150, 100, 0.0, 0.1),
        (105 * 10**400, 10**402, 0.9, 1.0),
        (1.05e-300, 1e-300, 0.9, 1.0),
        (1e308, -1e308, 0.0, 0.0),
        (0.0, 0, 1.0, 1.0),
        (1e-9, 0, 0.0, 0.0),
        (float("inf"), 1, 0.0, 0.0),
        (float("nan"), 1, 0.0, 0.0),
    ],
)
def test_no_rounding_decides_mean_relative_accuracy(pred, target, strict, inclusive):
    assert rewards.mean_relative_accuracy(pred, target) == strict
    assert rewards.mean_relative_accuracy(pred, target, inclusive=True) == inclusive


@pytest.mark.slow
def test_any_string_gives_a_number_in_range():
    rng, pieces = (
        random.Random(0),
        [
            "<answer>",
            "</answer>",
            "B",
            "A.",
            "(",
            "5",
            ",",
            ".",
            "-",
            "+",
            "e",
            "E5",
            "1e999",
            ":",
            " to ",
            "\x00",
            "\n",
            "é",
            "٣",
            " ",
        ],
    )
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=rng.randrange(8)))
        text = rng.choice([text, f"<answer>{text}</answer>"])
        for kind in rewards.PROBLEM_TYPES:
            gold = {"multiple choice": "B", "grounding": "0 to 5"}.get(kind, "5")
            assert 0 <= rewards.accuracy_reward(text, sample(kind, gold)) <= 1
        assert rewards.format_reward(text) in (0, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "piece",
    ["<answer>", "(", " ", "the ", "the answer is ", "1 000", "5.", r"\text{", "' ", "a.", "左"],
)
def test_a_long_response_takes_no_long_time(piece):
    for kind, gold in zip(
        rewards.PROBLEM_TYPES,
        ("B", "5", "停止 no entry", "the dog runs", "5", "3 to 5"),
        strict=True,
    ):
        text = "B. " + piece * (100_000 // len(piece))
        start = time.process_time()
        assert 0 <= rewards.accuracy_reward(f"<answer>{text}</answer>", sample(kind, gold)) <= 1
        assert time.process_time() - start < 5


# ---- texts, against known libraries


def vocabulary(rng):
    """Words of our own files, and random stems with all suffixes that the stemmer knows."""
    text = " ".join(f.read_text() for f in [*ROOT.glob("*.md"), *ROOT.glob("*.py")]).lower()
    suffixes = [
        *stem.STEP_2,
        *stem.STEP_3,
        *stem.STEP_4,
        *"ing ed ies ied eed sses logi logy ally y ll e s".split(),
    ]
    made = set()
    for suffix in suffixes:
        for _ in range(60):
            made.add("".join(rng.choices("aeiousytnlrd", k=rng.randrange(1, 7))) + suffix)
    return sorted(made | set(re.findall("[a-z]{2,}", text)) | set(stem.IRREGULAR))


def test_stemmer_equals_nltk():
    from nltk.stem.porter import PorterStemmer

    theirs = PorterStemmer()
    words = vocabulary(random.Random(0))
    assert len(words) > 3000
    assert [w for w in words if stem.stem(w) != theirs.stem(w)] == []


def test_rouge_and_word_error_rate_equal_known_libraries():
    import jiwer
    from rouge_score.rouge_scorer import RougeScorer

    rng, scorer = random.Random(1), RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    words = vocabulary(rng)
    for _ in range(500):
        few = rng.sample(words, 10)  # so that texts share words
        text, reference = (
            rng.choice([" ", ", ", "-", "_"]).join(rng.choices(few, k=rng.randrange(n, 15)))
            for n in (0, 1)
        )
        theirs = [score.fmeasure for score in scorer.score(reference, text).values()]
        assert rewards.rouge(text, reference) == pytest.approx(sum(theirs) / 3)
        assert rewards.word_error_rate(text, reference) == pytest.approx(jiwer.wer(reference, text))
    assert (
        rewards.rouge("", "a b") == 0 == rewards.rouge("!", "a b")
        and rewards.word_error_rate("", "") == 0
    )


@pytest.mark.slow
@needs_shared
def test_rewards_on_every_real_record():
    """The gold answer in tags is right, whatever its marks; other answers are not, nor is an answer
    without tags."""
    for file in sorted((SHARED / "benchmarks").glob("*.json*")):
        for s in load_samples(file):

            def reward(said, s=s):
                return rewards.accuracy_reward(f"<think>so</think>\n<answer>{said}</answer>", s)

            assert reward(s.answer) == 1 and rewards.accuracy_reward(s.answer, s) == 0, s
            assert rewards.format_reward(f"<think>so</think>\n<answer>{s.answer}</answer>") == 1
            if s.options:
                gold = s.answer[0]
                letters = [o.strip()[0] for o in s.options]
                text = s.options[letters.index(gold)].strip()[2:].strip()
                forms = ["{}.", "({})", "**{}**", r"\boxed{{{}}}", "The answer is {}."]
                forms += ["{}. {}", "{}.{}", "({}){}", "{}: {}", "Option {}: {}"]
                assert [
                    form for form in forms if reward(form.format(gold, text)) != 1
                ] == [] and reward(gold.lower()) == 1, s
                others = [c for c in letters if c != gold]
                assert not any(reward(c) for c in others), s
                hedged = (
                    "{} or {}",
                    "{}, {}",
                    "{}. or {}.",
                    "**{}** and **{}**",
                    "The answer is {} or {}",
                    "{}: {}",
                )
                assert [
                    form for form in hedged for c in others if reward(form.format(gold, c)) != 0
                ] == [], s
                assert len(text) < 2 or reward(text) == 0, s
