"""Evaluation: any model folder on any records file, one answer a question or sparse-to-dense; failures count as wrong.

    python eval.py --tts                    the toy's held-out questions, after `python train.py`: greedy, a vote of five and
                                            sparse-to-dense, at 4, 8 and 16 frames
    python eval.py --model DIR --data eval_mvbench.json --frames 32        one greedy answer to every question
    python eval.py --model DIR --data eval_videomme.json --tts             sparse-to-dense: 32 to 128 frames, m = 5
    python eval.py --model DIR --data train.json --m 10 --filter kept.json      what is neither too easy nor too hard to learn
    torchrun --nproc_per_node 8 -- eval.py ...      the same on 8 processes (without --, torchrun takes --start for its own)

What it leaves in --out: METHOD.rankN.jsonl, one line per question with everything (rounds, votes, responses, frames, tokens,
seconds, or the reason of a failure), appended as soon as it is answered; summary.json; config.txt. The same command again goes
on where a killed one stopped, on any number of processes, and prints the table at once when nothing is left to do.
"""

import json
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers.utils import logging as hf_logging

import rewards
import toy
import tts
from data import DataError, Prompt, PromptBuilder, Sample, load_samples, read_records
from model import ModelError, Policy, fingerprint, local_folder
from rollout import generate
from run import MEDIA, RANK, WORLD, flag_lines, flag_parser, gather, media_flags, refuse_changes, say, seed, start_ranks

BATCH = 32  # questions whose responses are drawn together
# what all the answers of a folder have in common, besides the model's weights ("#")
SAME = ("#", "data", "media_root", "seed", *MEDIA[:-1], "max_prompt", "max_new", "m", "temperature")


class Method(NamedTuple):
    """A way to answer: m responses at `start` frames, and while they disagree at twice as many, up to `cap`."""
    name: str
    start: int
    cap: int
    m: int
    temperature: float


def parse_args(argv=None):
    """The flags, from argv or the command line; @FILE reads them from a file."""
    p, add, flag = flag_parser(__doc__)
    g = p.add_argument_group("run")
    add(g, "model", None, "model folder, run folder or hub name; without one: the toy that `python train.py` has trained")
    add(g, "data", None, "records, .json or .jsonl")
    add(g, "media_root", None, "what relative paths in the records start from; the records' own folder unless told")
    add(g, "out", None, "folder of the answers (default: out/toy/eval, or out/eval-MODEL-DATA)")
    add(g, "seed", 0, "of the sampling")
    g = media_flags(p, add, fps=float("inf"), max_pixels=256 * 28 * 28, max_prompt=65536)
    add(g, "frames", 16, "without --tts: of every video, evenly spaced, if it has as many")
    g = p.add_argument_group("responses")
    add(g, "max_new", 1024, "tokens of a response, at most")
    flag(g, "tts", "sparse-to-dense: --m responses at --start frames; until they agree, twice the frames, up to --cap")
    add(g, "start", 32, "frames of the first round")
    add(g, "cap", 128, "frames of the last round")
    add(g, "m", 5, "responses of a round")
    add(g, "temperature", 1.0, "of the m responses; a single one is greedy")
    flag(g, "compare", "with --tts: also a greedy answer, and a vote of --m, at every number of frames from --start to --cap")
    add(g, "filter", None, "write to this file the records that --m responses at --frames frames answer neither always right nor "
        "always wrong, with their pass_rate: what RL can learn from (LongVILA-R1: --m 10)")
    args = p.parse_args(argv)
    if bool(args.model) != bool(args.data):
        p.error("--model and --data: expected both, or neither for the toy")
    for name, least in dict(frames=2, start=2, cap=args.start, m=1, max_new=1, workers=1, max_pixels=args.min_pixels).items():
        if getattr(args, name) < least or (name in ("frames", "start", "cap") and getattr(args, name) % 2):
            even = ", even" if name in ("frames", "start", "cap") else ""
            p.error(f"--{name} {getattr(args, name)}: expected at least {least}{even}")
    if args.filter and args.tts:
        p.error("--filter: expected without --tts")
    if args.temperature <= 0:
        p.error(f"--temperature {args.temperature}: expected above 0")
    return args


def methods(args):
    """The methods that the flags ask for."""
    greedy = lambda n: Method(f"greedy-{n}", n, n, 1, 0.0)
    vote = lambda n: Method(f"vote-{n}", n, n, args.m, args.temperature)
    if not args.tts:
        return [vote(args.frames) if args.filter else greedy(args.frames)]
    frames = [args.start]
    while frames[-1] < args.cap:
        frames.append(min(2 * frames[-1], args.cap))
    search = Method(f"s2d-{args.start}-{args.cap}", args.start, args.cap, args.m, args.temperature)
    return [*map(greedy, frames), *map(vote, frames), search] if args.compare else [search]


# ---- answering

@dataclass(eq=False)
class Question:
    """A sample on its way to an answer by a method. index: of its record. rounds: what happened, for the log."""
    index: int
    sample: Sample
    method: Method
    search: tts.Search = field(init=False)
    rounds: list[dict] = field(default_factory=list)
    decoded: dict = field(default_factory=dict)  # frames of earlier rounds
    prompt: Prompt | None = None  # of the last round; None: could not be loaded
    failure: str | None = None

    def __post_init__(self):
        self.search = tts.Search(start=self.method.start, cap=self.method.cap, m=self.method.m)

    def load(self, builder):
        """The prompt of the next round. Raises DataError."""
        return builder(self.sample, max_frames=self.search.frames, decoded=self.decoded)

    def show(self, prompt):
        """The next round will be of this prompt."""
        self.prompt = prompt
        self.search.clamp(prompt.media[0].available)

    def hear(self, group, texts, seconds):
        """The m responses to the prompt; seconds: this question's share of the batch's time."""
        answers = [rewards.normalize_answer(rewards.extract_answer(text), self.sample) for text in texts]
        logps = [float(x.mean()) for x in group.logps]
        self.search.tell([tts.Vote(a, x) for a, x in zip(answers, logps)])
        media, = self.prompt.media
        self.rounds.append(dict(frames=len(media.frames), visual_tokens=media.tokens, votes=answers, logps=logps, responses=texts,
                                tokens=[len(r) for r in group.responses], truncated=group.truncated, seconds=seconds))
        if self.search.frames is None and self.search.answer is None:
            self.failure = "no valid answer"

    @property
    def score(self):
        """In [0, 1]; 0 for a failure."""
        return score(self.search.answer, self.sample) if self.failure is None else 0.0


def answer(policy, builder, questions, method, *, pool, max_new, run_seed=0, batch=BATCH):
    """Yields each Question once it is answered or has failed; rounds of the same number of frames are drawn together.

    questions: Questions by this method.  pool: threads that load media ahead.  An answer is a function of the policy, the
    question and (run_seed, index, frames): not of its company, up to rounding.
    """
    waiting, queues = iter(questions), {method.start: []}  # frames -> [(question, its prompt-to-be)]
    queue = lambda q: queues.setdefault(q.search.frames, []).append((q, pool.submit(q.load, builder)))
    while True:
        for q in islice(waiting, 2 * batch - len(queues[method.start])):
            queue(q)
        full = [n for n in queues if len(queues[n]) >= batch]  # dense rounds first: their frames are held in memory
        n = max(full, default=min((n for n in queues if queues[n]), default=None))
        if n is None:
            return
        began = time.perf_counter()
        taken, queues[n] = queues[n][:batch], queues[n][batch:]
        ready, settled = [], []
        for q, future in taken:
            try:
                q.show(future.result())
                ready.append(q)
            except DataError as e:
                q.prompt, q.failure = None, str(e)
                settled.append(q)
        groups = generate(policy, [q.prompt for q in ready], method.m, max_new=max_new, temperature=method.temperature,
                          seeds=[seed(run_seed, q.index, q.search.frames) for q in ready])
        texts = [[builder.decode(r) for r in group.responses] for group in groups]
        share = (time.perf_counter() - began) / len(taken)
        for q, group, text in zip(ready, groups, texts):
            q.hear(group, text, share)
            if q.search.frames is None:
                settled.append(q)
            else:
                queue(q)
        yield from settled


def line(q):
    """A question as its line of the log."""
    s, shown = q.sample, q.rounds[-1] if q.rounds else {}
    T, pixels = q.prompt.frames_x_pixels if q.prompt else (0, 0)
    return dict(record=q.index, id=s.id, path=s.path, data_type=s.data_type, fps=s.fps, problem_type=s.problem_type,
                question=s.question, options=s.options, about=s.about, answer=s.answer, given=q.search.answer, score=q.score,
                failure=q.failure, frames=shown.get("frames", 0), pixels=pixels,
                visual_tokens=sum(r["visual_tokens"] for r in q.rounds), seconds=sum(r["seconds"] for r in q.rounds),
                rounds=q.rounds)


def run_method(policy, builder, samples, bad, method, out, pool, args):
    """Answers what is left to answer of this rank's share, appending to the method's file."""
    rewind(out, method)
    done = {r["record"] for r in read(out, method)}
    gather(None)  # every rank has read before any writes
    left = [i for i in sorted({*samples, *bad}) if i not in done][RANK::WORLD]
    path = out / f"{method.name}.rank{RANK}.jsonl"
    bar = tqdm(total=len(left), desc=method.name, unit="question", disable=None if RANK == 0 else True)
    with open(path, "a", encoding="utf-8") as f:
        for i in (i for i in left if i in bad):
            f.write(json.dumps(dict(record=i, score=0.0, failure=bad[i], rounds=[])) + "\n")
            bar.update()
        questions = (Question(i, samples[i], method) for i in left if i in samples)
        total = 0.0
        for n, q in enumerate(answer(policy, builder, questions, method, pool=pool, max_new=args.max_new, run_seed=args.seed), 1):
            f.write(json.dumps(line(q)) + "\n")
            f.flush()
            if q.prompt is None:
                tqdm.write(f"failed: {q.failure}")
            total += q.score
            bar.update()
            bar.set_postfix(accuracy=f"{total / n:.3f}")
    bar.close()
    gather(None)


def rewind(out, method):
    """Cuts half-written last lines off, as a kill leaves them; on rank 0, before any rank reads."""
    for path in out.glob(f"{method.name}.rank*.jsonl") if RANK == 0 else ():
        text = path.read_bytes()
        if not text.endswith(b"\n"):
            with open(path, "r+b") as f:
                f.truncate(text.rfind(b"\n") + 1)
    gather(None)


def read(out, method):
    """The lines of a method, of all ranks, in the order of the records."""
    files = sorted(out.glob(f"{method.name}.rank*.jsonl"))
    lines = [json.loads(x) for file in files for x in file.read_text(encoding="utf-8").splitlines()]
    return sorted(lines, key=lambda r: r["record"])


# ---- scoring

def score(answer, sample):
    """Of a normalised answer, in [0, 1]: mean relative accuracy for regression, else as in training."""
    if sample.problem_type == "regression" and answer is not None:
        return rewards.mean_relative_accuracy(answer, rewards.parse_number(sample.answer))
    return rewards.grade(answer, sample)


def constant_answer(samples):
    """The accuracy of always giving one answer, the best one for each problem type (of the 50 most frequent)."""
    right = 0.0
    for kind in {s.problem_type for s in samples}:
        group = [s for s in samples if s.problem_type == kind]
        frequent = Counter(rewards.normalize_answer(s.answer, s) for s in group).most_common(50)
        right += max(sum(score(answer, s) for s in group) for answer, _ in frequent)
    return right / len(samples)


def interval(accuracy, n):
    """The 95 % interval of a mean of n scores in [0, 1] (Wilson's: exact in coverage for 0 or 1, wide for what lies between)."""
    z = 1.96
    middle, half = accuracy + z * z / (2 * n), z * (accuracy * (1 - accuracy) / n + z * z / (4 * n * n)) ** 0.5
    return [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)]


def mean(xs):
    """0 for nothing."""
    xs = list(xs)
    return sum(xs) / len(xs) if xs else 0.0


def by_group(lines):
    """{field: {value: [accuracy, questions]}} of every field of the records that splits them into 2 to 30 groups."""
    out, splits = {}, []
    for name in dict.fromkeys(k for r in lines for k in (*r.get("about", {}), "problem_type", "data_type")):
        values = [r.get("about", {}).get(name) or r.get(name) for r in lines]
        groups = {}
        for value, r in zip(values, lines):
            groups.setdefault(value or "none", []).append(r["score"])
        same = [values.index(v) for v in values]  # the split itself, whatever its groups are called
        if 2 <= len(groups) <= 30 and same not in splits:
            splits.append(same)
            out[name] = {value: [mean(scores), len(scores)] for value, scores in sorted(groups.items())}
    return out


VSI = ("object_counting", "object_abs_distance", "object_size_estimation", "room_size_estimation", "object_rel_distance",
       "object_rel_direction", "route_planning", "obj_appearance_order")


def vsi_bench(lines):
    """VSI-Bench's two aggregates, {} for other records.

    official: the mean over its eight sub-tasks (the three difficulties of a direction are one), MRA with <=.
    video_r1: Video-R1's "VSI-Bench", the mean of two means, accuracy of multiple choice and MRA.
    """
    tasks, kinds = {}, {}
    for r in lines:
        kind = r.get("about", {}).get("original_question_type", "")
        task = next((t for t in VSI if kind.startswith(t)), None)
        if task is None:
            return {}
        kinds.setdefault(r["problem_type"], []).append(r["score"])
        if r["problem_type"] == "regression" and r["given"] is not None:
            exact = rewards.mean_relative_accuracy(r["given"], rewards.parse_number(r["answer"]), inclusive=True)
        else:
            exact = r["score"]
        tasks.setdefault(task, {}).setdefault(kind, []).append(exact)
    official = mean(mean(map(mean, levels.values())) for levels in tasks.values())
    return {"vsi_bench_official": official, "vsi_bench_video_r1": mean(map(mean, kinds.values()))}


def summarize(lines, method):
    """What the lines of a method (its name) come to; every line counts, failures as 0."""
    n, shown = len(lines), [r for r in lines if r["rounds"]]
    accuracy = mean(r["score"] for r in lines)
    return {"method": method, "questions": n, "accuracy": accuracy, "interval": interval(accuracy, n),
            "failures": sum(r["failure"] is not None for r in lines), "unreadable": n - len(shown),
            "mean_frames": mean(r["frames"] for r in shown), "pixels": mean(r["pixels"] for r in shown),
            "mean_visual_tokens": mean(r["visual_tokens"] for r in shown), "mean_rounds": mean(len(r["rounds"]) for r in shown),
            "seconds": sum(r.get("seconds", 0.0) for r in lines), "by": by_group(lines), **vsi_bench(lines)}


def table(summary):
    """The summary as text."""
    rows = summary["methods"]
    out = [f"{summary['model']} on {summary['data']}: {rows[0]['questions']} questions. Always the same answer: "
           f"{summary['constant_answer']:.3f}.", "",
           "method        accuracy  95 % interval   frames x pixels  visual tokens  rounds  failures  seconds"]
    for r in rows:
        low, high = r["interval"]
        shown = f"{r['mean_frames']:6.1f} x {r['pixels']:<6.0f}"
        out.append(f"{r['method']:13} {r['accuracy']:8.3f}  {low:.3f} - {high:.3f}   {shown}"
                   f" {r['mean_visual_tokens']:14.1f}  {r['mean_rounds']:6.2f}  {r['failures']:8}  {r['seconds']:7.1f}")
        out += [f"{'':13} {name} {r[name]:.3f}" for name in ("vsi_bench_official", "vsi_bench_video_r1") if name in r]
    for name in rows[0]["by"]:
        out += ["", f"by {name} (questions)"]
        for r in rows:
            out.append(f"{r['method']:13} " + "  ".join(f"{v} {a:.3f} ({n})" for v, (a, n) in r["by"][name].items()))
    return "\n".join(out)


def write_filtered(lines, samples, source, target):
    """Writes the records whose responses are sometimes right (score above 0.5), each with its pass_rate -> what to say of it."""
    rates = {r["record"]: mean(rewards.grade(vote, samples[r["record"]]) > 0.5 for vote in r["rounds"][0]["votes"])
             for r in lines if r["rounds"]}
    kept = [read() | {"pass_rate": rates[i]} for i, (_, read) in enumerate(read_records(source)) if 0 < rates.get(i, 0) < 1]
    partial = Path(f"{target}.partial")
    rows = "".join(json.dumps(r) + "\n" for r in kept)
    partial.write_text(rows if Path(target).suffix == ".jsonl" else json.dumps(kept, indent=1), encoding="utf-8")
    partial.replace(target)
    always, never = (sum(rate == x for rate in rates.values()) for x in (1, 0))
    return (f"{target}: {len(kept)} of {len(lines)} records kept; always right: {always}, never: {never}, "
            f"unreadable: {len(lines) - len(rates)}")


# ---- the command

def main(argv=None):
    """The command line."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    if not args.model:
        root = toy.root(args.seed)
        args = parse_args([f"@{Path(__file__).parent}/configs/toy_eval.txt", "--model", f"{root}/grpo",
                           "--data", f"{root}/world/test.json", "--out", f"{root}/eval", *argv])
        if not (root / "grpo").exists():
            raise SystemExit(f"error: no {root}/grpo: train the toy with `python train.py` first, or give --model and --data")
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    device = start_ranks(minutes=24 * 60)  # at the end, ranks wait for the slowest
    try:
        evaluate(args, device)
    except (DataError, ModelError, OSError) as e:
        raise SystemExit(f"error: {e}") from e
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def evaluate(args, device):
    """Answers all records by every method of the flags, and prints the table -> summary."""
    out = Path(args.out or f"out/eval-{Path(args.model).name}-{Path(args.data).stem}")
    folder, bad = local_folder(args.model), {}
    found = load_samples(args.data, media_root=args.media_root, skipped=bad)
    samples = dict(zip((i for i in range(len(found) + len(bad)) if i not in bad), found))
    lines = [f"# weights {fingerprint(folder)}", *flag_lines(args)]
    if RANK == 0:
        if (out / "config.txt").exists():
            refuse_changes(out / "config.txt", lines, SAME)
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for message in [*bad.values()][:5]:
        say(f"failed: {message}")
    policy = Policy.load(folder, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    builder = PromptBuilder(folder, max_prompt=args.max_prompt, **{name: getattr(args, name) for name in MEDIA})
    asked = methods(args)
    with ThreadPoolExecutor(args.workers) as pool:
        for method in asked:
            run_method(policy, builder, samples, bad, method, out, pool, args)
    share = len(found) / (len(found) + len(bad))
    summary = {"model": str(folder), "data": args.data, "constant_answer": constant_answer(found) * share,
               "methods": [summarize(read(out, method), method.name) for method in asked]}
    if RANK == 0:
        (out / "summary.json").write_text(json.dumps(summary, indent=1))
        say(table(summary))
        if args.filter:
            say(write_filtered(read(out, asked[0]), samples, args.data, args.filter))
    return summary


if __name__ == "__main__":
    main()
