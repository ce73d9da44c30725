"""Loads model folders twice, as shards and whole: the numbers must be the same bits.

torchrun --nproc_per_node 3 tests/load_worker.py FOLDER [FOLDER ...]
"""

import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from infra import fsdp  # noqa: E402
from model import Policy  # noqa: E402

dist.init_process_group("gloo")
for folder in sys.argv[1:]:
    for merged in (False, True):
        whole = dict(Policy.load(folder, merged=merged).named_parameters())
        policy = Policy.load(folder, merged=merged, prepare=fsdp.shard)
        sharded = dict(policy.named_parameters())
        assert sharded.keys() == whole.keys()
        for name, p in sharded.items():
            assert p.requires_grad == whole[name].requires_grad, name
            found = fsdp.full_tensor(p)  # on rank 0
            assert found is None or torch.equal(found, whole[name]), name
            if isinstance(p, DTensor):  # a frozen tower is whole
                held = len(p.to_local())
                assert held <= math.ceil(len(whole[name]) / dist.get_world_size()), name
        assert policy.is_sound()
dist.destroy_process_group()
