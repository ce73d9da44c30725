"""prepare.py: every set, from its fields as published to records that load and score."""

import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

import data
import eval as evaluation
import prepare
import rewards
from conftest import SHARED, needs_shared


@dataclass
class Published:
    """A file of a set with the fields as published, and what one of its records becomes."""

    out: str
    file: str
    record: dict
    medium: str  # where the archives of the set put it
    asked: str
    options: list
    answer: str  # the right one, as a response may give it
    about: dict
    kind: str = "multiple choice"


ABC = ["A. red", "B. green", "C. blue"]
VIDEO_R1 = dict(problem_id=7, problem="Which?", data_type="video", problem_type="multiple choice")
VIDEO_R1 |= dict(options=ABC, solution="<answer>B</answer>", path="./CLEVRER/v/1.mp4")
LONG = dict(problem_id=5, problem="Why?\nA. red\nB. green", data_type="video", reasoning="It is.")
LONG |= dict(problem_type="goal", videos="longvila_videos/a.webm", answer="<answer>B</answer>")
PUBLISHED = {
    "video_r1_260k": Published(
        "Video-R1-260k.json", "Video-R1-260k.json", VIDEO_R1 | {"data_source": "CLEVRER"},
        "CLEVRER/v/1.mp4", "Which?", ABC, "B", {"data_source": "CLEVRER"},
    ),
    "video_r1_cot_165k": Published(
        "Video-R1-COT-165k.json", "Video-R1-COT-165k.json",
        VIDEO_R1 | {"process": "<think>It is green.</think>"},
        "CLEVRER/v/1.mp4", "Which?", ABC, "B", {},
    ),
    "video_r1_eval": Published(
        "eval_mvbench.json", "eval_mvbench.json", VIDEO_R1 | {"path": "./Evaluation/MVBench/1.mp4"},
        "Evaluation/MVBench/1.mp4", "Which?", ABC, "B", {},
    ),
    "video_rts": Published(
        "cgbench_train.jsonl", "cgbench_selected_training_samples.jsonl",
        dict(problem="Which?\nA. red\nB. green\n", solution="<answer>B.</answer>", qid=9,
             video="/nas/abc.mp4", clue_intervals=[], duration=None, original_answer="green"),
        "cg_videos_720p/abc.mp4", "Which?", ABC[:2], "B", {},
    ),
    "longvideo_reason": Published(
        "longvideo_reason_train.json", "data/train-00000-of-00001.json", LONG,
        "longvila_videos/a.webm", "Why?", ABC[:2], "B", {"category": "goal"},
    ),
    "longvideo_reason_eval": Published(
        "longvideo_reason_eval.json", "data/test-00000-of-00001.json", LONG,
        "longvideo_eval_subset3/a.webm", "Why?", ABC[:2], "B", {"category": "goal"},
    ),
    "vsi_bench": Published(
        "vsi_bench.json", "test.jsonl",
        dict(id=0, dataset="scannet", scene_name="scene1", question_type="object_counting",
             question="How many chairs?", options=None, ground_truth="4"),
        "scannet/scene1.mp4", "How many chairs?", [], "4",
        {"original_question_type": "object_counting"}, "regression",
    ),
    "video_mmmu": Published(
        "video_mmmu.json", "Adaptation/test-00000-of-00001.json",
        dict(id="validation_Art_Theory_3", question="Which?", options=["red", "green", "blue"],
             answer="C", question_type="multiple-choice"),
        "Art/validation_Art_Theory_3.mp4", "Which?", ABC, "C", {"category": "Adaptation"},
    ),
    "mmvu": Published(
        "mmvu.json", "validation.json",
        dict(id="v_0", question="Which?", choices=dict(C="blue", A="red", B="green"), answer="C",
             question_type="multiple-choice",
             video="https://huggingface.co/datasets/yale-nlp/MMVU/resolve/main/videos/Art/0.mp4"),
        "videos/Art/0.mp4", "Which?", ABC, "C", {"category": "Art"},
    ),
    "mvbench": Published(
        "mvbench.json", "json/episodic_reasoning.json",
        dict(video="s04_clip_09", question="Why?", candidates=["red", "green", "blue"], fps=3,
             answer="blue", start=1.5, end=4.5, subtitle="", show_name="The Show"),
        "video/tvqa/frames_fps3_hq/s04_clip_09", "Why?", ABC, "C",
        {"task_type": "episodic_reasoning"},
    ),
    "temp_compass": Published(
        "temp_compass.json", "multi-choice/test-00000-of-00001.json",
        dict(video_id="109", dim="speed", question="How?\nA. red\nB. green\nC. blue",
             answer="B. green"),
        "videos/109.mp4", "How?", ABC, "B", {"category": "speed", "task_type": "multi-choice"},
    ),
    "video_mme": Published(
        "video_mme.json", "videomme/test-00000-of-00001.json",
        dict(video_id="001", videoID="fFjv93ACGo8", duration="short", domain="Knowledge",
             sub_category="History", question_id="001-1", question="Which?", options=ABC,
             answer="C", task_type="Counting"),
        "data/fFjv93ACGo8.mp4", "Which?", ABC, "C",
        dict(duration="short", domain="Knowledge", sub_category="History", task_type="Counting"),
    ),
    "video_holmes": Published(
        "video_holmes.json", "test_Video-Holmes.json",
        {"video ID": "a1", "Question ID": 2, "Question Type": "SR", "Question": "Who?",
         "Options": {"A": "red", "B": "green", "C": "blue"}, "Answer": "B", "Explanation": ""},
        "videos_cropped/a1.mp4", "Who?", ABC, "B", {"task_type": "SR"},
    ),
    "long_video_bench": Published(
        "long_video_bench.json", "lvb_val.json",
        dict(id="x_0", video_path="x.mp4", question="Which?", candidates=["red", "green", "blue"],
             correct_choice=1, duration_group=600, question_category="S2E", subtitle_path="x.json"),
        "videos/x.mp4", "Which?", ABC, "B", {"duration": "600", "category": "S2E"},
    ),
    "lvbench": Published(
        "lvbench.json", "video_info.meta.jsonl",
        dict(key="Cm73ma6Ibcs", type="cartoon", video_info={},
             qa=[dict(uid="0", question="Which?\n(A) red\n(B) green\n(C) blue", answer="C",
                      question_type=["event", "reasoning"], time_reference="00:15-00:19")]),
        "videos/Cm73ma6Ibcs.mp4", "Which?", ["(A) red", "(B) green", "(C) blue"], "C",
        {"category": "cartoon", "task_type": "event, reasoning"},
    ),
    "mlvu": Published(
        "mlvu.json", "MLVU/json/4_count.json",
        dict(video="count_1.mp4", duration=480.0, question="How many?", answer="green",
             candidates=["red", "green", "blue"], question_type="count"),
        "MLVU/video/4_count/count_1.mp4", "How many?", ABC, "B", {"task_type": "count"},
    ),
    "cg_bench": Published(
        "cg_bench.json", "cgbench.json",
        dict(video_uid="abc", qid=1, question="Which?", choices=["red", "green", "blue"],
             right_answer="B", answer="green", clue_intervals=[[1, 2]], domain="Life",
             sub_category="Food", duration=1200),
        "cg_videos_720p/abc.mp4", "Which?", ABC, "B", {"domain": "Life", "sub_category": "Food"},
    ),
    "charades_sta": Published(
        "charades_sta.json", "data/test-00000-of-00001.json",
        dict(video="3MSZA.mp4", caption="person turn a light on.", timestamp=[24.3, 30.4]),
        "Charades_v1_480/3MSZA.mp4", "When does this happen: person turn a light on?", [],
        "24.3 to 30.4", {}, "grounding",
    ),
    "charades_sta_train": Published(
        "charades_sta_train.json", "charades_sta_train.txt",
        "AO8RW 0.0 6.9##a person is putting a book on a shelf.",
        "Charades_v1_480/AO8RW.mp4",
        "When does this happen: a person is putting a book on a shelf?", [],
        "0 to 6.9", {}, "grounding",
    ),
    "gsm8k": Published(
        "gsm8k_test.jsonl", "main/test-00000-of-00001.jsonl",
        dict(question="3 nets hold 4 balls each. How many?", answer="3*4 = <<3*4=12>>12\n#### 12"),
        "", "3 nets hold 4 balls each. How many?", [], "12", {}, "numerical",
    ),
}  # fmt: skip
GROUNDING = {"charades_sta", "charades_sta_train"}
LOADED = [
    name for name in prepare.SETS if name not in GROUNDING or "grounding" in rewards.PROBLEM_TYPES
]


def write(folder, file, *records):
    """Writes records in the form of the file's suffix."""
    file = folder / file
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        arrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(list(records)), file)
    elif file.suffix == ".json":
        file.write_text(json.dumps(records))
    else:
        lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
        file.write_text("\n".join(lines) + "\n")


def medium(folder, path):
    """An empty file in the place of a medium."""
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).touch()


@pytest.fixture()
def run(tmp_path, capsys):
    """run(name) -> what `python prepare.py NAME FOLDER` prints. fails: it ends with an error."""

    def call(name, folder=tmp_path, fails=False):
        try:
            prepare.main([name, str(folder)])
        except SystemExit as e:
            assert fails, e
            return "".join(capsys.readouterr()) + str(e)
        assert not fails
        return "".join(capsys.readouterr())

    return call


def test_every_set_is_tested():
    assert PUBLISHED.keys() == prepare.SETS.keys()


@pytest.mark.parametrize("name", LOADED)
def test_a_set_as_published_becomes_records_whose_gold_answer_scores_1(tmp_path, run, name):
    p = PUBLISHED[name]
    write(tmp_path, p.file, p.record)
    if p.medium:
        medium(tmp_path, p.medium)
    printed = run(name)
    assert f"{tmp_path / p.out}: 1 records, 0 left out" in printed
    assert f"  1 {p.kind}\n" in printed and "do not fit" not in printed
    media = int(bool(p.medium))
    assert f"  {media} of {media} media are there\n" in printed and "missing" not in printed
    (sample,) = data.load_samples(tmp_path / p.out)
    assert (sample.question, sample.options, sample.problem_type) == (p.asked, p.options, p.kind)
    assert sample.path == (str(tmp_path / p.medium) if p.medium else "")
    assert sample.about == p.about
    assert rewards.accuracy_reward(f"<answer>{p.answer}</answer>", sample) == 1.0
    assert rewards.accuracy_reward("<answer>A</answer>", sample) == 0.0
    assert run(name) == printed  # again, beside the file that it wrote


def test_lines_of_text_end_at_newlines_only(tmp_path, run):
    file = tmp_path / "charades_sta_train.txt"
    file.write_bytes("\ufeffAO8RW 0.0 6.9##a person\x85 turns.\r\n\n".encode())
    run("charades_sta_train")
    (sample,) = data.load_samples(tmp_path / "charades_sta_train.json")
    assert sample.question == "When does this happen: a person\x85 turns?"
    file.write_bytes("AO8RW 0.0 6.9##in a café.\n".encode("latin-1"))
    assert "charades_sta_train.txt: not UTF-8" in run("charades_sta_train", fails=True)


@pytest.mark.parametrize("name", sorted(GROUNDING))
def test_grounding_is_answered_by_two_times(tmp_path, name):
    p = PUBLISHED[name]
    write(tmp_path, p.file, p.record)
    files = prepare.published(tmp_path, prepare.SETS[name].files[p.out][0])
    (record,), (where,), left_out, problems = prepare.convert(prepare.SETS[name], tmp_path, files)
    assert (left_out, problems) == (0, []) and str(tmp_path / p.file) in where
    assert (record["problem"], record["solution"]) == (p.asked, p.answer)
    assert (record["problem_type"], record["path"]) == ("grounding", p.medium)


def test_segments_and_folders_of_frames_of_mvbench(tmp_path, run):
    p = PUBLISHED["mvbench"]
    write(tmp_path, p.file, p.record)
    localized = dict(video="A.mp4", question="When?", candidates=["at the end", "at the start"])
    localized |= dict(answer="at the start", start=9.2, end=26.9, accurate_start=9.2)
    write(tmp_path, "json/action_localization.json", localized)
    run("mvbench")
    video, frames = data.load_samples(tmp_path / p.out)
    assert (video.data_type, video.segment, video.answer) == ("video", (9.2, 26.9), "B")
    assert (frames.data_type, frames.segment, frames.fps) == ("frame", (1.5, 4.5), 3.0)


def test_tasks_of_tempcompass(tmp_path, run):
    """Yes or no, and captions by their label; what takes a judge is left out, and counted."""
    one = PUBLISHED["temp_compass"].record
    matching = "Which caption matches the video better?\nCaption A: he runs.\nCaption B: he walks."
    write(tmp_path, "yes_no/test-0.json", one | {"question": "Is it fast?", "answer": "No"})
    captions = {"question": matching, "answer": "Caption B: he walks"}
    write(tmp_path, "caption_matching/test-0.json", one | captions)
    write(tmp_path, "captioning/test-0.json", one, one)
    assert "2 records, 2 left out (7,540 as published)" in run("temp_compass")
    match, yes_no = data.load_samples(tmp_path / "temp_compass.json")
    assert (yes_no.options, yes_no.answer) == (["A. yes", "B. no"], "B")
    assert match.question == "Which caption matches the video better?" and match.answer == "B"
    assert match.options == ["A. Caption A: he runs.", "B. Caption B: he walks."]


def test_kinds_of_video_mmmu_and_open_answers_of_mmvu(tmp_path, run):
    one = PUBLISHED["video_mmmu"].record | {"options": []}
    more = [one | {"answer": "12.97"}, one | {"answer": "the Baroque"}]
    write(tmp_path, "Perception/test-0.json", *more)
    printed = run("video_mmmu")
    assert "1 numerical, 1 free-form" in printed
    assert "1 media are missing:\n  1 from Art.zip, such as Art/" in printed  # of two questions
    one = PUBLISHED["mmvu"].record
    write(tmp_path, "validation.json", one, one | {"question_type": "open-ended"})
    assert "1 records, 1 left out" in run("mmvu")


def test_options_of_long_video_bench_in_fields_of_their_own(tmp_path, run):
    p = PUBLISHED["long_video_bench"]
    record = {key: value for key, value in p.record.items() if key != "candidates"}
    texts = dict(option0="red", option1="green", option2="blue", option3="N/A", option4="N/A")
    write(tmp_path, "validation-00000-of-00001.json", record | texts)
    run("long_video_bench")
    (sample,) = data.load_samples(tmp_path / p.out)
    assert (sample.options, sample.answer) == (ABC, "B")


# ---- media


def test_missing_media_are_counted_with_their_archives_and_commands(tmp_path, run):
    one = PUBLISHED["vsi_bench"].record
    scenes = [("scannet", "a"), ("scannet", "a"), ("scannet", "b"), ("arkitscenes", "c")]
    records = [one | dict(dataset=d, scene_name=s, id=i) for i, (d, s) in enumerate(scenes)]
    write(tmp_path, "test.jsonl", *records)
    medium(tmp_path, "scannet/b.mp4")
    printed = run("vsi_bench")
    assert "4 records" in printed and "1 of 3 media are there" in printed
    assert "2 media are missing:\n  1 from arkitscenes.zip, such as arkitscenes/c.mp4\n" in printed
    assert "  1 from scannet.zip, such as scannet/a.mp4\n" in printed and "scannetpp" not in printed
    command = "hf download nyu-visionx/VSI-Bench --repo-type dataset --local-dir "
    assert f"{command}{tmp_path} --include arkitscenes.zip --include scannet.zip\n" in printed
    assert f"(cd {tmp_path} && unzip -n -q 'scannet.zip')\n" in printed


def test_media_that_are_not_on_the_hub(tmp_path, run):
    one = PUBLISHED["mvbench"].record
    write(tmp_path, "json/fine_grained_pose.json", one | {"video": "S1.avi"})
    printed = run("mvbench")
    assert (
        "1 from elsewhere (see the note), such as video/nturgbd/S1.avi" in printed
        and "hf download" not in printed
    )
    assert "NTU RGB+D" in printed


def test_media_that_lie_in_another_folder_than_the_records_say(tmp_path, run):
    """MVBench's late archive has a folder of its own; Video-MMMU's may have none."""
    one = PUBLISHED["mvbench"].record
    write(tmp_path, "json/moving_count.json", one | {"video": "1.mp4"}, one | {"video": "2.mp4"})
    for path in (
        "video/clevrer/video_validation/1.mp4",
        "video/data0613/clevrer/video_validation/2.mp4",
    ):
        medium(tmp_path, path)
    assert "2 of 2 media are there" in run("mvbench")
    p = PUBLISHED["video_mmmu"]
    write(tmp_path, p.file, p.record)
    medium(tmp_path, p.medium.removeprefix("Art/"))
    assert "1 of 1 media are there" in run("video_mmmu")


def test_one_name_that_no_file_can_have_costs_one_medium(tmp_path, run):
    """A file system refuses to look for a name of 300 letters; the others are still found."""
    one = PUBLISHED["mvbench"].record
    names = "1.mp4", "n" * 300 + ".mp4"
    write(tmp_path, "json/moving_count.json", *(one | {"video": name} for name in names))
    medium(tmp_path, "video/clevrer/video_validation/1.mp4")
    medium(tmp_path, "video/data0613/clevrer/video_validation/2.mp4")
    assert "1 of 2 media are there" in run("mvbench")


def test_published_files_without_a_question_are_named(tmp_path, run):
    write(tmp_path, "validation.json", PUBLISHED["mmvu"].record | {"question_type": "open-ended"})
    problem = f"error: {tmp_path}/validation.json: no question to write, 1 records left out"
    assert problem in run("mmvu", fails=True)
    assert not (tmp_path / "mmvu.json").exists()


def test_a_part_of_a_set_whose_media_are_there(tmp_path, capsys):
    """From a file that is read as it is, with a record that cannot be read, and a name that no
    file can have."""
    one = PUBLISHED["video_r1_260k"].record
    paths = [f"./STAR/{'n' * 300}.mp4", "./CLEVRER/2.mp4", "./CLEVRER/3.mp4"]
    records = [one | {"path": path, "problem_id": i} for i, path in enumerate(paths)]
    write(tmp_path, "Video-R1-260k.json", records[0], one | {"solution": ""}, *records[1:])
    medium(tmp_path, "CLEVRER/2.mp4")
    medium(tmp_path, "CLEVRER/3.mp4")
    prepare.main(["video_r1_260k", str(tmp_path), "--present"])
    assert "Video-R1-260k_present.json: the 2 records whose media" in capsys.readouterr().out
    samples = data.load_samples(tmp_path / "Video-R1-260k_present.json")
    assert [sample.id for sample in samples] == ["1", "2"]


@pytest.mark.skipif(not shutil.which("unzip"), reason="needs unzip")
@pytest.mark.parametrize(
    "name, archive",
    [
        ("video_r1_260k", "CLEVRER/CLEVRER_part1.zip"),
        ("video_holmes", "videos.zip"),
        ("cg_bench", "video_chunk_1.zip video_chunk_2.zip video_chunk_10.zip"),
        ("longvideo_reason_eval", "longvideo_eval_subset3.tar.gz"),
        ("long_video_bench", "videos.tar.part.aa videos.tar.part.ab"),
    ],
)
def test_the_printed_commands_unpack_the_media_where_the_records_look(tmp_path, run, name, archive):
    """Several archives: parts of one."""
    p = PUBLISHED[name]
    folder = tmp_path / "a folder"
    write(folder, p.file, p.record)
    whole, parts = tmp_path / "whole", archive.split()
    inside = p.medium.removeprefix("CLEVRER/")
    if ".tar" in archive:
        medium(tmp_path, p.medium)
        with tarfile.open(whole, "w:gz" if archive.endswith("gz") else "w") as tar:
            tar.add(tmp_path / p.medium, inside)
    else:
        with zipfile.ZipFile(whole, "w") as zipped:
            zipped.writestr(inside, "")
    content = whole.read_bytes()
    for i, part in enumerate(parts):
        medium(folder, part)
        size = -(-len(content) // len(parts))
        (folder / part).write_bytes(content[i * size : (i + 1) * size])
    printed = run(name, folder)
    assert "0 of 1 media are there" in printed
    commands = [line for line in printed.splitlines() if line.startswith("  (cd ")]
    for command in commands:
        subprocess.run(["bash", "-c", command], check=True)
    assert "1 of 1 media are there" in run(name, folder)


# ---- what does not fit


def test_records_that_do_not_fit_are_named_and_kept(tmp_path, run):
    """So evaluation counts them as wrong answers."""
    one = PUBLISHED["vsi_bench"].record
    lost = {key: value for key, value in one.items() if key != "ground_truth"}
    write(tmp_path, "test.jsonl", one, lost, one | {"options": "A"}, one | {"ground_truth": "x"})
    printed = run("vsi_bench")
    file = tmp_path / "test.jsonl"
    assert "4 records" in printed and "3 do not fit:" in printed
    assert f"{file}, line 2: 'ground_truth' is not there, expected str | int | float\n" in printed
    assert f"{file}, line 3: 'options' is 'A', expected list | None\n" in printed
    assert (
        f"{file}, line 4: {tmp_path / 'vsi_bench.json'}, record 3 (id 0): the answer 'x'" in printed
    )
    skipped = {}
    assert len(data.load_samples(tmp_path / "vsi_bench.json", skipped=skipped)) == 1
    assert sorted(skipped) == [1, 2, 3]
    write(tmp_path, "test.jsonl", lost, lost)
    assert f"none of the 2 records fits; the first: {file}, line 1:" in run("vsi_bench", fails=True)


@pytest.mark.parametrize(
    "name, change, message",
    [
        (
            "mvbench",
            {"answer": "pink"},
            "the answer 'pink', expected one of 'red', 'green', 'blue'",
        ),
        ("video_mmmu", {"id": "dev_Sport_1"}, "found 'Sport', expected one of Art Art_Theory"),
        ("long_video_bench", {"correct_choice": 3}, "the answer 3, expected one of 'red'"),
        ("lvbench", {"qa": [{"uid": "0"}]}, "no field 'question_type'; it has key, type"),
        ("charades_sta", {"timestamp": [24.3]}, "not in the form as published"),
        ("mmvu", {"choices": ["red"]}, "'choices' is ['red'], expected dict"),
    ],
)
def test_what_is_wrong_with_a_record_is_said(tmp_path, name, change, message):
    p = PUBLISHED[name]
    write(tmp_path, p.file, p.record | change)
    files = prepare.published(tmp_path, prepare.SETS[name].files[p.out][0])
    (record,), _, _, (problem,) = prepare.convert(prepare.SETS[name], tmp_path, files)
    assert problem.startswith(str(tmp_path / p.file)) and message in problem
    assert record == {"not_converted": problem}


def test_a_folder_without_the_files_of_the_set(tmp_path, run):
    printed = run("video_mme", fails=True)
    expected = f"error: {tmp_path}: no records of video_mme, expected videomme/test-* with one of "
    assert f"{expected}the endings .json .jsonl .parquet .txt; to get them: hf download" in printed
    assert f"--local-dir {tmp_path} --include 'videomme/test-*'" in printed
    assert "they are at https://github.com/Ziyang412/Video-RTS" in run("video_rts", fails=True)
    assert "expected that of video_mme" in run("video_mme", tmp_path / "none", fails=True)
    assert "'imagenet' is not a set, expected one of the 20 that" in run("imagenet", fails=True)


def test_a_set_without_a_folder(capsys):
    with pytest.raises(SystemExit):
        prepare.main(["gsm8k"])
    expected = "error: gsm8k: expected FOLDER, which holds its files; to get them: hf download "
    assert capsys.readouterr().err.startswith(expected)


def test_the_list_names_every_set(capsys):
    prepare.main([])
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["NAME", "records", "download"]
    assert [line.split()[0] for line in lines] == [*prepare.SETS]
    assert "263,071" in lines[0] and "310 GB" in lines[0]


# ---- parquet


def test_parquet_reads_as_json_does(tmp_path, run):
    p = PUBLISHED["video_mme"]
    image = {"image": {"bytes": b"\x00\xff", "path": "x.png"}}  # which JSON cannot hold
    write(tmp_path, "videomme/test-00000-of-00001.parquet", p.record | image)
    run("video_mme")
    (sample,) = data.load_samples(tmp_path / p.out)
    assert (sample.question, sample.options, sample.answer) == (p.asked, p.options, p.answer)
    write(tmp_path, "main/test-00000-of-00001.parquet", PUBLISHED["gsm8k"].record | image)
    run("gsm8k")
    assert json.loads((tmp_path / "gsm8k_test.jsonl").read_text()) == PUBLISHED["gsm8k"].record
    (tmp_path / "main/test-00000-of-00001.parquet").write_bytes(b"PAR1")
    assert "test-00000-of-00001.parquet: cannot be read" in run("gsm8k", fails=True)


def test_parquet_without_pyarrow(tmp_path, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # what an import finds if it is not installed
    medium(tmp_path, "main/test-00000-of-00001.parquet")
    printed = run("gsm8k", fails=True)
    assert "is a parquet file, which takes pyarrow to read: pip install pyarrow" in printed


# ---- the whole way


def test_a_benchmark_as_published_is_evaluated(world, tmp_path, run, capsys):
    """A record that does not fit counts as a wrong answer, of one less that is asked."""
    clips = [s.path for s in data.load_samples(world / "test.json") if s.data_type == "video"]
    clips = [Path(path) for path in sorted(set(clips))[:2]]
    one = PUBLISHED["video_mme"].record
    records = [
        one | {"videoID": clip.stem, "question_id": f"00{i}-1"} for i, clip in enumerate(clips)
    ]
    write(tmp_path, "videomme/test-00000-of-00001.json", *records, one | {"answer": None})
    (tmp_path / "data").mkdir()
    for clip in clips:
        shutil.copy(clip, tmp_path / "data" / f"{clip.stem}.mp4")
    assert "2 of 2 media are there" in run("video_mme")
    where = ["--model", world / "model", "--data", tmp_path / "video_mme.json"]
    small = ["--out", tmp_path / "out", "--frames", 4, "--min_pixels", 784, "--max_new", 4]
    evaluation.main([str(word) for word in where + small])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    (greedy,) = summary["methods"]
    assert (greedy["questions"], greedy["unreadable"]) == (3, 1)
    assert "not_converted" in capsys.readouterr().out


@needs_shared
@pytest.mark.parametrize(
    "name, media", [("video_r1_eval", "Evaluation"), ("video_rts", "cg_videos_720p")]
)
def test_the_real_files(tmp_path, run, name, media):
    folder = SHARED / "benchmarks"
    files = (
        folder.glob("eval_*.json") if name == "video_r1_eval" else [folder / "cgbench_train.jsonl"]
    )
    for file in files:
        target = file.name if name == "video_r1_eval" else PUBLISHED[name].file
        shutil.copy(file, tmp_path / target)
    printed = run(name)
    assert "do not fit" not in printed and f"such as {media}" in printed
