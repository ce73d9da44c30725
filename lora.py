"""LoRA: train a small change of low rank beside a frozen model (arXiv 2106.09685, section 4.1).

    python train.py @RECIPE --lora 16      trains adapters of rank 16
    python lora.py merge RUN OUT           adds them to the weights: an ordinary model folder

A linear layer's weight W is frozen. An adapter, two small matrices, is trained beside it:

    y = W x + (alpha / r) B A x            W (out, in), A (r, in), B (out, r)

A begins random and B as zeros, so training begins at the model itself. Adapters stand beside every
linear layer of the language model's layers: q, k, v, o, gate, up, down.

    memory      the frozen weights have no gradients and no moments, and stay in bf16 on a GPU
    reference   of the KL penalty: the policy with its adapters off. No second copy is loaded
    rollouts    run with the adapters beside the weights. Merging would round: a sum in bf16 loses
                much of a small change, and the sampler would not be the policy that is scored
    checkpoint  an adapter folder in PEFT's form, which names its base: adapter_config.json and
                adapter_model.safetensors. What loads models here loads such a folder too

Adapters have no dropout here: sampler and scorer would differ.
"""

import argparse
import contextlib
import json
import re
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import logging as hf_logging

from infra.errors import DataError, ModelError
from infra.model_folder import ADAPTER, base_folder, local_folder, read_object, weights_dtype


class LoraLinear(nn.Linear):
    """A frozen linear layer with its adapter, in the place and under the name of that layer.

    lora_A (r, in), lora_B (out, r): trained, in fp32 (beside a float64 layer, in float64).
    scale: alpha / r.  on: whether the adapter takes part.  device: of the adapter, before the
    layer's weight is read (Policy.load).
    """

    def __init__(self, linear, rank, scale, device=None):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        exact = torch.promote_types(linear.weight.dtype, torch.float32)
        how = dict(dtype=exact, device=device or linear.weight.device)
        self.lora_A = nn.Parameter(torch.zeros(rank, linear.in_features, **how))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, **how))
        self.scale, self.on = scale, True

    def forward(self, x):
        """x (..., in) -> (..., out), computed in the dtype of x, or of autocast."""
        y = F.linear(x, self.weight, self.bias)
        if not self.on:
            return y
        low = F.linear(x, self.lora_A.to(x.dtype))  # (..., r)
        return y + self.scale * F.linear(low, self.lora_B.to(x.dtype))

    def merged(self, weight):
        """W -> W + (alpha / r) B A (out, in), summed in at least fp32, then in the dtype of W."""
        exact = weight.to(self.lora_A.dtype)
        return (exact + self.scale * (self.lora_B @ self.lora_A)).to(weight.dtype)


# ---- on and off


def adapters(policy):
    """The layers of a policy (or any module) that have an adapter, by name."""
    return {name: m for name, m in policy.named_modules() if isinstance(m, LoraLinear)}


@contextlib.contextmanager
def off(policy):
    """Inside, the policy is its base. Does nothing to a policy without adapters."""
    layers = adapters(policy).values()
    for layer in layers:
        layer.on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.on = True


# ---- add and merge

LAYERS = "model.language_model.layers."  # in the names of transformers' network
TARGETS = r"model\.language_model\.layers\.\d+\..*_proj"  # for PEFT: the same layers


def linears(net):
    """The linear layers of the language model's layers, by name in the network."""
    layers = {}
    for name, module in net.named_modules():
        if name.startswith(LAYERS) and isinstance(module, nn.Linear):
            layers[name] = module
    return layers


def add(policy, rank, alpha, seed=0):
    """Puts an adapter beside every linear layer of the language model's layers, in place.

    Everything else is frozen. As PEFT does, A is drawn from U(-in^-1/2, in^-1/2) and B is zero. All
    ranks draw the same. If the policy has adapters already, training continues with these.
    Raises ModelError: they have another rank or alpha.
    """
    policy.requires_grad_(False)
    if policy.adapter:
        found = (policy.adapter["r"], policy.adapter["lora_alpha"])
        if found != (rank, alpha):
            raise ModelError(
                f"the adapter that training starts from has rank {found[0]} and alpha {found[1]}, "
                f"expected --lora {rank} and --lora_alpha {alpha}. Set these flags to its own, or "
                "merge it first (python lora.py merge)"
            )
    else:
        random = torch.Generator().manual_seed(seed)
        for name, linear in linears(policy.net).items():
            layer = LoraLinear(linear, rank, alpha / rank, policy.device)
            bound = linear.in_features**-0.5
            drawn = torch.empty(rank, linear.in_features).uniform_(-bound, bound, generator=random)
            layer.lora_A.data.copy_(drawn)
            policy.net.set_submodule(name, layer)
        policy.adapter = new_config(rank, alpha, policy.base_name)
    for layer in adapters(policy).values():
        layer.lora_A.requires_grad_(True)
        layer.lora_B.requires_grad_(True)


@torch.no_grad()
def merge(policy):
    """Adds the adapters to the weights, in place: a policy as any other, its weights trainable.

    A sum is computed in fp32 and rounded to the weights' dtype. bf16 keeps 8 significant bits, so
    there the merged policy differs from the one with adapters.
    """
    weights = dict(policy.net.named_parameters())
    for name, merged in take_off(policy).items():
        weights[name].data = merged(weights[name])


def take_off(policy):
    """Removes the adapters, in place -> {name of a weight: function from it to the merged one}."""
    changes = {}
    for name, layer in adapters(policy.net).items():
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        linear.weight, linear.bias = layer.weight, layer.bias
        policy.net.set_submodule(name, linear)
        changes[f"{name}.weight"] = layer.merged
    policy.adapter = None
    policy.requires_grad_(True)
    return changes


# ---- adapter folders, in PEFT's form

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of a layer's name, in PEFT's files
# the fields of adapter_config.json that say nothing about what a trained adapter computes; every
# other one must have the value of PLAIN, or be empty
RECORDED = (
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "r",
    "target_modules",
    "task_type",
    "unsloth_version",
)
PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),
    "revision": (None, "main"),
}


def new_config(rank, alpha, base):
    """The content of adapter_config.json. base: a model folder or hub name."""
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": TARGETS,
        "task_type": "CAUSAL_LM",
    }


def write(folder, config, weights):
    """Writes an adapter folder. weights: of A and B by their names in the network."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{PREFIX}{name}.weight": x.cpu().contiguous() for name, x in weights.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / ADAPTER).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load(policy, folder):
    """Puts the adapters of a folder, ours or PEFT's, beside the layers of its base, in place.

    Everything is frozen. Raises ModelError: not a plain LoRA adapter; a layer that is none of
    `linears`; a matrix that is missing, of another shape, or not finite.
    """
    config = read_config(folder / ADAPTER)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as e:
        raise ModelError(f"{folder / WEIGHTS}: cannot be read: {e}") from e
    known = linears(policy.net)
    names = [layer_name(folder, key, known) for key in tensors]
    for name in dict.fromkeys(names):
        scale = config["lora_alpha"] / config["r"]
        layer = LoraLinear(known[name], config["r"], scale, policy.device)
        for part, p in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            x = tensors.get(f"{PREFIX}{name}.{part}.weight")
            if x is None or x.shape != p.shape or not x.isfinite().all():
                found = "nothing" if x is None else f"a tensor of shape {list(x.shape)}"
                raise ModelError(
                    f"{folder / WEIGHTS}: {name}.{part}: found {found}, expected finite numbers "
                    f"of shape {list(p.shape)}"
                )
            p.data.copy_(x)
        policy.net.set_submodule(name, layer)
    policy.adapter = config
    policy.requires_grad_(False)


def read_config(file):
    """The content of an adapter_config.json. Raises ModelError: not a plain LoRA adapter."""
    config = read_object(file)
    for name, value in config.items():
        if name in RECORDED:
            continue
        if name in PLAIN and value not in PLAIN[name] or name not in PLAIN and value:
            raise ModelError(
                f"{file}: {name!r} is {value!r}, expected a plain LoRA adapter, without this field "
                "or with it empty"
            )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or alpha <= 0:
        raise ModelError(
            f"{file}: 'r' is {rank!r} and 'lora_alpha' {alpha!r}, expected numbers above 0"
        )
    return config


def layer_name(folder, key, known):
    """PEFT's name of a matrix -> the name of its layer, one of `known`. Raises ModelError."""
    found = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_[AB]\.weight", key)
    if not found or found[1] not in known:
        raise ModelError(
            f"{folder / WEIGHTS}: {key} is not of a linear layer of the language model's layers, "
            f"expected names like {PREFIX}{next(iter(known))}.lora_A.weight"
        )
    return found[1]


# ---- the command


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    about = (
        "Adds adapters to the weights of their base and writes an ordinary model folder, in the "
        "base's dtype. In bf16 the sum is rounded, so that some answers can differ."
    )
    p = commands.add_parser("merge", help="write an ordinary model folder", description=about)
    p.add_argument("run", help="run folder, adapter folder or hub name of an adapter")
    p.add_argument("out", help="folder to write; must not exist yet")
    args = parser.parse_args(argv)
    hf_logging.disable_progress_bar()
    try:
        merge_folder(args.run, Path(args.out))
    except (DataError, ModelError, OSError) as e:
        raise SystemExit(f"error: {e}") from e
    print(f"{args.out}: an ordinary model folder")


def merge_folder(run, out):
    """Writes an adapter, merged into its base, as a model folder."""
    from model import Policy  # here, because model.py imports this file

    if out.exists():
        raise ModelError(f"{out}: exists already")
    folder = local_folder(run)
    base = base_folder(folder)
    if base == folder:
        raise ModelError(f"{folder}: an ordinary model folder, expected an adapter's ({ADAPTER})")
    Policy.load(folder, dtype=weights_dtype(base), merged=True).save(out)


if __name__ == "__main__":
    main()
