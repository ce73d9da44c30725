"""A model folder in Hugging Face's form.

Finds it, reads the network with every weight accounted for, and writes it back. A network is built
without numbers first, so that it can be sharded before its weights are read. Where an adapter's
folder (lora.py) stands for a model, `base_folder` is the model folder under it.
"""

import contextlib
import hashlib
import json
import sys
from functools import reduce
from pathlib import Path

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import rename_source_key

from infra import fsdp
from infra.errors import DataError, ModelError
from infra.ranks import RANK

# by safetensors' names
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
ADAPTER = "adapter_config.json"  # makes a folder an adapter's, and names its base
# the text files of a model folder that change answers
TEXTS = (
    ADAPTER,
    "config.json",
    "generation_config.json",
    "*.index.json",
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "additional_chat_templates/*",
)


# ---- find


def checkpoints(run):
    """The folders checkpoint-N of a run folder, the newest last."""
    folders = {}
    for folder in Path(run).glob("checkpoint-*"):
        number = folder.name.removeprefix("checkpoint-")
        if number.isdecimal() and folder.is_dir():
            folders[folder] = int(number)
    return sorted(folders, key=folders.get)


def newest_checkpoint(run):
    """The newest checkpoint-N of a run folder, or None."""
    return next(reversed(checkpoints(run)), None)


def local_folder(name):
    """A model folder, a run folder (its newest checkpoint) or a hub name -> the model folder.

    A folder with config.json and weights is the model itself, even if checkpoints of its training
    are inside. An adapter's folder has adapter_config.json instead. Raises ModelError: none of the
    three, or a folder without weights.
    """
    folder = Path(name)
    if not (config_file(folder).exists() and weight_files(folder)):
        folder = newest_checkpoint(name) or folder
    if not folder.is_dir():
        if folder.is_absolute() or str(name).startswith(".") or str(name).count("/") != 1:
            raise ModelError(f"{name}: no such model folder")
        folder = download(str(name))
    config = config_file(folder)
    if not config.exists() and (folder / "config.txt").exists():
        raise ModelError(f"{folder}: a run folder that holds no checkpoint yet")
    if not config.exists():
        raise ModelError(f"{folder}: no config.json, so not a model folder")
    if not weight_files(folder):
        raise ModelError(f"{folder}: no weights (*.safetensors) beside {config.name}")
    return folder


def config_file(folder):
    """The file that makes a folder a model's or an adapter's, whether it exists or not."""
    adapter = Path(folder) / ADAPTER
    return adapter if adapter.exists() else Path(folder) / "config.json"


def base_folder(folder):
    """The model folder under an adapter's folder. A model folder is its own base.

    Raises ModelError: the base is not named, cannot be found, or is an adapter itself.
    """
    file = config_file(folder)
    if file.name != ADAPTER:
        return Path(folder)
    name = read_object(file).get("base_model_name_or_path")
    expected = "expected the model folder or hub name of its base in 'base_model_name_or_path'"
    if not isinstance(name, str) or not name:
        raise ModelError(f"{file}: found {name!r}, {expected}")
    try:
        base = local_folder(name)
    except ModelError as e:
        raise ModelError(f"{file}: the base of this adapter is missing ({e}), {expected}") from e
    if config_file(base).name == ADAPTER:
        raise ModelError(f"{file}: the base {name} is an adapter itself, {expected}")
    return base


def download(name):
    """A hub name -> the folder of its download."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name))
    except HFValidationError:
        raise ModelError(
            f"{name}: no such folder, and not a name that the hub could have"
        ) from None
    except OSError as e:
        reason = " ".join(str(e).split())
        raise ModelError(
            f"{name}: neither a folder nor a model that the hub could deliver ({reason})"
        ) from e


def weight_files(folder):
    """The files of a folder's weights, as transformers and peft find them: model.safetensors, or of
    an adapter adapter_model.safetensors; else those that its index names; else none.

    Raises ModelError: an index that cannot be read.
    """
    name = f"{'adapter_' if config_file(folder).name == ADAPTER else ''}model.safetensors"
    whole, index = Path(folder) / name, Path(folder) / f"{name}.index.json"
    if whole.exists() or not index.exists():
        return [whole] if whole.exists() else []
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({index.with_name(name) for name in names})
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ModelError(
            f"{index}: expected an object with a 'weight_map' from weights to files ({e})"
        ) from e


# ---- read


@contextlib.contextmanager
def reading(folder):
    """Inside, whatever a broken file raises becomes a ModelError that names the folder."""
    try:
        yield
    except ModelError:
        raise
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        ArithmeticError,
        SafetensorError,
        StrictDataclassError,
    ) as e:
        raise ModelError(f"{folder}: cannot be loaded: {' '.join(str(e).split())}") from e


def build_network(folder, dtype, model_types):
    """transformers' network of a folder, by its text files alone.

    Its parameters are on the meta device: they have shapes, and no numbers until `read_weights`.
    Its buffers, which no file holds, are computed. Raises ModelError: an architecture that is not
    in `model_types`; quantised weights; files that cannot be read.
    """
    with reading(folder):
        check_config(folder, model_types)
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            net = AutoModelForImageTextToText.from_config(config, dtype=dtype)
        # what transformers' from_pretrained does for buffers, which are on the meta device too
        for p in net.parameters():
            p._is_hf_initialized = True
        net._move_missing_keys_from_meta_to_device(set(), None, None, None)
        net.initialize_weights()
        named = {}
        if not (folder / "generation_config.json").exists():
            named = dict(config_file_name="config.json", _from_model_config=True)
        net.generation_config = GenerationConfig.from_pretrained(folder, **named)
        check_rotary_sections(folder, net.config.text_config)
        return net


def find_weights(folder, net):
    """What a folder's files hold for a network -> {name of a parameter: slice of its file}.

    Nothing is read but the files' headers. A weight that two parameters share is under one name.
    Raises ModelError: weights that are missing or of another shape; files that cannot be read.
    Prints weights that the architecture does not have.
    """
    with reading(folder):
        check_files(folder)
        parameters = net.state_dict(keep_vars=True)
        names = get_model_conversion_mapping(net)  # from names in files to those in the network
        found, extra = {}, []
        for file in weight_files(folder):
            opened = safe_open(file, "pt")
            for key in opened.keys():
                name, _ = rename_source_key(key, names, [], net.base_model_prefix, parameters)
                name = key if name not in parameters and key in parameters else name
                if name in parameters:
                    found[name] = opened.get_slice(key)
                elif not name.endswith("rotary_emb.inv_freq"):  # of old files: it is computed
                    extra.append(name)
        net._weight_conversions = [x for x in names if x.was_used()]  # `save_pretrained` goes back
        check_shapes(folder, parameters, found)
        share_weights(net, found)
        missing = sorted(dict(net.named_parameters()).keys() - found)
        if missing:
            raise ModelError(f"{folder}: {len(missing)} weights are missing, first {missing[0]}")
    if extra and RANK == 0:
        print(
            f"{folder}: {len(extra)} weights have no place in this architecture and are not used, "
            f"first {min(extra)}",
            file=sys.stderr,
        )
    return found


def move_buffers(module, device):
    """Moves the buffers of a module, and not its parameters."""
    for part in module.modules():
        for name, x in part._buffers.items():
            part._buffers[name] = x if x is None else x.to(device)


def check_shapes(folder, parameters, found):
    """Raises ModelError for a weight of another shape than its parameter."""
    for name, x in sorted(found.items()):
        expected = list(parameters[name].shape)
        if x.get_shape() != expected:
            raise ModelError(f"{folder}: {name} has the shape {x.get_shape()}, expected {expected}")


def share_weights(net, found):
    """Of parameters that the configuration shares (embeddings and head), `found` keeps one.

    Files may name either. If they hold both and these differ, nothing is shared: so does
    transformers.
    """
    for name, first in list(net.all_tied_weights_keys.items()):
        if name not in found:
            continue
        if first in found and not torch.equal(found[name][:], found[first][:]):
            module, _, last = name.rpartition(".")
            alone = nn.Parameter(torch.empty_like(net.get_parameter(name)))
            setattr(net.get_submodule(module), last, alone)
            net.all_tied_weights_keys.pop(name)
            continue
        x = found.pop(name)
        found.setdefault(first, x)


@torch.no_grad()
def read_weights(folder, net, found, device, merged):
    """Gives a network of `build_network` its numbers, one parameter at a time, on a device.

    Of a parameter that is sharded (infra/fsdp.py), only this rank's rows are read and kept.
    found: of `find_weights`.  merged: {name: function from a weight to what takes its place}.
    Raises ModelError: a weight that is not finite; a file that cannot be read.
    """
    with reading(folder):
        for name, p in list(net.named_parameters()):
            if name not in found:  # an adapter's
                continue
            rows = fsdp.local_rows(p)
            if name in merged:
                x = merged[name](found[name][:].to(p.dtype))[rows].clone()
            else:
                x = found[name][rows].to(p.dtype, copy=True)
            if x.numel() and not torch.stack(torch.aminmax(x)).isfinite().all():
                raise ModelError(f"{folder}: {name} is not finite")
            fsdp.fill(p, x.to(device))


def check_config(folder, model_types):
    """Raises ModelError for text files that transformers would not refuse, or not plainly."""
    config, generation = read_object(folder / "config.json"), folder / "generation_config.json"
    eos = read_object(generation).get("eos_token_id") if generation.exists() else None
    if not all(type(i) is int for i in (eos if isinstance(eos, list) else [eos or 0])):
        raise ModelError(f"{generation}: 'eos_token_id' is {eos!r}, expected token ids")
    if config.get("model_type") not in model_types:
        raise ModelError(
            f"{folder}: model type {config.get('model_type')!r}, "
            f"expected one of {', '.join(model_types)}"
        )
    if "quantization_config" in config:
        raise ModelError(
            f"{folder}: quantised weights, "
            "expected the checkpoint that they were made from, in bf16 or fp32"
        )


def check_files(folder):
    """Raises ModelError for an index that names files which are not there, or is not plain."""
    for file in weight_files(folder):
        if not file.exists():
            raise ModelError(
                f"{folder}: cannot be loaded: its index names {file.name}, which is not there"
            )
    index = folder / "model.safetensors.index.json"
    used = index.exists() and not (folder / "model.safetensors").exists()
    if used and not isinstance(read_object(index).get("metadata"), dict):
        raise ModelError(
            f"{index}: no object 'metadata', which transformers expects beside 'weight_map'"
        )


def check_rotary_sections(folder, text):
    """Raises ModelError unless 'mrope_section' splits half a head in three."""
    sections = (text.rope_parameters or {}).get("mrope_section")
    half = head_size(text) // 2
    if not isinstance(sections, (list, tuple)) or len(sections) != 3 or sum(sections) != half:
        raise ModelError(
            f"{folder / 'config.json'}: 'mrope_section' of the rotary embedding is {sections}, "
            f"expected three numbers with the sum {half}, half a head"
        )


def head_size(text):
    """Numbers in a head of the language model. text: transformers' configuration of it, which for
    Qwen3-VL names the size: it need not be the width over the number of heads."""
    named = getattr(text, "head_dim", None)
    return named or text.hidden_size // text.num_attention_heads


def read_object(file):
    """The object in a JSON file. Raises ModelError."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as e:
        raise ModelError(f"{file}: not JSON, or cut off: {e}") from e
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds a {type(content).__name__}, expected an object")
    return content


def weights_dtype(folder):
    """The dtype of the weights on disk; of several, the one that holds all of them exactly."""
    found = set()
    for file in weight_files(folder):
        with safe_open(file, "pt") as f:
            found |= {f.get_slice(name).get_dtype() for name in f.keys()}
    if not found & DTYPES.keys():
        raise ModelError(
            f"{folder}: weights of type {', '.join(sorted(found))}, expected {', '.join(DTYPES)}"
        )
    return reduce(torch.promote_types, {DTYPES[name] for name in found & DTYPES.keys()})


def load_tokenizer(folder):
    """The tokenizer of a model folder.

    Raises DataError, naming the folder: none, or one that cannot be read.
    """
    if not any((Path(folder) / name).exists() for name in ("tokenizer.json", "vocab.json")):
        raise DataError(f"{folder}: no tokenizer (tokenizer.json, or vocab.json and merges.txt)")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as e:  # a native library raises anything for a broken file
        reason = " ".join(str(e).split())[:300]
        raise DataError(
            f"{folder}: the tokenizer cannot be read: {type(e).__name__}: {reason}"
        ) from e


# ---- write


def side_files(folder):
    """The small files beside the weights (config, tokenizer, template) -> their bytes by name."""
    files = [f for pattern in ("*.json", "*.txt", "*.jinja") for f in Path(folder).glob(pattern)]
    not_ours = (".index.json", "state.json")
    return {f.name: f.read_bytes() for f in files if not f.name.endswith(not_ours)}


def write_network(folder, net, weights, dtype, side_files):
    """Writes a folder that transformers and vLLM open.

    weights: {name: tensor}, written as `dtype`.
    """
    once = {}  # embeddings and head may be one tensor, and stay one
    for x in weights.values():
        if x.data_ptr() not in once:
            once[x.data_ptr()] = x.to(dtype).cpu()
    net.save_pretrained(folder, state_dict={n: once[x.data_ptr()] for n, x in weights.items()})
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    for part in (config, *config.values()):
        if isinstance(part, dict) and "dtype" in part:  # save_pretrained wrote the network's
            part["dtype"] = str(dtype).removeprefix("torch.")
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name, content in side_files.items():
        if not (folder / name).exists():
            (folder / name).write_bytes(content)


# ---- tell from others


def fingerprint(folder):
    """Hex digits that tell a checkpoint's weights from others; an adapter's with its base's.

    Reads 64 blocks of 64 KB, evenly spaced, of every file.
    """
    digest = hashlib.blake2b(digest_size=12)
    for file in _files_and_base(folder, ("*.safetensors",)):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as f:
            for i in range(64):
                f.seek(i * max(0, size - 2**16) // 63)
                digest.update(f.read(2**16))
    return digest.hexdigest()


def text_fingerprint(folder):
    """Hex digits that tell the TEXTS of a model folder from others, by their whole content.

    An adapter's are its own and its base's, wherever the base is.
    """
    digest = hashlib.blake2b(digest_size=12)
    for file in _files_and_base(folder, TEXTS):
        content = file.read_bytes()
        if file.name == ADAPTER:
            config = read_object(file) | {"base_model_name_or_path": None}
            content = json.dumps(config, sort_keys=True).encode()
        digest.update(f"{file.name} {len(content)} ".encode() + content)
    return digest.hexdigest()


def _files_and_base(folder, patterns):
    """The files of a folder that match, and then those of its base, if it is an adapter's."""
    files = []
    for part in dict.fromkeys([Path(folder), base_folder(folder)]):
        matches = {file for pattern in patterns for file in part.glob(pattern)}
        files += sorted(file for file in matches if file.is_file())
    return files
