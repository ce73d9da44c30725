"""One self-contained HTML page of a run: no server, no network; to open, to keep, to send.

    python report.py out/toy/grpo            a training run: its figures, curves, and sampled groups with their rewards
    python report.py out/toy/eval --open     an evaluation: its methods, and every question: frames, votes, responses
The page is RUN/report.html; an unfinished run has one too. What it shows stands in its address, so a view can be kept
as a link: report.html#method=s2d-4-16&show=wrong. The frames are those that were shown, read again from the videos; they and the
responses are cut down to a budget of bytes, and the page says where.
"""

import argparse
import base64
import io
import json
import math
import os
import time
import webbrowser
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from html import escape
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from data import Sample, load_media
from infra.errors import DataError
from infra.files import write_whole
from infra.flags import flag_words, read_config
from infra.video import close_workers
from rewards import choice_letter
from scores import ANSWER, MEDIUM, NONE, answer_misfit, misfit, natural, summarize

IMAGES, TEXT = 6_500_000, 1_500_000  # bytes of all frames and of all responses of a page
QUESTIONS = 500  # whose frames are shown, at most: failed, wrong and escalated ones first
GROUPS = 100  # of a training run of each kind (all right, all wrong, mixed): the newest
SAME = ("step", "position", "id", "path", "question")  # of the responses to one prompt
PARTS = (
    "reward",
    "accuracy",
    "format",
    "length_bonus",
    "temporal_bonus",
    "advantage",
)  # of a response
GRADIENT = (
    "loss",
    "kl",
    "entropy",
    "clipped",
    "ratio",
    "mismatch",
    "grad_norm",
)  # computed with the gradient, if there is one
COUNTS = {
    "fps": float,
    "min_frames": int,
    "max_frames": int,
}  # the flags that say how many frames were shown
SHEETS = (
    (16, 112, 85),
    (16, 84, 70),
    (12, 64, 50),
    (12, 48, 40),
    (8, 48, 35),
    (4, 40, 30),
)  # frames, height, JPEG quality


def read_lines(path, keys, wrong, notes):
    """The objects of a .jsonl file, NaN as None; [] without the file. A last line without its end is one that is being written
    and is left out; any other that cannot be read, or lacks one of the keys, is too, and counted in `notes`.
    Raises DataError for a line with values that cannot be: wrong(object) says what is wrong, or None."""
    *lines, _ = (
        path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else [""]
    )
    objects = []
    for i, line in enumerate(lines, 1):
        try:
            found = dict(
                json.loads(
                    line,
                    parse_constant=lambda _: None,
                    parse_float=partial(finite, float),
                    parse_int=partial(finite, int),
                )
            )
        except OverflowError as e:
            raise DataError(f"{path}, line {i}: {e}") from e
        except (ValueError, TypeError):
            continue
        if found.keys() >= set(keys):
            if why := wrong(found):
                raise DataError(f"{path}, line {i}: {why}")
            objects.append(found)
    if len(objects) < len(lines):
        notes.append(
            f"{path.name}: {len(lines) - len(objects)} lines that cannot be read are left out"
        )
    return objects


def finite(kind, text):
    """A number from its text. Raises OverflowError for one beyond all floats."""
    number = kind(text)
    if not math.isfinite(float(number)):
        raise OverflowError(f"holds the number {text[:20]}, expected one that is finite")
    return number


def sample_misfit(line):
    """What is wrong with a line of samples.jsonl, an object, as words, or None."""
    form = {"step": (int,), "response": (str,), "options": (NONE, [str]), "answer": (str, NONE)}
    return misfit(line, form | MEDIUM if "data_type" in line else form)


def largest(cost, budget, top):
    """The largest integer up to `top` whose cost, a growing function, is within the budget; 0 if there is none."""
    low = 0
    while low < top:
        middle = (low + top + 1) // 2
        low, top = (middle, top) if cost(middle) <= budget else (low, middle - 1)
    return low


def shorten(holders, notes):
    """Cuts the texts in every holder["responses"] to TEXT bytes in all: from the middle of those over a common length."""
    sizes = [
        (len(text), len(text.encode(errors="replace")))
        for holder in holders
        for text in holder["responses"]
        if text
    ]
    longest = max((n for n, _ in sizes), default=0)
    limit = largest(lambda most: sum(b * min(n, most) / n for n, b in sizes), TEXT, longest)
    if limit < longest:
        notes.append(f"Responses longer than {limit} characters are shown without their middle")
        cut = lambda text: (
            text
            if len(text) <= limit
            else f"{text[: limit // 2]} [...] {text[len(text) - limit // 2 :]}"
        )
        for holder in holders:
            holder["responses"] = [cut(text) for text in holder["responses"]]


# ---- frames


class Frames:
    """The frames of a page: one JPEG contact sheet for every medium and number of frames, within IMAGES bytes in all."""

    def __init__(self):
        self.media, self.count = (
            {},
            0,
        )  # {(path, data type, fps of a folder, segment): {counts: number of the sheet}}

    def want(self, r, counts):
        """Asks for the frames of an entry's medium that load_media gives for these counts, (fps, min_frames, max_frames) ->
        number of their sheet."""
        segment = r.get("segment") and tuple(r["segment"])
        sheets = self.media.setdefault((r["path"], r["data_type"], r["fps"], segment), {})
        self.count += counts not in sheets
        return sheets.setdefault(counts, self.count - 1)

    def sheets(self):
        """All sheets, by number: {of: number of frames, seconds: of the video, jpeg: base64, width, height: of a frame,
        at: those shown}, without the last four when the budget has no room, or {error} when the medium cannot be read."""
        found = {}
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            read = pool.map(_sheets, self.media.items())
            for sheets in tqdm(
                read, total=len(self.media), desc="frames", unit="medium", disable=not self.media
            ):
                found |= sheets
        close_workers()
        ladders = {number: sheet.pop("ladder", []) for number, sheet in found.items()}
        pick = lambda ladder, limit: next(
            (step for step in ladder if len(step["jpeg"]) <= limit), {"jpeg": ""}
        )
        limit = largest(
            lambda most: sum(len(pick(x, most)["jpeg"]) for x in ladders.values()), IMAGES, IMAGES
        )
        return [found[number] | pick(ladders[number], limit) for number in sorted(found)]


def _sheets(item):
    """One medium -> {number: sheet, with a `ladder` of images from large to small}."""
    (path, data_type, folder_fps, segment), wanted = item
    sample = Sample("-", "", [], "free-form", data_type, path, "", fps=folder_fps, segment=segment)
    decoded, out = {}, {}
    for (fps, least, most), number in wanted.items():
        try:
            media = load_media(
                sample,
                fps=fps,
                min_frames=least,
                max_frames=most,
                min_pixels=28 * 28,
                max_pixels=64 * 28 * 28,
                decoded=decoded,
            )
        except DataError as e:
            out[number] = {"error": str(e).removeprefix("record -: ")}
            continue
        T, ladder = len(media.frames), []
        for n, height, quality in SHEETS:
            at = np.linspace(0, T - 1, min(n, T)).round().astype(int).tolist()
            small = [
                Image.fromarray(frame.numpy().transpose(1, 2, 0)) for frame in media.frames[at]
            ]  # from (3, H, W)
            for image in small:
                image.thumbnail((2000, height if T > 1 else 2 * height))
            file = io.BytesIO()
            chroma = 0 if quality > 80 else 2  # halved on the smaller ones
            Image.fromarray(np.hstack(small)).save(
                file, "JPEG", quality=quality, subsampling=chroma
            )
            jpeg = base64.b64encode(file.getvalue()).decode()
            ladder.append(dict(jpeg=jpeg, width=small[0].width, height=small[0].height, at=at))
        out[number] = dict(of=T, seconds=round(media.seconds_per_grid / 2 * T, 2), ladder=ladder)
    return out


# ---- a training run


def training(run, flags, frames, notes):
    """log.jsonl and samples.jsonl -> what the page shows of them. `frames` is asked for those of the groups."""
    log, curves = (
        read_lines(run / "log.jsonl", ["step"], partial(misfit, form={"step": (int,)}), notes),
        {},
    )
    for entry in log:
        parts = {
            f"{key}.{name}": x
            for key, value in entry.items()
            if isinstance(value, dict)
            for name, x in value.items()
        }
        without = GRADIENT if entry.get("skipped_update") and entry.get("grad_norm") == 0 else ()
        for key, x in (entry | parts).items():
            if isinstance(x, (int, float)) and key != "step" and (x or key not in without):
                curve = curves.setdefault(key, ([], []))  # steps, values
                curve[0].append(entry["step"])
                curve[1].append(float(f"{x:.6g}"))
    lines = read_lines(run / "samples.jsonl", ["step", "response"], sample_misfit, notes)
    lines.sort(key=lambda s: -s["step"])  # the newest first; within a step as they were written
    groups = [
        list(group) for _, group in groupby(lines, key=lambda s: [s.get(key) for key in SAME])
    ]
    kinds, shown = Counter(), []
    for group in groups:
        card = group_card(group)
        kinds[card["kind"]] += 1
        if kinds[card["kind"]] <= GROUPS:
            shown.append(card)
            if flags.keys() >= set(COUNTS) and "data_type" in group[0]:
                card["sheet"] = frames.want(group[0], tuple(flags[name] for name in COUNTS))
    shorten(shown, notes)
    return {
        "figures": figures(curves, log, flags),
        "curves": curves,
        "groups": shown,
        "left_out": len(groups) - len(shown),
    }


def group_card(group):
    """The lines of samples.jsonl of one prompt, one a response -> what its card shows: the prompt once, all responses, and the
    numbers of each."""
    first = group[0]
    numbers = [
        {key: s[key] for key in PARTS if isinstance(s.get(key), (int, float))} for s in group
    ]
    right = sum(n.get("accuracy", 0) > 0.5 for n in numbers)
    more = {
        key: first[key]
        for key in ("step", "position", "orders", "probability_drops", "shuffled_accuracies")
        if key in first
    }
    return {
        **more,
        **texts(first, "id", "question", "answer"),
        "options": first.get("options") or [],
        "gold": gold(first),
        "kind": "wrong" if right == 0 else "right" if right == len(group) else "mixed",
        "responses": [s["response"] for s in group],
        "numbers": numbers,
    }


def texts(line, *keys):
    """Those of a line's values that are text: what a bad record holds in their place is not for the page."""
    return {key: line[key] for key in keys if isinstance(line.get(key), str)}


def gold(line):
    """The right answer of a line in the form of `given`; of one that has no "gold" the letter of its option, None without any."""
    if "gold" in line or not line.get("options"):
        return line.get("gold")
    return choice_letter(line.get("answer") or "", line["options"])


def figures(curves, log, flags):
    """The headline of a training run -> [(name, value, what it is)], of what the log holds and of nothing else."""
    values = {key: column for key, (_, column) in curves.items()}
    name = "accuracy" if "accuracy" in values else "loss"
    out = [("steps", str(log[-1]["step"]) if log else "0", f"of {flags.get('steps', '?')}")]
    if name in values:
        n = min(10, len(values[name]))
        first, last = sum(values[name][:n]) / n, sum(values[name][-n:]) / n
        out.append(
            (
                f"training {name}",
                f"{first:.3f} → {last:.3f}",
                f"means of the first and last {n} steps",
            )
        )
    if "eval_accuracy" in values:
        steps, held_out = curves["eval_accuracy"]
        counts = [
            f"{values[key][-1]:.0f} {what}"
            for key, what in (("eval_questions", "questions"), ("eval_failures", "failed"))
            if key in values
        ]
        out.append(
            (
                "held-out accuracy",
                f"{held_out[0]:.3f} → {held_out[-1]:.3f}",
                f"steps {steps[0]} and {steps[-1]}{'; ' if counts else ''}{', '.join(counts)}",
            )
        )
    if "skipped_samples" in values:
        out.append(
            ("skipped samples", f"{sum(values['skipped_samples']):.0f}", "could not be loaded")
        )
    if "skipped_update" in values:
        idle = values["skipped_update"]
        out.append(("steps without an update", f"{sum(map(bool, idle))}", f"of {len(idle)}"))
    if "seconds.step" in values:
        evaluated = (
            f"and {clock(sum(values['seconds.evaluate']))} of evaluations"
            if "seconds.evaluate" in values
            else ""
        )
        out.append(("time", clock(sum(values["seconds.step"])), evaluated))
    return out


def clock(seconds):
    """A duration as text, in the unit that suits it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


# ---- an evaluation


def evaluation(run, frames, notes):
    """METHOD.rankN.jsonl and summary.json -> what the page shows of them. `frames` is asked for those of the questions."""
    summary, order, lines, questions, interesting = {}, [], {}, {}, set()
    with suppress(OSError, ValueError, TypeError, KeyError, OverflowError):
        text = (run / "summary.json").read_text(encoding="utf-8")
        summary = dict(
            json.loads(text, parse_constant=lambda _: None, parse_float=partial(finite, float))
        )
        order = [m["method"] for m in summary["methods"]]
    if not summary:
        notes.append("No summary.json yet: these are the questions answered so far")
    for file in sorted(run.glob("*.rank*.jsonl")):
        read = read_lines(file, ANSWER, answer_misfit, notes)
        lines.setdefault(file.name.split(".rank")[0], {}).update((r["record"], r) for r in read)
    names = sorted(
        filter(lines.get, lines),
        key=lambda x: (order.index(x) if x in order else len(order), natural(x)),
    )
    everything = [r for name in names for r in lines[name].values()]
    for r in everything:
        question, about = questions.setdefault(r["record"], {}), r.get("about") or {}
        question |= texts(r, "id", "path", "problem_type", "data_type", "question", "answer")
        question |= {"options": r.get("options") or [], "about": texts(about, *about)}
        question["gold"] = gold(r) if question.get("gold") is None else question["gold"]
        if r["failure"] is not None or r["score"] <= 0.5 or len(r["rounds"]) > 1:
            interesting.add(r["record"])
    with_frames = set(
        sorted(questions, key=lambda record: (record not in interesting, record))[:QUESTIONS]
    )
    if len(questions) > QUESTIONS:
        notes.append(
            f"Frames of {QUESTIONS} of the {len(questions)} questions, failed, wrong and escalated ones first"
        )
    for r in everything:
        for part in r["rounds"]:
            part["logps"] = [x if x is None else round(x, 3) for x in part["logps"]]
            if r["record"] in with_frames:
                part["sheet"] = frames.want(r, (math.inf, part["frames"], part["frames"]))
    shorten([part for r in everything for part in r["rounds"]], notes)
    keep = ("record", "given", "score", "failure", "frames", "visual_tokens", "seconds", "rounds")
    results = lambda name: [
        {key: r[key] for key in keep if key in r} for _, r in sorted(lines[name].items())
    ]
    methods = [
        summarize([*lines[name].values()], name) | {"results": results(name)} for name in names
    ]
    return {
        **{key: summary.get(key) for key in ("model", "data", "constant_answer")},
        "questions": questions,
        "methods": methods,
    }


# ---- the page


def page(run):
    """The HTML of a run folder. Raises ValueError: no such folder, or neither a log nor results in it."""
    run = Path(run)
    if not run.is_dir():
        raise ValueError(f"{run}: no such folder")
    trained, evaluated = (run / "log.jsonl").exists(), any(run.glob("*.rank*.jsonl"))
    if not trained and not evaluated:
        raise ValueError(
            f"{run}: neither a training log (log.jsonl) nor answers of an evaluation (METHOD.rankN.jsonl)"
        )
    config = read_config(run / "config.txt") if (run / "config.txt").exists() else ""
    flags = (
        dict(words for words in flag_words(run / "config.txt").values() if len(words) == 2)
        if config
        else {}
    )
    flags = {name.removeprefix("--"): value for name, value in flags.items()}
    for name in COUNTS.keys() & flags.keys():
        try:
            flags[name] = COUNTS[name](flags[name])
        except ValueError:
            raise DataError(
                f"{run / 'config.txt'}: --{name} {flags[name]}: expected a number"
            ) from None
    frames, notes = Frames(), []
    D = {
        "run": str(run),
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "config": config,
        "algo": flags.get("algo"),
        "notes": notes,
        "training": training(run, flags, frames, notes) if trained else None,
        "evaluation": evaluation(run, frames, notes) if evaluated else None,
        "sheets": frames.sheets(),
    }
    blob = json.dumps(D, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace(
        "<", "\\u003c"
    )  # no </script>
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    head, tail = template.split("DATA</script>")
    return f"{head.replace('<title>TITLE', f'<title>{escape(str(run))}')}{blob}</script>{tail}"


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", help="folder of a training run or of an evaluation")
    parser.add_argument("--out", help="file of the page (default: RUN/report.html)")
    parser.add_argument("--open", action="store_true", help="open it in a browser")
    args = parser.parse_args(argv)
    out = Path(args.out or Path(args.run) / "report.html")
    try:
        write_whole(out, page(args.run), errors="replace")
    except (ValueError, OSError) as e:
        raise SystemExit(f"error: {e}") from e
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
    if args.open:
        webbrowser.open(out.resolve().as_uri())


if __name__ == "__main__":
    main()
