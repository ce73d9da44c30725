"""The answer normaliser and the rule rewards: a table to look things up in; texts against rouge-score, jiwer and NLTK."""

import random
import re

import pytest
from conftest import ROOT, SHARED, needs_shared

import rewards
import stem
from data import Sample, load_samples


def sample(problem_type="multiple choice", answer="B", options=("A. left", "B. right", "C. A")):
    return Sample("1", "?", list(options) if problem_type == "multiple choice" else [], problem_type, "video", "x.mp4", answer)


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
        ("The answer is B", None),
        ("1", None),
        ("B right left", None),
    ],
)
def test_choice_letter(text, letter):
    assert rewards.choice_letter(text, ["A. left", "B. right", "C. A"]) == letter


def test_choice_letter_with_closing_brackets_and_many_options():
    options = [f"{c}) option" for c in "ABCDEFGHIJKLMN"]
    assert rewards.choice_letter("N", options) == "N" and rewards.choice_letter("O", options) is None


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
        ("1 000", None),
        ("nan", None),
        ("inf", None),
        ("1e999", None),
        ("--1", None),
        ("5%", None),
        ("4 or 5", None),
        ("1e", None),
        ("e5", None),
        ("-E3", None),
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
        ("numerical", "3.429", "3.43", 1),
        ("numerical", "3.429", "3.44", 0),
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
        ("free-form", "cat", "cat", 2 / 3),  # ROUGE-2 sees no pair of words
        ("free-form", "A cat", "a dog barks", (2 / 5 + 0 + 2 / 5) / 3),
    ],
)
def test_accuracy_by_problem_type(kind, gold, said, reward):
    assert rewards.accuracy_reward(f"<think>t</think><answer>{said}</answer>", sample(kind, gold)) == pytest.approx(reward)
    assert rewards.accuracy_reward(said, sample(kind, gold)) == 0  # no tags, no answer


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
    assert rewards.length_reward(400, 0.1) == 0 and rewards.length_reward(5, 0.5, lo=5, hi=9, bonus=1.0) == 1.0


def test_mean_relative_accuracy_by_hand():
    assert rewards.mean_relative_accuracy(100, 100) == 1
    assert rewards.mean_relative_accuracy(120, 100) == pytest.approx(0.6)  # error 0.2 < 1 - 0.50, ..., 1 - 0.75
    assert rewards.mean_relative_accuracy(300, 100) == 0 and rewards.mean_relative_accuracy(0, 0) == 1


def test_any_string_gives_a_number_in_range():
    rng, pieces = (
        random.Random(0),
        ["<answer>", "</answer>", "B", "A.", "(", "5", ",", ".", "-", "+", "e", "E5", "1e999", "\x00", "\n", "é", "٣", " "],
    )
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=rng.randrange(8)))
        text = rng.choice([text, f"<answer>{text}</answer>"])
        for kind in rewards.PROBLEM_TYPES:
            assert 0 <= rewards.accuracy_reward(text, sample(kind, "B" if kind == "multiple choice" else "5")) <= 1
        assert rewards.format_reward(text) in (0, 1)


# ---- texts, against known libraries


def vocabulary(rng):
    """Words of our own files, and random stems with every suffix that the stemmer knows."""
    text = " ".join(f.read_text() for f in [*ROOT.glob("*.md"), *ROOT.glob("*.py")]).lower()
    suffixes = [*stem.STEP_2, *stem.STEP_3, *stem.STEP_4, *"ing ed ies ied eed sses logi logy ally y ll e s".split()]
    random_stem = lambda: "".join(rng.choices("aeiousytnlrd", k=rng.randrange(1, 7)))
    made = {random_stem() + suffix for suffix in suffixes for _ in range(60)}
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
        text, reference = (" ".join(rng.choices(few, k=rng.randrange(n, 15))) for n in (0, 1))
        theirs = [score.fmeasure for score in scorer.score(reference, text).values()]
        assert rewards.rouge(text, reference) == pytest.approx(sum(theirs) / 3)
        assert rewards.word_error_rate(text, reference) == pytest.approx(jiwer.wer(reference, text))
    assert rewards.rouge("", "a b") == 0 == rewards.rouge("!", "a b") and rewards.word_error_rate("", "") == 0


@needs_shared
def test_rewards_on_every_real_record():
    """The gold answer in the asked form is right, whatever marks it carries; nothing else is, and nothing without tags."""
    for file in sorted((SHARED / "benchmarks").glob("*.json*")):
        for s in load_samples(file):
            reward = lambda said, s=s: rewards.accuracy_reward(f"<think>so</think>\n<answer>{said}</answer>", s)
            assert reward(s.answer) == 1 and rewards.accuracy_reward(s.answer, s) == 0, s
            assert rewards.format_reward(f"<think>so</think>\n<answer>{s.answer}</answer>") == 1
            if s.options:
                gold = s.answer[0]
                letters = [o.strip()[0] for o in s.options]
                text = s.options[letters.index(gold)].strip()[2:].strip()
                assert [reward(x) for x in (f"{gold}.", f"({gold})", gold.lower(), f"{gold}. {text}")] == [1, 1, 1, 1], s
                others = [c for c in letters if c != gold]
                assert not any(reward(c) for c in others), s
                assert not any(reward(f"{gold} or {c}") for c in others), s
                assert len(text) < 2 or reward(text) == 0, s
