"""Trains a Qwen-VL policy on videos, images and text: by imitation (sft) or rewards (grpo, tgrpo).

    python train.py                                       a toy world, a cold start, then GRPO
    torchrun --nproc_per_node 8 train.py --algo grpo      the same on 8 processes (nccl, or gloo)
    python train.py @configs/NAME.txt --data FILE         a recipe: a file of flags

The algorithm, GRPO (arXiv 2402.03300) with Video-R1's temporal bonus (arXiv 2503.21776), is
`grpo_step`. For every question q of the step's B:

    1. encode     the video, once for all responses                Policy.encode
    2. prefill    the prompt's keys and values, once               rollout.prefill
    3. sample     G responses o_1 ... o_G ~ pi_old(. | q)          rollout.generate
                  tgrpo: G // 2 more, to shuffled frames (*)       tgrpo.run_on_shuffled
    4. reward     rules judge each response: r_i                   rewards.py
    5. advantage  A_i = (R_i - mean R) / std R                     grpo.group_advantages
                  R_i = r_i; tgrpo: R_i = r_i + bonus_i (*)        tgrpo.step_bonus
    6. log-probs  log pi(o_i | q), a group's responses in one row  Policy.forward
    7. update     -min(rho A, clip(rho) A) + beta KL(pi || ref)    grpo.grpo_loss
                  backward, clip the gradient, AdamW               infra/optimizer.py

rho = pi / pi_old of each token; sampling keeps log pi_old. (*) --temporal advantage adds the bonus
to A_i, and contrast scores the o_i again instead of sampling more (tgrpo.py). Left out on purpose:
a value network, a reward model, a trainer class, an inference server.

Rewards are gathered from all ranks before advantages are taken, and every loss is divided by a
count over the whole minibatch. So any split of a step over ranks and rows gives the same gradient,
up to rounding. Each random choice is a function of (--seed, step, position in the step): any number
of ranks draws the same samples and, up to rounding, the same responses, and a killed run resumes as
if nothing had happened (--resume). What a run leaves behind: infra/run_folder.py.
"""

import json
import math
import shlex
import signal
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging as hf_logging

import grpo
import lora
import mrsp
import tgrpo
import toy
from data import Loader, PromptBuilder, load_samples
from eval import Method, Question, answer, look_for_media
from infra import fsdp, track
from infra.checkpoints import save
from infra.clock import new_step, seconds, timed
from infra.ddp import passes, unwrap
from infra.errors import DataError, ModelError
from infra.flags import MEDIA, Parser, flag_words, media_flags, ordered, peek
from infra.judge import Judge
from infra.model_folder import base_folder, local_folder
from infra.optimizer import Update, learning_rate, make_optimizer, update
from infra.packing import pack
from infra.progress import LoadErrors, Progress
from infra.ranks import RANK, WORLD, gather, ranks, say, seed
from infra.reward_file import load_rewards, own_rewards, split_spec
from infra.run_folder import claimed, open_run, resumable, resume_command, stop_signals
from infra.step_log import (
    LossTotals,
    column,
    read_totals,
    sample_lines,
    sampled_metrics,
    shown_metrics,
    trained_metrics,
    update_metrics,
)
from infra.video import close_workers
from model import Policy
from rewards import accuracies, format_reward, length_reward
from rollout import Group, generate


@dataclass
class Run:
    """What every step of a run needs."""

    args: Namespace  # the flags
    policy: nn.Module  # pi: a Policy, perhaps inside DistributedDataParallel
    reference: Policy | None  # for the KL penalty; with --lora the policy itself; None if beta = 0
    builder: PromptBuilder
    refill: Callable  # (step, k) -> the prompts of the step's k-th refill
    optimize: Callable  # (step) -> Update, by infra/optimizer.update
    loader: Loader | None = None
    optimizer: torch.optim.Optimizer | None = None
    errors: LoadErrors | None = None
    sharing: mrsp.RowSharing | None = None  # sequence parallelism
    own: tuple = ()  # the functions of --reward
    judge: Judge | None = None  # of free-form answers
    moments: dict = field(default_factory=dict)  # of rewards, with --norm ema; in the checkpoint


# ---- GRPO


def grpo_step(run, prompts, step):
    """One step of GRPO, with T-GRPO's bonus under --algo tgrpo: the algorithm.

    prompts: [(position in the step, Prompt), ...] of this rank; with sequence parallelism, the
    ranks that share rows get the same ones.
    Returns (log entry, lines for samples.jsonl, response tokens of all ranks).
    """
    args = run.args
    local, groups, refills = sample_groups(run, prompts, step)  # o_1 ... o_G ~ pi_old, and r
    reward = column(groups, "reward")  # (B, G)
    bonus = tgrpo.step_bonus(groups, args)  # (B, G), not in `reward`: `advantages` adds it
    teaching = advantages(reward, bonus, args).any(dim=1)  # (B,) groups with an advantage
    kept = torch.arange(len(groups))
    if args.drop_zero_std:  # DAPO
        kept = kept[teaching][: args.prompts]
    kept_groups = [groups[b] for b in kept.tolist()]
    # (B,), and moves run.moments on; None unless --norm ema
    std = update_moving_std(run, kept_groups, reward[kept], bonus[kept])
    # again, because --norm batch and ema divide by a std over the groups that are kept
    A = advantages(reward[kept], bonus[kept], args, std)  # (R - mean R) / std R

    totals, updates = [], []
    for batch in minibatches(kept_groups, A, args):  # one, unless --minibatches asks for more
        with timed("train"):  # backward through -min(rho A, clip(rho) A) + beta KL
            total = policy_gradient(run, batch, local)
        with timed("optimizer"):  # no trained token: a step would only move by momentum
            updates.append(run.optimize(step) if total.tokens else Update(skipped=True))
        totals.append(total)

    entry = step_metrics(run, groups, teaching, bonus, totals, updates)
    entry |= {"trained_groups": len(kept_groups), "refills": refills}
    if std is not None:
        entry["reward_std"] = {g.kind: float(x) for g, x in zip(kept_groups, std)}
    applied = torch.zeros_like(reward).index_copy(0, kept, A)  # 0 for groups that were dropped
    sp_size = unwrap(run.policy).sp.size
    lines = sample_lines(local, groups[:2], bonus, applied, step, sp_size)  # two groups a step
    return entry, lines, sum(sum(g.lengths) for g in groups)


def step_metrics(run, groups, teaching, bonus, totals, updates):
    """The log entry of a step, from all groups and from the minibatches' totals and updates."""
    entry = sampled_metrics(groups, teaching)
    if run.args.algo == "tgrpo":
        entry |= tgrpo.step_metrics(groups, bonus, run.args)
    if run.judge:
        entry |= run.judge.step_counts()
    return entry | trained_metrics(totals, updates) | update_metrics(updates)


@dataclass
class ScoredGroup:
    """The numbers of one group, which every rank knows. (G,): one for each response."""

    position: int  # of the prompt in the step
    lengths: list[int]  # (G,) tokens
    truncated: list[bool]  # (G,)
    entropy: list[float]  # (G,) summed over a response's tokens
    reward: list[float]  # (G,) the weighted sum of `parts`, without T-GRPO's bonus
    parts: dict[str, list[float]]  # accuracy, format, length_bonus, those of --reward: (G,) each
    frames: int  # that the prompt shows; 0 for text
    pixels: int  # of a frame
    kind: str  # the problem type
    shuffle_effect: tgrpo.ShuffleEffect | None = None  # T-GRPO; None: nothing to shuffle

    @property
    def accuracy(self):
        """(G,)"""
        return self.parts["accuracy"]


@dataclass
class LocalGroup:
    """A group of this rank with what stays on it: tokens, texts, and the video's embeddings."""

    group: Group
    visual_embeds: torch.Tensor  # (V, D)
    texts: list[str]  # (G,)
    scored: ScoredGroup

    @property
    def tokens(self):
        """Of a packed row: one prompt and all responses."""
        return len(self.group.prompt.ids) + sum(self.scored.lengths)


def sample_groups(run, prompts, step):
    """Rollouts and rewards, with --refill of more prompts until enough groups teach.

    Returns ({position: LocalGroup} of this rank, [ScoredGroup] of all ranks, number of refills).
    """
    args = run.args
    local, groups = rollout_and_reward(run, prompts, step)
    refills, teach = 0, count_teaching(groups, args)
    while args.drop_zero_std and teach < args.prompts and refills < args.refill:
        refills += 1
        with timed("data"):
            prompts = run.refill(step, refills)
        more_local, more_groups = rollout_and_reward(run, prompts, step)
        local, groups = local | more_local, groups + more_groups
        teach = count_teaching(groups, args)
    if args.refill and teach < args.prompts:
        say(
            f"step {step + 1}: {teach} of {args.prompts} groups have an advantage "
            f"after {refills} refills"
        )
    return local, groups, refills


def rollout_and_reward(run, prompts, step):
    """Encodes, samples and scores -> ({position: LocalGroup} of this rank, [ScoredGroup] of all
    ranks, by position)."""
    args, policy, builder = run.args, unwrap(run.policy), run.builder
    # of the ranks that share rows, only the first one's rewards are kept: the others ask nobody
    judge, own = (run.judge, run.own) if policy.sp.rank == 0 else (None, ())
    with fsdp.unsharded(policy):  # inside, ranks may call the policy different numbers of times
        with timed("encode"), torch.no_grad():
            visual_embeds = policy.encode([p for _, p in prompts])
        with timed("rollout"):
            groups = generate(
                policy,
                [p for _, p in prompts],
                args.group,
                max_new=args.max_new,
                temperature=args.temperature,
                top_p=args.top_p,
                seeds=[seed(args.seed, step, i) for i, _ in prompts],
                visual_embeds=visual_embeds,
            )
        effects = {}
        if args.algo == "tgrpo":
            with timed("shuffled"):
                effects = tgrpo.run_on_shuffled(
                    policy, prompts, groups, visual_embeds, builder, step, args, judge
                )
    with timed("reward"):
        texts = [[builder.decode(r) for r in group.responses] for group in groups]
        samples = [p.sample for _, p in prompts]
        accuracy = accuracies(texts, samples, judge)  # (B, G)
        extra = own_rewards(own, texts, samples)  # {name: (G,)} of each group
        local = {}
        for b, (position, _) in enumerate(prompts):
            effect = effects.get(position)
            scored = score_group(position, groups[b], texts[b], accuracy[b], extra[b], effect, args)
            local[position] = LocalGroup(groups[b], visual_embeds[b], texts[b], scored)
        everywhere = gather([x.scored for x in local.values()], every=policy.sp.size)
        return local, sorted(sum(everywhere, []), key=lambda g: g.position)


def score_group(position, group, texts, accuracy, extra, effect, args):
    """The rewards of a group's responses -> ScoredGroup.

    texts, accuracy: (G,) each.  extra: {name: (G,)}, the rewards of --reward.
    """
    frames, pixels = group.prompt.frames_x_pixels
    lengths = [len(r) for r in group.responses]
    rule = dict(lo=args.len_lo, hi=args.len_hi, bonus=args.len_bonus)
    parts = {  # {name: (weight, values (G,))}; the size of the length bonus is --len_bonus
        "accuracy": (args.w_accuracy, accuracy),
        "format": (args.w_format, [format_reward(text) for text in texts]),
        "length_bonus": (1.0, [length_reward(n, a, **rule) for n, a in zip(lengths, accuracy)]),
    }
    own_weights = {name: weight for _, name, weight in map(split_spec, args.reward or [])}
    parts |= {name: (own_weights[name], values) for name, values in extra.items()}
    reward = [sum(w * values[i] for w, values in parts.values()) for i in range(len(texts))]
    return ScoredGroup(
        position=position,
        lengths=lengths,
        truncated=group.truncated,
        entropy=[float(x.double().sum()) for x in group.entropies],
        reward=reward,
        parts={name: values for name, (_, values) in parts.items()},
        frames=frames,
        pixels=pixels,
        kind=group.prompt.sample.problem_type,
        shuffle_effect=effect,
    )


def advantages(reward, bonus, args, std=None):
    """Rewards and T-GRPO's bonuses (B, G) -> advantages (B, G).

    std (B,): for --norm ema only. Where it is missing, ema does not divide: enough to see which
    groups have an advantage.
    """
    norm = "none" if args.norm == "ema" and std is None else args.norm
    if args.temporal == "advantage":
        return grpo.group_advantages(reward, norm, std=std) + bonus
    return grpo.group_advantages(reward + bonus, norm, std=std)


def update_moving_std(run, groups, reward, bonus):
    """The std of each group's problem type (B,), for --norm ema; None for another norm.

    Moves run.moments on by the rewards (B, G) of a step, which are the same on all ranks. They are
    those of the groups that are trained on: --drop_zero_std leaves the others out, as in the
    release of OneThinker.
    """
    if run.args.norm != "ema":
        return None
    kinds = [group.kind for group in groups]
    if run.args.temporal != "advantage":
        reward = reward + bonus
    run.moments = grpo.moving_moments(run.moments, reward, kinds)
    return grpo.moving_std(run.moments, kinds)


def count_teaching(groups, args):
    """How many groups have a response with an advantage."""
    bonus = tgrpo.step_bonus(groups, args)
    return int(advantages(column(groups, "reward"), bonus, args).any(dim=1).sum())


def trained_responses(group, args):
    """(G,): 1 for the responses that are trained, 0 for those that --mask_truncated leaves out."""
    trained = [not (args.mask_truncated and cut) for cut in group.truncated]
    return torch.tensor(trained, dtype=torch.float64)


def has_gradient(group, A, args):
    """Whether a group has a gradient: from its advantages A (G,), or from the KL penalty."""
    trained = trained_responses(group, args)
    return bool(trained.any()) and bool(args.beta or (trained * A).any())


def minibatches(groups, A, args):
    """The groups of each optimizer step -> [[(ScoredGroup, advantages (G,)), ...], ...]."""
    pairs = list(zip(groups, A))
    with_gradient = [has_gradient(group, a, args) for group, a in pairs]
    return [[pairs[i] for i in part] for part in split_evenly(with_gradient, args.minibatches)]


def split_evenly(with_gradient, parts):
    """Splits groups into at most `parts` minibatches -> the indices of each, the same on all ranks.

    with_gradient: whether each group has a gradient. Every minibatch gets about as many that have
    one, and about as many that have none; none is without a gradient unless all are. Neighbours
    stay together, because they are on different ranks.

    >>> split_evenly([True] * 8, 5)
    [[0, 1], [2, 3], [4], [5, 6], [7]]
    >>> split_evenly([False, False, True, True], 3)
    [[0, 2], [1, 3]]
    """
    n = max(1, min(parts, sum(with_gradient)))
    split = [[] for _ in range(n)]
    for kind in (True, False):
        of_kind = [i for i, x in enumerate(with_gradient) if x == kind]
        bounds = [-(-k * len(of_kind) // n) for k in range(n + 1)]  # rounded up
        for k, part in enumerate(split):
            part += of_kind[bounds[k] : bounds[k + 1]]
    return [sorted(part) for part in split]


def policy_gradient(run, batch, local):
    """Accumulates the gradient of the loss on a minibatch -> LossTotals of all ranks.

    batch: [(ScoredGroup, A (G,)), ...] of all ranks. This rank packs those that are `local` into
    rows. Groups without a gradient get no pass.

    Reused from the rollout: tokens, pi_old's log-probs, the embeddings of a frozen tower. Run
    again, with gradient: prompt and responses (the rollout's keys and values are gone). Recomputed
    in the backward pass: logits, and every n-th layer (--grad_checkpointing n).
    """
    args = run.args
    denominator = loss_denominator([group for group, _ in batch], args)
    mine = []
    for scored, A in batch:
        if scored.position in local and has_gradient(scored, A, args):
            mine.append((local[scored.position], A))
    sums = []  # of each row, on the device
    lengths = [x.tokens for x, _ in mine]
    for row in passes(run.policy, pack(mine, lengths, args.row_tokens)):
        loss, row_sums = row_loss(run, row, denominator)
        sums.append(row_sums)
        # The gradient is the sum over ranks, but DDP and FSDP take the mean. Without --sp each rank
        # has other groups. With --sp all have the same loss, but each rank's gradient is only the
        # part that flows through the tokens that it holds.
        (loss * WORLD).backward()
    total = sum(map(read_totals, sums), LossTotals())  # only now: reading waits for the GPU
    return sum(gather(total, every=unwrap(run.policy).sp.size), LossTotals())


def loss_denominator(groups, args):
    """What the summed loss of a minibatch is divided by (grpo.average_loss), over all ranks.

    The trained responses, their tokens, or groups * G * max_new. Groups without a gradient count
    too.
    """
    if args.average == "constant":
        return float(max(1, len(groups) * args.group * args.max_new))
    total = 0.0
    for group in groups:
        count = trained_responses(group, args)
        if args.average == "token":
            count = count * torch.tensor(group.lengths)
        total += float(count.sum())
    return max(1.0, total)


def row_loss(run, row, denominator):
    """The loss of a packed row of [(LocalGroup, A (G,)), ...] -> (loss, {name: sum over tokens}).

    The sums are LossTotals' fields, on the device; an empty row has none.

    The row has N responses; the longest has R tokens. pi_old's log-probs come from sampling,
    without another pass: rho of a first update is 1 up to rounding, logged as `mismatch`. An empty
    row gives a loss of 0 with a gradient of 0 for every parameter.
    """
    args = run.args
    prompts = [x.group.prompt for x, _ in row]
    # as arrays, because FSDP moves every tensor among its arguments to the GPU by itself
    responses = [[r.numpy() for r in x.group.responses] for x, _ in row]
    embeds = None if args.train_vision else [x.visual_embeds for x, _ in row]
    ref_logp = None
    if args.beta:  # first: the policy's activations stay until the backward pass
        with torch.no_grad(), lora.off(run.policy):
            ref_logp, _ = run.reference(prompts, responses, embeds, args.temperature)
    logp, entropy = run.policy(prompts, responses, embeds, args.temperature)  # (N, R)
    if not row:
        return logp.sum(), {}
    old_logps, masks = [], []
    for x, _ in row:
        old_logps += x.group.logps
        trained = trained_responses(x.scored, args)
        masks += [torch.full((n,), float(on)) for n, on in zip(x.scored.lengths, trained)]
    old_logp = pad_sequence(old_logps, batch_first=True).to(logp)  # (N, R)
    mask = pad_sequence(masks, batch_first=True).to(logp)  # (N, R)
    loss, sums = grpo.grpo_loss(
        logp,
        old_logp,
        torch.cat([A for _, A in row]).to(logp),  # (N,)
        mask,
        ref_logp=ref_logp,
        beta=args.beta,
        estimator=args.kl,
        variant=args.variant,
        clip_low=args.clip_low,
        clip_high=args.clip_high,
        dual_clip=args.dual_clip,
        tau_pos=args.tau_pos,
        tau_neg=args.tau_neg,
        average=args.average,
        denominator=denominator,
    )
    sums |= {"loss": loss.detach(), "entropy": (entropy * mask).sum()}
    sums["mismatch"] = ((logp.detach() - old_logp).abs() * mask).sum()
    return loss, sums


# ---- SFT


def sft_step(run, prompts, step):
    """One supervised step: the mean negative log-prob of all response tokens of the batch.

    Arguments and result as in grpo_step; there are no samples to log.
    """
    args, policy = run.args, unwrap(run.policy)
    prompts = [p for _, p in prompts]
    lengths = [len(p.ids) + len(p.target) for p in prompts]
    tokens = sum(gather(sum(len(p.target) for p in prompts), every=policy.sp.size))
    visual_embeds = [None] * len(prompts)
    if not args.train_vision:  # a tower that is trained encodes with gradient, row by row
        with timed("encode"), torch.no_grad():
            visual_embeds = policy.encode(prompts)
    total = 0.0
    with timed("train"):
        items = list(zip(prompts, visual_embeds))
        for row in passes(run.policy, pack(items, lengths, args.row_tokens)):
            embeds = None if args.train_vision else [x for _, x in row]
            targets = [[p.target.numpy()] for p, _ in row]  # arrays: see row_loss
            # (N, R), 0 beyond a response's end
            logp, _ = run.policy([p for p, _ in row], targets, embeds)
            loss = -logp.sum() / tokens
            (loss * WORLD).backward()
            total += float(-logp.detach().sum()) / tokens
    with timed("optimizer"):
        made = run.optimize(step)
    shown = sum(gather([p.frames_x_pixels for p in prompts], every=policy.sp.size), [])
    entry = {
        "loss": sum(gather(total, every=policy.sp.size)),
        "response_length": tokens / len(shown),
        **shown_metrics(shown),
        **update_metrics([made]),
    }
    return entry, [], tokens


# ---- evaluation during training


def evaluate(run, samples):
    """Greedy accuracy on held-out samples, over all ranks -> log entry.

    Each rank answers its own questions. A sample that cannot be loaded is a wrong answer. For sft
    also the validation loss, on samples with reasoning.
    Raises DataError if no sample can be loaded.
    """
    policy = unwrap(run.policy)
    with bf16_on_gpu(policy.device), timed("evaluate"), fsdp.unsharded(policy):
        answered, supervised = answer_held_out(run, samples)
        nll, tokens = validation_loss(policy, supervised, run.args)
    answered = sum(gather(answered), [])
    failures = [failure for _, _, failure in answered if failure]
    if len(failures) == len(answered):
        raise DataError(
            f"{run.args.eval_data}: none of the {len(answered)} held-out media could be loaded; "
            f"the first: {failures[0]}"
        )
    scores = [score for _, score, _ in answered]
    by_source = {}
    for source in sorted({source for source, _, _ in answered}):
        of_source = [score for s, score, _ in answered if s == source]
        by_source[source] = round(sum(of_source) / len(of_source), 4)
    entry = {"eval_loss": nll / tokens} if tokens else {}
    return entry | {
        "eval_accuracy": sum(scores) / len(scores),
        "eval_questions": len(scores),
        "eval_failures": len(failures),
        "eval_by_source": by_source,
    }


def answer_held_out(run, samples):
    """This rank's answers -> ([(source, score, why it could not be loaded or None), ...],
    [(Prompt, target ids), ...] for the validation loss of sft)."""
    args, builder = run.args, run.builder
    method = Method("greedy", args.max_frames, args.max_frames, 1, 0.0)
    questions = [Question(i, samples[i], method) for i in range(RANK, len(samples), WORLD)]
    answered, supervised = [], []
    how = dict(pool=run.loader.pool, max_new=args.max_new)
    for q in answer(unwrap(run.policy), builder, questions, method, **how):
        answered.append((q.sample.source, q.score, None if q.prompt else q.failure))
        if args.algo == "sft" and q.prompt and q.sample.reasoning:
            supervised.append((q.prompt, builder.target(q.sample)))
    return answered, supervised


@torch.no_grad()
def validation_loss(policy, supervised, args):
    """Of [(Prompt, target ids), ...] -> (negative log-prob, number of tokens), over all ranks."""
    nll, tokens = 0.0, 0
    lengths = [len(p.ids) + len(target) for p, target in supervised]
    for row in pack(supervised, lengths, args.row_tokens):
        logp, _ = policy([p for p, _ in row], [[target] for _, target in row])
        nll -= float(logp.sum())
        tokens += sum(len(target) for _, target in row)
    return sum(gather(nll)), sum(gather(tokens))


# ---- the loop


def train(args, device, at_end, policy_class=Policy):
    """Runs args.steps steps of args.algo, with evaluations, logs and checkpoints.

    at_end: an ExitStack of what has to be released, however the run ends. On SIGTERM (exit 0) and
    ctrl-C (130) the program ends after a step and its checkpoint.
    """
    samples, held_out = read_data(args)  # before a model is loaded: a wrong path costs nothing
    warn(args)
    run, start = open_training(args, samples, device, at_end, policy_class)
    progress = Progress(Path(args.out), args, start)
    at_end.callback(progress.close)
    signals = at_end.enter_context(stop_signals())
    at_end.enter_context(resumable())
    new_step()
    if start == 0 and held_out:
        progress.log(0, evaluate(run, held_out))
    for step in range(start, args.steps):
        new_step()
        done = step + 1
        with timed("step"):
            entry, lines, tokens = train_step(run, step)
        entry |= {
            "lr": learning_rate(step, args),
            "sp": run.sharing.sp.size,
            "skipped_samples": len(run.errors.in_step),
            "tokens_per_second": tokens / seconds["step"],
        }
        if held_out and (done % args.eval_every == 0 or done == args.steps):
            entry |= evaluate(run, held_out)
        progress.log(done, entry)
        progress.samples(lines)
        stop = max(gather(max(signals, default=0)))  # of any rank: all stop after the same step
        if done % args.save_every == 0 or done == args.steps or stop:
            with bf16_on_gpu(device):
                save(unwrap(run.policy), run.optimizer, done, args, run.moments)
        if stop:
            at = f"step {done} of {args.steps} by {signal.Signals(stop).name}"
            say(f"stopped after {at}; to resume: {resume_command()}")
            raise SystemExit(0 if stop == signal.SIGTERM else 128 + stop)
    say(f"{args.out} holds the run; `python report.py {shlex.quote(args.out)} --open` shows it")


def open_training(args, samples, device, at_end, policy_class):
    """Opens the run folder and loads all that the run needs -> (Run, the step to start at)."""
    at_end.enter_context(claimed(Path(args.out)))
    checkpoint = open_run(args, parse_args(["--model", "", "--data", ""]))
    own = load_rewards(args.reward or [])
    judge = None
    if args.judge:
        how = dict(fails=args.judge_fails, timeout=args.judge_timeout)
        judge = Judge(args.judge, args.judge_model, args.out, **how)
    policy, reference = load_policies(args, checkpoint, device, policy_class)
    loader = make_loader(args, policy, samples)
    at_end.callback(close_workers)
    at_end.callback(loader.pool.shutdown, cancel_futures=True)
    optimizer = make_optimizer(policy, args)
    start, moments = resume_state(args, checkpoint, optimizer)
    wrapped = policy
    if WORLD > 1 and not args.fsdp:
        how = dict(forward_sync_buffers=False, gradient_as_bucket_view=True)
        wrapped = DistributedDataParallel(policy, **how)
    errors = LoadErrors(args.prompts, args.steps)
    second = None if reference is policy else reference  # another copy of the weights
    sharing = mrsp.RowSharing(policy, second, patience(args), args)

    def refill(step, k):
        return sharing.share_prompts(errors.usable(loader.refill(step, k)))

    def optimize(step):
        return update(policy, optimizer, step, args)

    parts = dict(loader=loader, optimizer=optimizer, errors=errors, sharing=sharing)
    parts |= dict(own=own, judge=judge, moments=moments)
    return Run(args, wrapped, reference, loader.builder, refill, optimize, **parts), start


def bf16_on_gpu(device):
    """A context: on a GPU, fp32 master weights compute in bf16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def train_step(run, step):
    """Loads a step's prompts and trains on them -> (log entry, sample lines, response tokens)."""
    run.errors.next_step()
    with timed("data"):
        prompts = run.errors.usable(run.loader.load(step))
        run.errors.check()
        run.sharing.choose(prompts)
        prompts = run.sharing.share_prompts(prompts)
    if len(run.errors.in_step) == run.args.prompts:  # nothing could be loaded, on any rank
        return {"updates": 0, "skipped_updates": 1, "skipped_update": True}, [], 0
    run.policy.train()
    with run.sharing.rows(), bf16_on_gpu(unwrap(run.policy).device):
        if run.args.algo == "sft":
            entry, lines, tokens = sft_step(run, prompts, step)
            if not math.isfinite(entry["loss"]):
                raise ModelError(
                    f"step {step + 1}: the loss is {entry['loss']}: logits that are not finite"
                )
        else:
            entry, lines, tokens = grpo_step(run, prompts, step)
    run.policy.eval()
    return entry, lines, tokens


def patience(args):
    """How long ranks wait for each other: half an hour, and the time to load a rank's prompts."""
    loading = args.decode_timeout * math.ceil(args.prompts / WORLD / args.workers)
    return timedelta(minutes=30, seconds=loading)


# ---- what a run starts from


def read_data(args):
    """The records of a run -> (samples, held-out samples).

    Bad records are printed and left out; missing media are counted.
    Raises DataError: no usable record, a bad held-out record, or most media are missing.
    """
    skipped = {}
    samples = load_samples(args.data, media_root=args.media_root, skipped=skipped)
    bad = list(skipped.values())
    if args.algo == "sft":
        without = [s for s in samples if not s.reasoning]
        bad += [f"{s.name}: no reasoning ('process') to learn from" for s in without]
        samples = [s for s in samples if s.reasoning]
    if not samples:
        raise DataError(f"{args.data}: holds no usable record; the first problem: {bad[0]}")
    for message in bad:
        say(f"skipped: {message}")
    held_out = []
    if args.eval_data:
        held_out = load_samples(args.eval_data, media_root=args.media_root)
    counts = f"{len(samples)} samples, {len(held_out)} held out, {len(bad)} bad records skipped"
    say(f"{args.data}: {counts}")
    look_for_media(samples, args.data, args.media_root)
    look_for_media(held_out, args.eval_data, args.media_root)
    return samples, held_out


def warn(args):
    """Prints a line for every flag that keeps the run from learning."""
    if args.lr == 0:
        say("--lr 0: no step changes the weights")
    rewards = args.w_accuracy or args.w_format or args.len_bonus or args.reward
    if args.algo != "sft" and not rewards:
        only = " but for the temporal bonus" if args.algo == "tgrpo" and args.alpha else ""
        result = only or ", so nothing is learned"
        say(f"--w_accuracy 0, --w_format 0 and --len_bonus 0: every reward is 0{result}")
    if args.warmup >= args.steps:
        say(
            f"--warmup {args.warmup}: the run has {args.steps} steps, so the learning rate rises "
            "until its end"
        )


def load_policies(args, checkpoint, device, policy_class):
    """The policy, from the checkpoint or --model, and the reference -> (policy, None or Policy).

    With --lora, the reference is the policy itself, with its adapters off. But if --model is an
    adapter, it is the base with this adapter, as it was at the start.
    """
    cache = (args.embedding_cache, args.cache_gb) if args.embedding_cache else None
    frozen = torch.bfloat16 if device.type == "cuda" else torch.float32
    sharded = args.fsdp and WORLD > 1

    def prepare(policy):
        if args.lora:
            lora.add(policy, args.lora, args.lora_alpha, args.seed)
        if not args.train_vision:
            policy.freeze_vision()
        if sharded:
            fsdp.shard(policy)

    def prepare_reference(policy):
        policy.requires_grad_(False)
        if sharded:
            fsdp.shard(policy)

    policy = policy_class.load(
        checkpoint or args.model,
        device=device,
        dtype=frozen if args.lora else torch.float32,
        merged=not args.lora,
        grad_checkpointing=args.grad_checkpointing,
        cuda_graph=args.cuda_graph,
        embedding_cache=cache,
        prepare=prepare,
    )
    reference = None
    if args.beta and args.algo != "sft":
        model = local_folder(args.model)
        if args.lora and base_folder(model) == model:
            reference = policy
        else:
            how = dict(device=device, dtype=frozen, merged=not args.lora)
            reference = policy_class.load(model, **how, prepare=prepare_reference)
    millions = f"{mrsp.count(policy) / 1e6:.1f} M parameters"
    if args.lora:
        millions += f", {mrsp.count(policy, trained=True):,} of them trained"
    say(f"{args.algo}: {args.out}: {millions}, {WORLD} x {device.type}")
    return policy, reference


def make_loader(args, policy, samples):
    """The Loader of this rank."""
    media = {name: getattr(args, name) for name in (*MEDIA, "max_frames")}
    builder = PromptBuilder(policy.folder, max_prompt=args.max_prompt, **media)
    return Loader(
        samples,
        builder,
        prompts=args.prompts,
        seed=args.seed,
        workers=args.workers,
        target=args.algo == "sft",
        rank=mrsp.turn(RANK, WORLD, args.sp),
        world=WORLD,
    )


def resume_state(args, checkpoint, optimizer):
    """Loads the optimizer of a checkpoint -> (the step to start at, the moments of --norm ema);
    (0, {}) without a checkpoint."""
    if not checkpoint:
        return 0, {}
    state = json.loads((checkpoint / "state.json").read_text())
    start = state["step"]
    fsdp.load_optimizer(optimizer, checkpoint / "optimizer.pt")
    if start >= args.steps:
        say(
            f"{checkpoint}: {start} steps are done and --steps is {args.steps}, "
            "so there is nothing left to do"
        )
    return start, state.get("moments", {})


# ---- the flags


def parse_args(argv=None, embedded=False):
    """The flags, from argv or the command line. @FILE reads more, one a line, # is a comment.

    embedded: of a run of the embedded default, where --family has chosen the --model.
    """
    p = Parser(__doc__, dropped=("shuffles",))
    g = p.section("run")
    g.value(
        "algo",
        "grpo",
        "sft: imitate reasoning; grpo: learn from rewards; tgrpo: grpo with the temporal reward",
        choices=("sft", "grpo", "tgrpo"),
    )
    g.value("model", None, "model, adapter or run folder, or hub name; without: the toy world's")
    g.value("family", "qwen2_5_vl", "of the toy's model, without --model", choices=tuple(toy.TINY))
    g.value("data", None, "records to train on, .json or .jsonl")
    g.value("eval_data", None, "held-out records, answered greedily every --eval_every steps")
    g.value("media_root", None, "folder of the records' relative paths; default: the records' own")
    g.value("out", None, "run folder (default: out/toy or out/run)")
    g.value("steps", 1000, "steps: a batch of examples, or a rollout and its updates", "at least 1")
    g.value("seed", 0, "random seed of the data's order and of the sampling")
    g.switch("resume", "resume from the newest whole checkpoint in --out, if there is one")
    g = media_flags(p, fps=2.0, max_pixels=128 * 28 * 28, max_prompt=16384)
    g.value("max_frames", 16, "at most this many frames", "at least 2")
    g = p.section("step")
    g.value("prompts", 8, "prompts of a step, over all ranks (sft: examples)", "at least 1")
    g.value("group", 8, "G, responses to a prompt", "at least 2")
    g.value("max_new", 768, "tokens of a response, at most", "at least 1")
    within = "at least 1e-6, at most 100"  # below, logits / temperature overflow in fp32
    g.value("temperature", 1.0, "of sampling and of the trained log-probs", within)
    g.value("top_p", 1.0, "nucleus; below 1 the gradient is biased", "above 0, at most 1")
    g.value("minibatches", 1, "optimizer steps on the groups of one rollout", "at least 1")
    g.value(
        "row_tokens", 16384, "tokens of a packed row; a longer group gets its own", "at least 1"
    )
    g.switch("cuda_graph", "on a GPU: replay the decode steps as CUDA graphs")
    reward_flags(p)
    temporal_flags(p)
    loss_flags(p)
    g = p.section("optimizer")
    g.value("lr", 1e-6, "peak learning rate")
    g.value("schedule", "constant", "after the warm-up", choices=("constant", "cosine"))
    g.value("warmup", 0, "steps of linear warm-up")
    g.value("beta2", 0.999, "AdamW's beta2 (beta1 is 0.9)", "at least 0, below 1")
    g.value("weight_decay", 0.01, "of matrices", "at least 0, at most 100")
    g.value("clip_grad", 1.0, "largest gradient norm", "at least 1e-6")
    g.switch("train_vision", "train the vision tower too; it is frozen otherwise")
    g.value(
        "lora",
        0,
        "train only adapters of this rank (lora.py), with about 10 times the --lr; 0: off",
    )
    alpha = "the adapters' output is multiplied by this / rank; 0: 2 * rank"
    g.value("lora_alpha", 0, alpha, "at least 0, at most 1e6")
    g.value("grad_checkpointing", 1, "recompute every n-th layer in the backward pass; 0: none")
    g.switch("fsdp", "shard weights, gradients and moments over all ranks")
    g = p.section("long videos (mrsp.py)")
    g.value("sp", "1", "ranks that share each row, a divisor of all ranks, or auto: as few as fit")
    g.value("embedding_cache", None, "folder for embeddings of a frozen tower, shared by runs")
    g.value("cache_gb", 100.0, "its size; the least recently used entries go first", "above 0")
    g = p.section("logs and checkpoints")
    g.value("log_every", 10, "steps between console lines; log.jsonl has every step", "at least 1")
    g.value("eval_every", 100, "steps between evaluations, also at both ends", "at least 1")
    g.value("save_every", 100, "steps between checkpoints, also at the end", "at least 1")
    g.value("keep", 2, "newest checkpoints to keep", "at least 1")
    g.value("track", None, "log to this library too (infra/track.py)", choices=track.LIBRARIES)
    args = p.parse_args(argv)
    refuse_combinations(p, args, embedded)
    refuse_rewards(p, args)
    del args.family  # config.txt has --model instead
    args.lora_alpha = args.lora_alpha or 2 * args.lora
    return args


def reward_flags(p):
    """The flags of the rewards but T-GRPO's."""
    g = p.section("reward = w_accuracy * accuracy + w_format * format + length bonus + --reward")
    weight = "at least 0, at most 1e6"
    g.value("w_accuracy", 1.0, "weight of the accuracy reward", weight)
    g.value("w_format", 1.0, "weight of the format reward", weight)
    bonus = "for an accuracy above 0.1 in --len_lo to --len_hi tokens; 0.2 in Video-R1"
    g.value("len_bonus", 0.0, bonus, weight)
    g.value("len_lo", 320, "shortest response with the bonus")
    g.value("len_hi", 512, "longest response with the bonus")
    g.value(
        "reward",
        None,
        "functions of your own, (response, sample) -> 0 to 1, each with its weight, by default 1: "
        "a.py:score b.py:short=0.5; with (responses, samples), a list (infra/reward_file.py)",
        nargs="+",
        action="extend",
        metavar="FILE:FUNCTION",
    )
    g.value(
        "judge",
        None,
        "URL of an OpenAI-compatible server that grades free-form answers in training, in place "
        "of the rule (infra/judge.py)",
    )
    g.value("judge_model", None, "name of its model")
    g.value(
        "judge_fails",
        "stop",
        "a judge that fails for good stops the run, or rules grade instead, counted in the log",
        choices=("stop", "rules"),
    )
    timeout = "seconds of a request to the judge"
    g.value("judge_timeout", 60.0, timeout, "above 0, at most 86400")


def temporal_flags(p):
    """The flags of T-GRPO."""
    g = p.section("temporal reward (tgrpo, videos only)")
    g.value(
        "temporal",
        "reward",
        "reward: add the bonus to the reward (as published); advantage: add it after the division; "
        "contrast (ours): add alpha * a right response's probability drop on shuffled frames",
        choices=("reward", "advantage", "contrast"),
    )
    g.value(
        "alpha",
        0.3,
        "bonus of a right response whose group passes the test; contrast: its maximum",
        "at least 0, at most 1e6",
    )
    test = "the test passes if p(ordered) >= mu * p(shuffled); contrast has none"
    g.value("mu", 1.0, test, "at least 0, at most 1e6")
    right = "T-GRPO's test and bonus count a response as right above this accuracy"
    g.value("correct", 0.5, right, "at least 0, below 1")
    g.value(
        "shuffle",
        "frame",
        "shuffle frames, or 2-frame grids, which need no second encoding",
        choices=("frame", "grid"),
    )


def loss_flags(p):
    """The flags of GRPO's loss."""
    g = p.section("loss")
    g.value(
        "norm",
        "std",
        "divide advantages by the std of their group, by none, by that of the batch, or by that of "
        "their problem type, moving over steps (ema)",
        choices=grpo.NORMS,
    )
    g.value(
        "average",
        "sequence",
        "average token losses per response, over all tokens, or by a constant",
        choices=grpo.AVERAGES,
    )
    kl = "weight of the KL penalty to the starting model; 0 loads no reference"
    g.value("beta", 0.0, kl, "at least 0, at most 1e6")
    g.value("kl", "k3", "estimator of that KL", choices=grpo.KL_ESTIMATORS)
    g.value(
        "variant",
        "grpo",
        "clip the ratio of a token (grpo) or a response (gspo), weight log pi by it (cispo), or "
        "clip it softly (sapo)",
        choices=grpo.VARIANTS,
    )
    g.value("clip_low", 0.2, "lower clip, 1 - clip_low (grpo, gspo)", "at least 0, at most 1")
    g.value("clip_high", 0.2, "upper clip, 1 + clip_high (not sapo)", "at least 0, at most 1e6")
    tau = "at least 1e-6, at most 1e6"  # beyond, 4 / tau or tau (rho - 1) overflows in fp32
    g.value("tau_pos", 1.0, "sapo: how sharp its soft clip is where A > 0", tau)
    g.value("tau_neg", 1.05, "sapo: the same where A <= 0", tau)
    dual = "bound the loss where A < 0 and rho is above this; usual: 3, off: 0"
    g.value("dual_clip", 0.0, dual, "at least 0, at most 1e6")
    drop = "leave groups whose advantages are all 0 out of the batch, its averages and --norm's std"
    g.switch("drop_zero_std", drop)
    g.value("refill", 0, "with --drop_zero_std: extra draws, until --prompts groups are left")
    g.switch("mask_truncated", "leave truncated responses out of the loss")


def refuse_combinations(p, args, embedded):
    """Ends the program for flags that do not go together."""
    if "--family" in p.given and not embedded:
        p.error(
            f"--family {args.family}: chooses the toy's model, expected without --model and --data"
        )
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
    if args.dual_clip and (args.dual_clip <= 1 or args.variant in ("cispo", "sapo")):
        p.error(
            f"--dual_clip {args.dual_clip}: expected above 1, and not with --variant "
            "cispo or sapo, which do not clip below"
        )
    if args.sp != "auto" and (not args.sp.isdecimal() or int(args.sp) < 1 or WORLD % int(args.sp)):
        p.error(f"--sp {args.sp}: expected auto or a divisor of the {WORLD} ranks")
    if args.lora and args.train_vision:
        p.error("--lora: expected without --train_vision; the vision tower has no adapters")
    if args.lora_alpha and not args.lora:
        p.error(f"--lora_alpha {args.lora_alpha}: expected --lora beside it")
    if args.embedding_cache and args.train_vision:
        p.error(
            "--embedding_cache: expected a frozen vision tower; "
            "with --train_vision its embeddings change with every step"
        )


def refuse_rewards(p, args):
    """Ends the program for rewards, a judge or a library to log to that cannot be used."""
    for name in ("reward", "judge"):
        if args.algo == "sft" and getattr(args, name):
            p.error(f"--{name}: expected with --algo grpo or tgrpo; sft has no rewards")
    try:
        for spec in args.reward or []:
            file, _, _ = split_spec(spec)
            if not Path(file).is_file():
                p.error(f"--reward {spec}: {file}: no such file")
    except DataError as e:
        p.error(str(e))
    if args.judge and not args.judge.startswith(("http://", "https://")):
        p.error(f"--judge {args.judge}: expected http://HOST:PORT or https://HOST/v1")
    if bool(args.judge) != bool(args.judge_model):
        p.error("--judge and --judge_model: expected both or none")
    if args.track and (missing := track.missing(args.track)):
        p.error(f"--track {args.track}: {missing}")


# ---- the command


def toy_runs(args, argv):
    """The embedded default as ordinary runs: a cold start in the toy world, then RL from it.

    The flags of the command (argv) go to the RL run; the cold start has its own (and 600 or
    1,200 steps), unless the command asks for nothing else (--algo sft).
    """
    names = ["--algo", args.algo, "--family", args.family]
    parse_args(names, embedded=True)  # ends here for a name that is not a choice
    root = Path(args.out or toy.root(args.seed, args.family))
    world = root / "world"
    common = ["--eval_data", f"{world}/test.json", "--seed", str(args.seed)]
    sft = [*common, "--data", f"{world}/cot.json", "--model", f"{world}/model"]
    sft += ["--steps", str(toy.COLD_START_STEPS[args.family])]
    last = [*toy_recipe(args.algo, args.lora), *common]
    if args.algo == "sft":
        return [parse_args([*last, *sft, *argv, "--out", f"{root}/sft"], embedded=True)]
    rl = [*last, "--data", f"{world}/train.json", "--model", f"{root}/sft"]
    resume = ["--resume"] if (root / "sft").exists() else []
    return [
        parse_args([*toy_recipe("sft"), *sft, "--out", f"{root}/sft", *resume]),
        parse_args([*rl, *argv, "--out", f"{root}/{args.algo}"], embedded=True),
    ]


def toy_recipe(algo, lora=0):
    """The flags of the toy's recipe. With adapters the vision tower, which has none, is frozen."""
    file = Path(__file__).parent / "configs" / f"toy_{algo}.txt"
    words = sum(flag_words(file).values(), [])
    return [word for word in words if not (lora and word == "--train_vision")]


def main(argv=None, policy_class=Policy):
    """The command line: one run, or the embedded default's two."""
    argv = sys.argv[1:] if argv is None else argv
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    flags = dict(model=None, data=None, algo="grpo", out=None, seed=0)
    args = peek(argv, **flags, family="qwen2_5_vl", lora=0)
    embedded = not (args.model or args.data)
    runs = toy_runs(args, argv) if embedded else [parse_args(argv)]
    with ranks(max(map(patience, runs))) as device:
        world = Path(runs[0].data).parent
        if embedded and RANK == 0 and not world.exists():
            toy.write(world, args.seed, family=args.family)
        gather(None)
        if embedded:
            toy.check_family(world, args.family)
        for run in runs:
            run.out = run.out or "out/run"
            with ExitStack() as at_end:
                train(run, device, at_end, policy_class)


if __name__ == "__main__":
    main()
