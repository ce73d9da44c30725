"""One self-contained HTML page of a run: no server, no network; to open, to keep, to send.

    python report.py out/toy/grpo            a training run: its figures, curves, and sampled responses with their rewards
    python report.py out/toy/eval --open     an evaluation: its methods, and every question: frames, votes, responses
The page is RUN/report.html; a run that is still going on has one too. What it shows stands in its address, so a view can be kept
as a link: report.html#method=s2d-4-16&show=wrong. The frames are those that were shown, read again from the videos; they and the
responses are cut down to a budget of bytes, and the page says where.
"""

import argparse
import base64
import io
import json
import math
import os
import re
import shlex
import time
import webbrowser
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from html import escape
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace

import numpy as np
from PIL import Image
from tqdm import tqdm

from data import FOLDER_FPS, DataError, Sample, load_media
from eval import summarize
from video import close_worker

IMAGES, TEXT = 6_500_000, 1_500_000  # bytes of all frames and of all responses of a page
QUESTIONS = 500  # whose frames are shown, at most: failed, wrong and escalated ones first
SAMPLES = 100  # of a training run, right ones and wrong ones each: the newest
SHEETS = ((16, 112, 85), (16, 84, 70), (12, 64, 50), (12, 48, 40), (8, 48, 35), (4, 40, 30))  # frames, height, JPEG quality


def read_lines(path, notes):
    """The objects of a .jsonl file, NaN as None; [] without the file. A last line without its end is one that is being written
    and is left out; any other that cannot be read is too, and counted in `notes`."""
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else [""]
    objects = []
    for line in lines:
        with suppress(ValueError, TypeError):
            objects.append(dict(json.loads(line, parse_constant=lambda _: None)))
    if len(objects) < len(lines):
        notes.append(f"{path.name}: {len(lines) - len(objects)} lines that cannot be read are left out")
    return objects


def largest(cost, budget, top):
    """The largest integer up to `top` whose cost, a growing function, is within the budget; 0 if there is none."""
    low = 0
    while low < top:
        middle = (low + top + 1) // 2
        low, top = (middle, top) if cost(middle) <= budget else (low, middle - 1)
    return low


def shorten(holders, notes):
    """Cuts the texts in every holder["responses"] to TEXT bytes in all: from the middle of those over a common length."""
    sizes = [(len(text), len(text.encode(errors="replace"))) for holder in holders for text in holder["responses"] if text]
    longest = max((n for n, _ in sizes), default=0)
    limit = largest(lambda most: sum(b * min(n, most) / n for n, b in sizes), TEXT, longest)
    if limit < longest:
        notes.append(f"Responses longer than {limit} characters are shown without their middle")
        cut = lambda text: text if len(text) <= limit else f"{text[: limit // 2]} [...] {text[len(text) - limit // 2 :]}"
        for holder in holders:
            holder["responses"] = [cut(text) for text in holder["responses"]]


# ---- frames

class Frames:
    """The frames of a page: one JPEG contact sheet for every medium and number of frames, within IMAGES bytes in all."""

    def __init__(self):
        self.media, self.count = {}, 0  # {(path, data type, fps of a folder): {(fps, min_frames, max_frames): sheet number}}

    def want(self, path, data_type, folder_fps, counts):
        """Asks for the frames that load_media gives for these counts, (fps, min_frames, max_frames) -> number of their sheet."""
        sheets = self.media.setdefault((path, data_type, folder_fps), {})
        self.count += counts not in sheets
        return sheets.setdefault(counts, self.count - 1)

    def sheets(self):
        """All sheets, by number: {of: number of frames, seconds: of the video, jpeg: base64, width, height: of a frame,
        at: those shown}, without the last four when the budget has no room, or {error} when the medium cannot be read."""
        found, threads = {}, min(8, os.cpu_count() or 1)
        together = Barrier(threads)
        with ThreadPoolExecutor(threads) as pool:
            read = pool.map(_sheets, self.media.items())
            for sheets in tqdm(read, total=len(self.media), desc="frames", unit="medium", disable=not self.media):
                found |= sheets
            [*pool.map(lambda _: (together.wait(), close_worker()), range(threads))]  # each thread ends its decoder process
        ladders = {number: sheet.pop("ladder", []) for number, sheet in found.items()}
        pick = lambda ladder, limit: next((step for step in ladder if len(step["jpeg"]) <= limit), {"jpeg": ""})
        limit = largest(lambda most: sum(len(pick(x, most)["jpeg"]) for x in ladders.values()), IMAGES, IMAGES)
        return [found[number] | pick(ladders[number], limit) for number in sorted(found)]


def _sheets(item):
    """One medium -> {number: sheet, with a `ladder` of images from large to small}."""
    (path, data_type, folder_fps), wanted = item
    sample, decoded, out = Sample("-", "", [], "free-form", data_type, path, "", fps=folder_fps), {}, {}
    for (fps, least, most), number in wanted.items():
        try:
            media = load_media(sample, fps=fps, min_frames=least, max_frames=most, min_pixels=28 * 28, max_pixels=64 * 28 * 28,
                               decoded=decoded)
        except DataError as e:
            out[number] = {"error": str(e).removeprefix("record -: ")}
            continue
        T, ladder = len(media.frames), []
        for n, height, quality in SHEETS:
            at = np.linspace(0, T - 1, min(n, T)).round().astype(int).tolist()
            small = [Image.fromarray(frame.numpy().transpose(1, 2, 0)) for frame in media.frames[at]]  # from (3, H, W)
            for image in small:
                image.thumbnail((2000, height if T > 1 else 2 * height))
            file = io.BytesIO()
            chroma = 0 if quality > 80 else 2  # halved on the smaller ones
            Image.fromarray(np.hstack(small)).save(file, "JPEG", quality=quality, subsampling=chroma)
            jpeg = base64.b64encode(file.getvalue()).decode()
            ladder.append(dict(jpeg=jpeg, width=small[0].width, height=small[0].height, at=at))
        out[number] = dict(of=T, seconds=round(media.seconds_per_grid / 2 * T, 2), ladder=ladder)
    return out


# ---- a training run

def training(run, flags, frames, notes):
    """log.jsonl and samples.jsonl -> what the page shows of them. `frames` is asked for those of the samples."""
    log, curves = [entry for entry in read_lines(run / "log.jsonl", notes) if "step" in entry], {}
    for entry in log:
        parts = {f"{key}.{name}": x for key, value in entry.items() if isinstance(value, dict) for name, x in value.items()}
        for key, x in (entry | parts).items():
            if isinstance(x, (int, float)) and key != "step":
                curve = curves.setdefault(key, ([], []))  # steps, values
                curve[0].append(entry["step"])
                curve[1].append(float(f"{x:.6g}"))
    samples = read_lines(run / "samples.jsonl", notes)[::-1]
    right = [(s.get("accuracy") or 0) > 0.5 for s in samples]
    newest = [i for kind in (True, False) for i in [i for i, x in enumerate(right) if x == kind][:SAMPLES]]
    shown = [samples[i] for i in sorted(newest)]
    for s in shown:
        s["responses"] = [s.pop("response", "")]
        image = re.search(r"\.(png|jpe?g|webp|bmp|gif)$", s["path"], re.IGNORECASE)
        kind = "frame" if Path(s["path"]).is_dir() else "image" if image else "video"
        if "fps" in flags:
            counts = float(flags["fps"]), int(flags["min_frames"]), int(flags["max_frames"])
            s["sheet"] = frames.want(s["path"], kind, FOLDER_FPS, counts)
    shorten(shown, notes)
    return {"figures": figures(curves, log, flags), "curves": curves, "samples": shown, "left_out": len(samples) - len(shown)}


def figures(curves, log, flags):
    """The headline of a training run -> [(name, value, what it is)], of what the log holds."""
    column = lambda key: curves.get(key, ([], []))[1]
    clock = lambda s: f"{s:.1f} s" if s < 60 else f"{s / 60:.1f} min" if s < 3600 else f"{s / 3600:.1f} h"
    name = "accuracy" if "accuracy" in curves else "loss"
    steps, held_out = curves.get("eval_accuracy", ([], []))
    n, out = min(10, len(column(name))), [("steps", str(log[-1]["step"]) if log else "0", f"of {flags.get('steps', '?')}")]
    if n:
        first, last = sum(column(name)[:n]) / n, sum(column(name)[-n:]) / n
        out.append((f"training {name}", f"{first:.3f} → {last:.3f}", f"means of the first and last {n} steps"))
    if held_out:
        questions, failures = (f"{sum(column(key)[-1:]):.0f}" for key in ("eval_questions", "eval_failures"))
        out.append(("held-out accuracy", f"{held_out[0]:.3f} → {held_out[-1]:.3f}",
                    f"steps {steps[0]} and {steps[-1]}; {questions} questions, {failures} failed"))
    skipped, without = (f"{sum(column(key)):.0f}" for key in ("skipped_samples", "skipped_update"))
    return [*out, ("skipped samples", skipped, f"could not be loaded; {without} steps without an update"),
            ("time", clock(sum(column("seconds.step"))), f"and {clock(sum(column('seconds.evaluate')))} of evaluations")]


# ---- an evaluation

def evaluation(run, frames, notes):
    """METHOD.rankN.jsonl and summary.json -> what the page shows of them. `frames` is asked for those of the questions."""
    summary, lines, questions, interesting = {}, {}, {}, set()
    with suppress(OSError, ValueError):
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    if not summary:
        notes.append("No summary.json yet: these are the questions answered so far")
    for file in sorted(run.glob("*.rank*.jsonl")):
        lines.setdefault(file.name.split(".rank")[0], {}).update((r["record"], r) for r in read_lines(file, notes))
    order = [m.get("method") for m in summary.get("methods", [])]
    natural = lambda name: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", name)]
    names = sorted(filter(lines.get, lines), key=lambda x: (order.index(x) if x in order else len(order), natural(x)))
    everything = [r for name in names for r in lines[name].values()]
    for r in everything:
        about = ("id", "path", "problem_type", "data_type", "question", "options", "about", "answer")
        questions.setdefault(r["record"], {}).update((key, r[key]) for key in about if key in r)
        if r["failure"] is not None or r["score"] <= 0.5 or len(r["rounds"]) > 1:
            interesting.add(r["record"])
    with_frames = set(sorted(questions, key=lambda record: (record not in interesting, record))[:QUESTIONS])
    if len(questions) > QUESTIONS:
        notes.append(f"Frames of {QUESTIONS} of the {len(questions)} questions, failed, wrong and escalated ones first")
    for r in everything:
        for part in r["rounds"]:
            part["logps"] = [x if x is None else round(x, 3) for x in part["logps"]]
            if r["record"] in with_frames:
                part["sheet"] = frames.want(r["path"], r["data_type"], r["fps"], (math.inf, part["frames"], part["frames"]))
    shorten([part for r in everything for part in r["rounds"]], notes)
    keep = ("record", "given", "score", "failure", "frames", "visual_tokens", "seconds", "rounds")
    results = lambda name: [{key: r[key] for key in keep if key in r} for _, r in sorted(lines[name].items())]
    methods = [summarize([*lines[name].values()], SimpleNamespace(name=name)) | {"results": results(name)} for name in names]
    return {**{key: summary.get(key) for key in ("model", "data", "constant_answer")}, "questions": questions, "methods": methods}


# ---- the page

def page(run):
    """The HTML of a run folder. Raises ValueError: no such folder, or neither a log nor results in it."""
    run = Path(run)
    if not run.is_dir():
        raise ValueError(f"{run}: no such folder")
    trained, evaluated = (run / "log.jsonl").exists(), any(run.glob("*.rank*.jsonl"))
    if not trained and not evaluated:
        raise ValueError(f"{run}: neither a training log (log.jsonl) nor answers of an evaluation (METHOD.rankN.jsonl)")
    config = (run / "config.txt").read_text(encoding="utf-8") if (run / "config.txt").exists() else ""
    flags = dict(words for line in config.splitlines() if len(words := shlex.split(line.removeprefix("--"))) == 2)
    frames, notes = Frames(), []
    D = {"run": str(run), "written": time.strftime("%Y-%m-%d %H:%M"), "config": config, "algo": flags.get("algo"), "notes": notes,
         "training": training(run, flags, frames, notes) if trained else None,
         "evaluation": evaluation(run, frames, notes) if evaluated else None, "sheets": frames.sheets()}
    blob = json.dumps(D, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")  # no </script>
    alone = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"  # nothing from elsewhere
    return ('<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f'<meta http-equiv="Content-Security-Policy" content="{alone}">'
            f'<title>{escape(str(run))}</title><style>{STYLE}</style><main><noscript>This page needs JavaScript.</noscript>'
            f'</main><script type="application/json">{blob}</script><script>{SCRIPT}</script></html>\n')


STYLE = """
:root { color-scheme: light dark; --paper: #fcfcfa; --card: #fff; --ink: #1d2125; --faint: #646c75; --line: #dfe1e0;
  --right: #1d7146; --wrong: #b3372b; --failed: #8a6100; --c0: #2b66b0; --c1: #c65a1e; --c2: #2e8b62; --c3: #9a4f93;
  --c4: #a98200; --c5: #4f9fb5; --c6: #6d747c; --c7: #b2456e; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181b; --card: #1c2024; --ink: #e4e6e7; --faint: #979fa7;
  --line: #32383d; --right: #6cc797; --wrong: #f08b7d; --failed: #e0b04a; --c0: #7ab0f0; --c1: #ec9560; --c2: #68c79b;
  --c3: #cf92ca; --c4: #d9bb4e; --c5: #7fcbdf; --c6: #a9b1b9; --c7: #ec8db0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
main { max-width: 1180px; margin: 0 auto; padding: 24px clamp(12px, 2vw, 24px) 80px; }
h1, h2 { font: 600 27px/1.25 Charter, "Iowan Old Style", "Palatino Linotype", Georgia, serif; margin: 0; }
h2 { font-size: 20px; margin: 36px 0 10px; padding-top: 14px; border-top: 1px solid var(--line); }
h3 { font-size: 14px; margin: 0; } p, figure, ul { margin: 6px 0; } b { font-weight: 600; } summary { cursor: pointer; }
small, .note, figcaption, dt, th { color: var(--faint); font-size: 13px; font-weight: 400; }
pre { white-space: pre-wrap; margin: 4px 0; font: 12.5px/1.5 ui-monospace, monospace; }
a { color: inherit; text-decoration-color: var(--faint); text-underline-offset: 3px; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); padding: 1px 0 0 1px; }
dl div { background: var(--card); border: 1px solid var(--line); margin: -1px 0 0 -1px; padding: 10px 14px; }
dd { margin: 0; } dd b { font-size: 20px; } dl, table, .chart { font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; margin: 10px 0; } table { border-collapse: collapse; } td svg { width: 150px; height: 14px; }
th, td { text-align: right; padding: 4px 0 4px 24px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(290px, 100%), 1fr)); gap: 14px; }
.chart, .card { background: var(--card); border: 1px solid var(--line); padding: 12px 14px; }
.chart { display: flex; flex-direction: column; } .chart > svg { margin-top: auto; touch-action: pan-y; }
.chart text { font-size: 10px; fill: var(--faint); } .legend { font-size: 12px; color: var(--faint); }
.legend span { margin-right: 12px; white-space: nowrap; } .legend b { color: var(--ink); }
.legend i { display: inline-block; width: 12px; height: 3px; margin: 0 5px 3px 0; }
line { stroke: var(--line); } .cursor { stroke: var(--faint); } .interval { stroke: var(--c0); stroke-width: 2; }
.row { display: flex; flex-wrap: wrap; gap: 2px 14px; align-items: baseline; } .controls { gap: 8px; margin: 10px 0; }
button, select, input { font: inherit; font-size: 14px; color: inherit; background: var(--card); border: 1px solid var(--line);
  border-radius: 4px; padding: 4px 10px; max-width: 100%; } button { cursor: pointer; }
button[aria-pressed=true] { background: var(--ink); color: var(--paper); } :focus-visible { outline: 2px solid var(--c0); }
li { --verdict: transparent; } .chip { --verdict: var(--line); }
.chip { border: 1px solid var(--verdict); border-radius: 12px; padding: 0 10px; }
.right { --verdict: var(--right); } .wrong { --verdict: var(--wrong); } .failed { --verdict: var(--failed); }
.card { border-left: 4px solid var(--verdict); margin-bottom: 14px; } .badge { color: var(--verdict); }
.question { font-size: 16px; white-space: pre-wrap; } ul { list-style: none; padding: 0; }
li, .response { padding-left: 8px; border-left: 3px solid var(--verdict); } .response { border-color: var(--line); }
section { border-top: 1px solid var(--line); margin-top: 10px; padding-top: 8px; }
.strip { display: grid; grid-template-columns: repeat(auto-fill, minmax(84px, 1fr)); gap: 3px; max-width: calc(var(--n)*140px); }
.strip i { aspect-ratio: var(--ratio); background: var(--sheet) 0 0 / calc(100% * var(--n)) 100%; }
.tiny i { image-rendering: pixelated; }
"""

SCRIPT = r"""
"use strict";
const D = JSON.parse(document.querySelector("script").textContent), main = document.querySelector("main");
// h("p.note", {title: "..."}, children): what a model or a data set wrote becomes text or an attribute, never HTML
const maker = (space) => (name, ...rest) => {
  const [tag, ...classes] = name.split("."), element = document.createElementNS(space, tag);
  const attributes = rest[0]?.constructor === Object ? rest.shift() : {};
  if (classes.length) element.setAttribute("class", classes.join(" "));
  for (const [key, value] of Object.entries(attributes))
    if (key.startsWith("on")) element[key] = value; else element.setAttribute(key, value);
  element.append(...rest.flat(9).filter((child) => child != null && child !== false));
  return element;
};
const h = maker("http://www.w3.org/1999/xhtml"), s = maker("http://www.w3.org/2000/svg");
const fixed = (x, digits = 3) => typeof x === "number" ? x.toFixed(digits) : "–";
const short = (x) => x && (Math.abs(x) >= 1e5 || Math.abs(x) < 1e-3) ? x.toExponential(1) : `${+(x ?? NaN).toPrecision(3)}`;
const count = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`, mean = (xs) => xs.reduce((a, b) => a + b, 0) / xs.length;
const table = (...rows) => h("div.scroll", h("table", rows.map((row, i) => h("tr", row.map((x) => h(i ? "td" : "th", x))))));
const add = (...children) => main.append(...children.flat().filter(Boolean));
const BADGES = { right: "✓ right", wrong: "✗ wrong", failed: "! failed" };
const card = (kind, attributes, head, ...rest) => h(`article.card.${kind}`, attributes,
  h("div.row", h("b.badge", BADGES[kind]), head), rest);

// ---- what is shown stands in the address: #method=greedy-16&show=wrong&q=lamp
const views = [], redraw = () => views.forEach((view) => view()), state = () => new URLSearchParams(location.hash.slice(1));
const link = (changes) => {
  const all = Object.entries({ ...Object.fromEntries(state()), ...changes });
  return `#${new URLSearchParams(all.filter(([, value]) => value !== ""))}`;
};
const go = (changes) => { history.replaceState(null, "", link({ record: "", ...changes })); redraw(); };
addEventListener("hashchange", redraw);

// a button for each set of items; of the set that the address names, the cards, 20 at a time
function cards(sets, draw, choices, place, shown = 20) {
  const chosen = state().get("show") in sets ? state().get("show") : "all", items = sets[chosen];
  choices.replaceChildren(...Object.entries(sets).map(([name, { length }]) => h("button", { "aria-pressed": name === chosen,
    onclick: () => go({ show: name === "all" ? "" : name }) }, `${BADGES[name] || name} ${length}`)));
  place.replaceChildren(...items.slice(0, shown).map(draw));
  if (items.length > shown) place.append(h("button", { onclick: () => cards(sets, draw, choices, place, shown + 20) },
    `more (${items.length - shown} left)`));
}

function strip(number) {
  const f = D.sheets[number];
  if (!f) return null;
  if (!f.jpeg) return h("p.note", f.error ? `frames not readable: ${f.error}` : `${f.of} frames, no room for them here`);
  const n = f.at.length, name = f.of > 1 ? `${n} of ${f.of} frames, ${fixed(f.seconds, 1)} s of video` : "the image";
  const cells = f.at.map((k, i) => h("i", { style: `background-position: ${n > 1 ? 100 * i / (n - 1) : 0}% 0`,
    title: f.of > 1 ? `frame ${k + 1} of ${f.of}, at about ${fixed(k / (f.of - 1) * f.seconds, 1)} s` : name }));
  return h("figure", h(f.height < 60 ? "div.strip.tiny" : "div.strip", { role: "img", "aria-label": name,
    style: `--sheet: url(data:image/jpeg;base64,${f.jpeg}); --n: ${n}; --ratio: ${f.width} / ${f.height}` }, cells),
    h("figcaption", name));
}

// ---- curves
const CHARTS = { accuracy: ["accuracy", "eval_accuracy", "shuffled_accuracy"], reward: ["reward"],
  "parts of the reward": ["format", "length_bonus", "temporal_bonus"], loss: ["loss", "eval_loss"],
  "temporal test": ["temporal_passed", "temporal_vacuous", "temporal_not_applicable"] };
const readouts = [], hover = (step) => readouts.forEach((show) => show(step));

function ticks(low, high, log) {
  const raw = (high - low) / 4, power = 10 ** Math.floor(Math.log10(raw)), out = [];
  const by = log ? Math.max(1, Math.round(raw)) : [1, 2, 5, 10].map((m) => m * power).find((x) => x >= raw * 0.99);
  for (let k = Math.ceil(low / by - 1e-6); k * by <= high + by * 1e-6; k++) out.push(+(k * by).toPrecision(9));
  return out;
}

// series: [{name, x: [steps], y: [values], dots: a few points, not a noisy line}]
function chart(title, series) {
  const W = 320, H = 140, L = 40, R = 12, T = 8, B = 18, all = series.flatMap((c) => c.y), xs = series.flatMap((c) => c.x);
  const min = (v) => v.reduce((a, b) => Math.min(a, b)), max = (v) => v.reduce((a, b) => Math.max(a, b));
  const first = min(xs), last = Math.max(max(xs), first + 1), log = min(all) > 0 && max(all) > 50 * min(all);
  let [low, high] = log ? [Math.log10(min(all)), Math.log10(max(all))] : [min(all), max(all)];
  if (!log && low > 0 && low < high / 2) low = 0;
  if (!log && low >= 0 && high <= 1 && high > 0.5) [low, high] = [0, 1];
  if (low === high) [low, high] = [low - 1, high + 1];
  const px = (x) => L + (x - first) / (last - first) * (W - L - R);
  const py = (y) => T + (high - (log ? Math.log10(y) : y)) / (high - low) * (H - T - B);
  const smooth = (y, w = y.length / 40 | 0) => y.map((_, i) => mean(y.slice(Math.max(0, i - w), i + w + 1)));
  const text = (value, x, y, anchor) => s("text", { x, y, "text-anchor": anchor }, value);
  const svg = s("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": title },
    ticks(low, high, log).map((v) => log ? 10 ** v : v).map((v) =>
      [s("line", { x1: L, x2: W - R, y1: py(v), y2: py(v) }), text(short(v), L - 5, py(v) + 3, "end")]),
    ticks(first, last).map((v) => text(v, px(v), H - 4, "middle")),
    series.map((c, i) => {
      const line = (y, width, opacity) => s("path", { fill: "none", stroke: `var(--c${i % 8})`, "stroke-width": width, opacity,
        d: y.map((v, k) => `${k ? "L" : "M"}${px(c.x[k]).toFixed(1)} ${py(v).toFixed(1)}`).join("") });
      const dot = (v, k) => s("circle", { cx: px(c.x[k]), cy: py(v), r: 2.5, fill: `var(--c${i % 8})` });
      return c.dots ? [line(c.y, 1.5, 1), c.y.map(dot)] : [line(c.y, 1, 0.3), line(smooth(c.y), 1.6, 1)];
    }));
  const cursor = svg.appendChild(s("line.cursor", { y1: T, y2: H - B })), legend = h("div.legend"), at = h("small");
  readouts.push((step) => {  // the values at a step, or without one the last
    const to = step ?? last, near = (c) => c.x.reduce((best, x, i) => Math.abs(x - to) < Math.abs(c.x[best] - to) ? i : best, 0);
    legend.replaceChildren(...series.map((c, i) => h("span", h("i", { style: `background: var(--c${i % 8})` }),
      (series.length > 1 || c.name !== title) && `${c.name} `, h("b", short(c.y[near(c)])))));
    at.textContent = step == null ? "" : `, step ${series[0].x[near(series[0])]}`;
    cursor.setAttribute("visibility", step == null ? "hidden" : "visible");
    for (const end of ["x1", "x2"]) cursor.setAttribute(end, px(to));
  });
  svg.onpointermove = svg.onpointerdown = ({ clientX }) => {
    const { left, width } = svg.getBoundingClientRect(), x = (clientX - left) / width * W;
    hover(Math.min(last, Math.max(first, first + (x - L) / (W - L - R) * (last - first))));
  };
  svg.onpointerleave = () => hover(null);
  return h("div.chart", { "data-chart": title }, h("h3", title, h("small", log && ", log scale"), at), legend, svg);
}

function trainingPage({ figures, curves, samples, left_out }) {
  const series = (keys, dots) => keys.filter((key) => curves[key]).map((key) => ({ name: key.split(".").pop(),
    x: curves[key][0], y: curves[key][1], dots: dots || key.startsWith("eval_") }));
  const under = (prefix) => Object.keys(curves).filter((key) => key.startsWith(prefix) && key !== "seconds.evaluate");
  const grouped = Object.values(CHARTS).flat(), drawn = [], flat = [];
  const alone = Object.keys(curves).filter((key) => !/^eval_|\./.test(key) && !grouped.includes(key)).map((key) => [key, [key]]);
  for (const [title, keys] of [...Object.entries(CHARTS), ...alone]) {
    const lines = series(keys), moving = lines.filter((c) => c.dots || c.y.some((y) => y !== c.y[0]));
    flat.push(...lines.filter((c) => !moving.includes(c)).map((c) => `${c.name} ${short(c.y[0])}`));
    if (moving.length) drawn.push(chart(title, moving));
  }
  const sources = series(under("eval_by_source."), true), phases = series(under("seconds."));
  if (sources.length > 1 && sources.length < 9) drawn.splice(1, 0, chart("held-out accuracy by source", sources));
  if (phases.length) drawn.push(chart("seconds of a step, by phase", phases));
  const figure = ([name, value, what]) => h("div", h("dt", name), h("dd", h("b", value), h("br"), h("small", what)));
  add(h("dl", figures.map(figure)),
    h("h2", "Curves"), h("p.note", "Faint: every step; strong: a running mean; dots: held out. Point at one to read its values."),
    h("div.charts", drawn), h("p.note", flat.length > 0 && `The same at every step: ${flat.join(", ")}.`));
  if (sources.length) main.append(h("h2", "Held-out accuracy by source"), table(["source", "first", "last"],
    ...sources.map(({ name, y }) => [name, fixed(y[0]), fixed(y.at(-1))])));
  if (!samples.length) return;
  const kind = (x) => x.accuracy > 0.5 ? "right" : "wrong", choices = h("div.row.controls"), place = h("div");
  const numbers = ["reward", "accuracy", "format", "length_bonus", "temporal_bonus"];
  const draw = (x) => card(kind(x), {}, [`step ${x.step}`, h("small", `record ${x.id}`),
    numbers.filter((key) => x[key] != null).map((key) => h("small", `${key} `, h("b", short(x[key]))))],
    h("p.question", x.question), strip(x.sheet), h("pre.response", x.responses), h("small", `right answer: ${x.answer}`),
    x.orders && h("p.note", `with its frames in the order ${x.orders.map((o) => o.map((i) => i + 1).join(" ")).join(" / ")}: `,
      `accuracies ${x.shuffled_accuracies.map(short).join(" ")}`));
  add(h("h2", "Sampled responses"), h("p.note", "The newest first; right: accuracy above 0.5. ",
    left_out > 0 && `${left_out} older ones are left out.`), choices, place);
  const of = (wanted) => samples.filter((x) => kind(x) === wanted);
  views.push(() => cards({ all: samples, right: of("right"), wrong: of("wrong") }, draw, choices, place));
}

// ---- an evaluation
const same = (a, b) => a != null && (`${a}`.toLowerCase() === `${b}`.toLowerCase() || (b !== "" && +a === +b));
const verdict = (r) => r.failure != null ? "failed" : r.score > 0.5 ? "right" : "wrong";
const shown = (x) => `${count(x.frames, "frame")}, ${count(x.visual_tokens, "visual token")}, ${fixed(x.seconds, 2)} s`;

function drawRound(round, i, gold) {
  const votes = new Map(), logp = (k) => fixed(round.logps[k]);
  round.votes.forEach((vote, k) => votes.set(vote, [...(votes.get(vote) || []), k]));
  const chips = [...votes].sort((a, b) => b[1].length - a[1].length).map(([vote, ks]) =>
    h(same(vote, gold) ? "span.chip.right" : "span.chip", { title: `mean log-prob of the tokens: ${ks.map(logp).join(", ")}` },
      h("b", vote ?? "no valid answer"), ` × ${ks.length}${same(vote, gold) ? " ✓" : ""}`));
  const responses = round.responses.map((text, k) => h("div.response", h("small", `${round.votes[k] ?? "no valid answer"}, `,
    `mean log-prob ${logp(k)}, ${count(round.tokens[k], "token")}`, round.truncated[k] && ", cut off"), h("pre", text)));
  return h("section", h("small", `round ${i + 1}: ${shown(round)}`), strip(round.sheet), h("div.row", chips),
    h("details", h("summary.note", count(responses.length, "response")), responses));
}

function drawQuestion(r, q) {
  const options = (q.options || []).map((option, i) => {
    const letter = /^\s*\(?([A-Z])[.):]/.exec(option)?.[1] || String.fromCharCode(65 + i);
    const gold = same(letter, q.answer), given = same(r.given, letter);
    return h(gold ? "li.right" : given ? "li.wrong" : "li", option, " ",
      h("small", [gold && "✓ right answer", given && (gold ? "given" : "✗ given")].filter(Boolean).join(", ")));
  });
  return card(verdict(r), { "data-record": r.record }, [h("a", { href: link({ record: r.record }) }, `record ${r.record}`),
    Object.entries(q.about || {}).map(([key, value]) => h("small", `${key}: ${value}`)), h("small", q.problem_type),
    r.score > 0 && r.score < 1 && h("small", `score ${fixed(r.score, 2)}`), r.rounds.length > 1 && h("small", shown(r))],
    h("p.question", q.question ?? "This record could not be read."), options.length > 0 && h("ul", options),
    !options.length && q.answer != null && h("p", "right answer ", h("b", q.answer), ", given ", h("b", r.given ?? "none")),
    r.failure != null && h("p", h("b.badge", "! "), r.failure), r.rounds.map((round, i) => drawRound(round, i, q.answer)),
    h("small", q.path));
}

function evaluationPage({ model, data, constant_answer, questions, methods }) {
  const whisker = ({ accuracy, interval: [a, b] }) => s("svg", { viewBox: "0 0 150 14" },
    s("line", { x1: 4, x2: 146, y1: 7, y2: 7 }), s("line.interval", { x1: 4 + 142 * a, x2: 4 + 142 * b, y1: 7, y2: 7 }),
    s("circle", { cx: 4 + 142 * accuracy, cy: 7, r: 4, fill: "var(--c0)" }));
  const fields = [...new Set(methods.flatMap((m) => Object.keys(m.by)))], names = methods.map((m) => m.method);
  const values = (field) => [...new Set(methods.flatMap((m) => Object.keys(m.by[field] || {})))];
  const cell = (by) => by ? `${fixed(by[0])} (${by[1]})` : "–";
  add(h("p", model && `${model} on ${data}. `, constant_answer && `Always one answer: ${fixed(constant_answer)}.`),
    table(["method", "accuracy", "", "95 % interval", "questions", "failed", "frames", "pixels", "visual tokens", "seconds"],
      ...methods.map((m) => [h("a", { href: `#method=${encodeURIComponent(m.method)}` }, m.method), h("b", fixed(m.accuracy)),
        whisker(m), m.interval.map((x) => fixed(x)).join(" – "), m.questions, m.failures, fixed(m.mean_frames, 1),
        fixed(m.pixels, 0), fixed(m.mean_visual_tokens, 1), fixed(m.seconds, 1)])),
    fields.map((field) => h("details", h("summary", `accuracy by ${field}`), table([`${field} (questions)`, ...names],
      ...values(field).map((value) => [value, ...methods.map((m) => cell(m.by[field]?.[value]))])))));

  const select = (key, label, options) => h("select", { name: key, "aria-label": label,
    onchange: ({ target }) => go({ [key]: target.value }) }, options.map(([value, text]) => h("option", { value }, text)));
  const every = (field) => [["", `every ${field}`], ...values(field).map((value) => [value, value])];
  const pick = select("method", "method", names.map((name) => [name, name]));
  const selects = fields.map((field) => select(`by.${field}`, field, every(field)));
  const search = h("input", { type: "search", placeholder: "search", oninput: () => go({ q: search.value }) });
  const choices = h("div.row.controls"), place = h("div"), depths = h("p.note");
  add(h("h2", "Questions"), h("div.row.controls", pick, selects, search), choices, depths, place);
  const text = (r) => r.text ??= JSON.stringify([questions[r.record], r.failure, r.rounds.map((x) => x.responses)]).toLowerCase();
  const value = (r, field) => questions[r.record].about?.[field] || questions[r.record][field] || "none";
  views.push(() => {
    const now = (key) => state().get(key) || "", m = methods.find((x) => x.method === now("method")) || methods[0];
    pick.value = m.method;
    for (const choice of selects) choice.value = now(choice.name);
    if (search.value !== now("q")) search.value = now("q");
    const fits = (r) => (!now("record") || `${r.record}` === now("record")) && text(r).includes(now("q").toLowerCase())
      && fields.every((field) => !now(`by.${field}`) || value(r, field) === now(`by.${field}`));
    const some = m.results.filter(fits), of = (kind) => some.filter((r) => verdict(r) === kind);
    const escalated = some.filter((r) => r.rounds.length > 1), depth = {};
    for (const r of some) (depth[r.rounds.length] ??= []).push(r.score);
    depths.textContent = escalated.length ? Object.entries(depth).map(([n, scores]) =>
      `${count(+n, "round")}: ${count(scores.length, "question")}, accuracy ${fixed(mean(scores))}`).join("; ") : "";
    cards({ all: some, right: of("right"), wrong: of("wrong"), failed: of("failed"), escalated },
      (r) => drawQuestion(r, questions[r.record]), choices, place);
  });
}

main.replaceChildren(h("h1", D.run), h("p.note", D.training ? `${D.algo || "training"} run` : "evaluation",
  `, as of ${D.written}. `, D.notes.map((text) => `${text}. `)));
if (D.training) trainingPage(D.training);
if (D.evaluation?.methods.length) evaluationPage(D.evaluation);
add(h("h2", "Flags"), h("details", h("summary", "config.txt"), h("pre", D.config || "none")));
redraw();
hover(null);
"""


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a training run or of an evaluation")
    parser.add_argument("--out", help="file of the page (default: RUN/report.html)")
    parser.add_argument("--open", action="store_true", help="open it in a browser")
    args = parser.parse_args(argv)
    out = Path(args.out or Path(args.run) / "report.html")
    try:
        out.write_text(page(args.run), encoding="utf-8", errors="replace")
    except (ValueError, OSError) as e:
        raise SystemExit(f"error: {e}") from e
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
    if args.open:
        webbrowser.open(out.resolve().as_uri())


if __name__ == "__main__":
    main()
