"""Trains a Qwen2-VL / Qwen2.5-VL policy on videos and images: on reasoning examples (sft) or on rewards only (grpo, tgrpo).

    python train.py                                       the embedded default: a toy world, a cold start, then GRPO
    torchrun --nproc_per_node 8 train.py --algo grpo      the same on 8 processes (GPUs: nccl, none: gloo)
    python train.py @configs/NAME.txt --data FILE         a recipe: a file of flags, overridden by what follows it

One GRPO step, for every rank's share of the step's prompts:
    1. load      decode the videos, build the prompts (in worker processes, one step ahead)
    2. encode    visual embeddings, once for everything below
    3. rollout   G responses for every prompt (rollout.py)
    4. reward    rules judge every response (rewards.py); the group's mean is the baseline (grpo.py)
    5. train     log-probs of packed groups (model.py), clipped loss, backward, averaged over ranks (step.py) by DDP or
                 by FSDP (--fsdp, fsdp.py)
    6. update    clip the gradient, AdamW
What is missing on purpose: a value network, a reward model, a trainer class, an inference server. Every random choice is a
function of (--seed, step, position in the step): any number of ranks draws the same samples and, up to rounding, the same
responses, and a run that was killed goes on as if it had not been (--resume).

What a run leaves behind: run.py.
"""

import contextlib
import json
import math
import shlex
import signal
import sys
from collections import deque
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers.utils import logging as hf_logging

import grpo
import mrsp
import toy
from data import Loader, PromptBuilder, load_samples
from eval import Method, Question, answer, look_for_media
from infra import fsdp
from infra.checkpoints import save
from infra.clock import seconds, timed
from infra.embedding_cache import EmbeddingCache, tensor_digest
from infra.errors import DataError, ModelError
from infra.files import append
from infra.flags import MEDIA, Parser, media_flags, ordered, peek
from infra.memory import device_memory
from infra.ranks import RANK, WORLD, gather, ranks, say
from infra.run_folder import claimed, open_run, resumable, resume_command, stop_signals
from infra.video import close_workers
from model import Policy
from step import grpo_step, pack, sft_step

EMPTY_STEPS = 10  # a run ends if most samples of so many steps in a row, or of all its steps if fewer, cannot be loaded
IDLE_STEPS = 10  # after so many steps in a row that taught nothing, a line says what may help


def parse_args(argv=None):
    """The flags, from argv or the command line; @FILE reads them from a file, one a line, # begins a comment."""
    p = Parser(__doc__)
    g = p.section("run")
    g.value(
        "algo",
        "grpo",
        "sft: learn reasoning examples; grpo: learn from rewards; tgrpo: with the temporal reward",
        choices=("sft", "grpo", "tgrpo"),
    )
    g.value(
        "model",
        None,
        "model folder, run folder or hub name; without one: the embedded toy world",
    )
    g.value("data", None, "records to train on, .json or .jsonl")
    g.value("eval_data", None, "held-out records, answered greedily every --eval_every steps")
    g.value(
        "media_root",
        None,
        "what relative paths in the records start from; the records' own folder unless told",
    )
    g.value("out", None, "run folder (default: out/toy or out/run)")
    g.value(
        "steps",
        1000,
        "steps: one batch of examples, or one rollout and its --updates",
        "at least 1",
    )
    g.value("seed", 0, "of the order of the data and of the sampling")
    g.switch(
        "resume", "resume from the newest whole checkpoint in --out; start anew if there is none"
    )
    g = media_flags(p, fps=2.0, max_pixels=128 * 28 * 28, max_prompt=16384)
    g.value("max_frames", 16, "at most this many frames", "at least 2")
    g = p.section("step")
    g.value("prompts", 8, "prompts of a step, over all ranks (sft: examples)", "at least 1")
    g.value("group", 8, "G, responses to a prompt, at least 2", "at least 2")
    g.value("max_new", 768, "tokens of a response, at most", "at least 1")
    g.value(
        "temperature",
        1.0,
        "of the rollout, and of the log-probs that are trained",
        "above 0, at most 100",
    )
    g.value(
        "top_p",
        1.0,
        "nucleus of the rollout; below 1 the gradient is biased",
        "above 0, at most 1",
    )
    g.value(
        "minibatches",
        1,
        "optimizer steps on the rollout of one step, each on its share of the groups that have a gradient",
        "at least 1",
    )
    g.value(
        "row_tokens",
        16384,
        "tokens of a packed row, i.e. of one forward and backward pass (a longer group gets its own)",
        "at least 1",
    )
    g.switch("cuda_graph", "on a GPU: replay the decode steps as CUDA graphs")
    g = p.section("reward = w_accuracy * accuracy + w_format * format + length bonus")
    g.value("w_accuracy", 1.0, "weight of the accuracy reward")
    g.value("w_format", 1.0, "weight of the format reward")
    g.value("len_bonus", 0.0, "for a right answer of --len_lo to --len_hi tokens; 0.2 in Video-R1")
    g.value("len_lo", 320, "shortest response that gets the bonus")
    g.value("len_hi", 512, "longest response that gets the bonus")
    g = p.section("temporal reward (tgrpo, videos only)")
    g.value(
        "temporal",
        "reward",
        "the bonus is added to the reward, as published, or to the advantage; contrast (ours): to the "
        "reward, each response its own, by the share of its probability that is lost when the frames are shuffled",
        choices=("reward", "advantage", "contrast"),
    )
    g.value(
        "alpha",
        0.3,
        "the bonus of a right response whose group passed the test; contrast: that has lost it all",
    )
    g.value("mu", 1.0, "passed: right at least mu times as often in order as shuffled")
    g.value("correct", 0.5, "a response is right above this accuracy", "at least 0, below 1")
    g.value(
        "shuffle",
        "frame",
        "what is shuffled: frames, or 2-frame grids (no second encoding)",
        choices=("frame", "grid"),
    )
    g.value(
        "shuffles",
        1,
        "orders drawn for each video; they share its G/2 shuffled responses",
        "at least 1",
    )
    g = p.section("loss")
    g.value(
        "norm",
        "std",
        "advantages are divided by the group's std, by nothing, or by the batch's std",
        choices=grpo.NORMS,
    )
    g.value(
        "average",
        "sequence",
        "token losses are averaged per response, over all, or by a constant",
        choices=grpo.AVERAGES,
    )
    g.value(
        "beta", 0.0, "weight of the KL penalty to the starting model; 0 keeps no reference model"
    )
    g.value("kl", "k3", "estimator of that KL", choices=grpo.KL_ESTIMATORS)
    g.value(
        "variant",
        "grpo",
        "the clipped ratio is a token's, a response's (gspo), or weights log pi (cispo)",
        choices=grpo.VARIANTS,
    )
    g.value(
        "clip_low",
        0.2,
        "the ratio's lower clip, 1 - clip_low (none in cispo)",
        "at least 0, at most 1",
    )
    g.value("clip_high", 0.2, "the ratio's upper clip, 1 + clip_high")
    g.value(
        "dual_clip",
        0.0,
        "bound the loss where the advantage is negative and the ratio above this; 3 is usual, 0 is off",
    )
    g.switch(
        "drop_zero_std",
        "leave groups without an advantage out of the batch (and of its averages)",
    )
    g.value(
        "refill",
        0,
        "with --drop_zero_std: draw --prompts more, up to so many times, until --prompts groups are left",
    )
    g.switch("mask_truncated", "leave truncated responses out of the loss")
    g = p.section("optimizer")
    g.value("lr", 1e-6, "peak learning rate")
    g.value("schedule", "constant", "after the warm-up", choices=("constant", "cosine"))
    g.value("warmup", 0, "steps of linear warm-up")
    g.value(
        "beta2",
        0.999,
        "AdamW's memory of squared gradients (beta1 is 0.9)",
        "at least 0, below 1",
    )
    g.value("weight_decay", 0.01, "of matrices")
    g.value("clip_grad", 1.0, "largest gradient norm", "above 0")
    g.switch("train_vision", "train the vision tower too; without it, it is frozen")
    g.value(
        "grad_checkpointing",
        1,
        "recompute the activations of every n-th layer in the backward pass; 0: keep them all",
    )
    g.switch(
        "fsdp",
        "shard weights, gradients and moments over all ranks (fsdp.py); a single rank has nothing to shard",
    )
    g = p.section("long videos (mrsp.py)")
    g.value(
        "sp",
        "1",
        "ranks that share each row, a divisor of all ranks; auto: as few as memory allows, by each step's length",
    )
    g.value(
        "embedding_cache",
        None,
        "folder for the embeddings of a frozen vision tower, shared by runs",
    )
    g.value(
        "cache_gb", 100.0, "size of that folder; what was used longest ago goes first", "above 0"
    )
    g = p.section("logs and checkpoints")
    g.value(
        "log_every", 10, "steps between console lines (log.jsonl gets every step)", "at least 1"
    )
    g.value(
        "eval_every",
        100,
        "steps between evaluations on --eval_data, also done before the first and after the last",
        "at least 1",
    )
    g.value(
        "save_every",
        100,
        "steps between checkpoints; one is always written at the end",
        "at least 1",
    )
    g.value("keep", 2, "newest checkpoints to keep", "at least 1")
    args = p.parse_args(argv)
    if args.model and not args.data:
        p.error("--model needs --data, the records to train on")
    if args.data and not args.model:
        p.error("--data needs --model, what to train")
    ordered(
        p,
        args,
        ("min_frames", "max_frames"),
        ("min_pixels", "max_pixels"),
        ("min_pixels", "image_max_pixels"),
        ("len_lo", "len_hi"),
        ("minibatches", "prompts"),
    )
    if args.refill and not args.drop_zero_std:
        p.error(f"--refill {args.refill}: expected --drop_zero_std beside it")
    if args.dual_clip and (args.dual_clip <= 1 or args.variant == "cispo"):
        p.error(
            f"--dual_clip {args.dual_clip}: expected above 1, and not with --variant cispo, which does not clip below"
        )
    if args.sp != "auto" and (not args.sp.isdecimal() or int(args.sp) < 1 or WORLD % int(args.sp)):
        p.error(f"--sp {args.sp}: expected auto or a divisor of the {WORLD} ranks")
    if args.embedding_cache and args.train_vision:
        p.error(
            "--embedding_cache: expected a frozen vision tower; with --train_vision its embeddings change with every step"
        )
    if args.algo == "tgrpo" and args.group // 2 % args.shuffles:
        p.error(
            f"--shuffles {args.shuffles}: expected a divisor of the {args.group // 2} shuffled responses"
        )
    return args


def evaluate(policy, samples, loader, args):
    """Greedy accuracy on held-out samples, over all ranks -> log entry. A sample that cannot be loaded is a wrong answer; if
    none can be, DataError. For sft also the validation loss, on the samples that hold reasoning.
    """
    method, builder = Method("greedy", args.max_frames, args.max_frames, 1, 0.0), loader.builder
    questions = (Question(i, samples[i], method) for i in range(RANK, len(samples), WORLD))
    results, nll, tokens, items = [], 0.0, 0, []
    for q in answer(policy, builder, questions, method, pool=loader.pool, max_new=args.max_new):
        results.append((q.sample.source, q.score, None if q.prompt else q.failure))
        if args.algo == "sft" and q.prompt and q.sample.reasoning:
            items.append((q.prompt, builder.target(q.sample)))
    for row in pack(items, [len(p.ids) + len(target) for p, target in items], args.row_tokens):
        with torch.no_grad():
            nll -= float(policy([p for p, _ in row], [[target] for _, target in row])[0].sum())
        tokens += sum(len(target) for _, target in row)
    results, nll, tokens = sum(gather(results), []), sum(gather(nll)), sum(gather(tokens))
    failures = [failure for _, _, failure in results if failure]
    if len(failures) == len(results):
        raise DataError(
            f"{args.eval_data}: none of the {len(results)} held-out media could be loaded; the first: {failures[0]}"
        )
    by_source = {}
    for source, score, _ in results:
        by_source.setdefault(source, []).append(score)
    mean = lambda scores: sum(scores) / len(scores)
    entry = {"eval_loss": nll / tokens} if tokens else {}
    return entry | {
        "eval_accuracy": mean([score for _, score, _ in results]),
        "eval_questions": len(results),
        "eval_failures": len(failures),
        "eval_by_source": {
            source: round(mean(scores), 4) for source, scores in sorted(by_source.items())
        },
    }


# ---- the loop


def learning_rate(step, args):
    """Of a step (from 0): linear warm-up, then constant or a half cosine down to 0."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    if args.schedule == "constant":
        return args.lr
    return (
        args.lr
        * 0.5
        * (1 + math.cos(math.pi * (step - args.warmup) / max(1, args.steps - args.warmup)))
    )


def make_optimizer(policy, args):
    """AdamW on what is trained; weight decay on matrices only."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, args.beta2), fused=True), trained


def usable(loaded, errors):
    """The prompts of this rank, of what a loader gave; what could not be loaded, on any rank, is said and added to errors."""
    failed = sum(gather([str(p) for _, p in loaded if isinstance(p, DataError)]), [])
    for message in failed:
        say(f"skipped: {message}")
    errors += failed
    return [(i, p) for i, p in loaded if not isinstance(p, DataError)]


def refuse_failing(failed, args):
    """Raises DataError if most samples of the last steps could not be loaded. failed: the messages of each of them, up to
    EMPTY_STEPS; of fewer steps, only a whole run is judged."""
    messages, drawn = sum(failed, []), len(failed) * args.prompts
    if len(failed) == min(EMPTY_STEPS, args.steps) and 2 * len(messages) > drawn:
        raise DataError(
            f"{len(messages)} of the {drawn} samples of {len(failed)} steps in a row could not be loaded; the last: "
            f"{messages[-1]}"
        )


def patience(args):
    """How long ranks wait for each other: half an hour, and the time that one of them may need to load its prompts."""
    return timedelta(
        minutes=30, seconds=args.decode_timeout * math.ceil(args.prompts / WORLD / args.workers)
    )


def share(group, prompts):
    """The prompts of a sequence-parallel group: each was loaded by one of its ranks, now all have them, in order."""
    return sorted(sum(group.exchange(prompts), []), key=lambda p: p[0])


def update(optimizer, trained, step, args):
    """Clips the gradient and steps, unless the gradient is not finite -> log entry."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, args)
    norm = torch.nn.utils.clip_grad_norm_(trained, args.clip_grad)
    norm = float(
        norm.full_tensor() if isinstance(norm, DTensor) else norm
    )  # sharded: of this rank's parts
    if math.isfinite(norm):
        optimizer.step()
        torch.clear_autocast_cache()  # it holds bf16 copies of the weights as they were
    else:
        say(f"step {step + 1}: the gradient's norm is {norm}, so this update is skipped")
    optimizer.zero_grad()
    return {"grad_norm": norm, "skipped_update": not math.isfinite(norm)}


def read_data(args):
    """The records of a run -> (samples, held-out samples); bad records are printed and left out, missing media are counted.
    Raises DataError: nothing is left, a bad held-out record, or most media are missing."""
    bad = {}
    samples = load_samples(args.data, media_root=args.media_root, skipped=bad)
    bad = list(bad.values())
    if args.algo == "sft":
        bad += [
            f"{s.name}: no reasoning ('process') to learn from" for s in samples if not s.reasoning
        ]
        samples = [s for s in samples if s.reasoning]
    if not samples:
        raise DataError(f"{args.data}: holds no usable record; the first problem: {bad[0]}")
    for message in bad:
        say(f"skipped: {message}")
    held_out = load_samples(args.eval_data, media_root=args.media_root) if args.eval_data else []
    say(
        f"{args.data}: {len(samples)} samples, {len(held_out)} held out, {len(bad)} bad records skipped"
    )
    look_for_media(samples, args.data, args.media_root)
    look_for_media(held_out, args.eval_data, args.media_root)
    return samples, held_out


def warn(args):
    """Prints a line for every flag that keeps the run from learning, or from its learning rate."""
    if args.lr == 0:
        say("--lr 0: no step changes the weights")
    if args.algo != "sft" and not (args.w_accuracy or args.w_format or args.len_bonus):
        say(
            "--w_accuracy 0, --w_format 0 and --len_bonus 0: every reward is 0"
            + (
                " but for the temporal bonus"
                if args.algo == "tgrpo" and args.alpha
                else ", so nothing is learned"
            )
        )
    if args.warmup >= args.steps:
        say(
            f"--warmup {args.warmup}: the run has {args.steps} steps, so the learning rate rises until its end"
        )


def load(args, checkpoint, device, samples, policy_class=Policy):
    """What a run works with -> (policy, reference or None, Loader)."""
    policy = policy_class.load(
        checkpoint or args.model, device=device, grad_checkpointing=args.grad_checkpointing
    )
    policy.cuda_graph = args.cuda_graph and device.type == "cuda"
    if not args.train_vision:
        policy.freeze_vision()
    sharded = args.fsdp and WORLD > 1
    if sharded:
        fsdp.shard(policy)
    reference = None
    if args.beta and args.algo != "sft":
        reference = policy_class.load(
            args.model,
            device=device,
            dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        )
        reference.requires_grad_(False)
        if sharded:
            fsdp.shard(reference)
    media = {name: getattr(args, name) for name in (*MEDIA, "max_frames")}
    builder = PromptBuilder(policy.folder, max_prompt=args.max_prompt, **media)
    if args.embedding_cache:
        tower = [
            str(policy.net.model.visual.dtype),
            device.type,
            tensor_digest(*policy.net.model.visual.parameters()),
        ]
        policy.embedding_cache = EmbeddingCache(args.embedding_cache, args.cache_gb, tower)
    say(
        f"{args.algo}: {args.out}: {sum(p.numel() for p in policy.parameters()) / 1e6:.1f} M parameters, {WORLD} x {device.type}"
    )
    loader = Loader(
        samples,
        builder,
        prompts=args.prompts,
        seed=args.seed,
        workers=args.workers,
        target=args.algo == "sft",
        rank=mrsp.turn(RANK, WORLD, args.sp),
        world=WORLD,
    )
    return policy, reference, loader


def advice(entry, args):
    """One line on why steps like that of this log entry teach nothing, and what may help."""
    if not math.isfinite(entry["grad_norm"]):
        return "the gradient is not finite: lower --lr, or check the weights it started from"
    if entry["truncated"] > 0.5:
        return f"{entry['truncated']:.0%} of the responses are cut off at --max_new {args.max_new}: raise it"
    if entry["format"] == 0:
        return "no response has the format <think> </think><answer> </answer>: begin with a cold start (--algo sft)"
    return (
        "all responses to a question get the same reward: choose questions that are neither too easy nor too hard "
        "(eval.py --filter), or raise --group"
    )


def report(out, bar, step, entry, args, skipped=0):
    """Writes a step's log entry; shows its figures on the bar and, every args.log_every steps, on a line, with the updates that
    were skipped since the run began or was resumed."""
    if torch.cuda.is_available():
        entry["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    if RANK == 0:
        append(
            out / "log.jsonl",
            [{"step": step, **entry, "seconds": {k: round(v, 4) for k, v in seconds.items()}}],
        )
    figures = {
        k: f"{entry[k]:.3f}"
        for k in ("loss", "reward", "accuracy", "response_length", "grad_norm")
        if k in entry
    }
    bar.set_postfix(figures)
    if step and step % args.log_every == 0:
        figures |= {k: f"{entry[k]:.3f}" for k in ("zero_std_groups", "truncated") if k in entry}
        figures["skipped_updates"] = f"{skipped}"
        phases = ", ".join(f"{k} {v:.2f}" for k, v in seconds.items() if k != "step")
        say(
            f"step {step:5d}  {'  '.join(f'{k} {v}' for k, v in figures.items())}  {seconds['step']:.2f} s: {phases}"
        )
    if "eval_accuracy" in entry:
        say(
            f"step {step:5d}  held-out accuracy {entry['eval_accuracy']:.3f}   "
            + "  ".join(
                f"{source} {accuracy:.2f}" for source, accuracy in entry["eval_by_source"].items()
            )
        )


def train(args, device, at_end, policy_class=Policy):
    """Runs args.steps steps of args.algo; see the module's first lines for what a step does. at_end: an ExitStack of what is to
    be let go of, however it ends. Ends the program, after a step and its checkpoint, on SIGTERM (exit 0) or ctrl-C (130)."""
    samples, held_out = read_data(
        args
    )  # before a folder is opened or a model loaded: a wrong path costs nothing
    warn(args)
    out = Path(args.out)
    at_end.enter_context(claimed(out))
    checkpoint = open_run(args, parse_args(["--model", "", "--data", ""]))
    policy, reference, loader = load(args, checkpoint, device, samples, policy_class)
    at_end.callback(close_workers)
    at_end.callback(loader.pool.shutdown, cancel_futures=True)
    optimizer, trained = make_optimizer(policy, args)
    start, failed = (
        0,
        deque(maxlen=EMPTY_STEPS),
    )  # samples that could not be loaded, of the last steps
    idle_steps = skipped = 0
    if checkpoint:
        start = json.loads((checkpoint / "state.json").read_text())["step"]
        fsdp.load_optimizer(optimizer, checkpoint / "optimizer.pt")
        if start >= args.steps:
            say(
                f"{checkpoint}: {start} steps are done and --steps is {args.steps}, so there is nothing left to do"
            )
    wrapped = policy
    if WORLD > 1 and not args.fsdp:
        wrapped = DistributedDataParallel(
            policy, forward_sync_buffers=False, gradient_as_bucket_view=True
        )
    autocast = torch.autocast(
        policy.device.type, torch.bfloat16, enabled=policy.device.type == "cuda"
    )  # fp32 master weights
    bar = at_end.enter_context(
        tqdm(
            total=args.steps,
            initial=start,
            disable=None if RANK == 0 else True,
            desc=args.algo,
            unit="step",
        )
    )
    noted = at_end.enter_context(stop_signals())
    at_end.enter_context(resumable())

    def held_out_accuracy():
        policy.sp = mrsp.UNSHARDED  # every rank answers its own questions
        with autocast, timed("evaluate"), fsdp.gathered(policy):
            return evaluate(policy, held_out, loader, args)

    limit, said = (
        min(gather(device_memory(device, WORLD))),
        None,
    )  # the same on all ranks, as the degree must be
    seconds.clear()
    if start == 0 and held_out:
        report(out, bar, 0, held_out_accuracy(), args)
    for step in range(start, args.steps):
        seconds.clear()
        done = step + 1
        with timed("step"):
            errors = []
            with timed("data"):
                prompts = usable(loader.load(step), errors)
                failed.append(errors[:])
                refuse_failing(failed, args)
                lengths = sum(gather([len(p.ids) for _, p in prompts]), [])
                size, estimate = mrsp.smallest_group(policy, reference, lengths, limit, args, WORLD)
                group = policy.sp = mrsp.sequence_parallel(size, patience(args))
                if reference:
                    reference.sp = group
                if WORLD > 1 and lengths and size != said:
                    say(
                        f"memory: {estimate}"
                        if args.sp == "1"
                        else f"sequence parallelism: {size} ranks a row; {estimate}"
                    )
                    said = size
                prompts = share(group, prompts)
            entry, some, tokens = (
                {"updates": 0, "skipped_updates": 1, "skipped_update": True},
                [],
                0,
            )
            if len(errors) < args.prompts:
                policy.train()
                optimize = partial(update, optimizer, trained, step, args)
                with autocast:
                    if args.algo == "sft":
                        entry, some, tokens = sft_step(wrapped, prompts, optimize, args)
                        if not math.isfinite(entry["loss"]):
                            raise ModelError(
                                f"step {done}: the loss is {entry['loss']}: logits that are not finite"
                            )
                    else:
                        more = lambda k: share(group, usable(loader.refill(step, k), errors))
                        entry, some, tokens = grpo_step(
                            wrapped, reference, prompts, more, loader.builder, step, optimize, args
                        )
                policy.eval()
        entry |= {
            "lr": learning_rate(step, args),
            "sp": group.size,
            "skipped_samples": len(errors),
            "tokens_per_second": tokens / seconds["step"],
        }
        if held_out and (done % args.eval_every == 0 or done == args.steps):
            entry |= held_out_accuracy()
        bar.update()
        skipped += entry["skipped_updates"]
        report(out, bar, done, entry, args, skipped)
        if "grad_norm" in entry:  # some sample was loaded
            idle_steps = (
                idle_steps + 1
                if entry["skipped_update"] or entry.get("zero_std_groups") == 1
                else 0
            )
            if idle_steps == IDLE_STEPS:
                say(
                    f"step {done}: the last {IDLE_STEPS} steps taught nothing; {advice(entry, args)}"
                )
        if RANK == 0:
            append(out / "samples.jsonl", some)
        stop = max(gather(max(noted, default=0)))  # of any rank: all stop after the same step
        if done % args.save_every == 0 or done == args.steps or stop:
            policy.sp = mrsp.UNSHARDED
            with autocast:
                save(policy, optimizer, done, args)
        if stop:
            say(
                f"stopped after step {done} of {args.steps} by {signal.Signals(stop).name}; to resume: {resume_command()}"
            )
            raise SystemExit(0 if stop == signal.SIGTERM else 128 + stop)
    say(
        f"{out} holds the checkpoints, the log and samples; `python report.py {shlex.quote(str(out))} --open` shows them"
    )


def toy_runs(args, argv):
    """The embedded default as ordinary runs: a cold start in the toy world, then (--algo grpo) RL from it."""
    parse_args(["--algo", args.algo])
    root, configs = Path(args.out or toy.root(args.seed)), Path(__file__).parent / "configs"
    common = ["--eval_data", f"{root}/world/test.json", "--seed", str(args.seed)]
    sft = [
        f"@{configs}/toy_sft.txt",
        *common,
        "--data",
        f"{root}/world/cot.json",
        "--model",
        f"{root}/world/model",
    ]
    if args.algo == "sft":
        return [parse_args([*sft, *argv, "--out", f"{root}/sft"])]
    rl = [
        f"@{configs}/toy_{args.algo}.txt",
        *common,
        "--data",
        f"{root}/world/train.json",
        "--model",
        f"{root}/sft",
    ]
    return [
        parse_args([*sft, "--out", f"{root}/sft", "--resume"]),
        parse_args([*rl, *argv, "--out", f"{root}/{args.algo}"]),
    ]


def main(argv=None, policy_class=Policy):
    """The command line: one run, or the embedded default's. policy_class: the class of the policy."""
    argv = sys.argv[1:] if argv is None else argv
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    args = peek(argv, model=None, data=None, algo="grpo", out=None, seed=0)
    embedded = not (args.model or args.data)
    runs = toy_runs(args, argv) if embedded else [parse_args(argv)]
    with ranks(max(map(patience, runs))) as device:
        world = Path(runs[0].data).parent
        if embedded and RANK == 0 and not world.exists():
            toy.write(world, args.seed)
        gather(None)
        for run in runs:
            run.out = run.out or "out/run"
            with contextlib.ExitStack() as at_end:
                train(run, device, at_end, policy_class)


if __name__ == "__main__":
    main()
