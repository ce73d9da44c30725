"""Evaluation: any model folder on any records file; failures count as wrong answers.

A question is answered greedily, by a vote of m responses (self-consistency, arXiv 2203.11171), or
by sparse-to-dense test-time scaling (tts.py; Video-RTS, arXiv 2507.06485, section 3.3).

    python eval.py --tts
        the toy's held-out questions, after `python train.py`: sparse-to-dense, and greedy answers
        and votes of five at 4, 8 and 16 frames
    python eval.py --model DIR --data eval_mvbench.json --frames 32
        one greedy answer per question
    python eval.py --model DIR --data eval_videomme.json --tts
        sparse-to-dense: 32 to 128 frames, m = 5
    python eval.py --model DIR --data train.json --m 10 --filter kept.json
        keeps the questions that are neither too easy nor too hard to learn from
    torchrun --nproc_per_node 8 -- eval.py ...
        the same on 8 processes (without --, torchrun takes --start as its own flag)

Writes to --out:
    METHOD.rankN.jsonl  one line per question, appended once it is answered: rounds, votes,
                        responses, frames, tokens, seconds, or why it failed
    summary.json        the scores of every method answered in the folder
    config.txt          the flags
The same command resumes a killed evaluation, on any number of processes. If nothing is left to do,
it prints the table at once.
"""

import json
import shlex
import sys
import time
from collections import Counter, defaultdict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers.utils import logging as hf_logging

import rewards
import toy
import tts
from data import Prompt, PromptBuilder, Sample, about, load_samples, missing_media, problem_type
from infra.answers import earlier_answers, open_answers, read_answers, unanswered
from infra.errors import DataError
from infra.files import append, write_whole
from infra.flags import MEDIA, Parser, media_flags, ordered, peek
from infra.model_folder import local_folder
from infra.ranks import RANK, WORLD, gather, ranks, say, seed
from infra.records import read_records
from infra.summary import by_group, interval, mean, table
from infra.video import close_workers
from model import Policy
from rollout import generate

# ---- a question and its rounds


class Method(NamedTuple):
    """A way to answer: m responses at `start` frames; while they disagree, at twice as many, up to
    `cap`."""

    name: str
    start: int
    cap: int
    m: int
    temperature: float


@dataclass(eq=False)
class Question:
    """A sample that is being answered by a method. index: of its record. rounds: for the log."""

    index: int
    sample: Sample
    method: Method
    search: tts.Search = field(init=False)
    rounds: list[dict] = field(default_factory=list)
    decoded: dict | None = None  # frames of earlier rounds, where there can be several rounds
    loading: Future | None = None  # the prompt of the next round
    prompt: Prompt | None = None  # of the round; None: it could not be loaded
    failure: str | None = None

    def __post_init__(self):
        how = dict(start=self.method.start, cap=self.method.cap, m=self.method.m)
        if self.sample.problem_type == "grounding":  # two time spans are never quite the same
            how["similarity"] = rewards.temporal_iou
        self.search = tts.Search(**how)
        self.decoded = {} if self.method.start < self.method.cap else None

    @property
    def done(self):
        """Whether it is answered or has failed."""
        return self.failure is not None or self.search.frames is None

    @property
    def score(self):
        """In [0, 1]; 0 for a failure."""
        return score(self.search.answer, self.sample) if self.failure is None else 0.0

    def load(self, builder, pool):
        """Starts to load the prompt of the next round in a thread of the pool."""
        self.prompt = None  # frees the frames of the last round
        self.loading = pool.submit(
            builder, self.sample, max_frames=self.search.frames, decoded=self.decoded
        )

    def set_prompt(self):
        """Waits for the prompt of the next round. A question that cannot be loaded has failed."""
        try:
            self.prompt = self.loading.result()
            available = [m.available for m in self.prompt.media]
            self.search.clamp(sum(available))  # 0 for text, 1 for an image: a single round
        except DataError as e:
            self.failure = str(e)
        self.loading = None

    def record(self, group, texts, seconds):
        """The m responses to the prompt. seconds: this question's share of the batch's time."""
        answers = [
            rewards.normalize_answer(rewards.extract_answer(text), self.sample) for text in texts
        ]
        logps = [float(x.mean()) for x in group.logps]
        self.search.add_votes([tts.Vote(a, x) for a, x in zip(answers, logps)])
        frames, pixels = self.prompt.frames_x_pixels
        self.rounds.append(
            {
                "frames": frames,
                "pixels": pixels,
                "visual_tokens": self.prompt.visual_tokens,
                "votes": answers,
                "logps": logps,
                "responses": texts,
                "tokens": [len(r) for r in group.responses],
                "truncated": group.truncated,
                "seconds": seconds,
            }
        )
        if self.search.frames is None and self.search.answer is None:
            self.failure = "no valid answer"


def answer(policy, builder, questions, method, *, pool, max_new, run_seed=0, batch=32):
    """Yields each Question when it is answered or has failed, `batch` at a time.

    questions: iterable of Question, by this method.  pool: threads that load media ahead.
    An answer depends on the policy, the question and (run_seed, index, frames) alone: the other
    questions of a batch change it by rounding at most.
    """
    questions = iter(questions)
    waiting = defaultdict(deque)  # number of the round, from 0 -> questions that load or are loaded
    while True:
        for q in islice(questions, 2 * batch - len(waiting[0])):
            q.load(builder, pool)
            waiting[0].append(q)
        n = next_round(waiting, batch)
        if n is None:
            return
        taken = [waiting[n].popleft() for _ in range(min(batch, len(waiting[n])))]
        draw_round(policy, builder, taken, method, max_new, run_seed)
        for q in taken:
            if not q.done:
                q.load(builder, pool)
                waiting[n + 1].append(q)
        yield from (q for q in taken if q.done)


def next_round(waiting, batch):
    """The round to draw next: the latest with a full batch, as its questions hold frames in memory;
    otherwise the earliest with any question. None if no question waits.
    waiting: {number of the round: questions}."""
    rounds = sorted(n for n in waiting if waiting[n])
    full = [n for n in rounds if len(waiting[n]) >= batch]
    if full:
        return full[-1]
    return rounds[0] if rounds else None


def draw_round(policy, builder, questions, method, max_new, run_seed):
    """One round of each question: m responses to its next prompt, all questions in one batch."""
    began = time.perf_counter()
    for q in questions:
        q.set_prompt()
    ready = [q for q in questions if q.prompt is not None]
    groups = generate(
        policy,
        [q.prompt for q in ready],
        method.m,
        max_new=max_new,
        temperature=method.temperature,
        seeds=[seed(run_seed, q.index, q.search.frames) for q in ready],
    )
    texts = [[builder.decode(response) for response in group.responses] for group in groups]
    seconds = (time.perf_counter() - began) / len(questions)
    for q, group, responses in zip(ready, groups, texts):
        q.record(group, responses, seconds)


# ---- what is written


def line(q):
    """A line of the log. gold, given: the right answer and the model's, normalised."""
    s = q.sample
    last = q.rounds[-1] if q.rounds else {}
    return {
        "record": q.index,
        "id": s.id,
        "path": s.path,
        "data_type": s.data_type,
        "fps": s.fps,
        "segment": s.segment,
        "about": s.about,
        "problem_type": s.problem_type,
        "question": s.question,
        "options": s.options,
        "answer": s.answer,
        "gold": rewards.normalize_answer(s.answer, s),
        "given": q.search.answer,
        "score": q.score,
        "failure": q.failure,
        "frames": last.get("frames", 0),
        "pixels": last.get("pixels", 0),
        "visual_tokens": sum(r["visual_tokens"] for r in q.rounds),
        "seconds": sum(r["seconds"] for r in q.rounds),
        "rounds": q.rounds,
    }


def read_questions(args):
    """The records of --data -> ({index: Sample}, {index: what the line of a bad record holds})."""
    skipped = {}
    found = load_samples(args.data, media_root=args.media_root, skipped=skipped)
    indices = [i for i in range(len(found) + len(skipped)) if i not in skipped]
    bad = {}
    for i, (_, read_record) in enumerate(read_records(args.data)):
        if i in skipped:
            say(f"failed: {skipped[i]}")
            bad[i] = {"failure": skipped[i]}
            with suppress(DataError):  # not JSON
                record = read_record()
                bad[i] |= {"about": about(record), "problem_type": problem_type(record)}
    return dict(zip(indices, found)), bad


def look_for_media(samples, data, media_root):
    """Prints how many media are missing, if any; rank 0 looks for them. Raises DataError, on all
    ranks, if most are missing."""
    found = missing_media(samples, data, media_root) if RANK == 0 else None
    message, most = gather(found)[0]
    if most:
        raise DataError(message)
    if message:
        say(message)


def answer_all(args, methods, folder, device, samples, bad, out):
    """Answers all records by all methods, but for those that `out` has answers to already."""
    policy = None
    pool = ThreadPoolExecutor(args.workers)
    try:
        for method in methods:
            left = unanswered(out, method.name, sorted({*samples, *bad}))
            if not left:
                continue
            if policy is None:
                look_for_media([*samples.values()], args.data, args.media_root)
                policy, builder = load_model(args, folder, device)
            run_method(policy, builder, left, samples, bad, method, out, pool, args)
            gather(None)
    finally:
        pool.shutdown(cancel_futures=True)
        close_workers()


def load_model(args, folder, device):
    """The policy, in bf16 on a GPU, and the builder of its prompts."""
    on_gpu = device.type == "cuda"
    policy = Policy.load(
        folder,
        device=device,
        dtype=torch.bfloat16 if on_gpu else torch.float32,
        cuda_graph=args.cuda_graph,
    )
    media = {name: getattr(args, name) for name in MEDIA}
    return policy, PromptBuilder(policy.folder, max_prompt=args.max_prompt, **media)


def run_method(policy, builder, left, samples, bad, method, out, pool, args):
    """Answers this rank's share of the records `left`, appending to the method's file."""
    left = left[RANK::WORLD]
    file = out / f"{method.name}.rank{RANK}.jsonl"
    silent = None if RANK == 0 else True
    bar = tqdm(total=len(left), desc=method.name, unit="question", disable=silent)
    for i in left:
        if i in bad:
            append(file, [bad[i] | {"record": i, "score": 0.0, "rounds": []}])
            bar.update()
    questions = (Question(i, samples[i], method) for i in left if i in samples)
    how = {"pool": pool, "max_new": args.max_new, "run_seed": args.seed, "batch": args.batch}
    total = 0.0
    for n, q in enumerate(answer(policy, builder, questions, method, **how), 1):
        append(file, [line(q)])
        if q.prompt is None:
            tqdm.write(f"failed: {q.failure}")
        total += q.score
        bar.update()
        bar.set_postfix(accuracy=f"{total / n:.3f}")
    bar.close()


# ---- how it is scored


def score(answer, sample):
    """The score of a normalised answer, in [0, 1]: for regression the mean relative accuracy of
    VSI-Bench (arXiv 2412.14171), otherwise the accuracy reward of training."""
    if sample.problem_type == "regression" and answer is not None:
        return rewards.mean_relative_accuracy(answer, rewards.parse_number(sample.answer))
    return rewards.grade(answer, sample)


def constant_answer(samples):
    """The accuracy of the best constant answer to each problem type, chosen with the right answers
    known: what a policy without eyes could reach if it knew how often each answer is right."""
    right = 0.0
    for kind in {s.problem_type for s in samples}:
        group = [s for s in samples if s.problem_type == kind]
        golds = Counter(rewards.normalize_answer(s.answer, s) for s in group)
        # graded, so an answer that is not frequent may win
        tried = 50 if kind in ("regression", "grounding") else 5
        right += max(sum(score(gold, s) for s in group) for gold, _ in golds.most_common(tried))
    return right / len(samples)


VSI = (
    "object_counting",
    "object_abs_distance",
    "object_size_estimation",
    "room_size_estimation",
    "object_rel_distance",
    "object_rel_direction",
    "route_planning",
    "obj_appearance_order",
)


def vsi_bench(lines):
    """VSI-Bench's two aggregates; {} for other records. Lines whose sub-task is unknown, as their
    record could not be read, are in neither, and counted.

    official: the mean over its eight sub-tasks (rel_direction has three levels), MRA with <=.
    video_r1: Video-R1's "VSI-Bench", the mean of two means: accuracy of multiple choice, and MRA.
    """
    known = [r for r in lines if r.get("about")]
    tasks = {}  # {sub-task: {level: scores}}
    kinds = {}  # {is it regression?: scores}
    for r in known:
        level = r["about"].get("original_question_type", "")
        task = next((name for name in VSI if level.startswith(name)), None)
        if task is None:
            return {}
        regression = r["problem_type"] == "regression"
        exact = r["score"]
        if regression and r.get("given") is not None:
            gold = rewards.parse_number(r["answer"])
            exact = rewards.mean_relative_accuracy(r["given"], gold, inclusive=True)
        tasks.setdefault(task, {}).setdefault(level, []).append(exact)
        kinds.setdefault(regression, []).append(r["score"])
    if not known:
        return {}
    out = {
        "vsi_bench_official": mean(mean(map(mean, levels.values())) for levels in tasks.values()),
        "vsi_bench_video_r1": mean(map(mean, kinds.values())),
    }
    if len(known) < len(lines):
        out["vsi_bench_unknown"] = len(lines) - len(known)
    return out


def grounding(lines):
    """Scores of the grounding questions, as Charades-STA (arXiv 1705.02101) is reported: their mean
    IoU, and the share whose IoU is at least 0.3, 0.5, 0.7; {} without any. A failure has an IoU
    of 0."""
    ious = [r["score"] for r in lines if r.get("problem_type") == "grounding"]
    if not ious:
        return {}
    out = {"grounding_mIoU": mean(ious)}
    for least in (0.3, 0.5, 0.7):
        out[f"grounding_R1@{least}"] = mean(iou >= least for iou in ious)
    return out


def summarize(lines, method):
    """The scores and costs of a method, by name, from its lines. Failures count as 0. Frames,
    pixels and visual tokens are means over the questions that showed a medium, rounds over those
    that were asked; None without any."""
    n, asked = len(lines), [r for r in lines if r["rounds"]]
    shown = [r for r in asked if r["frames"]]
    accuracy = mean(r["score"] for r in lines)
    return {
        "method": method,
        "questions": n,
        "accuracy": accuracy,
        "interval": interval(accuracy, n),
        "failures": sum(r["failure"] is not None for r in lines),
        "unreadable": n - len(asked),
        "mean_frames": mean(r["frames"] for r in shown) if shown else None,
        "pixels": mean(r["pixels"] for r in shown) if shown else None,
        "mean_visual_tokens": mean(r["visual_tokens"] for r in shown) if shown else None,
        "mean_rounds": mean(len(r["rounds"]) for r in asked) if asked else None,
        "seconds": sum(r.get("seconds", 0.0) for r in lines),
        "by": by_group(lines),
        **vsi_bench(lines),
        **grounding(lines),
    }


def summarize_all(args, methods, folder, samples, bad, out):
    """Writes summary.json, prints the table -> {method: {record: line}} of these methods."""
    records = sorted({*samples, *bad})
    answers = {method.name: read_answers(out, method.name) for method in methods}
    for name, lines in answers.items():
        if lost := set(records) ^ set(lines):
            raise DataError(
                f"{out}: {name} has no line, or one too many, for the records {sorted(lost)[:10]}"
            )
    everything = answers | earlier_answers(out, answers, records)
    constant = constant_answer([*samples.values()])
    summary = {
        "model": str(folder),
        "data": args.data,
        "constant_answer": constant * len(samples) / len(records),
        "methods": [summarize([*lines.values()], name) for name, lines in everything.items()],
    }
    write_whole(out / "summary.json", json.dumps(summary, indent=1))
    say(table(summary))
    return answers


def write_filtered(lines, samples, source, target):
    """Writes the records whose responses are sometimes right (score above 0.5), with their
    pass_rate, from the file `source` to `target`, a JSON list or .jsonl -> a report, one line."""
    rates = {}
    for r in lines:
        if r["rounds"]:
            sample, votes = samples[r["record"]], r["rounds"][0]["votes"]
            rates[r["record"]] = mean(rewards.grade(vote, sample) > 0.5 for vote in votes)
    kept = []
    for i, (_, read_record) in enumerate(read_records(source)):
        if 0 < rates.get(i, 0) < 1:
            kept.append(read_record() | {"pass_rate": rates[i]})
    if target.endswith(".jsonl"):
        text = "".join(json.dumps(r) + "\n" for r in kept)
    else:
        text = json.dumps(kept, indent=1)
    write_whole(target, text)
    always = sum(rate == 1 for rate in rates.values())
    never = sum(rate == 0 for rate in rates.values())
    return (
        f"{target}: {len(kept)} of {len(lines)} records kept; always right: {always}, never: "
        f"{never}, unreadable: {len(lines) - len(rates)}. Its paths are relative to the same "
        "--media_root"
    )


# ---- the command


def parse_args(argv=None):
    """The flags, from argv or the command line; @FILE reads them from a file."""
    p = Parser(__doc__)
    g = p.section("run")
    g.value(
        "model",
        None,
        "model, adapter or run folder, or hub name (default: the toy of `python train.py`)",
    )
    g.value("data", None, "records, .json or .jsonl")
    g.value(
        "media_root",
        None,
        "folder that the paths in the records are relative to (default: the folder of the records)",
    )
    g.value("out", None, "folder of the answers (default: out/toy/eval, or out/eval-MODEL-DATA)")
    g.value("seed", 0, "random seed of the sampling")
    g = answer_flags(p)
    g.value(
        "batch", 32, "questions that are sampled together; fewer need less memory", "at least 1"
    )
    within = "at least 1e-6, at most 100"  # below, logits / temperature overflow in fp32
    g.value("temperature", 1.0, "of the m responses; a single one is greedy", within)
    g.switch(
        "compare",
        "with --tts: also a greedy answer and a vote of --m responses at each number of frames, "
        "from --start to --cap",
    )
    g.value(
        "filter",
        None,
        "file for the records that RL can learn from: of --m responses at --frames frames, some "
        "are right and some wrong; with their pass_rate (LongVILA-R1: --m 10)",
    )
    args = p.parse_args(argv)
    check(p, args)
    if args.tts:
        args.frames = None
    return args


def answer_flags(p, workers=2):
    """Adds the flags of media and responses that ask.py has too, and returns the last section."""
    media = dict(fps=float("inf"), max_pixels=256 * 28 * 28, max_prompt=65536, workers=workers)
    g = media_flags(p, **media)
    g.value("frames", 16, "frames of a video, evenly spaced; not with --tts", "at least 2")
    g = p.section("responses")
    g.value("max_new", 1024, "tokens of a response, at most", "at least 1")
    g.switch("cuda_graph", "on a GPU: replay the decode steps as CUDA graphs")
    g.switch(
        "tts",
        "sparse-to-dense: --m responses at --start frames; while they disagree, at twice as many, "
        "up to --cap",
    )
    g.value("start", 32, "frames of the first round", "at least 2")
    g.value("cap", 128, "frames of the last round", "at least 2")
    g.value("m", 5, "responses per round", "at least 1")
    return g


def check(p, args):
    """Ends the program if flags do not fit together."""
    if bool(args.model) != bool(args.data):
        p.error("--model and --data: expected both, or neither for the toy")
    if args.compare and not args.tts:
        p.error("--compare: expected with --tts")
    check_frames(p, args)
    if not args.filter:
        return
    target = Path(args.filter)
    if target.resolve() == Path(args.data or "").resolve():
        p.error(
            f"--filter {args.filter}: would overwrite the file of --data; expected another file"
        )
    if target.is_dir():
        p.error(f"--filter {args.filter}: is a folder, expected a file to write")
    if args.tts or args.m < 2 or not target.absolute().parent.is_dir():
        p.error(
            f"--filter {args.filter}: expected without --tts, with --m of at least 2, and in a "
            "folder that exists"
        )


def check_frames(p, args):
    """Ends the program if numbers of frames or pixels do not fit together."""
    typed = [place for place, _ in p.given.get("--frames", ()) if not place]
    if args.tts and typed:  # a config.txt of an earlier version has --frames beside --tts
        p.error(f"--frames {args.frames}: expected without --tts, which has --start and --cap")
    ordered(p, args, ("min_pixels", "max_pixels"), ("min_pixels", "image_max_pixels"))
    for name, least in (("frames", 2), ("start", 2), ("cap", args.start)):
        n = getattr(args, name)
        if n < least or n % 2:
            p.error(f"--{name} {n}: expected at least {least}, even")


def methods_of(args):
    """The methods that the flags ask for."""
    temperature = args.temperature if args.m > 1 else 0.0  # a single response is greedy
    if args.tts:
        search = Method(f"s2d-{args.start}-{args.cap}", args.start, args.cap, args.m, temperature)
        if not args.compare:
            return [search]
        frames = [args.start]
        while frames[-1] < args.cap:
            frames.append(min(2 * frames[-1], args.cap))
        votes = [vote(n, args.m, temperature) for n in frames]
        return [*(greedy(n) for n in frames), *votes, search]
    if args.filter:
        return [vote(args.frames, args.m, temperature)]
    return [greedy(args.frames)]


def greedy(frames):
    """One greedy answer at a fixed number of frames."""
    return Method(f"greedy-{frames}", frames, frames, 1, 0.0)


def vote(frames, m, temperature):
    """The plurality of m responses at a fixed number of frames."""
    return Method(f"vote-{frames}", frames, frames, m, temperature)


def evaluate(args, device):
    """Answers all records by every method that the flags ask for, and prints the table."""
    samples, bad = read_questions(args)
    folder = local_folder(args.model)
    methods = methods_of(args)
    with open_answers(args, folder) as out:
        answer_all(args, methods, folder, device, samples, bad, out)
        if RANK == 0:
            answers = summarize_all(args, methods, folder, samples, bad, out)
            refuse_unasked(answers, args.data)
            if args.filter:
                (lines,) = answers.values()
                say(write_filtered([*lines.values()], samples, args.data, args.filter))
            page = f"`python report.py {shlex.quote(str(out))} --open`"
            say(f"{out} holds the answers and summary.json; {page} shows them")


def refuse_unasked(answers, data):
    """Raises DataError if not one question could be asked."""
    lines = [line for found in answers.values() for line in found.values()]
    if not any(line["rounds"] for line in lines):
        first = lines[0]["failure"].removeprefix(f"{Path(data)}, ")
        n = len(lines) // len(answers)
        raise DataError(f"{data}: none of the {n} questions could be asked; the first: {first}")


def toy_args(argv, seed):
    """The flags of the embedded default: those of the toy, then those of the command line."""
    root, configs = toy.root(seed), Path(__file__).parent / "configs"
    if not (root / "grpo").exists() and {"-h", "--help"}.isdisjoint(argv):
        raise SystemExit(
            f"error: no {root}/grpo: train the toy with `python train.py` first, or give --model "
            "and --data"
        )
    paths = [
        "--model",
        f"{root}/grpo",
        "--data",
        f"{root}/world/test.json",
        "--out",
        f"{root}/eval",
    ]
    args = parse_args([f"@{configs}/toy_eval.txt", *paths, *argv])
    args.compare = args.tts  # the toy is small enough for all methods
    return args


def main(argv=None):
    """The command line."""
    argv = sys.argv[1:] if argv is None else argv
    given = peek(argv, model=None, data=None, seed=0)
    if given.model or given.data:
        args = parse_args(argv)
    else:
        args = toy_args(argv, given.seed)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    patience = timedelta(days=2)  # ranks wait for the slowest
    with ranks(patience, "stopped; the same command resumes") as device:
        evaluate(args, device)


if __name__ == "__main__":
    main()
