"""One case of tests/test_simulate.py, in a process of its own: it makes torch believe in a GPU.

RANK=0 WORLD_SIZE=8 python tests/simulate_worker.py CASE MODEL
"""

import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor  # noqa: E402

import attention  # noqa: E402
import model  # noqa: E402
import mrsp  # noqa: E402
import rollout  # noqa: E402
import simulate  # noqa: E402
import train  # noqa: E402
from infra import fake_cuda  # noqa: E402
from infra.fake_gpu import FakeGPU  # noqa: E402

case, folder = sys.argv[1:]
SIZE = (128, 128) if case == "qwen3_vl" else (112, 112)  # pixels; 4 x 4 visual tokens
calls = {"tower": 0, "row": 0, "step": 0}  # since the last reset
leaks = []  # what a decode step did that a CUDA graph must not do


def count_calls():
    """Counts calls of the tower, of rows and of decode steps, and watches the latter."""

    def counted(name, function):
        def call(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    def watched(decoding):
        gpu = simulate.Policy.gpu
        held, storages, syncs = gpu.now, set(gpu.live), gpu.current.syncs.total()
        step(decoding)
        if gpu.now != held or set(gpu.live) - storages:
            leaks.append(f"{gpu.now - held} bytes outlive step {calls['step']}")
        if gpu.current.syncs.total() != syncs:
            leaks.append(f"a sync in step {calls['step']}: {gpu.current.syncs}")

    step = rollout.Decoding.step
    rollout.Decoding.step = counted("step", watched)
    model.Policy._run_tower = counted("tower", model.Policy._run_tower)
    model.Policy.run_row = counted("row", model.Policy.run_row)


def begin(*flags):
    """Opens a run of a narrow recipe -> (the fake GPU, the run)."""
    words = [
        "--model",
        folder,
        "--frames",
        "8",
        "--size",
        "x".join(map(str, SIZE)),
        "--max_new",
        "64",
        *flags,
    ]
    own, rest = simulate.parse_args(words)
    args = train.parse_args(["--data", "-", "--prompts", "8", "--group", "4", *rest])
    count_calls()
    gpu = simulate.start(args, own)
    gpu.__enter__()
    return gpu, simulate.open_run(args, own.frames, SIZE, torch.device("cuda", 0))


def second_step(gpu, run):
    """Runs two steps -> the phases of the second."""
    for step in range(2):
        gpu.reset("gather")
        calls.update(dict.fromkeys(calls, 0))
        entry, _, _ = train.train_step(run, step)
        assert not entry.get("skipped_update"), entry
    assert not leaks, leaks
    return gpu.phases


def check(gpu, run, *, syncs):
    """Two steps. In the second, each phase has at most so many syncs, encode for each call of the
    tower and the others for each row; and its peak is at most the estimate of memory, which is at
    most 1.15 times as high. Returns its phases.
    """
    phases = second_step(gpu, run)
    prefills = calls["row"] - ("forward" in phases) - ("reference" in phases)  # one row a step
    number = {"encode": calls["tower"], "prefill": prefills}
    found = {name: phases[name].syncs.total() / number.get(name, 1) for name in syncs}
    peak, name = max((phase.peak, name) for name, phase in phases.items())
    phase, terms = mrsp.largest(run.sharing.estimate)
    ratio = sum(terms.values()) / peak
    print(
        f"{case}: syncs {found}; peak {peak / 1e9:.2f} GB ({name}), estimate {ratio:.3f} ({phase})"
    )
    for phase, most in syncs.items():
        assert found[phase] <= most, (phase, most, phases[phase].syncs)
    assert 1 <= ratio <= 1.15, (ratio, run.sharing.estimate)
    return phases


# ---- steps


def fsdp():
    gpu, run = begin("--algo", "tgrpo", "--fsdp", "--train_vision", "--beta", "0.04")
    syncs = dict(encode=4, prefill=4, reference=3, forward=3, backward=4, optimizer=1)
    phases = check(gpu, run, syncs=syncs)
    assert {*simulate.PHASES} - {"load"} == {*phases}
    # a 7B's layer in bf16, gathered in a forward pass: at least that many bytes come in
    layer = sum(p.numel() for p in run.policy.language_model.layers[0].parameters())
    assert phases["forward"].communicated > 2 * 2 * layer


def ddp():
    gpu, run = begin("--algo", "grpo", "--beta", "0.04")
    syncs = dict(encode=4, prefill=4, reference=3, forward=3, backward=8, optimizer=1)
    check(gpu, run, syncs=syncs)
    assert calls["tower"] == 1, "a frozen tower encodes once"


def sp():
    gpu, run = begin("--algo", "grpo", "--fsdp", "--beta", "0.04", "--sp", "2")
    syncs = dict(encode=4, prefill=6, reference=6, forward=6, backward=4, optimizer=1)
    check(gpu, run, syncs=syncs)


def lora():
    gpu, run = begin("--algo", "grpo", "--beta", "0.04", "--lora", "16")
    syncs = dict(encode=4, prefill=4, reference=3, forward=3, backward=4, optimizer=1)
    check(gpu, run, syncs=syncs)
    assert run.reference is run.policy
    frozen = run.policy.language_model.layers[0].mlp.up_proj.weight
    assert frozen.dtype == torch.bfloat16 and frozen.grad is None


def qwen3_vl():
    gpu, run = begin("--algo", "grpo", "--fsdp", "--train_vision", "--beta", "0.04")
    syncs = dict(encode=4, prefill=4, reference=3, forward=3, backward=4, optimizer=1)
    check(gpu, run, syncs=syncs)


def sft():
    gpu, run = begin("--algo", "sft", "--fsdp", "--train_vision")
    syncs = dict(encode=4, forward=3, backward=1, optimizer=1)
    phases = check(gpu, run, syncs=syncs)
    assert "decode" not in phases and "reference" not in phases


def greedy():
    gpu, run = begin("--algo", "grpo", "--beta", "0.04")
    prompts = [prompt for _, prompt in run.loader.prompts[:2]]
    for how in (dict(temperature=0), dict(temperature=0.7), dict(top_p=0.9)):
        with train.bf16_on_gpu(run.policy.device):
            groups = rollout.generate(run.policy, prompts, 4, max_new=16, **how)
        assert [len(r) for g in groups for r in g.responses] == [16] * 8
        assert all(x.device.type == "cpu" for g in groups for x in g.responses)
    assert calls["step"] and not leaks, leaks


# ---- faults


def faults():
    """Each fault, put in on purpose, is caught; without it, the step runs."""
    gpu, run = begin("--algo", "grpo")
    train.train_step(run, 0)
    assert not leaks, leaks

    make = attention.make_blocks

    def on_cpu(causal, full, device):
        return make(causal, full, torch.device("cpu"))

    attention.make_blocks = on_cpu
    assert "device" in failure(run)
    attention.make_blocks = make

    autocast, train.bf16_on_gpu = train.bf16_on_gpu, lambda device: torch.autocast("cpu")
    assert "flash attention on a GPU: dtype" in failure(run)
    train.bf16_on_gpu = autocast

    draw, kept = rollout.sample, []

    def reads(logits, *how):
        token, logp, entropy = draw(logits, *how)
        assert int(token[0]) >= 0
        return token, logp, entropy

    def keeps(logits, *how):
        kept.append(draw(logits, *how))
        return kept[-1]

    for fault, found in ((reads, "a sync in step"), (keeps, "bytes outlive step")):
        rollout.sample = fault
        train.train_step(run, 2)
        assert leaks and all(found in leak for leak in leaks), leaks
        leaks.clear()
    rollout.sample = draw
    train.train_step(run, 3)
    assert not leaks, leaks


def failure(run):
    """The message of the error that a step ends with."""
    try:
        train.train_step(run, 2)
    except RuntimeError as e:
        return str(e)
    raise AssertionError("the step did not fail")


# ---- the fake GPU itself


def machine():
    """Sizes, operations, syncs and numbers, by hand."""
    fake_cuda.pretend(memory=80e9)
    gpu, cuda = FakeGPU(simulate.ROOT), torch.device("cuda")
    with gpu:
        memory(gpu, cuda)
        operations(gpu, cuda)
        waits(gpu, cuda)
        numbers(gpu, cuda)
        refused(cuda)


def memory(gpu, cuda):
    x = torch.empty(1000, device=cuda)  # 4,000 bytes, in blocks of 512
    assert gpu.now == 4096
    view = x[:10]
    del x
    assert gpu.now == 4096, "a view holds its storage"
    with gpu.phase("two"):
        y = torch.empty(128, device=cuda)
        del y
    assert gpu.now == 4096 and gpu.phases["two"].peak == 4096 + 512
    assert sorted(gpu.phases["two"].sites.values()) == [512, 4096]
    del view
    assert gpu.now == 0


def operations(gpu, cuda):
    a = torch.empty(8, 16, device=cuda, dtype=torch.bfloat16)
    b = torch.empty(16, 32, device=cuda, dtype=torch.bfloat16)
    with gpu.phase("product"), gpu.repeated(3):
        c = (a @ b).view(-1)
    phase = gpu.phases["product"]
    assert phase.kernels == 3, "a view is no kernel"
    assert phase.flops == 3 * 2 * 8 * 16 * 32
    assert phase.bytes == 3 * 2 * (8 * 16 + 16 * 32 + len(c))
    q = torch.empty(1, 4, 64, 32, device=cuda, dtype=torch.bfloat16)
    with gpu.phase("attention"):
        torch.ops.aten._scaled_dot_product_flash_attention(q, q[:, :2], q[:, :2], 0.0, True)
    assert gpu.phases["attention"].flops == 2 * 2 * 4 * 64 * 64 * 32 / 2  # causal: half of it


def waits(gpu, cuda):
    x = torch.arange(8).to(cuda)
    even = x % 2 == 0
    for once in (
        lambda: int(x.sum()),
        lambda: x.tolist(),
        lambda: x.cpu(),
        lambda: x[even],
        lambda: even.nonzero(),
        lambda: torch.tensor([1, 2], device=cuda),
        lambda: x.repeat_interleave(x),
        lambda: x[torch.tensor([0, 1])],
    ):
        with gpu.phase("wait"):
            once()
        assert gpu.phases["wait"].syncs.total() == 1, gpu.phases["wait"].syncs
        gpu.reset("")
    with gpu.phase("no wait"):
        x.cumsum(0) + torch.where(even, x, -1)
        x[x.argsort()], x.index_add(0, x, x)
    assert not gpu.phases["no wait"].syncs


def numbers(gpu, cuda):
    x = torch.tensor([3, 0, 2], device=cuda)
    assert isinstance(x, FakeTensor) and x.device == torch.device("cuda", 0)
    assert (x * 2).tolist() == [6, 0, 4] and int(x.max()) == 3
    assert x[x > 0].tolist() == [3, 2] and x.nonzero()[:, 0].tolist() == [0, 2]
    view = x[1:]
    view += 1
    assert x.tolist() == [3, 1, 3], "a view writes to its base"
    x[x == 3] = 7
    assert x.cpu().tolist() == [7, 1, 7]
    assert float(torch.ones((), device=cuda)) == 0.5, "floats have no numbers"
    assert torch.ones(2, device=cuda).tolist() == [0.5, 0.5]


def refused(cuda):
    half = torch.empty(1, 4, 64, 32, device=cuda, dtype=torch.bfloat16)
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
    odd, across = half[..., :12], half.mT.contiguous().mT
    lse = torch.empty(1, 64, 4, device=cuda).mT
    for found, call in {
        "on the same device": lambda: half.float() + torch.ones(64, 32),
        "mm on a GPU": lambda: torch.mm(half[0, 0], half[0, 0].T.float()),
        "index_add_ on a GPU": lambda: half.float().index_add_(
            0, torch.zeros(1, dtype=torch.long, device=cuda), half
        ),
        "dtype: torch.float32": lambda: flash(*[half.float()] * 3),
        "dtypes:": lambda: flash(half, half, half.half()),
        "head dim: 12": lambda: flash(odd, odd, odd),
        "heads: 4 of queries, 3 of keys": lambda: flash(half, half[:, :3], half[:, :3]),
        "causal: 64 queries, 32 keys": lambda: flash(
            half, half[:, :, :32], half[:, :, :32], 0.0, True
        ),
        "strides: [1, 64, 1]": lambda: flash(half, across, half),
        "log-sum-exp: (1, 4, 64)": lambda: backward(
            *[half] * 5, lse, None, None, 64, 64, 0.0, True, None, None
        ),
    }.items():
        try:
            call()
        except RuntimeError as e:
            assert found in str(e), (found, str(e))
        else:
            raise AssertionError(f"not refused: {found}")


try:
    globals()[case]()
    code = 0
except BaseException:
    traceback.print_exc()
    code = 1
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
