"""One step's gradient in float64, by step.py's own functions, saved to OUT.RANK.

    python -m torch.distributed.run --nproc_per_node 2 tests/gradient_worker.py WORLD OUT [--flag ...] [frozen] [bypass]

With `frozen` the vision tower is not trained. With `bypass` the loss goes through the module inside DistributedDataParallel
instead of through its forward: the mistake whose gradients are never averaged.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

import model  # noqa: E402
import mrsp  # noqa: E402
import step  # noqa: E402
import train  # noqa: E402
from data import PromptBuilder, load_samples  # noqa: E402
from infra import fsdp, ranks  # noqa: E402
from model import Policy  # noqa: E402

world, out, *extra = sys.argv[1:]
bypass = "bypass" in extra
if ranks.WORLD > 1:
    dist.init_process_group("gloo")
args = train.parse_args(
    [
        "--model",
        world,
        "--data",
        world,
        "--prompts",
        "5",
        "--group",
        "3",
        "--max_new",
        "12",
        "--row_tokens",
        "300",
        "--beta",
        "0.1",
        "--w_format",
        "0",
        "--mask_truncated",
        *(["--train_vision"] if "frozen" not in extra else []),
        *(x for x in extra if x not in ("bypass", "frozen")),
    ]
)
policy, reference = (Policy.load(f"{world}/model", dtype=torch.float64) for _ in range(2))
policy.eos_ids = reference.eos_ids = list(range(20, 66))  # so that groups are of unequal length
with torch.no_grad():
    reference.net.lm_head.weight.mul_(1.01)
step.rewards.accuracy_reward = lambda text, sample: (
    len(text) / 100
)  # a random model is never right: let long answers be
reference.requires_grad_(False)
if not args.train_vision:
    policy.freeze_vision()
model.PATCHES_PER_CALL = 40  # of the tower: ranks call it different numbers of times
wrapped = policy.train()
if args.fsdp:
    fsdp.shard(policy)
    fsdp.shard(reference)
elif ranks.WORLD > 1:
    wrapped = DistributedDataParallel(policy, forward_sync_buffers=False)
builder = PromptBuilder(f"{world}/model", min_pixels=784)
samples = load_samples(f"{world}/cot.json")
group = policy.sp = reference.sp = mrsp.sequence_parallel(int(args.sp))
media = lambda i: builder(
    samples[i], min_pixels=784 if i % 2 else 56 * 84
)  # videos of two shapes, 4 to 16 frames, and images
deal = lambda first: train.share(
    group, [(first + i, media(first + i)) for i in range(ranks.RANK, 5, ranks.WORLD)]
)
prompts = deal(0)
if bypass:
    wrapped.forward = lambda *a, **kw: policy(*a, **kw)
stay = lambda: {"grad_norm": 0.0, "skipped_update": False}  # keeps the gradient
more = lambda k: deal(5 * k)
for _, prompt in prompts:
    prompt.target = builder.target(prompt.sample)
entry = (
    step.sft_step(wrapped, prompts, stay, args)[0]
    if args.algo == "sft"
    else step.grpo_step(wrapped, reference, prompts, more, builder, 0, stay, args)[0]
)
whole = lambda x: x.full_tensor() if isinstance(x, DTensor) else x
grads = {name: whole(p.grad) for name, p in policy.named_parameters() if p.requires_grad}
torch.save({"grads": grads, "entry": entry}, f"{out}.{ranks.RANK}")
if ranks.WORLD > 1:
    dist.destroy_process_group()
    os._exit(
        0
    )  # what is left here holds the group, and a thread of gloo's that outlives the interpreter aborts it
