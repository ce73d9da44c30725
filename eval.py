"""Evaluation: any model folder on any records file, one answer a question or sparse-to-dense; failures count as wrong.

    python eval.py --tts                    the toy's held-out questions, after `python train.py`: greedy, a vote of five and
                                            sparse-to-dense, at 4, 8 and 16 frames
    python eval.py --model DIR --data eval_mvbench.json --frames 32        one greedy answer to every question
    python eval.py --model DIR --data eval_videomme.json --tts             sparse-to-dense: 32 to 128 frames, m = 5
    python eval.py --model DIR --data train.json --m 10 --filter kept.json      what is neither too easy nor too hard to learn
    torchrun --nproc_per_node 8 -- eval.py ...      the same on 8 processes (without --, torchrun takes --start for its own)

What it leaves in --out: METHOD.rankN.jsonl, one line per question with everything (rounds, votes, responses, frames, tokens,
seconds, or the reason of a failure), appended as soon as it is answered; summary.json, of every method answered in the folder;
config.txt. The same command again resumes where a killed one stopped, on any number of processes, and prints the table at once
when nothing is left to do.
"""

import json
import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
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
from infra.errors import DataError
from infra.files import append, digest, write_whole
from infra.flags import (
    MEDIA,
    Parser,
    by_name,
    flag_lines,
    media_flags,
    ordered,
    peek,
    read_config,
    refuse_changes,
)
from infra.model_folder import fingerprint, local_folder, text_fingerprint
from infra.ranks import RANK, WORLD, gather, ranks, say, seed
from infra.records import read_records
from infra.run_folder import claimed, commit
from infra.video import close_workers
from model import Policy
from rollout import generate
from scores import answer_misfit, constant_answer, mean, natural, score, summarize, table

# what all the answers of a folder have in common, besides the model's weights and the records
SAME = ("# weights", "media_root", "seed", *MEDIA[:-1], "max_prompt", "max_new", "m", "temperature")


class Method(NamedTuple):
    """A way to answer: m responses at `start` frames, and while they disagree at twice as many, up to `cap`."""

    name: str
    start: int
    cap: int
    m: int
    temperature: float


def parse_args(argv=None):
    """The flags, from argv or the command line; @FILE reads them from a file."""
    p = Parser(__doc__)
    g = p.section("run")
    g.value(
        "model",
        None,
        "model folder, run folder or hub name; without one: the toy that `python train.py` has trained",
    )
    g.value("data", None, "records, .json or .jsonl")
    g.value(
        "media_root",
        None,
        "what relative paths in the records start from; the records' own folder unless told",
    )
    g.value("out", None, "folder of the answers (default: out/toy/eval, or out/eval-MODEL-DATA)")
    g.value("seed", 0, "of the sampling")
    g = media_flags(p, fps=float("inf"), max_pixels=256 * 28 * 28, max_prompt=65536)
    g.value(
        "frames",
        16,
        "without --tts: of every video, evenly spaced, if it has as many",
        "at least 2",
    )
    g = p.section("responses")
    g.value("max_new", 1024, "tokens of a response, at most", "at least 1")
    g.value(
        "batch",
        32,
        "questions whose responses are drawn together; fewer need less memory",
        "at least 1",
    )
    g.switch("cuda_graph", "on a GPU: replay the decode steps as CUDA graphs")
    g.switch(
        "tts",
        "sparse-to-dense: --m responses at --start frames; until they agree, twice the frames, up to --cap",
    )
    g.value("start", 32, "frames of the first round", "at least 2")
    g.value("cap", 128, "frames of the last round", "at least 2")
    g.value("m", 5, "responses of a round", "at least 1")
    g.value(
        "temperature", 1.0, "of the m responses; a single one is greedy", "above 0, at most 100"
    )
    g.switch(
        "compare",
        "with --tts: also a greedy answer, and a vote of --m, at every number of frames from --start to --cap",
    )
    g.value(
        "filter",
        None,
        "write to this file the records that --m responses at --frames frames answer neither always right nor "
        "always wrong, with their pass_rate: what RL can learn from (LongVILA-R1: --m 10)",
    )
    args = p.parse_args(argv)
    if bool(args.model) != bool(args.data):
        p.error("--model and --data: expected both, or neither for the toy")
    ordered(p, args, ("min_pixels", "max_pixels"), ("min_pixels", "image_max_pixels"))
    for name, least in dict(frames=2, start=2, cap=args.start).items():
        if getattr(args, name) < least or getattr(args, name) % 2:
            p.error(f"--{name} {getattr(args, name)}: expected at least {least}, even")
    if args.filter and Path(args.filter).resolve() == Path(args.data or "").resolve():
        p.error(
            f"--filter {args.filter}: is the file of --data, which it would overwrite; expected another file"
        )
    if args.filter and Path(args.filter).is_dir():
        p.error(f"--filter {args.filter}: is a folder, expected a file to write")
    if args.filter and (args.tts or args.m < 2 or not Path(args.filter).absolute().parent.is_dir()):
        p.error(
            f"--filter {args.filter}: expected without --tts, with --m of at least 2, and in a folder that exists"
        )
    return args


def methods(args):
    """The methods that the flags ask for."""
    greedy = lambda n: Method(f"greedy-{n}", n, n, 1, 0.0)
    temperature = args.temperature if args.m > 1 else 0.0
    vote = lambda n: Method(f"vote-{n}", n, n, args.m, temperature)
    if not args.tts:
        return [vote(args.frames) if args.filter else greedy(args.frames)]
    frames = [args.start]
    while frames[-1] < args.cap:
        frames.append(min(2 * frames[-1], args.cap))
    search = Method(f"s2d-{args.start}-{args.cap}", args.start, args.cap, args.m, temperature)
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
    decoded: dict | None = None  # frames of earlier rounds, where there can be several
    prompt: Prompt | None = None  # of the last round; None: could not be loaded
    failure: str | None = None

    def __post_init__(self):
        self.search = tts.Search(start=self.method.start, cap=self.method.cap, m=self.method.m)
        self.decoded = {} if self.method.start < self.method.cap else None

    def load(self, builder):
        """The prompt of the next round. Raises DataError."""
        return builder(self.sample, max_frames=self.search.frames, decoded=self.decoded)

    def set_prompt(self, prompt):
        """The next round will be of this prompt."""
        self.prompt = prompt
        self.search.clamp(prompt.media[0].available)

    def record(self, group, texts, seconds):
        """The m responses to the prompt; seconds: this question's share of the batch's time."""
        answers = [
            rewards.normalize_answer(rewards.extract_answer(text), self.sample) for text in texts
        ]
        logps = [float(x.mean()) for x in group.logps]
        self.search.add_votes([tts.Vote(a, x) for a, x in zip(answers, logps)])
        (media,) = self.prompt.media
        frames, pixels = self.prompt.frames_x_pixels
        self.rounds.append(
            dict(
                frames=frames,
                pixels=pixels,
                visual_tokens=media.tokens,
                votes=answers,
                logps=logps,
                responses=texts,
                tokens=[len(r) for r in group.responses],
                truncated=group.truncated,
                seconds=seconds,
            )
        )
        if self.search.frames is None and self.search.answer is None:
            self.failure = "no valid answer"

    @property
    def score(self):
        """In [0, 1]; 0 for a failure."""
        return score(self.search.answer, self.sample) if self.failure is None else 0.0


def answer(policy, builder, questions, method, *, pool, max_new, run_seed=0, batch=32):
    """Yields each Question once it is answered or has failed; the first rounds of many are drawn together, and so on.

    questions: Questions by this method.  pool: threads that load media ahead.  An answer is a function of the policy, the
    question and (run_seed, index, frames): not of its company, up to rounding.
    """
    waiting, queues = (
        iter(questions),
        {0: []},
    )  # number of the round -> [(question, its prompt-to-be)]
    queue = lambda q: queues.setdefault(len(q.rounds), []).append((q, pool.submit(q.load, builder)))
    while True:
        for q in islice(waiting, 2 * batch - len(queues[0])):
            queue(q)
        full = [
            n for n in queues if len(queues[n]) >= batch
        ]  # late rounds first: their frames are held in memory
        n = max(full, default=min((n for n in queues if queues[n]), default=None))
        if n is None:
            return
        began = time.perf_counter()
        taken, queues[n] = queues[n][:batch], queues[n][batch:]
        ready, settled = [], []
        for q, future in taken:
            try:
                q.set_prompt(future.result())
                ready.append(q)
            except DataError as e:
                q.prompt, q.failure = None, str(e)
                settled.append(q)
        groups = generate(
            policy,
            [q.prompt for q in ready],
            method.m,
            max_new=max_new,
            temperature=method.temperature,
            seeds=[seed(run_seed, q.index, q.search.frames) for q in ready],
        )
        texts = [[builder.decode(r) for r in group.responses] for group in groups]
        share = (time.perf_counter() - began) / len(taken)
        for q, group, text in zip(ready, groups, texts):
            q.record(group, text, share)
            if q.search.frames is None:
                settled.append(q)
            else:
                q.prompt = None
                queue(q)
        yield from settled


def line(q):
    """A question as its line of the log. answer: the record's; gold and given: that and the model's answer, normalised alike."""
    s, shown = q.sample, q.rounds[-1] if q.rounds else {}
    return dict(
        record=q.index,
        id=s.id,
        path=s.path,
        data_type=s.data_type,
        fps=s.fps,
        segment=s.segment,
        about=s.about,
        problem_type=s.problem_type,
        question=s.question,
        options=s.options,
        answer=s.answer,
        gold=rewards.normalize_answer(s.answer, s),
        given=q.search.answer,
        score=q.score,
        failure=q.failure,
        frames=shown.get("frames", 0),
        pixels=shown.get("pixels", 0),
        visual_tokens=sum(r["visual_tokens"] for r in q.rounds),
        seconds=sum(r["seconds"] for r in q.rounds),
        rounds=q.rounds,
    )


def run_method(policy, builder, left, samples, bad, method, out, pool, args):
    """Answers this rank's share of the records `left`, appending to the method's file."""
    left = left[RANK::WORLD]
    bar = tqdm(
        total=len(left), desc=method.name, unit="question", disable=None if RANK == 0 else True
    )
    file = out / f"{method.name}.rank{RANK}.jsonl"
    for i in (i for i in left if i in bad):
        append(file, [bad[i] | dict(record=i, score=0.0, rounds=[])])
        bar.update()
    questions = (Question(i, samples[i], method) for i in left if i in samples)
    total = 0.0
    asked = answer(
        policy,
        builder,
        questions,
        method,
        pool=pool,
        max_new=args.max_new,
        run_seed=args.seed,
        batch=args.batch,
    )
    for n, q in enumerate(asked, 1):
        append(file, [line(q)])
        if q.prompt is None:
            tqdm.write(f"failed: {q.failure}")
        total += q.score
        bar.update()
        bar.set_postfix(accuracy=f"{total / n:.3f}")
    bar.close()


def read(out, name, form=True):
    """{record: line} of a method, of all ranks. Raises DataError for a line that cannot be read, unless it is a file's last, or,
    with `form`, holds other values than eval.py writes."""
    lines, wrong = {}, None
    for file in sorted(out.glob(f"{name}.rank*.jsonl")):
        *whole, _ = file.read_bytes().split(b"\n")
        for i, text in enumerate(whole, 1):
            try:
                r = json.loads(text)
                if type(r["record"]) is not int:
                    raise TypeError("'record' is no whole number")
            except (ValueError, TypeError, KeyError) as e:
                raise DataError(
                    f"{file}, line {i}: not JSON with the number of a 'record'; delete the line, and its question is "
                    f"asked again ({e})"
                ) from e
            lines[r["record"]] = r
            if wrong is None and (why := answer_misfit(r)):
                wrong = f"{file}, line {i}: {why}; delete the line, and its question is asked again"
    if form and wrong:
        raise DataError(wrong)
    return dict(sorted(lines.items()))


def unanswered(out, method, records):
    """The records without a line yet, the same on all ranks; half-written last lines, as a kill leaves them, are cut off."""
    if RANK == 0:
        for path in out.glob(f"{method.name}.rank*.jsonl"):
            text = path.read_bytes()
            with open(path, "r+b") as f:
                f.truncate(text.rfind(b"\n") + 1)
    answered = read(out, method.name) if RANK == 0 else {}
    return gather([i for i in records if i not in answered])[0]


def earlier_methods(out, asked, records):
    """The summaries of the methods that earlier commands answered in this folder. A method that lacks answers is named and
    left out."""
    found, names = [], {file.name.split(".rank")[0] for file in out.glob("*.rank*.jsonl")}
    for name in sorted(names - {method.name for method in asked}, key=natural):
        lines = read(out, name, form=False)
        if lines.keys() == set(records):
            found.append(summarize([*read(out, name).values()], name))
        else:
            say(
                f"{name}: has answers to {len(lines)} of {len(records)} questions, so it is not in summary.json"
            )
    return found


# ---- the command


def main(argv=None):
    """The command line."""
    argv = sys.argv[1:] if argv is None else argv
    args = peek(argv, model=None, data=None, seed=0)
    if not (args.model or args.data):
        root = toy.root(args.seed)
        if not (root / "grpo").exists() and {"-h", "--help"}.isdisjoint(argv):
            raise SystemExit(
                f"error: no {root}/grpo: train the toy with `python train.py` first, or give --model and --data"
            )
        argv = [
            f"@{Path(__file__).parent}/configs/toy_eval.txt",
            "--model",
            f"{root}/grpo",
            "--data",
            f"{root}/world/test.json",
            "--out",
            f"{root}/eval",
            *argv,
        ]
    args = parse_args(argv)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    with ranks(
        timedelta(days=2), "stopped; the same command resumes"
    ) as device:  # ranks wait for the slowest
        with ExitStack() as at_end:
            evaluate(args, device, at_end)


def write_filtered(lines, samples, source, target):
    """Writes to target the records whose responses are sometimes right (score above 0.5), with their pass_rate -> a report."""
    rates = {
        r["record"]: mean(
            rewards.grade(vote, samples[r["record"]]) > 0.5 for vote in r["rounds"][0]["votes"]
        )
        for r in lines
        if r["rounds"]
    }
    kept = [
        read() | {"pass_rate": rates[i]}
        for i, (_, read) in enumerate(read_records(source))
        if 0 < rates.get(i, 0) < 1
    ]
    write_whole(
        target,
        "".join(json.dumps(r) + "\n" for r in kept)
        if target.endswith(".jsonl")
        else json.dumps(kept, indent=1),
    )
    always, never = (sum(rate == x for rate in rates.values()) for x in (1, 0))
    return (
        f"{target}: {len(kept)} of {len(lines)} records kept; always right: {always}, never: {never}, "
        f"unreadable: {len(lines) - len(rates)}. Relative paths in it start where they did: --media_root"
    )


def open_answers(args, folder, at_end):
    """Opens the folder of answers, claimed until at_end, an ExitStack, closes -> the folder. Ends the program where other
    processes are still writing to it, or where it holds the answers of another model, other records or flags, or answers of
    which config.txt does not say what they were made with."""
    out = Path(
        args.out
        or f"out/eval-{str(args.model).strip('./').replace('/', '-')}-{Path(args.data).stem}"
    )
    at_end.enter_context(claimed(out))
    if RANK == 0:
        model = f"{fingerprint(folder)}, texts {text_fingerprint(folder)}"
        lines = [
            f"# weights {model}, records {digest(args.data)}",
            f"# commit {commit()}",
            *flag_lines(args),
        ]
        config = out / "config.txt"
        if any(f.stat().st_size for f in out.glob("*.rank*.jsonl")):
            if not config.exists() or "# weights" not in by_name(read_config(config).splitlines()):
                raise DataError(
                    f"{config}: missing, or without its line '# weights': nothing says which model and flags gave "
                    "the answers beside it. Another --out starts anew, and so does deleting that folder"
                )
            refuse_changes(config, lines, SAME)
        write_whole(config, "\n".join(lines) + "\n")
    gather(None)
    return out


def look_for_media(samples, data, media_root):
    """Prints how many media are missing, if any are. Raises DataError, on all ranks, if most are: rank 0 looks for them."""
    found = missing_media(samples, data, media_root) if RANK == 0 else None
    message, most = gather(found)[0]
    if most:
        raise DataError(message)
    if message:
        say(message)


def evaluate(args, device, at_end):
    """Answers all records by every method of the flags, and prints the table -> summary. at_end: see open_answers."""
    bad = {}
    found = load_samples(args.data, media_root=args.media_root, skipped=bad)
    folder = local_folder(args.model)
    samples = dict(zip((i for i in range(len(found) + len(bad)) if i not in bad), found))
    for i, (_, read_record) in enumerate(read_records(args.data)):
        if i in bad:
            say(f"failed: {bad[i]}")
            bad[i] = dict(failure=bad[i])
            with suppress(DataError):  # it is not JSON
                raw = read_record()
                bad[i] |= dict(about=about(raw), problem_type=problem_type(raw))
    out = open_answers(args, folder, at_end)
    asked, records, policy = methods(args), sorted({*samples, *bad}), None
    pool = ThreadPoolExecutor(args.workers)
    try:
        for method in asked:
            left = unanswered(out, method, records)
            if left and policy is None:
                look_for_media(found, args.data, args.media_root)
                policy = Policy.load(
                    folder,
                    device=device,
                    dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
                )
                policy.cuda_graph = args.cuda_graph and device.type == "cuda"
                builder = PromptBuilder(
                    folder,
                    max_prompt=args.max_prompt,
                    **{name: getattr(args, name) for name in MEDIA},
                )
            if left:
                run_method(policy, builder, left, samples, bad, method, out, pool, args)
                gather(None)
    finally:
        pool.shutdown(cancel_futures=True)
        close_workers()
    if RANK:
        return None
    lines = {method: read(out, method.name) for method in asked}
    for method in asked:
        if lost := set(records) ^ set(lines[method]):
            raise DataError(
                f"{out}: {method.name} has no line, or one too many, for the records {sorted(lost)[:10]}"
            )
    summary = {
        "model": str(folder),
        "data": args.data,
        "constant_answer": constant_answer(found) * len(found) / len(records),
        "methods": [
            *(summarize([*lines[method].values()], method.name) for method in asked),
            *earlier_methods(out, asked, records),
        ],
    }
    write_whole(out / "summary.json", json.dumps(summary, indent=1))
    say(table(summary))
    if not any(r["rounds"] for answered in lines.values() for r in answered.values()):
        first = next(iter(lines[asked[0]].values()))["failure"].removeprefix(f"{Path(args.data)}, ")
        raise DataError(
            f"{args.data}: none of the {len(records)} questions could be asked; the first: {first}"
        )
    if args.filter:
        say(write_filtered([*lines[asked[0]].values()], samples, args.data, args.filter))
    say(
        f"{out} holds the answers and summary.json; `python report.py {shlex.quote(str(out))} --open` shows them"
    )
    return summary


if __name__ == "__main__":
    main()
