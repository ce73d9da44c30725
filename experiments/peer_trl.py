"""TRL's side of experiments/peer.py: GRPOTrainer on the prompts, settings and rewards of train.py.

TRL 1.16.0 samples from a prompt's video but trains on the prompt without it: the pixels reach
`generate`, and the log-prob pass (`_get_per_token_logps_and_entropies`) has no argument for them.
It does train on images. So a clip is handed over as an image with more than one time step, which
transformers' model takes as it takes a video.
"""

import shutil
import time
from types import SimpleNamespace

import torch
from datasets import Dataset
from transformers import (
    AutoModelForImageTextToText,
    BatchFeature,
    ProcessorMixin,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer
from trl.extras import profiling

import rewards
from data import Loader, PromptBuilder, normalize, patchify
from infra.errors import DataError
from infra.flags import MEDIA
from infra.frames import MERGE
from infra.model_folder import load_tokenizer, local_folder, side_files, write_network
from model import VISION_TOKENS, mrope_positions


class PromptProcessor(ProcessorMixin):
    """A processor that knows all prompts: an image is the number of one of them.

    It gives the prompt's token ids, those of a video as those of an image, and its pixels.
    """

    def __init__(self, tokenizer, prompts, config, family):
        self.tokenizer, self.prompts, self.family = tokenizer, prompts, family
        self.image_token = config.image_token_id
        self.visual = torch.tensor([config.image_token_id, config.video_token_id])
        self.tokenizer.padding_side = "left"
        self.chat_template = tokenizer.chat_template
        self.image_processor = SimpleNamespace(merge_size=MERGE)

    def __call__(self, images, text=None, padding=False, **_):
        ids, kinds, pixels, grids = [], [], [], []
        for [number] in images:
            prompt = self.prompts[int(number)]
            [media] = prompt.media
            visual = torch.isin(prompt.ids, self.visual)
            ids.append(prompt.ids.masked_fill(visual, self.image_token).tolist())
            kinds.append(visual.int().tolist())
            mean, std = self.family.mean, self.family.std
            patches, grid = patchify(normalize(media.frames, torch.float32, mean, std))
            pixels.append(patches)
            grids.append(grid)
        masks = [[1] * len(x) for x in ids]
        if padding:
            longest = max(map(len, ids))
            pad = self.tokenizer.pad_token_id
            ids, kinds, masks = (
                left(ids, pad, longest),
                left(kinds, 0, longest),
                left(masks, 0, longest),
            )
        out = {"input_ids": ids, "attention_mask": masks, "mm_token_type_ids": kinds}
        out |= {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.tensor(grids)}
        return BatchFeature(out)

    def apply_chat_template(self, conversation, tokenize=False, **_):
        """The prompts that the conversations name. As text nothing: TRL hands it back unread."""
        if not tokenize:
            return ""
        return self([[part["image"] for part in message["content"]] for [message] in conversation])

    def batch_decode(self, *args, **kwargs):
        return self.tokenizer.batch_decode(*args, **kwargs)


def left(rows, value, longest):
    """Rows of numbers -> one tensor, padded on the left."""
    return torch.tensor([[value] * (longest - len(row)) + row for row in rows])


def positions_like_ours(config):
    """A get_rope_index that gives model.mrope_positions: transformers' own differs (see there)."""
    per_grid = config.vision_config.tokens_per_second  # of clips with a 2-frame grid each second
    token = config.image_token_id

    def get_rope_index(input_ids, _=None, image_grid_thw=None, *, attention_mask=None, **__):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        positions = torch.zeros(3, *input_ids.shape, dtype=torch.long)
        ahead = []  # how far the next position is from the number of tokens
        for b, grid in enumerate(image_grid_thw.tolist()):
            row, seen = input_ids[b], mask[b].bool()
            positions[:, b, seen], following = mrope_positions(
                row[seen],
                [(grid, 1.0)],
                video_token=token,
                image_token=token,
                tokens_per_second=per_grid,
            )
            ahead.append(following - int(seen.sum()))
        return positions, torch.tensor(ahead)[:, None]

    return get_rope_index


def load_prompts(args, samples, folder):
    """The prompts of all steps, in the order in which train.py draws them -> (prompts, family)."""
    media = {name: getattr(args, name) for name in (*MEDIA, "max_frames")}
    builder = PromptBuilder(folder, **media)
    loader = Loader(samples, builder, prompts=args.prompts, seed=args.seed)
    loaded, prompts = {}, []
    for step in range(args.steps):
        for i in range(args.prompts):
            sample = loader.sample(step, i)
            if sample.id not in loaded:
                loaded[sample.id] = builder(sample)
            prompts.append(loaded[sample.id])
    for p in loaded.values():
        if [m.seconds_per_grid for m in p.media if m.kind == "video"] not in ([], [1.0]):
            raise DataError(f"{p.sample.name}: expected a video of two frames a second")
    return prompts, builder.family


def settings(args, config, rows, equal, out):
    """train.py's flags -> GRPOConfig. rows: of a micro-batch. equal: no end of a turn is drawn."""
    banned = sorted({getattr(config, name, None) for name in VISION_TOKENS} - {None})
    generation = {"suppress_tokens": banned}
    if equal:
        generation["min_new_tokens"] = args.max_new
    return GRPOConfig(
        output_dir=str(out),
        max_steps=args.steps,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=args.prompts * args.group // rows,
        num_generations=args.group,
        max_completion_length=args.max_new,
        learning_rate=args.lr,
        lr_scheduler_type="constant",
        warmup_steps=0,
        adam_beta2=args.beta2,
        weight_decay=args.weight_decay,
        max_grad_norm=args.clip_grad,
        loss_type="grpo",  # a mean over each response, as --average sequence
        scale_rewards="group",
        epsilon=args.clip_low,
        beta=args.beta,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=0,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        shuffle_dataset=False,
        seed=args.seed,
        generation_kwargs=generation,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )


def reward_functions(prompts, drawn):
    """The rules of rewards.py as TRL calls them, or `drawn` in their place."""

    accuracy_reward = drawn or rewards.accuracy_reward

    def accuracy(completions, number, **_):
        texts = [message["content"] for [message] in completions]
        return [accuracy_reward(text, prompts[i].sample) for i, text in zip(number, texts)]

    def form(completions, **_):
        return [rewards.format_reward(message["content"]) for [message] in completions]

    return [accuracy] if drawn else [accuracy, form]


class Turns(TrainerCallback):
    """Waits for a message before each step, and answers it with the step's figures."""

    def __init__(self, pipe, figures):
        self.pipe, self.figures, self.spent = pipe, figures, {}

    def wait(self):
        self.pipe.recv()
        self.spent.clear()
        self.began = time.process_time()

    def on_train_begin(self, args, state, control, **_):
        self.wait()

    def on_log(self, args, state, control, logs=None, **_):
        """After each step. Sampling is TRL's "generate"; preparing holds that, the processor and
        the rewards; what is left of a step is training."""
        if "reward" not in logs:  # the summary at the end
            return
        step = time.process_time() - self.began
        spent = {name.split(".", 1)[1]: took for name, took in self.spent.items()}
        trained = step - spent["_prepare_inputs"]
        rollout = spent["transformers.generate"]
        self.pipe.send(self.figures(step, rollout, trained, float(logs["reward"])))
        if state.global_step < state.max_steps:
            self.wait()


def run(args, samples, rows, drawn, out, pipe, figures, clock):
    """Trains for args.steps, a step for each message, and writes the network to `out`/end.

    drawn: a reward in place of the rules', None for those.  figures: see peer.figures.  clock: in
    place of the module `time`, for TRL's own stopwatches.
    """
    profiling.time = clock
    folder = local_folder(args.model)
    prompts, family = load_prompts(args, samples, folder)
    net = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    net.model.get_rope_index = positions_like_ours(net.config)
    if not args.train_vision:
        net.model.visual.requires_grad_(False)
    rows_of_data = []
    for i in range(len(prompts)):
        turn = {"role": "user", "content": [{"type": "image", "image": str(i)}]}
        rows_of_data.append({"prompt": [turn], "number": i})
    turns = Turns(pipe, figures)

    def note(context, took):  # what one of TRL's own stopwatches says
        turns.spent[context.name] = turns.spent.get(context.name, 0.0) + took

    profiling.ProfilingContext._log_metrics = note
    trainer = GRPOTrainer(
        model=net,
        reward_funcs=reward_functions(prompts, drawn),
        args=settings(args, net.config, rows, bool(drawn), out),
        train_dataset=Dataset.from_list(rows_of_data),
        processing_class=PromptProcessor(load_tokenizer(folder), prompts, net.config, family),
        callbacks=[turns],
    )
    trainer.train()
    weights = {name: p.detach() for name, p in net.state_dict().items()}
    shutil.rmtree(out / "end", ignore_errors=True)
    write_network(out / "end", net, weights, torch.float32, side_files(folder))
