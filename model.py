"""The policy: a Qwen2-VL or Qwen2.5-VL checkpoint that encodes a video once and scores responses that share a prompt.

transformers' classes are the network. Around them, in the order of a training step:
    Policy.load      a folder or hub name -> the policy;  Policy.save writes the same form back
    mrope_positions  the three rotary position ids of every token, by the rule the checkpoints were trained with
    Policy.encode    frames -> visual embeddings, once per step, whatever happens to them afterwards
    Policy.forward   packed rows [prompt | o_1 ... o_G | prompt' ...] -> log-probs of the response tokens, fp32
Everything a loss needs comes out of `forward`: DistributedDataParallel averages gradients of that call only.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForImageTextToText

import attention
import mrsp
from data import Prompt, normalize, patchify
from infra.errors import ModelError
from infra.model_folder import load_tokenizer, local_folder, weight_files, weights_dtype

MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl")
PATCHES_PER_CALL = (
    2**16
)  # of the vision tower: bounds its activations; 2-frame grids are independent, so it may be split


def mrope_positions(ids, media, *, video_token, image_token, merge=2, tokens_per_second=2):
    """M-RoPE ids (temporal, height, width) of a prompt (Qwen2-VL, arXiv 2409.12191, section 2.1; Qwen2.5-VL, 2502.13923).

    Text advances all three ids together. A medium that starts at s gets s + (floor(grid * seconds * tokens_per_second),
    row, column); the text after it starts at the largest id of ALL THREE axes + 1. (transformers 5.23's get_rope_index
    forgets the temporal axis there, which puts the question inside the time range of a video longer than some 10 s.)

    ids: (P,) token ids with one video or image token per visual token.
    media: [((t, h, w) in patches, seconds per 2-frame grid), ...] in order; seconds is ignored for images.
    tokens_per_second: None for Qwen2-VL, whose temporal id is the index of the grid.
    Returns positions (3, P) and the position of the next token. Raises ValueError when visual tokens and media disagree.
    """
    ids = torch.as_tensor(ids)
    visual = (ids == video_token) | (ids == image_token)
    positions, start, i = [], 0, 0
    for (t, h, w), seconds in media:
        n = t * (h // merge) * (w // merge)
        text = int(visual[i:].to(torch.uint8).argmax()) if visual[i:].any() else 0
        if (
            not visual[i + text : i + text + n].all()
            or i + text + n > len(ids)
            or not visual[i:].any()
        ):
            raise ValueError(
                f"a medium of grid {(t, h, w)} wants {n} visual tokens at {i + text} of a prompt of {len(ids)}"
            )
        positions.append(start + torch.arange(text).expand(3, -1))
        start, i = start + text, i + text + n
        per_grid = (
            1.0
            if tokens_per_second is None or ids[i - 1] == image_token
            else seconds * tokens_per_second
        )
        grid = torch.meshgrid(
            (torch.arange(t, dtype=torch.float64) * per_grid).long(),
            torch.arange(h // merge),
            torch.arange(w // merge),
            indexing="ij",
        )
        positions.append(start + torch.stack(grid).flatten(1))
        start = int(positions[-1].max()) + 1
    if visual[i:].any():
        raise ValueError(f"{int(visual[i:].sum())} visual tokens more than the media hold")
    positions.append(start + torch.arange(len(ids) - i).expand(3, -1))
    return torch.cat(positions, dim=1), start + len(ids) - i


class Policy(nn.Module):
    """The policy pi: see the module's first lines. folder: where the checkpoint, its tokenizer and its side files are."""

    def __init__(self, net, folder):
        super().__init__()
        self.net, self.folder = net, Path(folder)
        net.set_attn_implementation(
            {"text_config": attention.NAME, "vision_config": attention.SEGMENTS}
        )
        self.sp, self.embedding_cache = mrsp.UNSHARDED, None  # sequence parallelism: mrsp.py
        self.cuda_graph = False  # of a decode step: rollout.py
        # kept, to be saved beside the weights: by then the folder may be gone (an old checkpoint of the same run)
        files = [f for pattern in ("*.json", "*.txt", "*.jinja") for f in self.folder.glob(pattern)]
        self.side_files = {
            f.name: f.read_bytes()
            for f in files
            if not f.name.endswith((".index.json", "state.json"))
        }
        c = self.config = net.config
        self.text = net.model.language_model
        last = self.text.layers[-1]
        last.__class__ = type("LastLayer", (type(last),), {"forward": last_layer})
        net.model.visual.patch_embed.forward = partial(
            embed_patches, net.model.visual.patch_embed.proj
        )
        self.tokens_per_second = (
            c.vision_config.tokens_per_second if c.model_type == "qwen2_5_vl" else None
        )
        self.merge = c.vision_config.spatial_merge_size
        eos = net.generation_config.eos_token_id  # an id, which may be 0, a list, or None
        eos = c.text_config.eos_token_id if eos is None else eos
        self.eos_ids = [eos] if isinstance(eos, int) else list(eos or [])
        self.saved_dtype = None  # of the weights that save() writes; None: as they are
        # the policy must not speak in pixels: these are impossible in sampling and in scoring alike
        names = (
            "image_token_id",
            "video_token_id",
            "vision_start_token_id",
            "vision_end_token_id",
            "vision_token_id",
        )
        banned = {i for i in (getattr(c, name, None) for name in names) if i is not None}
        self.register_buffer("banned", torch.tensor(sorted(banned)), persistent=False)

    @classmethod
    def load(cls, name, *, dtype=torch.float32, device="cpu", grad_checkpointing=1):
        """Loads a Qwen2-VL or Qwen2.5-VL folder or hub name, with every weight accounted for.

        dtype: of the weights; fp32 master weights for training, computed in bf16 under torch.autocast. `save` writes them in
        the dtype that they have in the folder.
        grad_checkpointing: as in set_grad_checkpointing.
        A response ends at any token that the generation config or the tokenizer names as its end.
        Raises ModelError: no folder, no weights, another architecture; weights that are missing, of another shape, or not
        finite. Raises DataError: no tokenizer. Weights that the architecture does not have are printed.
        """
        folder = local_folder(name)
        try:
            net, saved_dtype = _load_network(folder, dtype)
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
        policy = cls(net, folder).to(device)
        policy.saved_dtype = saved_dtype
        end = load_tokenizer(folder).eos_token_id
        policy.eos_ids += [end] if end is not None and end not in policy.eos_ids else []
        if not policy.eos_ids:
            raise ModelError(
                f"{folder}: neither the generation config nor the tokenizer names the token that ends a response"
            )
        net.generation_config.eos_token_id = list(policy.eos_ids)
        policy.set_grad_checkpointing(grad_checkpointing)
        return policy.eval()

    def save(self, folder, weights=None):
        """Writes a folder that transformers and vLLM open: weights and config, tokenizer and processor files beside.
        weights: by name, where the policy's own are sharded (fsdp.py)."""
        folder, weights = Path(folder), self.net.state_dict() if weights is None else weights
        dtype = self.saved_dtype or self.text.embed_tokens.weight.dtype
        once = {}  # embeddings and head may be one tensor, and stay one
        for x in weights.values():
            if x.data_ptr() not in once:
                once[x.data_ptr()] = x.to(dtype).cpu()
        self.net.save_pretrained(
            folder, state_dict={name: once[x.data_ptr()] for name, x in weights.items()}
        )
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for part in (config, *(part for part in config.values() if isinstance(part, dict))):
            if "dtype" in part:  # save_pretrained writes that of the network
                part["dtype"] = str(dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name, content in self.side_files.items():
            if not (folder / name).exists():
                (folder / name).write_bytes(content)

    @torch.no_grad()
    def is_sound(self):
        """Whether the next-token logits after one token are finite. Every rank of a sharded policy must ask."""
        token = torch.tensor(self.eos_ids[:1])
        logp, _ = self([Prompt(None, token)], [[token]])
        return bool(logp.isfinite().all())

    @property
    def device(self):
        return self.banned.device

    @property
    def compute_dtype(self):
        """What the network computes in: autocast's dtype, or that of the weights."""
        device = self.device.type
        autocast = torch.is_autocast_enabled(device)
        return torch.get_autocast_dtype(device) if autocast else self.text.embed_tokens.weight.dtype

    def set_grad_checkpointing(self, n):
        """Recompute the activations of every n-th layer in the backward pass (in train mode only); 0: keep them all."""
        for layers in (self.net.model.visual.blocks, self.text.layers):
            for i, layer in enumerate(layers):
                layer.gradient_checkpointing = n > 0 and i % n == 0
                layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    def freeze_vision(self):
        """Keeps the vision tower as it is: no gradients, and embeddings of `encode` stay valid for the whole run."""
        self.net.model.visual.requires_grad_(False)

    # ---- prompt -> embeddings and positions

    def encode(self, prompts):
        """Visual embeddings of each prompt's media in order, [(V, D), ...]; V = sum of t * h * w / merge^2, (0, D) for text.

        The work of the sequence-parallel group, once for each medium (mrsp.encode); with gradients under torch.enable_grad.
        """
        return mrsp.encode(self, prompts)

    def encode_grids(self, grids):
        """The vision tower on 2-frame grids [(Media, number of the grid), ...] -> their embeddings in order (V, D).

        Splits and batches at grids are exact up to rounding: the tower attends within one grid only.
        """
        visual, out, i = self.net.model.visual, [], 0
        exact = torch.promote_types(
            visual.dtype, torch.float32
        )  # rounded once, as in training and in transformers' processors
        while i < len(grids):
            end, patches = i + 1, grids[i][0].grid[1] * grids[i][0].grid[2]
            while (
                end < len(grids)
                and patches + (more := grids[end][0].grid[1] * grids[end][0].grid[2])
                <= PATCHES_PER_CALL
            ):
                end, patches = end + 1, patches + more
            runs = []  # (medium, first grid, number of grids) of this call
            for m, g in grids[i:end]:
                if runs and runs[-1][0] is m and runs[-1][1] + runs[-1][2] == g:
                    runs[-1][2] += 1
                else:
                    runs.append([m, g, 1])
            patches = torch.cat([patchify(m.frames_of(g, n))[0] for m, g, n in runs]).to(
                self.device
            )  # bytes
            pixels = normalize(patches.unflatten(1, (3, -1)), exact).flatten(1)
            sizes = torch.tensor([(n, *m.grid[1:]) for m, _, n in runs], device=self.device)
            out.append(visual(pixels.to(visual.dtype), grid_thw=sizes).pooler_output)
            i = end
        if not out:  # no rows, but a gradient of zero where one is wanted: all ranks reduce the same parameters
            nothing = torch.zeros(
                0, self.config.text_config.hidden_size, device=self.device
            ) + _nothing(visual)
            out.append(nothing.to(self.compute_dtype))
        return torch.cat(out)

    def positions(self, prompt):
        """(3, P) M-RoPE ids of a prompt and the id of its first response token."""
        return mrope_positions(
            prompt.ids,
            [(m.grid, m.seconds_per_grid) for m in prompt.media],
            merge=self.merge,
            video_token=self.config.video_token_id,
            image_token=self.config.image_token_id,
            tokens_per_second=self.tokens_per_second,
        )

    def embed(self, ids):
        """Token embeddings (..., D) of token ids; visual tokens are run_row's to replace."""
        return self.text.embed_tokens(ids.to(self.device))

    def run_text(self, x, positions, plan):
        """The language model on embeddings x (N, S, D) at positions (3, N, S): last hidden states (N, S, D)."""
        out = self.text(
            inputs_embeds=x.to(self.compute_dtype),
            position_ids=positions.to(self.device),
            attention_mask=None,
            use_cache=False,
            plan=plan,
        )
        return out.last_hidden_state

    def head(self):
        """The matrix from hidden states to logits (vocabulary, D), in at least fp32."""
        weight = self.net.lm_head.weight
        return weight.to(torch.promote_types(weight.dtype, torch.float32))

    def logits(self, hidden, head):
        """Next-token logits (..., vocabulary) in at least fp32, vision ids impossible. In full precision even under autocast:
        in bf16 a logit is off by up to 0.06, too much for a ratio or a KL. head: what self.head() gave."""
        with torch.autocast(self.device.type, enabled=False):
            logits = F.linear(hidden.to(head.dtype), head)
            return logits.index_fill(-1, self.banned, -1e30)

    # ---- packed groups -> log-probs

    def run_row(self, prompts, responses, visual_embeds, cache=None, first_slot=0):
        """One packed row through the language model -> (hidden states of this rank's tokens (n, D), the row's plan, the
        position after each prompt). responses: lists of token ids, one list a prompt.  cache, first_slot: see PackedRow."""
        ids, visual, positions, lengths, following = [], [], [], [], []
        for prompt, group in zip(prompts, responses, strict=True):
            where, first = self.positions(prompt)
            ids += [prompt.ids, *(r.cpu() for r in group)]
            visual += [
                (prompt.ids == self.config.video_token_id)
                | (prompt.ids == self.config.image_token_id),
                torch.zeros(sum(map(len, group)), dtype=torch.bool),
            ]
            positions += [where, *((first + torch.arange(len(r))).expand(3, -1) for r in group)]
            lengths.append((len(prompt.ids), [len(r) for r in group]))
            following.append(first)
        if self.sp.size == 1:
            plan = attention.PackedRow(lengths, self.device, cache, first_slot)
        else:
            plan = mrsp.ShardedRow(lengths, self.device, self.sp, cache, first_slot)
        ids, visual, positions = (
            torch.cat(parts, dim=-1).to(self.device) for parts in (ids, visual, positions)
        )
        number, visual = (
            (visual.cumsum(0) - 1)[plan.own],
            visual[plan.own],
        )  # of each visual token, and where this rank has one
        x = self.embed(ids[plan.own])
        x = x.masked_scatter(visual[:, None], torch.cat(visual_embeds)[number[visual]].to(x.dtype))
        return self.run_text(x[None], positions[:, None, plan.own], plan)[0], plan, following

    def forward(self, prompts, responses, visual_embeds=None, temperature=1.0):
        """Log-probs of all response tokens of B groups, each prompt run once (shared prefix).

        prompts: B prompts.  responses: B lists of token ids (R_i,).  visual_embeds: what `encode` gave, or None to encode here,
        with gradient. Returns log-probs and entropies (N, R) at `temperature`, N = all responses in order, R = the longest;
        0 beyond a response's end. Every parameter that is trained gets a gradient, of zero where it took no part, and every layer
        runs, so that all ranks gather and reduce the same: also with no groups at all.
        """
        if not prompts:  # one token through the network stands in, and nothing of it is returned
            token = torch.tensor(self.eos_ids[:1])
            return tuple(x[:0].clone() for x in self.forward([Prompt(None, token)], [[token]]))
        if visual_embeds is None:
            visual_embeds = self.encode(prompts)
        logp, entropy = self._score(prompts, responses, visual_embeds, temperature)
        if not any(len(f) for f in visual_embeds) or not any(
            f.requires_grad for f in visual_embeds
        ):
            logp = logp + _nothing(self.net.model.visual)
        lengths = [len(r) for group in responses for r in group]
        pad = lambda x: nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True)
        return pad(logp), pad(entropy)

    def _score(self, prompts, responses, visual_embeds, temperature):
        hidden, plan, _ = self.run_row(prompts, responses, visual_embeds)
        sources, start = [], 0  # of every response token, the token of the row that predicts it
        for prompt, group in zip(prompts, responses):
            last, start = start + len(prompt.ids) - 1, start + len(prompt.ids)
            for r in group:  # token 0 of EVERY response is predicted by the last prompt token, token t by token t - 1
                sources += [torch.tensor([last]), torch.arange(start, start + len(r) - 1)]
                start += len(r)
        sources = torch.cat(sources).to(self.device)
        targets = torch.cat([r.to(self.device) for group in responses for r in group])
        mine, where = plan.find(sources)
        chunk = max(1, attention.LOGITS_PER_CHUNK // self.config.text_config.vocab_size)
        head = self.head()
        out = [
            checkpoint(
                self._log_softmax, h, t, head, temperature, use_reentrant=False
            )  # no logits for the prompt
            for h, t in zip(hidden[where].split(chunk), targets[mine].split(chunk))
        ]
        return tuple(plan.collect(torch.cat(column), sources) for column in zip(*out))

    def _log_softmax(self, hidden, targets, head, temperature):
        logits = (
            self.logits(hidden, head) / temperature
        )  # (chunk, vocabulary), recomputed in the backward pass
        logp = logits.log_softmax(-1)
        entropy = -(logp.detach().exp() * logp.detach()).sum(-1)
        return logp.gather(-1, targets[:, None])[:, 0], entropy


def _read_object(file):
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ModelError(f"{file}: not JSON, or cut off: {e}") from e
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds a {type(content).__name__}, expected an object")
    return content


def _load_network(folder, dtype):
    """transformers' model of a folder with every weight accounted for -> (model, the dtype of the weights in the files)."""
    config, generation = _read_object(folder / "config.json"), folder / "generation_config.json"
    eos = (
        _read_object(generation).get("eos_token_id") if generation.exists() else None
    )  # transformers overlooks a broken file
    if not all(type(i) is int for i in (eos if isinstance(eos, list) else [eos or 0])):
        raise ModelError(f"{generation}: 'eos_token_id' is {eos!r}, expected token ids")
    if config.get("model_type") not in MODEL_TYPES:
        raise ModelError(
            f"{folder}: model type {config.get('model_type')!r}, expected one of {', '.join(MODEL_TYPES)}"
        )
    if "quantization_config" in config:
        raise ModelError(
            f"{folder}: quantised weights, expected the checkpoint that they were made from, in bf16 or fp32"
        )
    for file in weight_files(folder):
        if not file.exists():
            raise ModelError(
                f"{folder}: cannot be loaded: its index names {file.name}, which is not there"
            )
    index = folder / "model.safetensors.index.json"
    if index.exists() and not isinstance(_read_object(index).get("metadata"), dict):
        raise ModelError(
            f"{index}: no object 'metadata', which transformers expects beside 'weight_map'"
        )
    net, info = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
    )  # they are an error here, not there
    for name, found, expected in sorted(info["mismatched_keys"], key=str):
        raise ModelError(f"{folder}: {name} has the shape {list(found)}, expected {list(expected)}")
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"{folder}: {len(missing)} weights are missing, first {missing[0]}")
    for name, p in net.named_parameters():
        if not torch.stack(torch.aminmax(p.detach())).isfinite().all():
            raise ModelError(f"{folder}: {name} is not finite")
    if (extra := sorted(info["unexpected_keys"])) and int(os.environ.get("RANK", 0)) == 0:
        print(
            f"{folder}: {len(extra)} weights have no place in this architecture and are not used, first {extra[0]}",
            file=sys.stderr,
        )
    text = net.config.text_config
    sections, half = (
        (text.rope_parameters or {}).get("mrope_section"),
        text.hidden_size // text.num_attention_heads // 2,
    )
    if not isinstance(sections, (list, tuple)) or len(sections) != 3 or sum(sections) != half:
        raise ModelError(
            f"{folder / 'config.json'}: 'mrope_section' of the rotary embedding is {sections}, expected three "
            f"numbers with the sum {half}, half a head"
        )
    return net, weights_dtype(folder)


def embed_patches(conv, patches):
    """The forward of the vision tower's first layer: its convolution sees each patch once, so it is a matrix product, several
    times as fast. patches (N, 3 * 2 * 14 * 14) -> (N, D)."""
    return F.linear(patches.to(conv.weight.dtype), conv.weight.flatten(1))


def last_layer(layer, hidden, plan=None, **kw):
    """The forward of the last layer of the language model: every token attends, and only those whose hidden state predicts a
    token (plan.reads) go on. hidden (N, S, D) -> (N, reads, D)."""
    attended, _ = layer.self_attn(layer.input_layernorm(hidden), plan=plan, **kw)
    hidden = (hidden + attended)[:, slice(None) if plan is None else plan.reads]
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def _nothing(module):
    """Zero, with a gradient of zero for every parameter that is trained."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return sum(p.flatten()[0] * 0 for p in trained) if trained and torch.is_grad_enabled() else 0
