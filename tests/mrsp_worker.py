"""What a sequence-parallel group of all ranks computes, in float64, saved to OUT.RANK.

python -m torch.distributed.run --nproc_per_node 2 tests/mrsp_worker.py WORLD OUT
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

import mrsp  # noqa: E402
from data import PromptBuilder, Sample, load_samples  # noqa: E402
from infra import ranks  # noqa: E402
from model import Policy  # noqa: E402
from rollout import generate  # noqa: E402

world, out = sys.argv[1:]
if ranks.WORLD > 1:
    dist.init_process_group("gloo")
policy = Policy.load(f"{world}/model", dtype=torch.float64)
policy.eos_ids = list(range(20, 66))  # so that responses are of unequal length
policy.sp = mrsp.sequence_parallel(ranks.WORLD)  # for the whole process
builder = PromptBuilder(f"{world}/model")
samples = load_samples(f"{world}/train.json")
images = [s for s in samples if s.data_type == "image"]
videos = [s for s in samples if s.data_type == "video"]
# 8, 4, 1, 3 * 6 and 3 * 6 visual tokens, the first video again for another question, and text
prompts = [
    builder(videos[0], min_pixels=784),
    builder(videos[5], max_frames=8, min_pixels=784),
    builder(images[0], min_pixels=784),
    builder(videos[2], max_frames=6, min_pixels=56 * 84),
    builder(videos[1], max_frames=6, min_pixels=5000),
    builder(next(s for s in videos[1:] if s.path == videos[0].path), min_pixels=784),
    builder(Sample("text", "How many are 3 and 4?", [], "numerical", "text", "", "7")),
]
result, patches = {}, []
policy.net.model.visual.register_forward_pre_hook(
    lambda module, args, kwargs: patches.append(int(kwargs["grid_thw"].prod(1).sum())),
    with_kwargs=True,
)
with torch.no_grad():
    result["visual_embeds"] = policy.encode(prompts)
    result["reversed"] = policy.encode(prompts[::-1])[::-1]
result["patches"] = sum(patches) // 2
random = torch.Generator().manual_seed(3)


def tokens(n):
    return torch.randint(70, 300, (n,), generator=random)


responses = [
    [tokens(n) for n in lengths]
    for lengths in ([5], [1, 7, 2], [3, 3], [11], [4, 1, 1, 6], [2], [3, 2])
]
policy.train()
result["logp"], result["entropy"] = policy(
    prompts, responses, result["visual_embeds"], temperature=0.8
)
# all but one rank have no response token
result["one token"], _ = policy(prompts[:1], [[tokens(1)]], result["visual_embeds"][:1])
result["alone"] = [
    policy([p], [r], [f], temperature=0.8)[0]
    for p, r, f in zip(prompts, responses, result["visual_embeds"])
]
for name, how in (
    ("greedy", dict(temperature=0)),
    ("sampled", dict(seeds=range(11, 18))),
):
    groups = generate(policy, prompts, 5, max_new=20, visual_embeds=result["visual_embeds"], **how)
    result[name] = [g.responses for g in groups]
    result[f"{name} logps"] = torch.cat([x for g in groups for x in g.logps])
    result[f"{name} entropies"] = torch.cat([x for g in groups for x in g.entropies])
    result[f"{name} scored"] = policy(prompts, result[name], result["visual_embeds"])[0]
    result[f"{name} truncated"] = [g.truncated for g in groups]
torch.save(
    {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in result.items()},
    f"{out}.{ranks.RANK}",
)
if ranks.WORLD > 1:
    dist.destroy_process_group()
    # this module still holds the group; a thread of gloo that outlives the interpreter aborts it
    os._exit(0)
