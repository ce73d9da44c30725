"""The policy: a Qwen-VL that encodes a video once and scores G responses in a row.

transformers' classes are the network. Around them, in the order of a training step:

    Policy.load       a folder or hub name -> the policy;  Policy.save writes the same form back
    Policy.positions  the three rotary position ids of every token (mrope_positions)
    Policy.encode     frames -> visual embeddings; those of a frozen tower serve the whole step
    Policy.forward    packed rows [prompt | o_1 ... o_G | prompt' ...] -> log-probs of the responses

A loss calls the wrapped policy (run.policy), not its methods: DistributedDataParallel averages the
gradients of its own forward only.
"""

from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

import attention
import lora
import mrsp
from data import MEAN, STD, Prompt, normalize, patchify
from infra.embedding_cache import EmbeddingCache, tensor_digest
from infra.errors import ModelError
from infra.families import FAMILIES, read_family
from infra.flash import to_device
from infra.model_folder import (
    base_folder,
    build_network,
    find_weights,
    load_tokenizer,
    local_folder,
    move_buffers,
    read_weights,
    side_files,
    weights_dtype,
    write_network,
)
from infra.tf32 import TF32Linear

MODEL_TYPES = tuple(FAMILIES)
PATCHES_PER_CALL = 2**16  # of the vision tower: bounds its activations
VISION_TOKENS = (
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "vision_token_id",
)


def mrope_positions(ids, media, *, video_token, image_token, merge=2, tokens_per_second=2):
    """M-RoPE ids (temporal, height, width) of a prompt.

    Qwen2-VL, arXiv 2409.12191, section 2.1; Qwen2.5-VL, arXiv 2502.13923.

    Text advances all three ids together. A medium that starts at s gets s + (floor(grid * seconds *
    tokens_per_second), row, column); the text after it starts at the largest id of ALL THREE axes +
    1. (transformers 5.23's get_rope_index forgets the temporal axis there, which puts the question
    inside the time range of a video longer than some 10 s.)

    ids: (P,) token ids with one video or image token per visual token.
    media: [((t, h, w) in patches, seconds per 2-frame grid), ...] in order; seconds is ignored for
    images. tokens_per_second: None if the temporal id is the index of the grid: in Qwen2-VL, and
    in Qwen3-VL, where each grid of a video is a medium of its own, with t = 1. (There,
    get_rope_index has no temporal axis to forget, and gives the same ids.)
    Returns positions (3, P) and the position of the next token. Raises ValueError when visual
    tokens and media disagree.
    """
    ids = torch.as_tensor(ids)
    visual = (ids == video_token) | (ids == image_token)
    positions, start, i = [], 0, 0  # start: the next position; i: the next token
    for (t, h, w), seconds in media:
        n = t * (h // merge) * (w // merge)
        any_left = bool(visual[i:].any())
        text = int(visual[i:].to(torch.uint8).argmax()) if any_left else 0  # tokens before it
        first, last = i + text, i + text + n
        if not any_left or last > len(ids) or not visual[first:last].all():
            raise ValueError(
                f"a medium of grid {(t, h, w)} wants {n} visual tokens at {first} "
                f"of a prompt of {len(ids)}"
            )
        positions.append(start + torch.arange(text).expand(3, -1))
        start, i = start + text, last
        timed = tokens_per_second is not None and ids[first] == video_token
        per_grid = seconds * tokens_per_second if timed else 1.0
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
    """The policy pi. forward: log-probs of packed groups.

    net: transformers' network.  folder: of the checkpoint, its tokenizer and its other files.
    Settings, plain attributes: sp, the ranks that share a row (set by mrsp.share_rows alone);
    embedding_cache, or None; cuda_graph, whether decoding replays CUDA graphs; tf32_head, whether a
    GPU computes logits in TF32; on_tokens, a function of each decode step's tokens
    (rollout.Decoding.run), or None; eos_ids, the tokens that end a response; saved_dtype, of the
    weights that `save` writes, None for the network's; adapter, what lora.py knows of the adapters,
    or None; base_name, what they name as their base.
    """

    def __init__(self, net, folder):
        super().__init__()
        self.net, self.folder, self.config = net, Path(folder), net.config
        self.language_model = net.model.language_model
        self.sp, self.embedding_cache, self.cuda_graph = mrsp.ONE_RANK, None, False
        self.tf32_head, self.on_tokens = True, None
        self.saved_dtype, self.adapter, self.base_name = None, None, str(folder)
        self.side_files = side_files(folder)  # read now: an old checkpoint may be deleted later
        implementations = {"text_config": attention.NAME, "vision_config": attention.SEGMENTS}
        net.set_attn_implementation(implementations)
        visual = net.model.visual
        visual.patch_embed = PatchEmbed(visual.patch_embed.proj)
        vision = self.config.vision_config
        self.merge = vision.spatial_merge_size
        self.family = read_family(folder, self.config.to_dict())
        self.tokens_per_second = vision.tokens_per_second if self.family.time_ids else None
        # a visual token has an embedding, and one more for each layer that sees it again
        self.visual_width = self.config.text_config.hidden_size * (1 + self.family.deepstack)
        eos = net.generation_config.eos_token_id  # an id, which may be 0, a list, or None
        eos = getattr(self.config.text_config, "eos_token_id", None) if eos is None else eos
        self.eos_ids = [eos] if isinstance(eos, int) else list(eos or [])
        # a response must not contain pixels: these are impossible when sampled and when scored
        ids = {getattr(self.config, name, None) for name in VISION_TOKENS} - {None}
        vocabulary = self.config.text_config.vocab_size
        if max(ids, default=0) >= vocabulary:
            raise ModelError(
                f"{folder}: config.json leaves out or misnames a vision token: ids {sorted(ids)}, "
                f"expected below {vocabulary}, the size of the vocabulary"
            )
        self.register_buffer("banned", torch.tensor(sorted(ids)), persistent=False)

    # ---- load and save

    @classmethod
    def load(
        cls,
        name,
        *,
        dtype=torch.float32,
        device="cpu",
        grad_checkpointing=1,
        cuda_graph=False,
        embedding_cache=None,
        merged=False,
        prepare=None,
    ):
        """Loads a folder or hub name of a supported family, with every weight accounted for.

        Of an adapter folder (lora.py), loads the base and the adapters, all frozen.
        dtype: of the weights; fp32 master weights for training compute in bf16 under
        torch.autocast. `save` writes them in the dtype that they have in the folder.
        grad_checkpointing: see set_grad_checkpointing.
        cuda_graph: replay decode steps as CUDA graphs, on a CUDA device.
        embedding_cache: (folder, gigabytes) for the embeddings of a frozen vision tower.
        merged: add adapters to the weights of their base instead of keeping them beside.
        prepare: a function that may add adapters to the policy, freeze it and shard it before its
        weights are read, so that each rank reads only its own part of them.
        A response ends at any end token of the generation config or the tokenizer.

        Raises ModelError: no folder, no weights, another architecture; weights that are missing, of
        another shape, or not finite. Raises DataError: no tokenizer. Prints weights that the
        architecture does not have.
        """
        found = local_folder(name)
        folder = base_folder(found)
        net = build_network(folder, dtype, MODEL_TYPES)
        weights = find_weights(folder, net)
        policy = cls(net, folder)
        move_buffers(policy, device)
        policy.saved_dtype = weights_dtype(folder)
        policy.base_name = str(folder.resolve()) if Path(name).exists() else str(name)
        if found != folder:
            lora.load(policy, found)
        changes = lora.take_off(policy) if merged else {}
        if prepare:
            prepare(policy)
        read_weights(folder, net, weights, device, changes)
        policy._add_end_of(load_tokenizer(folder))
        policy.set_grad_checkpointing(grad_checkpointing)
        policy.cuda_graph = cuda_graph and policy.device.type == "cuda"
        if embedding_cache:
            policy.embedding_cache = EmbeddingCache(*embedding_cache, policy.tower_fingerprint())
        return policy.eval()

    def _add_end_of(self, tokenizer):
        """Adds the tokenizer's end token to those that end a response."""
        end = tokenizer.eos_token_id
        if end is not None and end not in self.eos_ids:
            self.eos_ids.append(end)
        if not self.eos_ids:
            raise ModelError(
                f"{self.folder}: neither the generation config nor the tokenizer "
                "names the token that ends a response"
            )
        self.net.generation_config.eos_token_id = list(self.eos_ids)

    def save(self, folder, weights=None):
        """Writes a folder that transformers and vLLM open, tokenizer and processor included.

        With adapters, an adapter folder that names its base.
        weights: `saved_parameters`, where the policy's own are sharded (infra/fsdp.py).
        """
        if weights is None:
            weights = {name: p.detach() for name, p in self.saved_parameters().items()}
        if self.adapter:
            lora.write(folder, self.adapter, weights)
            return
        dtype = self.saved_dtype or self.language_model.embed_tokens.weight.dtype
        write_network(Path(folder), self.net, weights, dtype, self.side_files)

    def saved_parameters(self):
        """What `save` writes, by name: the adapters if there are any, else the whole network."""
        parameters = self.net.state_dict(keep_vars=True)
        if not self.adapter:
            return parameters
        return {name: p for name, p in parameters.items() if name.endswith((".lora_A", ".lora_B"))}

    def set_grad_checkpointing(self, n):
        """In train mode, recompute every n-th layer's activations in the backward pass; 0: none."""
        for layers in (self.net.model.visual.blocks, self.language_model.layers):
            for i, layer in enumerate(layers):
                layer.gradient_checkpointing = n > 0 and i % n == 0
                layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    def freeze_vision(self):
        """Freezes the vision tower, so that embeddings of `encode` stay valid for the whole run."""
        self.net.model.visual.requires_grad_(False)

    def tower_fingerprint(self):
        """What embeddings depend on besides the medium: dtype, device, weights, normalisation."""
        visual = self.net.model.visual
        pixels = (self.family.mean, self.family.std)
        known = (
            [] if pixels == (MEAN, STD) else [pixels]
        )  # older entries do not name the usual ones
        return [str(visual.dtype), self.device.type, tensor_digest(*visual.parameters()), *known]

    @torch.no_grad()
    def is_sound(self):
        """Whether the logits after one token are finite. All ranks of a sharded policy must ask."""
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
        weights = self.language_model.embed_tokens.weight
        return torch.get_autocast_dtype(device) if autocast else weights.dtype

    # ---- positions

    def positions(self, prompt):
        """M-RoPE ids (3, P) of a prompt, and the id of its first response token."""
        media = []
        for m in prompt.media:
            media += [(grid, m.seconds_per_grid) for grid in self.family.shown_as(m)]
        return mrope_positions(
            prompt.ids,
            media,
            merge=self.merge,
            video_token=self.config.video_token_id,
            image_token=self.config.image_token_id,
            tokens_per_second=self.tokens_per_second,
        )

    # ---- encode

    def encode(self, prompts):
        """Visual embeddings of each prompt's media in order -> [(V, D), ...].

        V is the sum of t * h * w / merge^2; (0, D) for a text prompt. With deepstack a row has
        `visual_width` numbers, (1 + deepstack) * D: the embedding, then what each of the first
        layers adds. So whatever moves rows (cache, ranks, shuffles) moves all of it. With gradient
        under torch.enable_grad. Each medium is encoded once, by the ranks that share rows together
        (mrsp.encode).
        """
        return mrsp.encode(self, prompts)

    def encode_grids(self, grids):
        """The vision tower on 2-frame grids [(Media, index of the grid), ...] -> embeddings (V, D).

        The grids of a medium stand together, in order. The tower attends within a grid only, so
        that calling it on any split between grids gives the same, up to rounding.
        """
        if not grids:  # no rows, but a gradient of zero: all ranks reduce the same parameters
            none = torch.zeros(0, self.visual_width, device=self.device)
            return (none + zero_of(self.net.model.visual)).to(self.compute_dtype)
        return torch.cat([self._run_tower(call) for call in split_grids(grids, PATCHES_PER_CALL)])

    def _run_tower(self, grids):
        visual = self.net.model.visual
        frames, sizes = [], []  # of each medium's run of grids
        for media, run in groupby(grids, key=itemgetter(0)):
            indices = [index for _, index in run]
            frames.append(media.frames_of(indices[0], len(indices)))
            sizes.append((len(indices), *media.grid[1:]))
        family = self.family
        patches = torch.cat([patchify(x, family.patch)[0] for x in frames]).to(self.device)  # bytes
        # rounded once, as in transformers' processors
        exact = torch.promote_types(visual.dtype, torch.float32)
        channels = patches.unflatten(1, (3, -1))
        pixels = normalize(channels, exact, family.mean, family.std).flatten(1).to(visual.dtype)
        sizes = torch.tensor(sizes)
        out = visual(pixels, grid_thw=sizes, **tower_indices(visual, sizes, self.device))
        again = out.deepstack_features if family.deepstack else []  # (V, D) each
        return torch.cat([out.pooler_output, *again], dim=1)

    # ---- the language model

    def embed(self, ids):
        """Token embeddings (..., D) of token ids; run_row puts in the visual ones."""
        return self.language_model.embed_tokens(ids.to(self.device))

    def run_layers(self, x, positions, plan, **deepstack):
        """Embeddings x (N, S, D) at positions (3, N, S) -> last hidden states (N, S, D): fp32 where
        the last norm's weight is (full training without --fsdp), else in compute_dtype.

        deepstack: what transformers' Qwen3-VL adds after its first layers, and to which tokens.
        """
        out = self.language_model(
            inputs_embeds=x.to(self.compute_dtype),
            position_ids=positions.to(self.device),
            attention_mask=None,
            use_cache=False,
            plan=plan,  # reaches attention.shared_prefix_attention in every layer
            **deepstack,
        )
        return out.last_hidden_state

    def lm_head_weight(self):
        """The matrix from hidden states to logits (vocabulary, D), in at least fp32; with --fsdp on
        a GPU, a copy of weights that were gathered in bf16."""
        weight = self.net.lm_head.weight
        return weight.to(torch.promote_types(weight.dtype, torch.float32))

    def logits(self, hidden, head):
        """Hidden states (..., D) -> next-token logits (..., vocabulary), vision tokens impossible.

        head: from `lm_head_weight`. In at least fp32, even under autocast: a bf16 logit is off by
        up to 0.06, too much for a ratio or a KL. On a GPU, its products are TF32 (infra/tf32.py).
        """
        with torch.autocast(self.device.type, enabled=False):
            linear = TF32Linear.apply if self.tf32_head else F.linear
            logits = linear(hidden.to(head.dtype), head)
            return logits.index_fill(-1, self.banned, -1e30)

    def run_row(self, prompts, responses, visual_embeds, cache=None, first_prompt=0):
        """One packed row [prompt | o_1 ... o_G | prompt' ...] through the language model.

        responses: for each prompt a list of token ids (R_i,), on the CPU.  visual_embeds: of each
        prompt (V, D). cache, first_prompt: see PackedRow.
        Returns the hidden states of the tokens that this rank holds (n, D), the row's plan, and the
        position that follows each prompt.
        """
        lengths = row_lengths(prompts, responses)
        if self.sp.size == 1:
            plan = attention.PackedRow(lengths, self.device, cache, first_prompt)
        else:
            plan = mrsp.ShardedRow(lengths, self.device, self.sp, cache, first_prompt)
        ids, positions, visual, following = [], [], [], []
        for prompt, group in zip(prompts, responses, strict=True):
            prompt_positions, first = self.positions(prompt)
            ids.append(prompt.ids)
            positions.append(prompt_positions)
            visual.append(self._is_visual(prompt.ids))
            for r in group:  # every response starts where the prompt ends
                ids.append(r)
                positions.append((first + torch.arange(len(r))).expand(3, -1))
                visual.append(torch.zeros(len(r), dtype=torch.bool))
            following.append(first)
        ids = torch.cat(ids)[plan.held]  # (n,)
        positions = torch.cat(positions, dim=1)[:, plan.held]  # (3, n)
        visual = torch.cat(visual)  # (S,)
        embed_rows = visual.cumsum(0) - 1  # (S,): the row of visual_embeds for each visual token
        places = visual[plan.held].nonzero()[:, 0]  # where visual tokens are among those held
        embed_rows = embed_rows[plan.held][places]
        moved = to_device([ids, positions, places, embed_rows], self.device)
        ids, positions, places, embed_rows = moved
        x = self.embed(ids)  # (n, D)
        embeds = torch.cat(visual_embeds)[embed_rows].to(x.dtype)  # (n visual, visual_width)
        embeds, *again = embeds.split(x.shape[1], dim=1)  # (n visual, D) each
        x = x.index_put((places,), embeds)  # index_copy would keep embeds for its backward pass
        deepstack = {}
        if again:
            # transformers adds the features to hidden[mask]. Index 0 instead of a mask is the whole
            # row: no shape depends on the numbers of a mask, so nobody waits for a GPU.
            row = torch.zeros(1, dtype=torch.long, device=x.device)
            again = [torch.zeros_like(x).index_put((places,), e)[None] for e in again]  # (1, n, D)
            deepstack = dict(visual_pos_masks=row, deepstack_visual_embeds=again)
        hidden = self.run_layers(x[None], positions[:, None], plan, **deepstack)[0]
        return hidden, plan, following

    def _is_visual(self, ids):
        return (ids == self.config.video_token_id) | (ids == self.config.image_token_id)

    # ---- log-probs

    def forward(self, prompts, responses, visual_embeds=None, temperature=1.0):
        """Log-probs of all response tokens of B groups, each prompt once for its G responses.

        prompts: B.  responses: B lists of token ids (R_i,), tensors or arrays.  visual_embeds: what
        `encode` gave; None: encode here, with gradient.
        Returns log-probs and entropies (N, R) at `temperature`: N = all responses in order, R = the
        longest, 0 after a response's end.

        Every trained parameter gets a gradient, zero where it had no part, and every layer runs,
        even without groups: all ranks must gather and reduce the same.
        """
        if not prompts:  # one token runs instead; its log-prob is not returned
            token = torch.tensor(self.eos_ids[:1])
            logp, entropy = self.forward([Prompt(None, token)], [[token]])
            return logp[:0].clone(), entropy[:0].clone()
        if visual_embeds is None:
            visual_embeds = self.encode(prompts)
        responses = [[torch.as_tensor(r).cpu() for r in group] for group in responses]
        logp, entropy = self._score(prompts, responses, visual_embeds, temperature)  # (T,) each
        # DDP and FSDP wait for a gradient of every trained parameter
        if not any(len(x) and x.requires_grad for x in visual_embeds):
            logp = logp + zero_of(self.net.model.visual)
        lengths = [len(r) for group in responses for r in group]
        logp, entropy = logp.split(lengths), entropy.split(lengths)
        pad = nn.utils.rnn.pad_sequence
        return pad(logp, batch_first=True), pad(entropy, batch_first=True)

    def _score(self, prompts, responses, visual_embeds, temperature):
        """Log-probs and entropies of all response tokens in order, (T,) each."""
        hidden, plan, _ = self.run_row(prompts, responses, visual_embeds)
        sources = attention.predictors(row_lengths(prompts, responses))  # (T,)
        targets = torch.cat([r for group in responses for r in group])  # (T,)
        which, where = plan.find(sources)  # this rank's
        where, targets = to_device([where, targets[which]], self.device)
        size = max(1, attention.LOGITS_PER_CHUNK // self.config.text_config.vocab_size)
        head, logps, entropies = self.lm_head_weight(), [], []
        for h, t in zip(hidden[where].split(size), targets.split(size)):
            logp, entropy = checkpoint(
                self._score_chunk, h, t, head, temperature, use_reentrant=False
            )
            logps.append(logp)
            entropies.append(entropy)
        logp, entropy = torch.cat(logps), torch.cat(entropies)  # (T,) each, of this rank's tokens
        return plan.from_all_ranks(logp, sources), plan.from_all_ranks(entropy, sources)

    def _score_chunk(self, hidden, targets, head, temperature):
        """Hidden states (n, D) and the tokens they predict (n,) -> log-probs, entropies (n,)."""
        logits = self.logits(hidden, head) / temperature  # (n, vocabulary), recomputed in backward
        logp = logits.log_softmax(-1)
        detached = logp.detach()
        entropy = -(detached.exp() * detached).sum(-1)
        return logp.gather(-1, targets[:, None])[:, 0], entropy


class PatchEmbed(nn.Module):
    """The vision tower's first layer.

    Its convolution sees each patch once, so it is a matrix product, and faster as one.
    """

    def __init__(self, proj):
        super().__init__()
        self.proj = proj  # the convolution, under the name that checkpoints have for it

    def forward(self, patches):
        """Patches (N, 3 * 2 * patch * patch) -> (N, D)."""
        weight = self.proj.weight
        return F.linear(patches.to(weight.dtype), weight.flatten(1), self.proj.bias)


def tower_indices(visual, sizes, device):
    """What a vision tower of transformers indexes with -> keywords of its forward.

    It would compute them itself from the grid sizes (media, 3). Here they move to the GPU as one.
    Sizes and bounds of segments stay on the CPU: shapes depend on them, so reading them from a GPU
    would make the host wait.
    """
    merge = visual.spatial_merge_size
    indices, others = {"position_ids": get_vision_position_ids(sizes, merge)}, {}
    if hasattr(visual, "window_size"):  # Qwen2.5-VL
        indices["window_index"], others["cu_window_seqlens"] = get_vision_window_index(
            sizes, merge, visual.window_size, visual.patch_size
        )
    if hasattr(visual, "pos_embed"):  # Qwen3-VL: learned positions, resampled to the grid
        indices["interp_indices"], weights = get_vision_interpolation_indices_and_weights(
            sizes,
            visual.num_grid_per_side,
            mode=visual.interpolation_mode,
            align_corners=visual.interpolation_align_corners,
            spatial_merge_size=merge,
        )
        others["interp_weights"] = weights.to(device)
    moved = to_device(list(indices.values()), device)
    return dict(zip(indices, moved)) | others


def split_grids(grids, limit):
    """Splits 2-frame grids into calls of at most `limit` patches; a larger grid gets its own."""
    calls, patches = [], limit
    for media, index in grids:
        n = media.grid[1] * media.grid[2]
        if patches + n > limit:
            calls.append([])
            patches = 0
        calls[-1].append((media, index))
        patches += n
    return calls


def row_lengths(prompts, responses):
    """The lengths of a packed row, as in attention.visible: [(P, [R_1, ..., R_G]), ...]."""
    return [
        (len(prompt.ids), [len(r) for r in group])
        for prompt, group in zip(prompts, responses, strict=True)
    ]


def zero_of(module):
    """Zero, with a gradient of zero for every trained parameter of the module."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return sum(p.flatten()[0] * 0 for p in trained) if trained and torch.is_grad_enabled() else 0
