"""A report: one self-contained HTML page of a run, to open, keep and send. No server, no network.

    python report.py out/toy/grpo           training: key figures, curves, sampled groups
    python report.py out/toy/eval --open    evaluation: methods; frames and votes of each question
    python report.py out/toy/grpo --watch   the same while the run goes on: the page reloads itself

Writes RUN/report.html. At its top, and on the console, stands what is wrong with the last steps
(`alarms`). The address of the page holds the view, so a view is a link:
report.html#method=s2d-4-16&show=wrong. The frames are those that the model saw, read again from the
videos. Frames and responses are reduced to a budget of bytes; the page says where.
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
from eval import summarize
from infra.answers import ANSWER, MEDIUM, NONE, answer_misfit, misfit
from infra.errors import DataError
from infra.files import write_whole
from infra.flags import flag_words, read_config
from infra.summary import natural
from infra.video import close_workers
from rewards import choice_letter

IMAGES, TEXT = 6_500_000, 1_500_000  # bytes of all frames and of all responses on a page
QUESTIONS = 500  # shown with frames, at most: failed, wrong and escalated ones first
GROUPS = 100  # of each kind (all right, all wrong, mixed) of a training run: the newest
SHEETS = (  # number of frames, height, JPEG quality
    (16, 112, 85),
    (16, 84, 70),
    (12, 64, 50),
    (12, 48, 40),
    (8, 48, 35),
    (4, 40, 30),
)
# keys of samples.jsonl that are the same in all responses to one prompt
SAME = ("step", "position", "id", "path", "question")
# keys of log.jsonl that are computed with the gradient, so a step without one does not have them
GRADIENT = ("loss", "kl", "entropy", "clipped", "ratio", "mismatch", "grad_norm")
# of a training run: over this many of the newest steps, and at least 3, alarms are taken
ALARM_STEPS = 10
# flags that determine which frames were shown
COUNTS = {"fps": float, "min_frames": int, "max_frames": int}


# ---- files


def parse(text):
    """The JSON value of a text; NaN becomes None. Raises ValueError, or OverflowError for a number
    that no float holds."""
    return json.loads(
        text,
        parse_constant=lambda _: None,
        parse_float=partial(finite, float),
        parse_int=partial(finite, int),
    )


def finite(kind, text):
    """A number from its text. Raises OverflowError for one that no float holds."""
    number = kind(text)
    if not math.isfinite(float(number)):
        raise OverflowError(f"holds the number {text[:20]}, expected one that is finite")
    return number


# keys in logs of earlier versions, and what they are called now
EARLIER_KEYS = {"share_lost": "probability_drop", "shares_lost": "probability_drops"}


def read_lines(path, keys, wrong, notes):
    """The objects of a .jsonl file; [] if there is no file.

    Left out are a last line without its end, which is still being written, and, counted in `notes`,
    lines that cannot be read or lack one of the keys.
    wrong(object) -> what is wrong with its values, or None. Raises DataError, which names the line.
    """
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    *lines, _ = text.split("\n")
    objects = []
    for i, line in enumerate(lines, 1):
        try:
            found = {EARLIER_KEYS.get(key, key): value for key, value in dict(parse(line)).items()}
        except OverflowError as e:
            raise DataError(f"{path}, line {i}: {e}") from e
        except (ValueError, TypeError):
            continue
        if found.keys() >= set(keys):
            if why := wrong(found):
                raise DataError(f"{path}, line {i}: {why}")
            objects.append(found)
    unreadable = len(lines) - len(objects)
    if unreadable:
        notes.append(f"{path.name}: {unreadable} lines that cannot be read are left out")
    return objects


def step_misfit(line):
    """What is wrong with a line of log.jsonl, an object -> text, or None."""
    return misfit(line, {"step": (int,)})


def sample_misfit(line):
    """What is wrong with a line of samples.jsonl, an object -> text, or None."""
    form = {"step": (int,), "response": (str,), "options": (NONE, [str]), "answer": (str, NONE)}
    return misfit(line, form | MEDIUM if "data_type" in line else form)


def read_flags(run):
    """config.txt of a run -> (its text, {flag with a value: value}); ("", {}) if there is none.
    Raises DataError."""
    file = run / "config.txt"
    if not file.exists():
        return "", {}
    flags = {}
    for words in flag_words(file).values():
        if words[:1] == ["--reward"]:
            flags["reward"] = words[1:]
        elif len(words) == 2:
            name, value = words
            flags[name.removeprefix("--")] = value
    for name in COUNTS.keys() & flags.keys():
        try:
            flags[name] = COUNTS[name](flags[name])
        except ValueError:
            raise DataError(f"{file}: --{name} {flags[name]}: expected a number") from None
    return read_config(file), flags


# ---- budgets


def largest(cost, budget, top):
    """The largest integer up to `top` whose cost, which grows, is within the budget, or 0."""
    low = 0
    while low < top:
        middle = (low + top + 1) // 2
        if cost(middle) <= budget:
            low = middle
        else:
            top = middle - 1
    return low


def shorten(holders, notes):
    """Reduces all texts in holder["responses"] to TEXT bytes in total: those over a common length
    lose their middle."""
    texts = [text for holder in holders for text in holder["responses"] if text]
    sizes = [(len(text), len(text.encode(errors="replace"))) for text in texts]
    longest = max((n for n, _ in sizes), default=0)
    limit = largest(lambda most: sum(b * min(n, most) / n for n, b in sizes), TEXT, longest)
    if limit == longest:
        return
    notes.append(f"Responses longer than {limit} characters are shown without their middle")
    for holder in holders:
        holder["responses"] = [without_middle(text, limit) for text in holder["responses"]]


def without_middle(text, limit):
    """A text, or its first and last half of `limit` characters."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} [...] {text[len(text) - half :]}"


# ---- frames


class Frames:
    """The frames of a page: one contact sheet (a JPEG) for each medium and number of frames, within
    IMAGES bytes in total.

    known: what an earlier page has read, {(medium, counts): sheet, with a ladder of images}. It is
    brought up to date.
    """

    def __init__(self, known=None):
        self.known = {} if known is None else known
        self.media = {}  # {(path, data type, fps of a folder, segment): {counts: sheet number}}
        self.count = 0

    def want(self, r, counts):
        """Asks for frames of an entry's medium, as load_media picks them for counts = (fps,
        min_frames, max_frames) -> the number of their sheet; None for text."""
        if r["data_type"] == "text":
            return None
        segment = r.get("segment") and tuple(r["segment"])
        sheets = self.media.setdefault((r["path"], r["data_type"], r["fps"], segment), {})
        if counts not in sheets:
            sheets[counts] = self.count
            self.count += 1
        return sheets[counts]

    def sheets(self):
        """All sheets, in order of their numbers, each a dict; {error} if the medium cannot be read.

        of: number of frames.  seconds: of the video.  jpeg: base64, "" without room in the budget.
        width, height: of a frame.  at: indices of the frames shown.
        """
        wanted = [(medium, counts) for medium, sheets in self.media.items() for counts in sheets]
        for gone in self.known.keys() - set(wanted):
            del self.known[gone]
        unread = {medium: [] for medium, counts in wanted if (medium, counts) not in self.known}
        for medium in unread:
            unread[medium] = [c for c in self.media[medium] if (medium, c) not in self.known]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            read = pool.map(medium_sheets, unread.items())
            n = len(unread)
            for sheets in tqdm(read, "frames", n, leave=False, unit="medium", disable=n < 2):
                self.known |= sheets
        close_workers()
        found = {self.media[medium][c]: self.known[medium, c] for medium, c in wanted}
        ladders = {number: sheet.get("ladder", []) for number, sheet in found.items()}
        limit = largest(
            lambda most: sum(len(best(ladder, most)["jpeg"]) for ladder in ladders.values()),
            IMAGES,
            IMAGES,
        )
        shown = []
        for number in sorted(found):
            about = {key: x for key, x in found[number].items() if key != "ladder"}
            shown.append(about | best(ladders[number], limit))
        return shown


def best(ladder, limit):
    """The first, i.e. largest, image of a ladder that has at most `limit` bytes."""
    return next((image for image in ladder if len(image["jpeg"]) <= limit), {"jpeg": ""})


def medium_sheets(item):
    """A medium and its [counts], see Frames -> {(medium, counts): sheet, with a ladder of
    images}."""
    medium, wanted = item
    path, data_type, folder_fps, segment = medium
    sample = Sample("-", "", [], "free-form", data_type, path, "", fps=folder_fps, segment=segment)
    size = {"min_pixels": 28 * 28, "max_pixels": 64 * 28 * 28}
    decoded, out = {}, {}
    for counts in wanted:
        names = dict(zip(COUNTS, counts))
        try:
            media = load_media(sample, **names, **size, decoded=decoded)
        except DataError as e:
            out[medium, counts] = {"error": str(e).removeprefix("record -: ")}
            continue
        n = len(media.frames)
        out[medium, counts] = {
            "of": n,
            "seconds": round(media.seconds_per_grid / 2 * n, 2),
            "ladder": [contact_sheet(media.frames, *step) for step in SHEETS],
        }
    return out


def contact_sheet(frames, n, height, quality):
    """At most n of the frames (T, 3, H, W), evenly spaced, side by side in one JPEG."""
    T = len(frames)
    at = np.linspace(0, T - 1, min(n, T)).round().astype(int).tolist()
    images = [Image.fromarray(frame.numpy().transpose(1, 2, 0)) for frame in frames[at]]
    for image in images:
        image.thumbnail((2000, height if T > 1 else 2 * height))
    file = io.BytesIO()
    chroma = 0 if quality > 80 else 2  # subsampled in the smaller ones
    sheet = Image.fromarray(np.hstack(images))
    sheet.save(file, "JPEG", quality=quality, subsampling=chroma)
    jpeg = base64.b64encode(file.getvalue()).decode()
    return {"jpeg": jpeg, "width": images[0].width, "height": images[0].height, "at": at}


# ---- a training run


def training(run, flags, frames, notes):
    """log.jsonl and samples.jsonl -> what the page shows of them; asks `frames` for those of the
    groups."""
    log = read_lines(run / "log.jsonl", ["step"], step_misfit, notes)
    lines = read_lines(run / "samples.jsonl", ["step", "response"], sample_misfit, notes)
    lines.sort(key=lambda s: -s["step"])  # the newest first; within a step as they were written
    groups = [list(lines) for _, lines in groupby(lines, key=prompt_of)]
    kinds, shown = Counter(), []
    for group in groups:
        card = group_card(group)
        kinds[card["kind"]] += 1
        if kinds[card["kind"]] <= GROUPS:
            shown.append(card)
            if flags.keys() >= set(COUNTS) and "data_type" in group[0]:
                card["sheet"] = frames.want(group[0], tuple(flags[name] for name in COUNTS))
    shorten(shown, notes)
    curves = curves_of(log)
    own = [spec.rpartition(":")[2].partition("=")[0] for spec in flags.get("reward", [])]
    return {
        "alarms": alarms(log),
        "figures": figures(curves, log, flags),
        "curves": curves,
        "own": own,  # names of the rewards of --reward
        "groups": shown,
        "left_out": len(groups) - len(shown),
    }


def alarms(log):
    """What is wrong with the newest steps of a log -> {name: text}; docs/log.md says what to do."""
    newest = [entry for entry in log if entry["step"] > 0][-ALARM_STEPS:]

    def mean(key):
        """None if fewer than 3 steps have it."""
        values = [x[key] for x in newest if isinstance(x.get(key), (int, float))]
        return sum(values) / len(values) if len(values) >= 3 else None

    alone, cut = mean("zero_std_groups"), mean("truncated")
    entropy, mismatch = mean("entropy"), mean("mismatch")
    found = {}
    if alone == 1:
        found["no group teaches"] = "no group had an advantage, so nothing is learned"
    if cut is not None and cut > 0.5:
        found["truncated"] = f"{cut:.0%} of the responses were cut off at --max_new"
    if entropy is not None and entropy < 0.005:
        found["entropy gone"] = f"{entropy:.4f} nats a token: all responses are alike"
    if mismatch is not None and mismatch > 0.05:
        found["mismatch"] = f"log-probs of sampler and scorer differ by {mismatch:.3f} on average"
    return {name: f"{text} (last {len(newest)} steps)" for name, text in found.items()}


def curves_of(log):
    """The entries of a log -> {key: (steps, values)}; the numbers of a nested object have keys such
    as "seconds.step"."""
    curves = {}
    for entry in log:
        numbers = dict(entry)
        for key, value in entry.items():
            if isinstance(value, dict):
                numbers |= {f"{key}.{name}": x for name, x in value.items()}
        idle = entry.get("skipped_update") and entry.get("grad_norm") == 0
        for key, x in numbers.items():
            if key == "step" or not isinstance(x, (int, float)):
                continue
            if idle and x == 0 and key in GRADIENT:  # not computed
                continue
            steps, values = curves.setdefault(key, ([], []))
            steps.append(entry["step"])
            values.append(float(f"{x:.6g}"))
    return curves


def prompt_of(line):
    """What the responses to one prompt have in common."""
    return [line.get(key) for key in SAME]


def group_card(group):
    """The lines of samples.jsonl of one prompt -> its card: the prompt, the responses, and the
    rewards of each."""
    first = group[0]
    numbers = [numbers_of(line) for line in group]
    right = sum(n.get("accuracy", 0) > 0.5 for n in numbers)
    kept = ("step", "position", "orders", "probability_drops", "shuffled_accuracies")
    return {
        **{key: first[key] for key in kept if key in first},
        **texts(first, "id", "question", "answer"),
        "options": first.get("options") or [],
        "gold": gold(first),
        "kind": "wrong" if right == 0 else "right" if right == len(group) else "mixed",
        "responses": [s["response"] for s in group],
        "numbers": numbers,
    }


def numbers_of(line):
    """What a line says of its response in numbers: reward, its parts, bonus, advantage."""
    about_prompt = (*SAME, "fps")
    return {
        key: x for key, x in line.items() if isinstance(x, (int, float)) and key not in about_prompt
    }


def texts(line, *keys):
    """Those values of a line that are text: a bad record may hold anything."""
    return {key: line[key] for key in keys if isinstance(line.get(key), str)}


def gold(line):
    """The right answer of a line, in the form of `given`. A line without "gold" has the letter of
    its option, or None without options."""
    if "gold" in line or not line.get("options"):
        return line.get("gold")
    return choice_letter(line.get("answer") or "", line["options"])


def figures(curves, log, flags):
    """The key figures of a training run that its log has -> [(name, value, what it is)]."""
    values = {key: column for key, (_, column) in curves.items()}
    out = [("steps", str(log[-1]["step"]) if log else "0", f"of {flags.get('steps', '?')}")]
    name = "accuracy" if "accuracy" in values else "loss"
    if name in values:
        n = min(10, len(values[name]))
        first, last = sum(values[name][:n]) / n, sum(values[name][-n:]) / n
        means = f"means of the first and last {n} steps"
        out.append((f"training {name}", f"{first:.3f} → {last:.3f}", means))
    if "eval_accuracy" in values:
        steps, held_out = curves["eval_accuracy"]
        counts = []
        for key, what in (("eval_questions", "questions"), ("eval_failures", "failed")):
            if key in values:
                counts.append(f"{values[key][-1]:.0f} {what}")
        about = f"steps {steps[0]} and {steps[-1]}"
        if counts:
            about += f"; {', '.join(counts)}"
        out.append(("held-out accuracy", f"{held_out[0]:.3f} → {held_out[-1]:.3f}", about))
    if "skipped_samples" in values:
        skipped = sum(values["skipped_samples"])
        out.append(("skipped samples", f"{skipped:.0f}", "could not be loaded"))
    if "skipped_update" in values:
        idle = values["skipped_update"]
        out.append(("steps without an update", f"{sum(map(bool, idle))}", f"of {len(idle)}"))
    if "seconds.step" in values:
        evaluations = values.get("seconds.evaluate")
        about = f"and {clock(sum(evaluations))} of evaluations" if evaluations else ""
        out.append(("time", clock(sum(values["seconds.step"])), about))
    return out


def clock(seconds):
    """A duration as text, in the unit that suits it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


# ---- an evaluation


def evaluation(run, frames, notes):
    """METHOD.rankN.jsonl and summary.json -> what the page shows of them; asks `frames` for those
    of the questions."""
    summary, lines = read_evaluation(run, notes)
    everything = [r for of_method in lines.values() for r in of_method.values()]
    questions = questions_of(everything)
    with_frames = most_interesting(everything, notes)
    want_rounds([r for r in everything if r["record"] in with_frames], frames)
    rounds = [part for r in everything for part in r["rounds"]]
    for part in rounds:
        part["logps"] = [x if x is None else round(x, 3) for x in part["logps"]]
    shorten(rounds, notes)
    kept = ("record", "given", "score", "failure", "frames", "visual_tokens", "seconds", "rounds")
    methods = []
    for name, of_method in lines.items():
        results = [{key: r[key] for key in kept if key in r} for _, r in sorted(of_method.items())]
        methods.append(summarize([*of_method.values()], name) | {"results": results})
    return {
        **{key: summary.get(key) for key in ("model", "data", "constant_answer")},
        "questions": questions,
        "methods": methods,
    }


def want_rounds(lines, frames):
    """Asks for the frames of every round of these lines."""
    for r in lines:
        for part in r["rounds"]:
            part["sheet"] = frames.want(r, (math.inf, part["frames"], part["frames"]))


def read_evaluation(run, notes):
    """The files of an evaluation -> (summary, {method: {record: line}}, in the summary's order);
    the summary is {} if there is none yet."""
    summary, order = {}, []
    with suppress(OSError, ValueError, TypeError, KeyError, OverflowError):
        summary = dict(parse((run / "summary.json").read_text(encoding="utf-8")))
        order = [m["method"] for m in summary["methods"]]
    if not summary:
        notes.append("No summary.json yet: these are the questions answered so far")
    lines = {}
    for file in sorted(run.glob("*.rank*.jsonl")):
        of_method = lines.setdefault(file.name.split(".rank")[0], {})
        for r in read_lines(file, ANSWER, answer_misfit, notes):
            of_method[r["record"]] = r
    names = sorted((name for name in lines if lines[name]), key=natural)
    names.sort(key=lambda name: order.index(name) if name in order else len(order))
    return summary, {name: lines[name] for name in names}


def questions_of(lines):
    """The questions that lines answer -> {record: question}."""
    questions = {}
    for r in lines:
        question, about = questions.setdefault(r["record"], {}), r.get("about") or {}
        question |= texts(r, "id", "path", "problem_type", "data_type", "question", "answer")
        question |= {"options": r.get("options") or [], "about": texts(about, *about)}
        if question.get("gold") is None:
            question["gold"] = gold(r)
    return questions


def most_interesting(lines, notes):
    """The records that are shown with frames, at most QUESTIONS: those that some method failed, got
    wrong or took several rounds for, then the first ones."""
    interesting, records = set(), set()
    for r in lines:
        records.add(r["record"])
        if r["failure"] is not None or r["score"] <= 0.5 or len(r["rounds"]) > 1:
            interesting.add(r["record"])
    if len(records) > QUESTIONS:
        notes.append(
            f"Frames of {QUESTIONS} of the {len(records)} questions, failed, wrong and escalated "
            "ones first"
        )
    ranked = sorted(interesting) + sorted(records - interesting)
    return set(ranked[:QUESTIONS])


# ---- the page


def page(run):
    """The HTML of a run folder. Raises ValueError if there is no such folder, or neither a log nor
    answers in it."""
    return html(contents(run))


def contents(run, every=None, known=None):
    """What the page of a run folder shows, a dict. Raises ValueError, see `page`.

    every: seconds after which the page reloads itself, or None.  known: see Frames.
    """
    run = Path(run)
    if not run.is_dir():
        raise ValueError(f"{run}: no such folder")
    trained, evaluated = (run / "log.jsonl").exists(), any(run.glob("*.rank*.jsonl"))
    if not trained and not evaluated:
        raise ValueError(
            f"{run}: neither a training log (log.jsonl) nor answers of an evaluation "
            "(METHOD.rankN.jsonl)"
        )
    config, flags = read_flags(run)
    frames, notes = Frames(known), []
    return {
        "run": str(run),
        "written": time.strftime("%Y-%m-%d %H:%M:%S" if every else "%Y-%m-%d %H:%M"),
        "every": every,
        "config": config,
        "algo": flags.get("algo"),
        "notes": notes,
        "training": training(run, flags, frames, notes) if trained else None,
        "evaluation": evaluation(run, frames, notes) if evaluated else None,
        "sheets": frames.sheets(),
    }


def asked_page(path, model, lines):
    """The HTML of questions about one medium, as ask.py asks them.

    lines: of eval.line; with a score and an answer of None if the right answer is not known.
    """
    frames, notes = Frames(), []
    want_rounds(lines, frames)
    shorten([part for r in lines for part in r["rounds"]], notes)
    shown = {
        "run": path,
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "asked": {"model": model, "questions": questions_of(lines), "results": lines},
        "notes": notes,
        "sheets": frames.sheets(),
    }
    return html(shown)


def html(shown):
    """The page that shows these contents."""
    text = json.dumps(shown, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = text.replace("<", "\\u003c")  # no </script>
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    head, tail = template.split("DATA</script>")
    head = head.replace("<title>TITLE", f"<title>{escape(shown['run'])}")
    return f"{head}{text}</script>{tail}"


# ---- a run that goes on


def watch(run, out, every, opened):
    """Writes the page again whenever the run has written, until it is finished or ctrl-C; then once
    more, as a page that stands still. Prints alarms as they come and go.

    opened: a function to call once there is a page.
    """
    known, drawn, told, shown = {}, None, {}, None
    print(f"{out}: redrawn every {every:g} s while the run goes on; ctrl-C ends", flush=True)
    try:
        while shown is None or not finished(run, shown):
            written = {}
            for name in ("log.jsonl", "samples.jsonl", "summary.json", "*.rank*.jsonl"):
                written |= {file: file.stat().st_size for file in run.glob(name)}
            if written and written != drawn:
                shown = contents(run, every, known)
                write_whole(out, html(shown), errors="replace")
                told = tell(shown, told)
                if drawn is None:
                    opened()
                drawn = written
            time.sleep(every)
    except KeyboardInterrupt:
        print()
    if drawn is not None:
        write_whole(out, html(contents(run, None, known)), errors="replace")


def tell(shown, before):
    """Prints the alarms of a page that were not there before, and those that are over -> {name:
    text} of today's."""
    now = shown["training"]["alarms"] if shown["training"] else {}
    for name in now:
        if name not in before:
            print(f"alarm: {name}: {now[name]}", flush=True)
    for name in before:
        if name not in now:
            print(f"over: {name}", flush=True)
    return now


def finished(run, shown):
    """Whether a run has made all its steps, or an evaluation has its summary."""
    if shown["training"]:
        _, done, of = shown["training"]["figures"][0]
        return of == f"of {done}"
    summary, answers = run / "summary.json", run.glob("*.rank*.jsonl")
    newest = max(file.stat().st_mtime for file in answers)
    return summary.exists() and summary.stat().st_mtime >= newest


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", help="folder of a training run or of an evaluation")
    parser.add_argument("--out", help="file of the page (default: RUN/report.html)")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    parser.add_argument("--watch", action="store_true", help="redraw it while the run goes on")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between (default: 10)")
    args = parser.parse_args(argv)
    if not 0.1 <= args.every <= 86400:
        parser.error(f"--every {args.every:g}: expected seconds, at least 0.1, at most 86400")
    run = Path(args.run)
    out = Path(args.out or run / "report.html")

    def opened():
        if args.open:
            webbrowser.open(out.resolve().as_uri())

    try:
        if args.watch and run.is_dir():
            watch(run, out, args.every, opened)
        else:
            shown = contents(run)
            tell(shown, {})
            write_whole(out, html(shown), errors="replace")
            opened()
    except (ValueError, OSError) as e:
        raise SystemExit(f"error: {e}") from e
    if out.exists():
        print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
