"""Data sets and benchmarks, from the files as published to the records that train.py and eval.py
read (data.py; the recipes of docs/).

    python prepare.py                  lists the sets (SETS): records, size, what each is, where
    python prepare.py NAME FOLDER      FOLDER holds the files of NAME as `hf download` leaves them
    python prepare.py NAME FOLDER --present     also writes the records whose media are there

It writes records beside these files, with paths that start in FOLDER, and reads them back. It
counts the media that are not there yet, and prints the commands that download and unpack them. It
downloads nothing itself. A set whose files can be read as they are is only checked. Run it again
once the media are there.

A record that does not fit is named, with the field found and expected, and kept in the file: then
train.py skips it, and eval.py counts it as a wrong answer. Questions that take a judge (open
answers, captions) are left out, and counted.

To add a set: a function from one record as published to ours, and a row of SETS.
"""

import argparse
import glob
import json
import os
import shlex
import string
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from reprlib import repr as short_repr

import data
import rewards
from infra.errors import DataError
from infra.files import write_whole
from infra.flags import Parser
from infra.records import read_parquet, read_records

# ---- a record as published -> our records
# Each function yields the records of one that is published, or none where it leaves it out.
# file: where the record is from, relative to FOLDER.


def question(name, asked, answer, path, options=(), kind="multiple choice", **more):
    """A record. name: its id. more: other fields, such as those that evaluation counts by."""
    return {
        "problem_id": name,
        "problem": asked,
        "problem_type": kind,
        "options": list(options),
        "solution": str(answer),
        "path": path,
        **more,
    }


def with_letters(texts):
    """Options with the letters A, B, C ... in order. Those that have them stay as they are."""
    starts = [f"{string.ascii_uppercase[i]}." for i in range(len(texts))]
    if all(text.startswith(start) for start, text in zip(starts, texts)):
        return texts
    return [f"{start} {text}" for start, text in zip(starts, texts)]


def from_dict(options):
    """{"A": "left", "B": "right"} -> ["A. left", "B. right"]"""
    return [f"{c}. {text}" for c, text in sorted(options.items()) if text is not None]


def letter(answer, texts):
    """The letter of the option whose text, or position from 0, is the answer. Raises DataError."""
    position = texts.index(answer) if answer in texts else answer
    if type(position) is not int or not 0 <= position < len(texts):
        expected = ", ".join(map(short_repr, texts))
        raise DataError(f"the answer {short_repr(answer)}, expected one of {expected}")
    return string.ascii_uppercase[position]


def folder_of(name, folders):
    """The key of {folder: names} whose names have this one. Raises DataError."""
    for folder, names in folders.items():
        if name in names.split():
            return folder
    raise DataError(f"found {name!r}, expected one of {' '.join(folders.values())}")


def as_published(record, file):
    """Records that are ours already, from parquet."""
    yield record


def video_rts(record, file):
    """CG-Bench questions with the paths of the authors' disk."""
    name = PurePosixPath(record["video"]).name
    yield record | {"video": f"cg_videos_720p/{name}"}


def longvideo_reason(record, file):
    """The type of a question is what it asks for: temporal, goal, plot, spatial."""
    if data.problem_type(record) is None:
        kind = "free-form" if "openended" in file else "multiple choice"
        record = record | {"problem_type": kind, "category": record["problem_type"]}
    yield record


VSI_NUMBERS = "object_counting object_abs_distance object_size_estimation room_size_estimation"


def vsi_bench(record, file):
    """Four of its tasks are answered by a number."""
    task, path = record["question_type"], f"{record['dataset']}/{record['scene_name']}.mp4"
    kind = "regression" if task in VSI_NUMBERS.split() else "multiple choice"
    asked, options = record["question"], record["options"] or []
    more = {"original_question_type": task}
    yield question(record.get("id"), asked, record["ground_truth"], path, options, kind, **more)


VIDEO_MMMU = {  # subjects by their archive
    "Art": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics "
    "Energy_and_Power Materials Mechanical_Engineering",
    "Humanities": "History Literature Sociology Psychology",
    "Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine "
    "Pharmacy Public_Health",
    "Science": "Biology Chemistry Geography Math Physics",
}


def video_mmmu(record, file):
    """id: SPLIT_SUBJECT_NUMBER. A folder of parquet for each track, such as Perception."""
    name, answer, options = record["id"], record["answer"], record["options"] or []
    folder = folder_of("_".join(name.split("_")[1:-1]), VIDEO_MMMU)
    kind = "multiple choice" if options else "numerical"
    if not options and rewards.parse_number(answer) is None:
        kind = "free-form"
    track = PurePosixPath(file).parts[0]
    asked, path = record["question"], f"{folder}/{name}.mp4"
    options = with_letters(options)
    yield question(f"{track} {name}", asked, answer, path, options, kind, category=track)


def mmvu(record, file):
    """The papers report the multiple choice; open answers take a judge."""
    if record["question_type"] != "multiple-choice":
        return
    url = record.get("video_path") or record["video"]
    path = url.rpartition("/resolve/main/")[2]
    options, subject = from_dict(record["choices"]), PurePosixPath(path).parent.name
    name, asked = record.get("id"), record["question"]
    yield question(name, asked, record["answer"], path, options, category=subject)


MVBENCH = {  # tasks by the folder of their videos
    "star/Charades_v1_480": "action_sequence action_prediction object_interaction",
    "ssv2_video": "action_antonym",
    "Moments_in_Time_Raw/videos": "fine_grained_action",
    "FunQA_test/test": "unexpected_action",
    "clevrer/video_validation": "object_existence moving_direction moving_count moving_attribute "
    "counterfactual_inference",
    "perception/videos": "object_shuffle action_count state_change character_order",
    "sta/sta_video": "action_localization",
    "scene_qa/video": "scene_transition",
    "nturgbd": "fine_grained_pose",
    "vlnqa": "egocentric_navigation",
    "tvqa/frames_fps3_hq": "episodic_reasoning",  # folders of frames, 3 a second
}


def mvbench(record, file):
    """A file for each task. Where a question is about a segment, the record has start and end."""
    task, texts = PurePosixPath(file).stem, record["candidates"]
    path = f"video/{folder_of(task, MVBENCH)}/{record['video']}"
    more = {key: record[key] for key in ("start", "end", "fps") if key in record}
    more |= {"data_type": "frame" if task == "episodic_reasoning" else "video", "task_type": task}
    answer, options = letter(record["answer"], texts), with_letters(texts)
    yield question(None, record["question"], answer, path, options, **more)


def temp_compass(record, file):
    """A folder for each task. Captions take a judge."""
    task, asked, answer = PurePosixPath(file).parts[0], record["question"], record["answer"]
    options = []  # multi-choice: they are lines of the question
    if task == "captioning":
        return
    if task == "yes_no":
        options, answer = ["A. yes", "B. no"], letter(answer.lower().rstrip("."), ["yes", "no"])
    if task == "caption_matching":  # "Option 1: a man runs", or "Caption A: ..."
        asked, *texts = asked.split("\n")
        answer = letter(answer.split(":")[0], [text.split(":")[0] for text in texts])
        options = with_letters(texts)
    path, more = f"videos/{record['video_id']}.mp4", {"category": record["dim"], "task_type": task}
    yield question(None, asked, answer, path, options, **more)


def video_mme(record, file):
    """The options have their letters."""
    path = f"data/{record['videoID']}.mp4"
    more = {key: record[key] for key in ("duration", "domain", "sub_category", "task_type")}
    name, asked = record["question_id"], record["question"]
    yield question(name, asked, record["answer"], path, record["options"], **more)


def video_holmes(record, file):
    """The fields are capitalised; one name has a space."""
    name, path = record["Question ID"], f"videos_cropped/{record['video ID']}.mp4"
    asked, answer = record["Question"], record["Answer"]
    more = {"task_type": record["Question Type"]}
    yield question(name, asked, answer, path, from_dict(record["Options"]), **more)


def long_video_bench(record, file):
    """lvb_val.json has candidates, the parquet file option0 to option4 instead. No subtitles."""
    texts = record.get("candidates") or [record[f"option{i}"] for i in range(5)]
    texts = [text for text in texts if text != "N/A"]
    answer, path = letter(record["correct_choice"], texts), f"videos/{record['video_path']}"
    more = {"duration": str(record["duration_group"]), "category": record["question_category"]}
    yield question(record["id"], record["question"], answer, path, with_letters(texts), **more)


def lv_bench(record, file):
    """A line for each video, with all its questions. Their options are lines of the question."""
    for asked in record["qa"]:
        more = {"category": record["type"], "task_type": ", ".join(asked["question_type"])}
        path = f"videos/{record['key']}.mp4"
        yield question(asked["uid"], asked["question"], asked["answer"], path, **more)


def mlvu(record, file):
    """A file for each task, and a folder of videos of the same name. Two tasks take a judge."""
    texts, task = record.get("candidates"), PurePosixPath(file).stem
    if not texts:
        return
    path = f"MLVU/video/{task}/{record['video']}"
    answer, more = letter(record["answer"], texts), {"task_type": record["question_type"]}
    yield question(None, record["question"], answer, path, with_letters(texts), **more)


def cg_bench(record, file):
    """right_answer is a letter, answer the option's text."""
    path = f"cg_videos_720p/{record['video_uid']}.mp4"
    more = {key: record[key] for key in ("domain", "sub_category")}
    asked, options = record["question"], with_letters(record["choices"])
    yield question(record["qid"], asked, record["right_answer"], path, options, **more)


def charades_sta(record, file):
    """timestamp: start and end of what the caption says, in seconds."""
    start, end = map(float, record["timestamp"])
    asked = f"When does this happen: {record['caption'].strip().rstrip('.')}?"
    path = f"Charades_v1_480/{record['video']}"
    yield question(None, asked, f"{start:.10g} to {end:.10g}", path, kind="grounding")


def charades_sta_train(record, file):
    """A line: "3MSZA 24.3 30.4##person turns a light on." """
    where, _, caption = record["line"].partition("##")
    name, *times = where.split()
    yield from charades_sta({"video": f"{name}.mp4", "caption": caption, "timestamp": times}, file)


# ---- the sets


@dataclass(frozen=True)
class DataSet:
    """A data set or benchmark as published. What is not known for sure is left empty."""

    about: str  # what it is, and its paper
    hub: str  # where its records are: a data set of the hub, or another place
    # file that is written -> (files as published, how many records they have). The files are
    # patterns without .parquet, .json, .jsonl or .txt; after | what to read if there are none
    files: dict[str, tuple[str, int | None]]
    convert: Callable | None = None  # None: the files are read as they are
    fields: dict = field(default_factory=dict)  # field of a record as published -> its type
    # first part of a medium's path -> files of the hub that hold it, where {0} and {1} are its
    # first folders and {parent} is all of them; "" for media that the note tells about
    archives: dict[str, str] = field(default_factory=dict)
    media_hub: str = ""  # of the archives, if it is not the records'
    elsewhere: dict[str, str] = field(default_factory=dict)  # path -> where else media may lie
    joined: bool = False  # the archives are the parts of one
    size: str = ""  # of records and media, to download
    note: str = ""


NTU = (
    "fine_grained_pose needs the videos of NTU RGB+D that video/MVBench_videos_ntu.txt lists, from "
    "https://rose1.ntu.edu.sg/dataset/actionRecognition, in video/nturgbd"
)
SETS = {
    "video_r1_260k": DataSet(
        "Video-R1 (2503.21776), RL: 116,248 videos, 146,823 images",
        "Video-R1/Video-R1-data",
        {"Video-R1-260k.json": ("Video-R1-260k", 263_071)},
        archives={"": "{0}/*.zip"},
        size="310 GB",
    ),
    "video_r1_cot_165k": DataSet(
        "Video-R1 (2503.21776), cold start, on media of video_r1_260k",
        "Video-R1/Video-R1-data",
        {"Video-R1-COT-165k.json": ("Video-R1-COT-165k", 165_575)},
        archives={"": "{0}/*.zip"},
        size="310 GB",
    ),
    "video_r1_eval": DataSet(
        "Video-R1 (2503.21776), evaluation: six benchmarks",
        "Video-R1/Video-R1-eval",
        {
            "eval_mvbench.json": ("eval_mvbench", 4_000),
            "eval_mmvu.json": ("eval_mmvu", 625),
            "eval_tempcompass.json": ("eval_tempcompass", None),
            "eval_videomme.json": ("eval_videomme", 2_700),
            "eval_videommmu.json": ("eval_videommmu", 900),
            "eval_vsibench.json": ("eval_vsibench", 5_130),
        },
        archives={"": ""},
        note="the media are those of each benchmark; or prepare the benchmarks themselves",
    ),
    "video_rts": DataSet(
        "Video-RTS (2507.06485), RL: questions of CG-Bench",
        "https://github.com/Ziyang412/Video-RTS, src/training_data",
        {"cgbench_train.jsonl": ("cgbench_selected_training_samples", 8_136)},
        video_rts,
        {"video": str, "problem": str, "solution": str},
        archives={"": "video*.zip"},
        media_hub="CG-Bench/CG-Bench",
        joined=True,
    ),
    "longvideo_reason": DataSet(
        "LongVILA-R1 (2507.07966), SFT and RL",
        "LongVideo-Reason/longvideo-reason",
        {
            "longvideo_reason_train.json": ("data/train-*", 51_200),
            "longvideo_reason_openended.json": ("data/openended-*", 52_800),
            "longvideo_reason_validation.json": ("data/validation-*", 62),
        },
        longvideo_reason,
        {"problem": str, "problem_type": str, "videos": str, "answer": str},
        archives={"": "*.tar.gz"},
        media_hub="Perflow-Shuai/movie_mp4",
        note="the videos unpack to other folders than the records name; move them there",
    ),
    "longvideo_reason_eval": DataSet(
        "LongVILA-R1 (2507.07966), evaluation",
        "LongVideo-Reason/longvideo-reason",
        {"longvideo_reason_eval.json": ("data/test-*", 1_000)},
        longvideo_reason,
        {"problem": str, "problem_type": str, "videos": str, "answer": str},
        archives={"": "longvideo_eval_subset*.tar.gz"},
        media_hub="LongVideo-Reason/longvideo_eval_videos",
        elsewhere={"longvila_videos/": "longvideo_eval_subset*/"},
        size="195 GB",
        note="always answering B scores 44.1 %",
    ),
    "vsi_bench": DataSet(
        "VSI-Bench (2412.14171)",
        "nyu-visionx/VSI-Bench",
        {"vsi_bench.json": ("test|test-*", 5_130)},
        vsi_bench,
        {"dataset": str, "scene_name": str, "question_type": str, "question": str}
        | {"options": list | None, "ground_truth": str | int | float},
        archives={"": "{0}.zip"},
    ),
    "video_mmmu": DataSet(
        "Video-MMMU (2501.13826)",
        "lmms-lab/VideoMMMU",
        {"video_mmmu.json": ("*/test-*", 900)},
        video_mmmu,
        {"id": str, "question": str, "options": list | None, "answer": str},
        archives={"": "{0}.zip"},
        elsewhere={f"{folder}/": "**/" for folder in VIDEO_MMMU},
        note="questions of Adaptation are about an image, which is the end of the video",
    ),
    "mmvu": DataSet(
        "MMVU (2501.12380), validation: 625 of 1,000 are multiple choice",
        "yale-nlp/MMVU",
        {"mmvu.json": ("validation", 1_000)},
        mmvu,
        {"question": str, "choices": dict, "answer": str, "question_type": str},
        archives={"": "videos/*"},
        size="0.9 GB",
    ),
    "mvbench": DataSet(
        "MVBench (2311.17005), 20 tasks",
        "OpenGVLab/MVBench",
        {"mvbench.json": ("json/*", 4_000)},
        mvbench,
        {"video": str, "question": str, "candidates": list, "answer": str},
        archives={"": "video/{1}.zip", "video/star": "video/star.zip video/data0613.zip"}
        | {"video/clevrer": "video/clevrer.zip video/data0613.zip", "video/nturgbd": ""},
        elsewhere={"video/": "video/data0613/"},
        size="16 GB",
        note=NTU,
    ),
    "temp_compass": DataSet(
        "TempCompass (2403.00476): 2,004 of 7,540 are captions",
        "lmms-lab/TempCompass",
        {"temp_compass.json": ("*/test-*", 7_540)},
        temp_compass,
        {"video_id": str, "question": str, "answer": str, "dim": str},
        archives={"": "tempcompass_videos.zip"},
        size="0.4 GB",
    ),
    "video_mme": DataSet(
        "Video-MME (2405.21075), without subtitles",
        "lmms-lab/Video-MME",
        {"video_mme.json": ("videomme/test-*", 2_700)},
        video_mme,
        {"videoID": str, "question_id": str, "question": str, "options": list, "answer": str},
        archives={"": "videos_chunked_*.zip"},
        size="101 GB",
    ),
    "video_holmes": DataSet(
        "Video-Holmes (2505.21374)",
        "TencentARC/Video-Holmes",
        {"video_holmes.json": ("test_Video-Holmes", 1_837)},
        video_holmes,
        {"video ID": str, "Question": str, "Question Type": str, "Options": dict, "Answer": str},
        archives={"": "videos.zip"},
        size="5 GB",
    ),
    "long_video_bench": DataSet(
        "LongVideoBench (2407.15754), validation, without subtitles",
        "longvideobench/LongVideoBench",
        {"long_video_bench.json": ("lvb_val|validation-*", 1_337)},
        long_video_bench,
        {"video_path": str, "question": str, "correct_choice": int, "question_category": str},
        archives={"": "videos.tar.part.*"},
        joined=True,
        size="162 GB",
    ),
    "lvbench": DataSet(
        "LVBench (2406.08035)",
        "zai-org/LVBench",
        {"lvbench.json": ("video_info.meta", 1_549)},
        lv_bench,
        {"key": str, "type": str, "qa": list},
        archives={"": ""},
        note="the videos are YouTube's; put that with the id KEY in videos/KEY.mp4",
    ),
    "mlvu": DataSet(
        "MLVU (2406.04264), dev, seven multiple-choice tasks of nine",
        "MLVU/MVLU",
        {"mlvu.json": ("MLVU/json/*", None)},
        mlvu,
        {"video": str, "question": str, "question_type": str, "answer": str | list},
        archives={"": "{parent}/*"},
        size="about 400 GB",
        note="2,174 questions are multiple choice",
    ),
    "cg_bench": DataSet(
        "CG-Bench (2412.12075); Video-RTS trains on two thirds of it",
        "CG-Bench/CG-Bench",
        {"cg_bench.json": ("cgbench", 12_129)},
        cg_bench,
        {"video_uid": str, "question": str, "choices": list, "right_answer": str},
        archives={"": "video*.zip"},
        joined=True,
    ),
    "charades_sta": DataSet(
        "Charades-STA (1705.02101), test: grounding in time",
        "lmms-lab/charades_sta",
        {"charades_sta.json": ("**/test-*", 3_720)},
        charades_sta,
        {"video": str, "caption": str, "timestamp": list},
        archives={"": "Charades_v1_480_part_*.zip"},
        size="16 GB",
    ),
    "charades_sta_train": DataSet(
        "Charades-STA (1705.02101), training: grounding in time",
        "https://github.com/jiyanggao/TALL",
        {"charades_sta_train.json": ("charades_sta_train", 12_408)},
        charades_sta_train,
        {"line": str},
        archives={"": "Charades_v1_480_part_*.zip"},
        media_hub="lmms-lab/charades_sta",
        size="16 GB",
    ),
    "gsm8k": DataSet(
        "GSM8K (2110.14168): text without a medium",
        "openai/gsm8k",
        {"gsm8k_train.jsonl": ("main/train-*", 7_473), "gsm8k_test.jsonl": ("main/test-*", 1_319)},
        as_published,
        {"question": str, "answer": str},
    ),
}

# ---- files as published -> a file of records

SUFFIXES = (".json", ".jsonl", ".parquet", ".txt")


def published(folder, pattern, written=None):
    """The files that a pattern of DataSet.files stands for; [] without any. written: the file that
    an earlier run wrote, which is not one of them."""
    for part in pattern.split("|"):
        files = [f for f in folder.glob(f"{part}.*") if f.suffix in SUFFIXES and f != written]
        one_of_each = {f.with_suffix(""): f for f in sorted(files, reverse=True)}
        if files:
            return sorted(one_of_each.values())
    return []


def records_of(file):
    """The records of a file as published, as read_records returns them."""
    if file.suffix == ".parquet":
        return read_parquet(file)
    if file.suffix != ".txt":
        return read_records(file)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise DataError(f"{file}: not UTF-8 ({e})") from e
    lines = enumerate(text.split("\n"), 1)  # splitlines would end lines at rare characters too
    found = [(f"{file}, line {i}", line) for i, line in lines if line.strip()]
    return [(where, lambda line=line: {"line": line}) for where, line in found]


def converted(data_set, read, where, file):
    """The records that one as published becomes. file: where it is from, relative to FOLDER.
    Raises DataError."""
    record = read()
    expected = ", ".join(data_set.fields)
    if not isinstance(record, dict):
        found = short_repr(record)
        raise DataError(f"{where}: found {found}, expected an object with {expected}")
    for name, kind in data_set.fields.items():
        if not isinstance(record.get(name), kind):
            found = short_repr(record[name]) if name in record else "not there"
            raise DataError(f"{where}: {name!r} is {found}, expected {_name(kind)}")
    try:
        return list(data_set.convert(record, file))
    except DataError as e:
        raise DataError(f"{where}: {e}") from e
    except KeyError as e:
        raise DataError(f"{where}: no field {e}; it has {', '.join(record)}") from e
    except (TypeError, AttributeError, ValueError, IndexError) as e:
        raise DataError(f"{where}: not in the form as published ({e})") from e


def _name(kind):
    return getattr(kind, "__name__", str(kind))


def convert(data_set, folder, files):
    """Files as published -> (records, where each is from, how many were left out, problems).

    A record that cannot be converted becomes one that says why, which no reader takes for a
    question: so the number of records stays that of the set.
    """
    found, places, problems = [], [], []
    left_out = 0
    for file in files:
        name = file.relative_to(folder).as_posix()
        for where, read in records_of(file):
            try:
                new = converted(data_set, read, where, name)
            except DataError as e:
                new = [{"not_converted": str(e)}]
                problems.append(str(e))
            left_out += not new
            found += [placed(record, data_set, folder) for record in new]
            places += [where] * len(new)
    return found, places, left_out, problems


def placed(record, data_set, folder):
    """The record, with the path at which its medium lies if that is one of data_set.elsewhere."""
    key = "path" if "path" in record else "videos"  # LongVideo-Reason's
    path = record.get(key, "")
    for start, other in data_set.elsewhere.items():
        if path.startswith(start) and not os.path.exists(folder / path):
            pattern = other + glob.escape(path.removeprefix(start))
            for file in glob.glob(pattern, root_dir=folder, recursive=True):
                return record | {key: Path(file).as_posix()}
    return record


def write_records(file, found):
    """Writes a .json or .jsonl file of records, one a line."""
    lines = [json.dumps(record) for record in found]
    if file.suffix == ".jsonl":
        write_whole(file, "\n".join(lines) + "\n")
    else:
        write_whole(file, "[\n" + ",\n".join(lines) + "\n]\n")


# ---- media


def missing_media(samples, folder):
    """The paths of media that are not there, relative to FOLDER if they lie in it, and how many
    media there are."""
    root = folder.absolute()
    paths = sorted({sample.path for sample in samples if sample.path})
    missing = []
    for path in map(Path, paths):
        if not os.path.exists(path):  # Path.exists raises for a name that is too long
            inside = path.is_relative_to(root)
            missing.append((path.relative_to(root) if inside else path).as_posix())
    return missing, len(paths)


def archives_of(path, data_set):
    """The files of the hub that hold a medium, as patterns; [] if they are not known."""
    starts = [start for start in data_set.archives if path.startswith(start)]
    if not starts:
        return []
    *folders, _ = path.split("/")
    files = data_set.archives[max(starts, key=len)]
    return files.format(*folders, "", "", parent="/".join(folders)).split()


def download(hub, folder, patterns):
    """The command that downloads files of the hub."""
    words = ["hf", "download", hub, "--repo-type", "dataset", "--local-dir", str(folder)]
    for pattern in patterns:
        words += ["--include", pattern]
    return shlex.join(words)


def unpack(folder, pattern, joined):
    """The command that unpacks archives in the folder that they are in; "" for other files."""
    place = (folder / pattern).parent
    name = PurePosixPath(pattern).name
    if joined and name.endswith(".zip"):
        parts = f"$(printf '%s\\n' {name} | sort -V)"
        what = f"cat {parts} > joined.zip && unzip -n -q joined.zip"
    elif joined:
        what = f"cat {name} | tar -x"
    elif name.endswith(".zip"):
        what = f"unzip -n -q '{name}'"
    elif name.endswith(".tar.gz"):
        what = f'for f in {name}; do tar -xzf "$f"; done'
    else:
        return ""
    return f"(cd {shlex.quote(str(place))} && {what})"


# ---- the command


def prepare(name, folder, only_present=False):
    """Writes the records of a set, and prints what it found and what is to be done. Raises
    DataError. only_present: also write those whose media are there."""
    data_set = SETS[name]
    present = {}
    for out, (files, _) in data_set.files.items():
        written = None if data_set.convert is None else folder / out
        present[out] = published(folder, files, written)
    if not any(present.values()):
        expected = ", ".join(pattern for pattern, _ in data_set.files.values())
        raise DataError(
            f"{folder}: no records of {name}, expected {expected} with one of the endings "
            f"{' '.join(SUFFIXES)}; {get(name, folder)}"
        )
    missing = set()
    for out, files in present.items():
        if files:
            missing |= set(prepare_file(data_set, folder, folder / out, files))
            if only_present:
                write_present(folder / out)
        else:
            print(f"{out}: not written, {folder} has no {data_set.files[out][0]}")
    if missing:
        print_missing(data_set, folder, sorted(missing))
    if data_set.note:
        print(f"note: {data_set.note}")


def prepare_file(data_set, folder, out, files):
    """Writes one file of records, if the set is not read as it is. Prints what is in it, and
    returns the paths of its missing media."""
    places, left_out, problems = [], 0, []
    if data_set.convert is None:
        (out,) = files
    else:
        found, places, left_out, problems = convert(data_set, folder, files)
        if not found:
            names = ", ".join(map(str, files))
            raise DataError(f"{names}: no question to write, {left_out} records left out")
        if len(problems) == len(found):
            raise DataError(f"none of the {len(found)} records fits; the first: {problems[0]}")
        write_records(out, found)
    skipped = {}
    samples = data.load_samples(out, skipped=skipped)
    for i, message in skipped.items():
        if not places:
            problems.append(message)
        elif "not_converted" not in found[i]:
            problems.append(f"{places[i]}: {message}")
    records = len(samples) + len(skipped)
    published_number = data_set.files[out.name][1]
    about = f"{published_number:,} as published" if published_number else "number not published"
    print(f"{out}: {records:,} records, {left_out:,} left out ({about})", end="")
    print(", read as it is" if data_set.convert is None else "")
    kinds = Counter(sample.problem_type for sample in samples)
    print("  " + ", ".join(f"{n:,} {kind}" for kind, n in kinds.most_common()))
    if problems:
        print(f"  {len(problems):,} do not fit:")
    for message in problems[:20]:
        print(f"    {message}")
    if len(problems) > 20:
        print(f"    and {len(problems) - 20:,} more")
    missing, total = missing_media(samples, folder)
    print(f"  {total - len(missing):,} of {total:,} media are there")
    return missing


def write_present(file):
    """Writes the records whose media are there to another file beside this one of records."""
    skipped = {}
    samples = data.load_samples(file, skipped=skipped)
    records = [read for i, (_, read) in enumerate(read_records(file)) if i not in skipped]
    there = [not sample.path or os.path.exists(sample.path) for sample in samples]
    found = [read() for read, is_there in zip(records, there) if is_there]
    target = file.with_stem(f"{file.stem}_present")
    write_records(target, found)
    print(f"{target}: the {len(found):,} records whose media are there")


def print_missing(data_set, folder, missing):
    """Prints the missing media by archive, and the commands that get them."""
    sources = {path: archives_of(path, data_set) for path in missing}
    by_source = {}
    for path, patterns in sources.items():
        by_source.setdefault(" and ".join(patterns) or "elsewhere (see the note)", []).append(path)
    print(f"{len(missing):,} media are missing:")
    for source, paths in by_source.items():
        print(f"  {len(paths):,} from {source}, such as {paths[0]}")
    patterns = sorted({pattern for found in sources.values() for pattern in found})
    if patterns:
        print("to get them:")
        print(f"  {download(data_set.media_hub or data_set.hub, folder, patterns)}")
    for pattern in patterns:
        if command := unpack(folder, pattern, data_set.joined):
            print(f"  {command}")


def get(name, folder):
    """How to get the records of a set."""
    data_set = SETS[name]
    if "/" not in data_set.hub or data_set.hub.startswith("https:"):
        return f"they are at {data_set.hub}"
    patterns = [files.split("|")[0] for files, _ in data_set.files.values()]
    patterns = [p if p.endswith("*") else f"{p}.*" for p in patterns]
    return f"to get them: {download(data_set.hub, folder, patterns)}"


def print_sets():
    """Prints all sets, one a line."""
    print(f"{'NAME':22} {'records':>8} {'download':>12}  what it is; where its records are")
    for name, data_set in SETS.items():
        numbers = [n for _, n in data_set.files.values()]
        total = f"{sum(numbers):,}" if all(numbers) else "?"
        print(f"{name:22} {total:>8} {data_set.size or '?':>12}  {data_set.about}; {data_set.hub}")


def set_name(text):
    """The name of a set, from the command line."""
    if text not in SETS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a set, expected one of the {len(SETS)} that `python prepare.py` lists"
        )
    return text


def main(argv=None):
    """The command line."""
    p = Parser(__doc__)
    p.add_argument("name", nargs="?", help="a set of the list", type=set_name, metavar="NAME")
    p.add_argument(
        "folder", nargs="?", help="the folder with its files as published", metavar="FOLDER"
    )
    p.add_argument(
        "--present",
        action="store_true",
        help="also write NAME_present.json, the records whose media are there: to train on a part",
    )
    args = p.parse_args(argv)
    if args.name is None:
        print_sets()
        return
    if args.folder is None:
        p.error(f"{args.name}: expected FOLDER, which holds its files; {get(args.name, 'FOLDER')}")
    if not Path(args.folder).is_dir():
        how = get(args.name, args.folder)
        p.error(f"{args.folder}: no such folder, expected that of {args.name}; {how}")
    try:
        prepare(args.name, Path(args.folder), args.present)
    except (DataError, OSError) as e:
        raise SystemExit(f"error: {e}") from e


if __name__ == "__main__":
    main()
