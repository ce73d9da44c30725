"""What only a GPU can confirm, by `python bench.py --gpu_check --json FILE`, on one card of 80 GB.

    log_probs   ours in bf16 is as close to transformers in fp32 as transformers in bf16 is; so are
                the gradients, and what the sampler says of its own tokens
    graphs      decode steps replayed as CUDA graphs draw the same tokens as eager ones; a step that
                cannot be recorded runs eagerly
    options     seconds with and without what is set for speed
    kernels     where the time of a decode step and of a training pass goes
    steps       training steps of recipes at the true size: seconds and peak memory by phase, beside
                the peaks that simulate.py predicts

bench.py then times the plain way and ours. Weights are random. A check that fails is reported with
its traceback, and the others still run. Without a GPU the same code runs on small sizes, as a
rehearsal.
"""

import contextlib
import gc
import json
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path

import torch

import rollout
import simulate
import toy
import train
from infra import fake_cuda
from infra.ranks import say
from rollout import generate
from ways import (
    random_policy,
    shape_config,
    switch,
    timed,
    video_prompt,
    wait,
    write_figures,
    write_video,
)

# bench.py's flags, which a command may change
FLAGS = {
    "cuda": "--model 3b --frames 16 64 256 --height 252 --width 392 --new 128 "
    "--grad_checkpointing 1 --repeat 1",
    "cpu": "--frames 4 --height 56 --width 56 --new 8 --group 2 --repeat 1",
}
# training steps: the name, a shape of ways.SHAPES, and flags of train.py and simulate.py
STEPS = {
    "cuda": [
        ("LoRA, 4B", "qwen3-4b", "@configs/qwen3_vl_4b_lora_24gb.txt --size 256x480"),
        (
            "full, 3B",
            "3b",
            "@configs/video_r1_3b.txt --beta 0 --prompts 1 --frames 16",
        ),
        (
            "LoRA, 7B, 256 frames",
            "7b",
            "--algo grpo --lora 16 --prompts 1 --group 8 --max_new 256 --max_prompt 32768 "
            "--row_tokens 32768 --frames 256 --size 252x392 --cuda_graph",
        ),
    ],
    "cpu": [
        (
            "rehearsal",
            "tiny",
            "--algo tgrpo --train_vision --prompts 1 --group 2 --max_new 8 --frames 4 "
            "--size 56x56 --beta 0.1",
        ),
    ],
}


def run(args, device):
    """Runs the checks -> {name: figures, or the traceback under "failed"}."""
    found = {}
    for name in args.gpu_check or CHECKS:
        start = time.perf_counter()
        try:
            figures = CHECKS[name](args, device)
        except Exception:  # of any kind: the other checks must still run
            figures = {"failed": traceback.format_exc()}
        free()
        found[name] = figures
        say(f"{name}, {time.perf_counter() - start:.0f} s: {json.dumps(figures)}")
        write_figures(args.json, found)
    return found


def free():
    """Gives the memory of what is gone back to the device."""
    gc.collect()
    torch.clear_autocast_cache()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def bf16(device):
    """A context in which fp32 weights compute in bf16, also on a CPU."""
    return torch.autocast(device.type, torch.bfloat16)


def small_prompts(policy, args, frames):
    """Prompts of random words about videos of these numbers of frames."""
    with tempfile.TemporaryDirectory() as folder:
        prompts = []
        for n in frames:
            file = Path(folder) / f"{n}.y4m"
            write_video(file, n, args)
            prompts.append(video_prompt(policy, file, args)[0])
    return prompts


# ---- numbers


def log_probs(args, device):
    """Log-probs and gradients of ours and of the plain way in bf16, against the plain way in fp32.

    Errors of log-probs: mean and largest. Of gradients: the norm of the difference, as a share of
    the norm. In fp32 there is no flash kernel on a GPU, so ours runs in bf16 only.
    """
    torch.manual_seed(0)
    policy = random_policy(args.model, device, torch.float32)
    policy.freeze_vision()
    policy.set_grad_checkpointing(1)
    policy.eos_ids = []
    (prompt,) = small_prompts(policy, args, [4])
    vocabulary = policy.config.text_config.vocab_size
    responses = [torch.randint(8, vocabulary, (args.new,)) for _ in range(args.group)]
    weights = torch.randn(args.group, args.new, device=device)

    def passed(plain):
        way = switch(policy, plain=plain)(policy, prompt, responses)
        policy.train()
        policy.zero_grad()
        logp = way.log_probs()
        (logp.float() * weights).sum().backward()
        torch.clear_autocast_cache()
        return logp.detach().double()

    exact = passed(plain=True)
    trained = [p for p in policy.parameters() if p.requires_grad]
    gradient = [p.grad.clone() for p in trained]
    norm = sum(float(g.square().sum()) for g in gradient) ** 0.5
    found = {"prompt_tokens": len(prompt.ids), "logp_mean": float(exact.mean())}
    for name, plain in (("plain", True), ("ours", False)):
        with bf16(device):
            error = (passed(plain) - exact).abs()
        apart = sum(float((p.grad - g).square().sum()) for p, g in zip(trained, gradient)) ** 0.5
        found[name] = {
            "logp_error_mean": float(error.mean()),
            "logp_error_max": float(error.max()),
            "gradient_error": apart / norm,
        }
    policy.zero_grad()
    policy.eval()
    with bf16(device), torch.no_grad():
        switch(policy)
        (group,) = generate(policy, [prompt], args.group, max_new=args.new)
        scored, _ = policy([prompt], [group.responses])
    error = (scored.cpu() - torch.stack(group.logps)).abs()
    found["sampler_and_scorer"] = {"mean": float(error.mean()), "max": float(error.max())}
    return found


def graphs(args, device):
    """Decoding with CUDA graphs against the same steps, run eagerly: prompts of two lengths,
    responses that end early, two windows. And steps that wait for the GPU, which no graph can."""
    torch.manual_seed(0)
    policy = random_policy(args.model, device, torch.float32)
    vocabulary = policy.config.text_config.vocab_size
    policy.eos_ids = torch.randperm(vocabulary)[: vocabulary // 100].tolist()  # 1 % of the tokens
    prompts = small_prompts(policy, args, [4, 8])
    ways = {
        "eager": replaced("record", recorded_step),
        "graph": contextlib.nullcontext(),
        "waits": replaced("step", waiting_step),
    }
    runs, found = {}, {}
    with bf16(device), torch.no_grad():
        embeds = policy.encode(prompts)
        for name, way in ways.items():
            switch(policy, cuda_graph=device.type == "cuda")
            with way:
                start = time.perf_counter()
                runs[name] = generate(
                    policy, prompts, args.group, max_new=2 * rollout.WINDOW, visual_embeds=embeds
                )
                seconds = time.perf_counter() - start
            found[name] = {"seconds": seconds, "graphs": policy.cuda_graph}
    tokens, logps = flat(runs["eager"])
    found["tokens"] = len(tokens)
    other_tokens, other_logps = flat(runs["graph"])
    same = tokens.shape == other_tokens.shape and bool((tokens == other_tokens).all())
    found["same_tokens"] = same
    with bf16(device), torch.no_grad():
        scored, _ = policy(prompts, [group.responses for group in runs["graph"]], embeds)
    sampled = [logp for group in runs["graph"] for logp in group.logps]
    errors = torch.cat([(row[: len(x)].cpu() - x).abs() for row, x in zip(scored, sampled)])
    found["sampler_and_scorer"] = {"mean": float(errors.mean()), "max": float(errors.max())}
    found["logp_difference"] = float((logps - other_logps).abs().max()) if same else None
    return found


def recorded_step(decoding):
    """Decoding.record without a graph: the step itself."""
    return decoding.step


eager_step = rollout.Decoding.step


def waiting_step(decoding):
    """A step that reads a number from the device."""
    eager_step(decoding)
    decoding.token[0].item()


def flat(groups):
    """All tokens of the groups, and their log-probs."""
    tokens = torch.cat([r for group in groups for r in group.responses])
    return tokens, torch.cat([logp for group in groups for logp in group.logps])


@contextlib.contextmanager
def replaced(name, method):
    """Inside, a method of Decoding is another."""
    before = getattr(rollout.Decoding, name)
    setattr(rollout.Decoding, name, method)
    try:
        yield
    finally:
        setattr(rollout.Decoding, name, before)


# ---- speed


def options(args, device):
    """Seconds of the parts that a setting is there for, with it and without it."""
    torch.manual_seed(0)
    policy = random_policy(args.model, device, torch.float32)
    policy.freeze_vision()
    policy.set_grad_checkpointing(1)
    policy.eos_ids = []
    found, kept = {}, {}
    (prompt,) = small_prompts(policy, args, [8])
    responses = [torch.randint(8, 100, (4 * args.new,)) for _ in range(args.group)]
    way = switch(policy)(policy, prompt, responses)
    policy.train()
    for tf32 in (False, True, False, True):
        policy.tf32_head = tf32
        policy.zero_grad()
        with bf16(device):
            logp, seconds = timed(way.log_probs, device)
            _, backward = timed(logp.sum().backward, device)
        torch.clear_autocast_cache()
        found[f"head, TF32 {'on' if tf32 else 'off'}"] = {"forward": seconds, "backward": backward}
        kept[tf32] = logp.detach(), policy.net.lm_head.weight.grad.clone()
    (logp, gradient), (logp_tf32, gradient_tf32) = kept[False], kept[True]
    found["TF32 changes"] = {
        "logp": float((logp_tf32 - logp).abs().max()),
        "gradient of the head": float((gradient_tf32 - gradient).norm() / gradient.norm()),
    }
    kept.clear()
    policy.zero_grad()
    policy.eval()
    for cudnn in (False, True):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        calls = []
        for n in (4, 8, 12, 16):  # new shapes of the tower's attention
            prompts = small_prompts(policy, args, [n])
            with bf16(device), torch.no_grad():
                calls.append(timed(partial(policy.encode, prompts), device)[1])
        found[f"cuDNN attention {'on' if cudnn else 'off'}"] = calls
    torch.backends.cuda.enable_cudnn_sdp(False)
    return found


def kernels(args, device):
    """The kernels that take the most time in decoding (as CUDA graphs) and in a training pass ->
    {part: {"seconds", "kernels": {name: seconds}}}."""
    torch.manual_seed(0)
    policy = random_policy(args.model, device, torch.float32)
    policy.freeze_vision()
    policy.set_grad_checkpointing(1)
    policy.eos_ids = []
    found = {}
    for frames in args.frames:
        (prompt,) = small_prompts(policy, args, [frames])
        responses = [torch.randint(8, 100, (args.new,)) for _ in range(args.group)]
        way = switch(policy, cuda_graph=device.type == "cuda")(policy, prompt, responses)
        with bf16(device):
            policy.eval()
            found[f"decode, {frames} frames"] = profiled(partial(way.rollout, args.new), device)
            policy.train()
            torch.clear_autocast_cache()
            found[f"train, {frames} frames"] = profiled(partial(training_pass, way), device)
        policy.zero_grad()
    return found


def training_pass(way):
    """Log-probs and their gradient."""
    way.log_probs().sum().backward()


def profiled(f, device):
    """f(), once to warm up and once under the profiler -> its seconds, and those of its kernels."""
    f()
    activity = torch.profiler.ProfilerActivity
    used = activity.CUDA if device.type == "cuda" else activity.CPU
    with torch.profiler.profile(activities=[used]) as profile:
        _, seconds = timed(f, device)
    times = {}
    for event in profile.key_averages():
        taken = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        times[event.key[:100]] = times.get(event.key[:100], 0.0) + taken / 1e6
    longest = sorted(times, key=times.get, reverse=True)[:15]
    return {"seconds": seconds, "kernels": {name: times[name] for name in longest}}


# ---- whole steps


class Measured:
    """What infra.fake_gpu.FakeGPU is for a simulation, on a real device: peaks and seconds of each
    phase."""

    def __init__(self, device):
        self.device, self.name, self.phases, self.since = device, "", {}, time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name):
        """Inside, everything counts for this phase."""
        before = self.name
        self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def enter(self, name):
        """Ends the phase under way, and begins another."""
        wait(self.device)
        now, cuda = time.perf_counter(), self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() if cuda else 0
        phase = self.phases.setdefault(self.name, {"seconds": 0.0, "peak": 0})
        phase["seconds"] += now - self.since
        phase["peak"] = max(phase["peak"], peak)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        self.name, self.since = name, now

    def reset(self, name):
        """Forgets all phases, and begins one."""
        self.enter(name)
        self.phases = {}


def steps(args, device):
    """Two training steps of each of STEPS, the second measured, beside its simulation."""
    found, measured = {}, Measured(device)
    simulate.take_the_place_of_files(measured)
    for name, shape, flags in STEPS[device.type]:
        with tempfile.TemporaryDirectory() as folder:
            write_folder(folder, shape)
            try:
                found[name] = train_two_steps(folder, flags.split(), measured)
            except torch.OutOfMemoryError as e:
                found[name] = {"failed": str(e)}
            free()
            found[name] |= {"flags": flags, "simulated": simulated(folder, flags.split(), device)}
        say(f"{name}: {json.dumps(found[name])}")
    return found


def write_folder(folder, shape):
    """Writes the small files of a model of this shape, with the toy's tokenizer."""
    tokenizer = toy.write_tokenizer(folder, ["When does the lamp light up?"])
    end = tokenizer.eos_token_id
    config = shape_config(shape, **toy.vision_tokens(tokenizer))
    config.text_config.bos_token_id = config.text_config.eos_token_id = end
    config.text_config.pad_token_id = tokenizer.pad_token_id
    config.save_pretrained(folder)


def fill(policy):
    """Random numbers for weights that have none."""
    with torch.no_grad():
        for p in policy.parameters():
            p.normal_(std=0.02) if p.ndim > 1 else p.fill_(1.0)


def train_two_steps(folder, flags, measured):
    """Runs the step of train.py on videos that are alike -> the second's figures by phase."""
    own, words = simulate.parse_args(["--config", folder, *flags])
    run_args = train.parse_args(["--model", "-", "--data", "-", *words])
    run_args.model = folder
    device = measured.device
    measured.reset("")
    with measured.phase("load"):
        run = simulate.open_run(run_args, *simulate.video_shape(run_args, own), device)
    fill(run.policy)
    if run.reference not in (None, run.policy):
        fill(run.reference)
    run.policy.eos_ids = []  # every response has --max_new tokens
    load = measured.phases["load"]
    for step in range(2):
        measured.reset("gather")
        start = time.perf_counter()
        entry, _, tokens = train.train_step(run, step)
        wait(device)
        seconds = time.perf_counter() - start
    measured.enter("")
    return {
        "load": load,
        "phases": measured.phases,
        "step_seconds": seconds,
        "response_tokens": tokens,
        "estimate": {name: sum(terms.values()) for name, terms in run.sharing.estimate.items()},
        "prompt_tokens": len(run.loader.prompts[0][1].ids),
        "grad_norm": entry.get("grad_norm"),
        "loss": entry.get("loss"),
        "mismatch": entry.get("mismatch"),
    }


def simulated(folder, flags, device):
    """The peak of each phase by simulate.py, or why there is none."""
    reason = fake_cuda.unsupported()
    if reason or device.type != "cuda":
        return reason or "there is no GPU to compare with"
    own, words = simulate.parse_args(["--config", folder, "--gpus", "1", *flags])
    found = simulate.run_rank(own, words)
    return {name: phase["peak"] for name, phase in found["phases"].items()} if found else "failed"


CHECKS = {
    "log_probs": log_probs,
    "graphs": graphs,
    "options": options,
    "kernels": kernels,
    "steps": steps,
}
