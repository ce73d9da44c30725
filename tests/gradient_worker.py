"""One step's gradient in float64, by train.py's own functions, saved to OUT.RANK.

    torchrun --nproc_per_node 2 tests/gradient_worker.py WORLD MODEL OUT [--flag ...] [word ...]

MODEL is a cold start. The temperature is high, so responses to a prompt are right and wrong, long
and short. Flags are train.py's, words are

    frozen  the vision tower is not trained (nor with --lora R, which trains adapters from a random
            B; the policy is then its own reference)
    half    the weights are bf16 and compute in it
    bypass  the loss goes through the module inside DistributedDataParallel instead of through its
            forward: the mistake whose gradients are never averaged
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

import lora  # noqa: E402
import model  # noqa: E402
import mrsp  # noqa: E402
import train  # noqa: E402
from data import PromptBuilder, load_samples  # noqa: E402
from infra import fsdp, ranks  # noqa: E402
from infra.optimizer import Update  # noqa: E402
from model import Policy  # noqa: E402

world, start, out, *extra = sys.argv[1:]
bypass = "bypass" in extra
if ranks.WORLD > 1:
    dist.init_process_group("gloo")
flags = "--prompts 5 --group 3 --max_new 15 --temperature 1.3 --row_tokens 300 --beta 0.1".split()
flags += ["--model", start, "--data", world, "--mask_truncated"]
flags += [] if {"frozen", "--lora"} & {*extra} else ["--train_vision"]
flags += [x for x in extra if x not in ("bypass", "frozen", "half")]
args = train.parse_args(flags)
dtype = torch.bfloat16 if "half" in extra else torch.float64


def prepare(policy):
    """Of the policy that is trained: its weights are read afterwards, with --fsdp as shards."""
    if not args.train_vision:
        policy.freeze_vision()
    if args.lora:
        lora.add(policy, args.lora, 2 * args.lora)
        random = torch.Generator().manual_seed(1)
        for layer in lora.adapters(policy).values():
            layer.lora_B.data.normal_(std=0.02, generator=random)
    if args.fsdp:
        fsdp.shard(policy)


def prepare_reference(policy):
    policy.requires_grad_(False)
    if args.fsdp:
        fsdp.shard(policy)


policy = Policy.load(start, dtype=dtype, prepare=prepare)
if args.lora:
    reference = policy
else:
    reference = Policy.load(start, dtype=dtype, prepare=prepare_reference)
    with torch.no_grad():
        reference.net.lm_head.weight.mul_(1.01)
model.PATCHES_PER_CALL = 40  # of the tower: ranks call it different numbers of times
wrapped = policy.train()
if ranks.WORLD > 1 and not args.fsdp:
    wrapped = DistributedDataParallel(policy, forward_sync_buffers=False)
builder = PromptBuilder(policy.folder, min_pixels=784)
samples = load_samples(f"{world}/cot.json")
samples = [samples[8], *samples]  # an image, then videos
sp = mrsp.sequence_parallel(int(args.sp))


def prompt_of(i):
    """Videos of two shapes, an image, and a text in every five prompts."""
    if i % 5 == 2:
        return builder(replace(samples[i], data_type="text", path=""))
    return builder(samples[i], min_pixels=784 if i % 2 else 28 * 56)


def deal(first):
    """The prompts of this rank, from five."""
    mine = [first + i for i in range(ranks.RANK, 5, ranks.WORLD)]
    exchanged = sp.all_gather_objects([(i, prompt_of(i)) for i in mine])
    return sorted(sum(exchanged, []), key=lambda p: p[0])


def refill(step, k):
    return deal(5 * k)


def keep_gradient(step):
    """In place of the optimizer's step."""
    return Update()


def past_ddp(*args, **kw):
    """The mistake: the module inside DistributedDataParallel, called directly."""
    return policy(*args, **kw)


prompts = deal(0)
if bypass:
    wrapped.forward = past_ddp
for _, prompt in prompts:
    prompt.target = builder.target(prompt.sample)
run = train.Run(args, wrapped, reference, builder, refill, keep_gradient)
take_step = train.sft_step if args.algo == "sft" else train.grpo_step
with mrsp.share_rows(sp, policy, reference):
    entry, _, _ = take_step(run, prompts, 0)
grads = {name: p.grad for name, p in policy.named_parameters() if p.requires_grad}
for name, grad in grads.items():
    if isinstance(grad, DTensor):
        grads[name] = grad.full_tensor()
torch.save({"grads": grads, "entry": entry}, f"{out}.{ranks.RANK}")
if ranks.WORLD > 1:
    dist.destroy_process_group()
    # what is left here holds the group, and a thread of gloo's that outlives Python aborts it
    os._exit(0)
