"""Records, frames, pixels, patches, prompts; and everything that can be wrong with them."""

import gzip
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import rewards
import toy
from conftest import ROOT, SHARED, needs_shared
from data import DataError, Sample
from infra.frames import resize

RECORD = dict(
    problem_id=3,
    problem="Which?",
    options=["A. left", "B. right"],
    data_type="video",
    problem_type="multiple choice",
    solution="<answer>B</answer>",
    path="./v/x.mp4",
    data_source="set",
)


def load(tmp_path, *records, name="r.json", **kw):
    (tmp_path / name).write_text(
        json.dumps(list(records)) if name.endswith("json") else "\n".join(map(json.dumps, records))
    )
    return data.load_samples(tmp_path / name, **kw)


# ---- records


def test_a_video_r1_record(tmp_path):
    (sample,) = load(tmp_path, RECORD | {"process": "<think>it turns</think>"})
    assert sample == Sample(
        "3",
        "Which?",
        ["A. left", "B. right"],
        "multiple choice",
        "video",
        str(tmp_path / "v/x.mp4"),
        "B",
        "it turns",
        "set",
        about={"data_source": "set"},
    )


def test_options_null_and_bracket_prefixes(tmp_path):
    a, b, c = load(
        tmp_path,
        RECORD | {"options": None, "problem_type": "numerical", "solution": "<answer> 5 </answer>"},
        RECORD | {"options": ["A) x", "B) y"]},
        RECORD | {"options": ["x", "y"]},
        media_root="/videos",
    )
    assert a.options == [] and a.answer == "5" and a.path == "/videos/v/x.mp4"
    assert b.options == ["A) x", "B) y"] and c.options == ["A. x", "B. y"]


def test_a_video_rts_record_has_its_options_in_the_question(tmp_path):
    (sample,) = load(
        tmp_path,
        {
            "problem": "Why?\nA. so\nB. thus\n",
            "solution": "<answer>B.</answer>",
            "video": "/abs/x.mp4",
            "qid": 9,
        },
        name="r.jsonl",
    )
    assert (sample.id, sample.question, sample.options, sample.answer, sample.path) == (
        "9",
        "Why?",
        ["A. so", "B. thus"],
        "B.",
        "/abs/x.mp4",
    )


def test_only_a_closing_run_of_letters_is_options(tmp_path):
    (sample,) = load(
        tmp_path,
        {"problem": "Q: why?\n\nA. so\nB. thus", "solution": "B", "video": "x.mp4", "qid": 9},
    )
    assert (sample.question, sample.options) == ("Q: why?", ["A. so", "B. thus"])
    assert load(tmp_path, RECORD | {"options": ["U.S. flag", "France"]})[0].options == [
        "A. U.S. flag",
        "B. France",
    ]


def test_one_bad_line_does_not_cost_the_others(tmp_path):
    """Nor does a byte-order mark, or a line separator inside a string."""
    lines = [
        json.dumps(RECORD),
        '{"pro',
        json.dumps(RECORD | {"problem": "a\u2028b"}, ensure_ascii=False),
    ]
    (tmp_path / "r.jsonl").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    skipped = {}
    assert len(data.load_samples(tmp_path / "r.jsonl", skipped=skipped)) == 2
    assert "r.jsonl, line 2: not JSON" in skipped[1]


def test_a_longvideo_reason_record(tmp_path):
    (sample,) = load(
        tmp_path,
        {
            "problem_id": 1,
            "problem": "Why?\nA. so\nB. thus",
            "data_type": "video",
            "problem_type": "multiple choice",
            "reasoning": "because",
            "videos": "x.mp4",
            "answer": "<answer>A</answer>",
        },
    )
    assert (sample.answer, sample.reasoning, sample.options) == (
        "A",
        "because",
        ["A. so", "B. thus"],
    )


def test_a_question_of_text_alone(tmp_path):
    """It has no medium, so no path, whatever --media_root is."""
    text = dict(problem="What is 3 times 4?", data_type="text", problem_type="numerical")
    (sample,) = load(
        tmp_path,
        text | {"solution": r"\boxed{12}", "process": "three fours", "path": "", "images": []},
        media_root="/videos",
    )
    assert sample == Sample(
        "0", text["problem"], [], "numerical", "text", "", r"\boxed{12}", "three fours", "r"
    )
    assert rewards.accuracy_reward("<think></think><answer>12</answer>", sample) == 1
    (choice,) = load(tmp_path, RECORD | {"data_type": "text", "path": None})
    assert (choice.path, choice.options, choice.answer) == ("", ["A. left", "B. right"], "B")


GSM8K = dict(
    question="Natalia sold 48 clips in April, and half as many in May. How many in all?",
    answer="In May she sold 48/2 = <<48/2=24>>24 clips.\n"
    "In all she sold 48+24 = <<48+24=72>>72 clips.\n#### 72",
)


def test_files_with_byte_order_marks_can_be_joined(tmp_path):
    line = json.dumps(GSM8K) + "\n"
    (tmp_path / "joined.jsonl").write_text(f"\ufeff{line}\ufeff{line}", encoding="utf-8")
    assert len(data.load_samples(tmp_path / "joined.jsonl")) == 2


def test_a_gsm8k_record(tmp_path):
    """As published: neither data type nor problem type, and the number behind the reasoning."""
    (sample,) = load(tmp_path, GSM8K, name="gsm8k.jsonl")
    assert sample == Sample(
        "0",
        GSM8K["question"],
        [],
        "numerical",
        "text",
        "",
        "72",
        "In May she sold 48/2 = 24 clips.\nIn all she sold 48+24 = 72 clips.",
        "gsm8k",
    )
    assert data.problem_type(GSM8K) == "numerical"


@pytest.mark.parametrize(
    "change, field, value",
    [
        ({"data_type": "text"}, "data_type", "text"),
        ({"answer": "so\r\n#### 1,000\r\n"}, "answer", "1,000"),
        ({"answer": "#### 72"}, "reasoning", ""),
        ({"answer": "so\r\nit is\r\n#### 72", "path": math.nan}, "reasoning", "so\nit is"),
        ({"answer": "#### Step 1\nhalf\n#### 24"}, "reasoning", "#### Step 1\nhalf"),
        ({"answer": "by its shape\n#### a kite", "problem_type": "OCR"}, "answer", "a kite"),
        # not GSM8K's: there the answer is read as it is
        (
            {"answer": "so\n#### 72", "solution": "7", "data_type": "text", "problem_type": "OCR"},
            "answer",
            "7",
        ),
        ({"path": "x.mp4", "problem_type": "OCR"}, "answer", GSM8K["answer"]),
        (
            {"process": "half", "data_type": "text", "problem_type": "OCR"},
            "answer",
            GSM8K["answer"],
        ),
    ],
)
def test_what_is_read_as_gsm8k_and_what_is_not(tmp_path, change, field, value):
    (sample,) = load(tmp_path, GSM8K | change)
    assert getattr(sample, field) == value


def test_the_records_of_the_recipe(tmp_path):
    """Video and text in one file, as docs/recipes.md shows them."""
    recipe = (ROOT / "docs" / "recipes.md").read_text().split("### Text beside video")[1]
    (tmp_path / "r.json").write_text(re.search("```json\n(.*?)```", recipe, re.DOTALL)[1])
    samples = data.load_samples(tmp_path / "r.json")
    assert [s.data_type for s in samples] == ["video", "text", "text"]
    assert [s.answer for s in samples] == ["B", "84", "12"]
    assert [s.reasoning for s in samples] == ["", "", "3*4 = 12"]


@pytest.mark.parametrize(
    "record, message",
    [
        (GSM8K | {"answer": "72 clips"}, "no medium .*, and no data_type: text; it has 'question'"),
        (GSM8K | {"answer": "so 72\n####"}, "'so 72.*' of a numerical question is not a number"),
        (GSM8K | {"answer": "so\n#### 72 clips"}, "the answer '72 clips' of a numerical question"),
        (GSM8K | {"data_type": "video"}, "no medium"),
        (GSM8K | {"question": " "}, "no question"),
        (
            {"problem": "6 / 2?", "solution": "So it is 3.", "data_type": "text"},
            "multiple choice without options",
        ),
        (
            GSM8K
            | {"answer": None, "solution": r"So $\boxed{72}$.", "data_type": "text"}
            | {"problem_type": "numerical"},
            "'So .*' of a numerical question is not a number",
        ),
    ],
)
def test_a_text_that_cannot_be_used_is_named(tmp_path, record, message):
    with pytest.raises(DataError, match=f"r.json, record 1: .*{message}"):
        load(tmp_path, GSM8K, record)


@pytest.mark.parametrize("field", ["path", "video", "videos", "image", "images"])
def test_a_text_with_a_medium_is_refused(tmp_path, field):
    """Which of the two is wrong, its author knows."""
    record = RECORD | {"path": None, "data_type": "text"}
    with pytest.raises(
        DataError,
        match=rf"record 0 \(id 3\): data type text with '{field}' 'x.png', expected no medium",
    ):
        load(tmp_path, record | {field: "x.png"})


def test_errors_after_loading_name_the_record_as_those_before(tmp_path, builder):
    """By its position in the file and its id; a Sample made by hand by its id."""
    records = [RECORD | {"problem_id": 3}, RECORD | {"problem_id": 1}]
    first, second = load(tmp_path, *records)
    for sample, name in (
        (first, f"{tmp_path}/r.json, record 0 (id 3)"),
        (second, f"{tmp_path}/r.json, record 1"),
        (replace(first, where=""), "record 3"),
    ):
        with pytest.raises(DataError, match=f"^{re.escape(f'{name}: {tmp_path}/v/x.mp4')}"):
            builder(sample)
        with pytest.raises(DataError, match=f"^{re.escape(name)}: no reasoning"):
            builder.target(sample)
        with pytest.raises(DataError, match=f"^{re.escape(name)}: its question"):
            builder.build(replace(sample, question="<|im_end|>"), [])
    (line,) = load(tmp_path, RECORD | {"problem_id": 1}, name="r.jsonl")
    assert line.name == f"{tmp_path}/r.jsonl, line 1 (id 1)" and line == replace(line, where="")


@pytest.mark.parametrize("name", [float("nan"), float("inf")])
def test_an_id_that_is_no_number_is_refused(tmp_path, name):
    with pytest.raises(
        DataError, match=rf"record 0 \(id {name}\): expected text or a number as its id"
    ):
        load(tmp_path, RECORD | {"problem_id": name})


def test_solution_is_read_before_answer(tmp_path):
    assert load(tmp_path, RECORD | {"solution": "A", "answer": "left"})[0].answer == "A"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"solution": None}, "no 'solution'"),
        ({"solution": "<answer></answer>"}, "empty solution"),
        ({"problem_type": "essay"}, "unknown problem type 'essay'"),
        ({"solution": "<answer>C</answer>"}, "'C' is not exactly one of the options"),
        ({"options": []}, "without options"),
        ({"problem": None}, "no question"),
        ({"path": ""}, "no medium"),
        ({"data_type": "audio"}, "data type 'audio'"),
        ({"options": "A. x"}, "expected a list of strings"),
        ({"fps": "abc"}, "'fps' is 'abc'"),
        ({"fps": -1}, "'fps' is -1"),
        (
            {"problem_type": "numerical", "solution": "five"},
            "'five' of a numerical question is not a number",
        ),
        ({"problem": "\ud800"}, "not valid Unicode"),
        ({"problem_id": "3\ud800"}, "not valid Unicode"),
        ({"data_source": "\udfff"}, "not valid Unicode"),
        ({"options": ["\ud800", "y"]}, "not valid Unicode"),
        ({"path": "\ud800.mp4"}, "not valid Unicode"),
        ({"solution": "\ud800", "problem_type": "OCR"}, "not valid Unicode"),
        ({"process": "\ud800"}, "not valid Unicode"),
        ({"problem_type": "\ud800"}, "unknown problem type"),
        ({"problem_type": 3}, "unknown problem type 3"),
        ({"problem_type": False}, "unknown problem type False"),
        ({"problem_type": ["OCR"]}, "unknown problem type .'OCR'.,"),
        ({"problem_type": {}}, "unknown problem type {}"),
        ({"problem": 7}, "'problem' is 7, expected text"),
        ({"path": ["x.mp4", "y.mp4"]}, "'path' is .'x.mp4', 'y.mp4'., expected text"),
        ({"data_type": ["video"]}, "'data_type' is .'video'., expected text"),
        ({"data_source": 5}, "'data_source' is 5, expected text"),
        ({"solution": ["A"]}, "'solution' is .'A'., expected text or a number"),
        ({"solution": True}, "'solution' is True"),
        (
            {"problem": " "},
            "no question .* it has 'problem_id', .* expected a list of objects with problem, ",
        ),
        ({"fps": 0}, "'fps' is 0"),
        ({"fps": True}, "'fps' is True"),
        ({"fps": 10**400}, r"'fps' is 1000\d*\.\.\.0*, expected a number from 1e-06 to 1e\+06"),
        ({"fps": float("nan")}, "'fps' is nan"),
        ({"fps": "inf"}, "'fps' is 'inf'"),
        ({"start": 0, "end": 10**400}, "'end' is 1000"),
        ({"start": 0, "end": float("inf")}, "'end' is inf"),
        ({"start": -1, "end": 5}, "'start' is -1"),
        ({"start": "00:05", "end": "00:09"}, "'start' is '00:05'"),
        ({"start": [1], "end": 5}, "'start' is .1."),
        ({"start": 5.0}, "only one of 'start' .5.0. and 'end' .None."),
        ({"end": 5}, "only one of 'start' .None. and 'end' .5.0."),
        ({"start": "7", "end": 5}, "a segment from 7 to 5 seconds"),
        ({"process": ["it is x"]}, "'process' is .'it is x'., expected text"),
        ({"process": 5}, "'process' is 5"),
        (
            {"process": "<think>left</think><answer>A</answer>"},
            "the reasoning answers 'A', the solution is 'B'",
        ),
        ({"process": "<answer>B</answer> as it turns"}, "a tag within the reasoning"),
        ({"process": "it turns</answer>"}, "the reasoning answers None"),
        ({"solution": "<answer>so", "problem_type": "OCR"}, "a tag within"),
        ({"options": {}}, "'options' is {}, expected a list"),
        ({"options": ["A. x", ""]}, "none of them empty"),
        ({"options": [str(i) for i in range(27)]}, "27 options, expected at most 26"),
        ({"options": ["A. x", "A. y"]}, "expected the letters A, B, C"),
        ({"options": ["A.x", "A.y"]}, "expected the letters"),
        ({"options": ["B. x", "A. y"]}, "expected the letters"),
        ({"options": ["A. x", "y"]}, "expected the letters"),
        ({"options": ["x", "(b) y"]}, "expected the letters"),
        ({"options": ["B. x", "C. y"]}, "expected the letters"),
        ({"options": ["A. x", "B. y", "D. z"]}, "expected the letters"),
        ({"options": ["**B.** x", "**A.** y"]}, "expected the letters"),
        ({"options": ["Ｂ．x", "Ａ．y"]}, "expected the letters"),
        ({"options": ["A - x", "y"]}, "expected the letters"),
        ({"options": ["Option A: x", "Option C: y"]}, "expected the letters"),
        ({"options": ["**A** x", "y"]}, "expected the letters"),
        ({"options": None, "problem": "A. x\nB. y"}, "no question beside the options"),
        ({"options": None, "problem": "Why?\nA. x\nA. y\nB. z"}, "without options"),
        ({"options": None, "problem": "Why?\nB. y"}, "without options"),
        ({"problem_id": [3]}, "expected text or a number as its id"),
        (
            {"solution": float("nan"), "problem_type": "free-form"},
            "'solution' is nan, expected text or a number",
        ),
        ({"solution": float("-inf"), "problem_type": "OCR"}, "'solution' is -inf"),
        (
            {"process": "So. <think>a</think> It is B."},
            "a tag within the reasoning 'So. <think>a.*It is B.'",
        ),
        ({"process": "</think>a<think>"}, "a tag within the reasoning"),
        (
            {"process": "<think>a<think>b</think>"},
            "a tag within .* expected one <think>...</think> around all of the reasoning",
        ),
        ({"process": "<think>a</think><think>b</think>"}, "a tag within"),
        ({"process": "<think>a"}, "a tag within"),
        ({"process": "<think>a</think> so <answer>B</answer>"}, "a tag within"),
        (
            {"path": None, "video": "x.mp4", "image": "x.jpg"},
            "several media, 'video' 'x.mp4', 'image' 'x.jpg', expected one",
        ),
        ({"image": "x.jpg"}, "several media, 'path' './v/x.mp4', 'image' 'x.jpg', expected one"),
        ({"path": None, "video": "x.mp4", "videos": "y.mp4"}, "several media"),
    ],
)
def test_a_bad_record_is_named(tmp_path, change, message):
    with pytest.raises(DataError, match=rf"r.json, record 1 .id \W*3.*{message}"):
        load(tmp_path, RECORD, RECORD | change)
    skipped = {}
    assert len(load(tmp_path, RECORD, RECORD | change, skipped=skipped)) == 1 and len(skipped) == 1


def test_a_list_of_one_medium_is_that_medium(tmp_path):
    (named,) = load(tmp_path, RECORD | {"path": None, "videos": ["v/x.mp4"]})
    assert named.path.endswith("v/x.mp4") and named.data_type == "video"
    for field in ("image", "images"):
        (named,) = load(tmp_path, RECORD | {"path": None, "data_type": None, field: ["v/x.jpg"]})
        assert named.path.endswith("v/x.jpg") and named.data_type == "image"
    with pytest.raises(DataError, match="several media, 'videos' .*, 'images' "):
        load(tmp_path, RECORD | {"path": None, "videos": ["x.mp4"], "images": ["x.jpg"]})
    with pytest.raises(DataError, match="'videos' is .*, expected text"):
        load(tmp_path, RECORD | {"path": None, "videos": ["x.mp4", "y.mp4"]})


@pytest.mark.parametrize(
    "change, field, value",
    [
        ({"start": "5.0", "end": "10"}, "segment", (5.0, 10.0)),
        ({"start": None, "end": ""}, "segment", None),
        ({"fps": "2.5"}, "fps", 2.5),
        ({"fps": None}, "fps", 3.0),
        ({"path": None, "image": "x.jpg", "data_type": None}, "data_type", "image"),
        ({"path": None, "video": "x.mp4", "data_type": None}, "data_type", "video"),
        ({"problem_type": "Multiple-Choice"}, "problem_type", "multiple choice"),
        ({"problem_type": None}, "problem_type", "multiple choice"),
        ({"problem_type": "Free-Form", "options": []}, "problem_type", "free-form"),
        ({"problem_type": "numerical", "options": None, "solution": 0}, "answer", "0"),
        ({"problem_id": None}, "id", "0"),
        ({"data_source": ""}, "source", "r"),
        ({"process": "it turns"}, "reasoning", "it turns"),
        (
            {"process": "<think>it turns</think>\n<answer>B. right</answer>\n"},
            "reasoning",
            "it turns",
        ),
        ({"options": ["J. Smith", "K. Brown"]}, "options", ["A. J. Smith", "B. K. Brown"]),
        ({"options": ["A.M.", "P.M."]}, "options", ["A. A.M.", "B. P.M."]),
        ({"options": ["a.m.", "p.m."]}, "options", ["A. a.m.", "B. p.m."]),
        ({"options": ["A man", "B-roll"]}, "options", ["A. A man", "B. B-roll"]),
        ({"options": ["A.x", "B.y"]}, "options", ["A.x", "B.y"]),
        ({"options": [" (A) x", "(B) y"]}, "options", ["(A) x", "(B) y"]),
        ({"options": ["A: x", "B: y"]}, "options", ["A: x", "B: y"]),
        (
            {"options": ["A. ", "B. "]},
            "options",
            ["A. ", "B. "],
        ),  # letters that the frames show, as in VideoMMMU
        ({"options": ["B movie", "A man"]}, "options", ["A. B movie", "B. A man"]),
        ({"options": ["A", "B"]}, "options", ["A. A", "B. B"]),
        ({"options": ["A*x", "B*x"]}, "options", ["A. A*x", "B. B*x"]),
        ({"options": ["$A$", "$B$"]}, "options", ["A. $A$", "B. $B$"]),
        ({"process": "\n<think>\nit turns\n</think>\n"}, "reasoning", "it turns"),
        (
            {"path": None, "video": "x.jpg", "image": "x.jpg", "data_type": "image"},
            "data_type",
            "image",
        ),
        ({"video": 1}, "source", "set"),
        ({"video": "1.webm"}, "source", "set"),  # MVBench's records name their source's file too
        (
            {"options": [str(i) for i in range(26)]},
            "options",
            [f"{chr(65 + i)}. {i}" for i in range(26)],
        ),
        (
            {"category": "\ud800", "domain": 3, "duration": "short"},
            "about",
            {"data_source": "set", "duration": "short"},
        ),
    ],
)
def test_a_field_is_read_rightly(tmp_path, change, field, value):
    (sample,) = load(tmp_path, RECORD | change)
    assert getattr(sample, field) == value


@pytest.mark.parametrize(
    "style",
    [
        *(
            "{}. {}",
            "({}) {}",
            "[{}] {}",
            "{{{}}} {}",
            "{} - {}",
            "{} – {}",
            "{}、{}",
            "{}： {}",
            "【{}】{}",
            "{} {}",
        ),
        *(
            "**{}.** {}",
            "**{}**. {}",
            "**{}** {}",
            "**{}. {}**",
            "- **{}. {}**",
            "**({})** {}",
            "__{}.__ {}",
        ),
        *("Option {}: {}", "option {} {}", "Choice ({}) {}", "Answer {}: {}", "- {}. {}"),
    ],
)
def test_letters_of_any_style_are_the_options_own(tmp_path, style):
    """Rewritten as "A. x"; with a second letter before them choice_letter would find two."""
    for letters in ("abc", "ABC", "ＡＢＣ"):
        options = [
            style.format(letter, text) for letter, text in zip(letters, ("left", "2² m", "B-roll"))
        ]
        (sample,) = load(tmp_path, RECORD | {"options": options})
        if options != sample.options:  # they stay where they are "A. x" or "(A) x"
            assert sample.options == ["A. left", "B. 2² m", "C. B-roll"]
        assert options != sample.options or style in ("{}. {}", "({}) {}")
        assert [
            rewards.accuracy_reward(f"<answer>{said}</answer>", sample)
            for said in ("B", "A. 2² m", "B. left")
        ] == [1, 0, 0]


@pytest.mark.parametrize("name", ["r.json", "r.jsonl"])
def test_a_list_and_json_lines_under_either_name(tmp_path, name):
    for text in (
        json.dumps([RECORD, RECORD], indent=1),
        json.dumps(RECORD) + "\r\n\n" + json.dumps(RECORD) + "\n",
    ):
        (tmp_path / name).write_text(text)
        assert [s.answer for s in data.load_samples(tmp_path / name)] == ["B", "B"]
    (tmp_path / name).write_text(json.dumps(RECORD))
    assert len(data.load_samples(tmp_path / name)) == 1


@pytest.mark.parametrize(
    "record", [{"messages": [{"role": "user"}]}, {"id": 1, "conversations": [], "video": "x.mp4"}]
)
def test_records_of_another_form_name_the_fields_that_are_wanted(tmp_path, record):
    expected = (
        "no question .*'(messages|conversations)'.* expected a list of objects with "
        "problem, options, problem_type, data_type, solution, path"
    )
    with pytest.raises(DataError, match=expected):
        load(tmp_path, record)


@pytest.mark.parametrize(
    "content, kind",
    [
        (b"PAR1\x15\x04", "a parquet file"),
        (gzip.compress(b"[]", mtime=0), "compressed by gzip"),
        ("[]".encode("utf-16"), "UTF-16 text"),
        ("[]".encode("utf-16-le"), "binary, or UTF-16 text"),
        ("[]".encode("utf-16-be"), "binary, or UTF-16 text"),
        ("[é]".encode("latin-1"), "not UTF-8 text"),
    ],
)
def test_a_file_that_is_no_json_is_called_by_its_name(tmp_path, content, kind):
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(
        DataError,
        match=f"r.json: is {kind}, expected JSON in UTF-8: a list of objects with problem, ",
    ):
        data.load_samples(tmp_path / "r.json")


def test_missing_media_are_counted_by_folder(tmp_path):
    """v lacks y and z, w lacks x, and two records name y: 4 of 5 lack their video."""
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "x.mp4").write_bytes(b"")
    paths = ["v/x.mp4", "v/y.mp4", "v/z.mp4", "w/x.mp4", "v/y.mp4"]
    samples = load(
        tmp_path, *(RECORD | {"path": path, "problem_id": i} for i, path in enumerate(paths))
    )
    message, most = data.missing_media(samples, tmp_path / "r.json", None)
    assert most and message == (
        f"{tmp_path}/r.json: the media of 4 of 5 records are missing: "
        f"3 in {tmp_path}/v, 1 in {tmp_path}/w; the first: record 1, {tmp_path}/v/y.mp4; "
        f"--media_root was not set, so paths start from {tmp_path}"
    )
    text = replace(samples[0], data_type="text", path="")
    assert data.missing_media([text] * 9 + samples, tmp_path / "r.json", None) == (message, most)
    assert data.missing_media([text], tmp_path / "r.json", None) == ("", False)
    message, most = data.missing_media(samples[:2], tmp_path / "r.json", tmp_path)
    assert (
        not most
        and "1 of 2 records" in message
        and message.endswith(f"--media_root was {tmp_path}")
    )
    (named,) = load(tmp_path, RECORD)
    assert (
        "the first: record 0 (id 3), "
        in data.missing_media([replace(named, path="y")], tmp_path / "r.json", None)[0]
    )
    assert data.missing_media(samples[:1], tmp_path / "r.json", None) == ("", False)


@needs_shared
def test_records_that_went_wrong(tmp_path):
    skipped = {}
    samples = {
        s.id: s
        for s in data.load_samples(SHARED / "cases" / "records_fields.json", skipped=skipped)
    }
    assert (
        samples["segment as text"].segment == (5.0, 10.0)
        and samples["an image by its key"].data_type == "image"
    )
    assert samples["answer inside process"].reasoning == "it is x"
    assert samples["options that are initials"].options == ["A. J. Smith", "B. K. Brown"]
    assert (
        "only one of 'start'" in skipped[1]
        and "'process' is ['it is x', 'so A']" in skipped[4]
        and len(skipped) == 2
    )
    assert [s.answer for s in data.load_samples(SHARED / "cases" / "records_nonlatin.json")] == [
        "猫在跳",
        "кошка прыгает",
        "+",
    ]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.json", "", "is empty"),
        ("a.json", '[{"problem": 1', "not JSON, or cut off"),
        ("a.jsonl", '\n{"pro', "line 2: not JSON"),
        ("a.json", "[" * 100000, "not JSON"),
        ("a.json", "{}", "expected a list"),
        ("a.json", "[]", "no usable record"),
        ("a.json", "[3]", "record 0: found 3, expected an object"),
        ("a.json", '{"problem": "?"}', "line 1: no medium"),
        ("a.json", '{"data": [\n{},\n{}\n]}', "holds one JSON dict, expected a list of objects"),
        ("a.json", '{\n"data": [', "line 1: not JSON.* expected a list of objects"),
        ("a.jsonl", "[]\n[]", r"line 1: found \[\], expected an object"),
        ("a.jsonl", "problem,solution", "line 1: not JSON"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=f"{name}.*{message}"):
        data.load_samples(tmp_path / name)
    with pytest.raises(DataError, match="nowhere.json: cannot be read"):
        data.load_samples(tmp_path / "nowhere.json")


@needs_shared
def test_all_real_benchmark_records_load():
    files = sorted((SHARED / "benchmarks").glob("*.json*"))
    samples = [s for f in files for s in data.load_samples(f)]
    assert len(samples) == 40 * len(files) and {s.data_type for s in samples} == {"video", "frame"}
    assert all(s.options for s in samples if s.problem_type == "multiple choice")


# ---- which frames, which size


def test_frame_indices():
    assert data.frame_indices(16, 2.0) == list(range(16))
    assert data.frame_indices(491, 22.29, max_frames=4) == [0, 163, 327, 490]
    assert (
        len(data.frame_indices(1000, 25.0)) == 16 and len(data.frame_indices(100, 25.0)) == 8
    )  # 4 s at 2 fps
    assert len(data.frame_indices(25, 25.0)) == 4  # 1 s: at least min_frames
    assert data.frame_indices(3, 30.0) == [0, 2] and data.frame_indices(5, 30.0, min_frames=16) == [
        0,
        1,
        3,
        4,
    ]  # what there is, even
    assert len(data.frame_indices(70, 10.0)) == 14
    with pytest.raises(ValueError, match="1 frames .* at least 2"):
        data.frame_indices(1, 30.0)


def test_smart_resize():
    def resize(h, w, lo=4 * 28 * 28, hi=128 * 28 * 28):
        return data.smart_resize(h, w, min_pixels=lo, max_pixels=hi)

    assert (
        resize(360, 640) == (224, 420) and resize(56, 56) == (56, 56) and resize(28, 28) == (56, 56)
    )
    assert resize(10, 300) == (28, 308) and resize(100, 100, hi=28 * 28) == (28, 28)
    with pytest.raises(ValueError, match="aspect ratio"):
        resize(10, 2001)


# ---- patches


def test_patches_of_an_image_equal_transformers_processor():
    """Its processor based on Pillow, which needs no torchvision: the same size, pixels, order."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (150, 211, 3), dtype=np.uint8))
    theirs = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 56 * 56, "longest_edge": 100 * 28 * 28}
    )(image, return_tensors="pt")
    frames = torch.from_numpy(resize(image, 56 * 56, 100 * 28 * 28).copy()).permute(2, 0, 1)[None]
    patches, grid = data.patchify(data.normalize(frames))
    assert [list(grid)] == theirs["image_grid_thw"].tolist()
    torch.testing.assert_close(patches, theirs["pixel_values"], atol=1e-5, rtol=0)


def test_patches_of_a_video_by_definition():
    """Row (t, block, patch in block) holds [channel, frame of the grid, y, x] of that patch."""
    frames = torch.arange(4 * 3 * 56 * 84, dtype=torch.float64).view(4, 3, 56, 84)
    patches, grid = data.patchify(frames)
    assert grid == (2, 4, 6)
    row = 0
    for t in range(2):
        for block_y in range(2):
            for block_x in range(3):
                for y in (2 * block_y, 2 * block_y + 1):
                    for x in (2 * block_x, 2 * block_x + 1):
                        patch = frames[
                            2 * t : 2 * t + 2, :, 14 * y : 14 * y + 14, 14 * x : 14 * x + 14
                        ]
                        assert torch.equal(patches[row].view(3, 2, 14, 14), patch.transpose(0, 1))
                        row += 1
    with pytest.raises(ValueError, match="3 frames"):
        data.patchify(frames[:3])


# ---- media


def media(tmp_path, data_type="image", name="x.png", **kw):
    return data.load_media(
        Sample("7", "?", [], "numerical", data_type, str(tmp_path / name), "1"), **kw
    )


def test_images_of_every_mode(tmp_path):
    """Transparency on white, palettes resolved, EXIF rotation applied."""
    clear = Image.new("RGBA", (56, 56), (255, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 28, 56))
    clear.save(tmp_path / "x.png")
    frames = media(tmp_path).frames
    assert (
        frames.shape == (1, 3, 56, 56)
        and frames[0, :, 5, 5].tolist() == [0, 0, 255]
        and frames[0, :, 5, 50].tolist() == [255] * 3
    )
    clear.convert("RGB").convert("P").save(tmp_path / "x.png")
    assert media(tmp_path).frames[0, 2, 5, 5] > 200
    Image.fromarray(np.full((56, 56), 257 * 40, np.uint16)).save(tmp_path / "x.png")
    assert media(tmp_path).frames.unique().tolist() == [40]
    Image.new("RGB", (56, 56), (9, 9, 9)).save(tmp_path / "x.png", transparency=(9, 9, 9))
    assert media(tmp_path).frames.unique().tolist() == [255]
    Image.new("L", (56, 56), 9).save(tmp_path / "x.png")
    assert media(tmp_path).frames.unique().tolist() == [9]
    image = Image.new("RGB", (112, 56))
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was held upright
    image.save(tmp_path / "x.jpg", exif=exif)
    found = media(tmp_path, name="x.jpg")
    assert (
        found.frames.shape == (1, 3, 112, 56)
        and found.grid == (1, 8, 4)
        and found.tokens == 8
        and found.seconds_per_grid == 0
    )


def test_a_video_keeps_its_time(tmp_path):
    """16 frames at 2 fps are 8 s: shown as 8 frames, a grid of 2 spans 2 s."""
    frames = np.zeros((16, 56, 56, 3), np.uint8)
    frames[:, :, :, 1] = np.arange(16)[:, None, None] * 15
    toy.write_y4m(tmp_path / "x.y4m", frames, fps=2)
    m = media(tmp_path, "video", "x.y4m", max_frames=8)
    assert m.frames.shape == (8, 3, 56, 56) and m.grid == (4, 4, 4) and m.seconds_per_grid == 2.0
    expected = [data.frame_indices(16, 2.0, max_frames=8)[i] * 15 for i in range(8)]
    assert (m.frames[:, 1, 5, 5].long() - torch.tensor(expected)).abs().max() <= 3  # YUV rounding
    assert torch.equal(m.frames_of(1, 2), m.frames[2:6])


def test_a_folder_of_frames(tmp_path):
    (tmp_path / "f").mkdir()
    for i in range(12):
        Image.new("RGB", (56, 56), (i * 10, 0, 0)).save(
            tmp_path / "f" / f"{i}.png"
        )  # 10.png after 9.png
    m = media(tmp_path, "frame", "f", max_frames=4)
    assert m.frames[:, 0, 0, 0].tolist() == [
        0,
        40,
        70,
        110,
    ] and m.seconds_per_grid == pytest.approx(2.0)  # 12 frames at 3 fps
    with pytest.raises(DataError, match="record 7: .*no such folder"):
        media(tmp_path, "frame", "g")


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\x00" * 40])
def test_broken_images_are_named(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(DataError, match="record 7: .*x.png: cannot be read as an image"):
        media(tmp_path)


# ---- prompts


def test_prompt_layout(world, builder):
    sample = next(s for s in data.load_samples(world / "train.json") if s.source == "motion")
    prompt = builder(sample)
    tokens = builder.tokenizer.convert_ids_to_tokens(prompt.ids)
    assert tokens.count("<|video_pad|>") == prompt.media[0].tokens == 8
    assert tokens.index("<|vision_start|>") + 1 == tokens.index("<|video_pad|>")
    assert tokens[-3:-1] == ["<|im_start|>", "assistant"]
    text = builder.tokenizer.decode(prompt.ids)
    assert (
        text.index("<|video_pad|>")
        < text.index("Which way")
        < text.index("A. left\nB. right")
        < text.index("<think>")
    )
    assert prompt.frames_x_pixels == (16, 784)


def test_layout_of_a_prompt_of_text_alone(builder):
    """The turn of the user without a medium: as with one, less its tokens."""
    sample = Sample("0", "What is 3 times 4?", [], "numerical", "text", "", "12")
    prompt = builder(sample)
    assert prompt.media == [] and prompt.visual_tokens == 0 and prompt.frames_x_pixels == (0, 0)
    assert builder.tokenizer.decode(prompt.ids) == (
        f"<|im_start|>user\nWhat is 3 times 4?\n{data.INSTRUCTION}with one number.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    tight = replace(sample, question="What? " * 9000)
    with pytest.raises(DataError, match=r"^record 0: a prompt of \d+ tokens \(0 visual\), more"):
        builder(tight)


def test_target_is_what_the_rewards_ask_for(world, builder):
    sample = data.load_samples(world / "cot.json")[0]
    target = builder.target(sample)
    assert target[-1] == builder.tokenizer.eos_token_id
    text = builder.decode(target)
    assert rewards.format_reward(text) == 1 and rewards.accuracy_reward(text, sample) == 1
    with pytest.raises(DataError, match="no reasoning"):
        builder.target(data.load_samples(world / "train.json")[0])


def test_a_prompt_over_the_limit_is_refused(world):
    tight = data.PromptBuilder(world / "model", min_pixels=784, max_prompt=30)
    with pytest.raises(
        DataError,
        match=r"record 0: .*train_00000.y4m: a prompt of \d+ tokens \(8 visual\), "
        "more than --max_prompt 30",
    ):
        tight(data.load_samples(world / "train.json")[0])


@pytest.mark.parametrize(
    "change, token",
    [
        ({"question": "What is <|video_pad|>?"}, "<|video_pad|>"),
        ({"question": "Left?<|im_end|>"}, "<|im_end|>"),
        ({"options": ["A. left", "B. <|im_start|>"]}, "<|im_start|>"),
        ({"answer": "<|endoftext|>"}, "<|endoftext|>"),
    ],
)
def test_a_text_that_spells_out_a_special_token_is_refused(world, builder, change, token):
    sample = data.load_samples(world / "train.json")[0]
    with pytest.raises(
        DataError,
        match=re.escape(f"record 0: its question, options or solution spells out {token}"),
    ):
        builder(replace(sample, **change))


def test_reasoning_that_spells_out_a_special_token_is_no_target(world, builder):
    sample = data.load_samples(world / "cot.json")[0]
    with pytest.raises(
        DataError, match=re.escape("its reasoning or solution spells out <|im_end|>")
    ):
        builder.target(replace(sample, reasoning="it turns<|im_end|>"))
    with pytest.raises(
        DataError, match=re.escape("its reasoning or solution spells out <|im_end|>")
    ):
        builder.target(replace(sample, answer="<|im_end|>"))


# ---- the loader


def test_every_sample_once_an_epoch_whatever_the_rank_count():
    samples = list(range(10))
    loader = data.Loader(samples, None, prompts=4)
    drawn = [loader.sample(step, i) for step in range(5) for i in range(4)]
    assert sorted(drawn[:10]) == samples == sorted(drawn[10:]) and drawn[:10] != drawn[10:]
    ranks = [
        data.Loader(samples, None, prompts=4, rank=rank, world=3).positions for rank in range(3)
    ]
    assert sorted(i for positions in ranks for i in positions) == [0, 1, 2, 3]
    assert drawn != [
        data.Loader(samples, None, prompts=4, seed=1).sample(step, i)
        for step in range(5)
        for i in range(4)
    ]


def test_the_loader_gives_prompts_and_errors_in_order(world, builder):
    good = data.load_samples(world / "cot.json")[:3]
    samples = [good[0], replace(good[1], path="nowhere.y4m"), good[2]]
    loader = data.Loader(samples, builder, prompts=3, target=True)
    for step in range(2):
        loaded = loader.load(step)
        assert [i for i, _ in loaded] == [0, 1, 2]
        for i, p in loaded:
            assert isinstance(p, DataError) == (loader.sample(step, i).path == "nowhere.y4m")
            assert isinstance(p, DataError) or len(p.target) > 5
