"""Speed, side by side: one GRPO step the plain way, and with each idea of this code added one by one.

    python bench.py                                    a 17 M model on this machine's CPU, 2 minutes
    python bench.py --shape 3b --frames 16 64 256      a true shape with random weights, for a GPU
    python bench.py --model DIR --json results/x.json  any checkpoint; the figures also as JSON

The plain way is what a trainer does that calls transformers: `generate` with G copies of the prompt, G full rows in every
log-prob pass, and the video encoded again for every row of every pass. Then, one after the other:
    encode once      the vision tower once a step, whatever happens to the embeddings        (model.Policy.encode)
    shared prefill   the prompt once through the language model, not G times                  (rollout.prefill)
    shared decode    G rows that read one copy of the prompt's keys and values                (attention.DecodeCache)
    packed rows      [prompt | o_1 ... o_G] in the reference and the training pass            (attention.PackedRow)
A phase is timed both ways in turn, `--repeat` times, and the median taken; a line of the table is the sum of its phases. All
responses have their full length, no end of turn is taken: both ways do the same work.
"""

import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import attention
from data import Media, Prompt, Sample, normalize, patchify
from model import Policy
from rollout import generate
from run import flag_parser

SHAPES = {  # hidden, intermediate, layers, heads, K/V heads, vocabulary; vision hidden, intermediate, layers, heads
    "tiny": (384, 1024, 8, 6, 2, 4096, 192, 384, 4, 4),
    "3b": (2048, 11008, 36, 16, 2, 151936, 1280, 3420, 32, 16),
    "7b": (3584, 18944, 28, 28, 4, 152064, 1280, 3420, 32, 16),
}
TOWER_RUNS = 3  # of the plain way, each on G copies: in the rollout, the reference and the training pass
PHASES = ("encode", "prefill", "decode", "reference", "train", "optimizer")


def parse_args(argv=None):
    """The flags."""
    p, add, flag = flag_parser(__doc__)
    g = p.add_argument_group("what is measured")
    add(g, "shape", "tiny", "of the random model: tiny is 17 M parameters, 3b and 7b are Qwen2.5-VL's", choices=SHAPES)
    add(g, "model", None, "a checkpoint instead")
    g.add_argument("--frames", type=int, nargs="+", default=[16, 64, 128], help="of the video (default: 16 64 128)")
    add(g, "height", 112, "pixels of a frame")
    add(g, "width", 112, "pixels of a frame")
    add(g, "text", 32, "tokens of the question")
    add(g, "group", 8, "G")
    add(g, "new", 32, "tokens of every response")
    add(g, "repeat", 3, "measurements of each phase, each way")
    add(g, "json", None, "file for the figures")
    return p.parse_args(argv)


# ---- what is measured

def random_policy(shape, device, dtype):
    """A Qwen2.5-VL of a true or small shape with random weights, its tower frozen."""
    D, inner, layers, heads, kv, vocabulary, v_D, v_inner, v_layers, v_heads = SHAPES[shape]
    d = D // heads
    t, h = d // 8, 3 * d // 16
    tokens = dict(zip(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"), range(4)))
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=vocabulary, hidden_size=D, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=kv, initializer_range=D**-0.5, max_position_embeddings=2**18,
            bos_token_id=4, eos_token_id=4, pad_token_id=4,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [t, h, d // 2 - t - h]}),
        vision_config=dict(
            hidden_size=v_D, intermediate_size=v_inner, depth=v_layers, num_heads=v_heads, out_hidden_size=D, tokens_per_second=2,
            fullatt_block_indexes=list(range(7, v_layers, 8)) or [v_layers - 1]), **tokens, tie_word_embeddings=shape != "7b")
    torch.set_default_dtype(dtype)
    with device:
        net = Qwen2_5_VLForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    net.generation_config.eos_token_id = 4
    return Policy(net, "random weights")  # a folder that is not there: no files to save beside


def video_prompt(policy, frames, height, width, text):
    """A prompt of random pixels and words, half a second a frame."""
    media = Media(torch.randint(256, (frames, 3, height, width), dtype=torch.uint8), "video", 1.0)
    words = lambda n: torch.randint(8, policy.config.text_config.vocab_size, (n,))
    ids = torch.cat([words(text // 2), torch.full((media.tokens,), policy.config.video_token_id), words(text - text // 2)])
    return Prompt(Sample("-", "", [], "free-form", "video", "", ""), ids, [media])


class Plain:
    """One step's phases as transformers does them."""

    def __init__(self, policy, prompt, responses):
        self.policy, self.net, (media,) = policy, policy.net, prompt.media
        self.G, device = len(responses), policy.device
        patches, grid = patchify(normalize(media.frames.to(device), policy.net.model.visual.dtype))
        self.video = dict(pixel_values_videos=patches, video_grid_thw=torch.tensor([grid], device=device))
        self.copies = {name: x.repeat(self.G, 1) for name, x in self.video.items()}
        self.ids = prompt.ids[None].to(device)
        self.responses = torch.stack(responses).to(device)
        where, following = policy.positions(prompt)
        R = self.responses.shape[1]
        where = torch.cat([where, (following + torch.arange(R)).expand(3, -1)], dim=1)
        self.positions = where[:, None].expand(-1, self.G, -1).to(device)

    def encode(self):
        with torch.no_grad():
            self.net.model.visual(self.copies["pixel_values_videos"], grid_thw=self.copies["video_grid_thw"])

    def rollout(self, new):
        self.net.generate(self.ids, **self.video, num_return_sequences=self.G, do_sample=True, max_new_tokens=new,
                          min_new_tokens=new, use_cache=True, top_k=0, mm_token_type_ids=self.kinds(self.ids))

    def kinds(self, ids):
        return 2 * (ids == self.net.config.video_token_id).int()

    def distribution(self):
        """(G, R, vocabulary) log-probs of every token of every response, and of those not taken."""
        rows = torch.cat([self.ids.expand(self.G, -1), self.responses], dim=1)
        R = self.responses.shape[1]
        out = self.net(rows, **self.copies, position_ids=self.positions, logits_to_keep=R + 1, use_cache=False,
                       mm_token_type_ids=self.kinds(rows))
        logits = out.logits[:, :-1].float().index_fill(-1, self.policy.banned, -1e30)
        return logits.log_softmax(-1)

    def log_probs(self):
        return self.distribution().gather(-1, self.responses[..., None])[..., 0]


class Ours:
    """The same phases as this code does them."""

    def __init__(self, policy, prompt, responses):
        self.policy, self.prompt, self.responses = policy, prompt, responses
        self.encode()

    def encode(self):
        with torch.no_grad():
            self.features = self.policy.encode([self.prompt])

    def rollout(self, new):
        generate(self.policy, [self.prompt], len(self.responses), max_new=new, features=self.features)

    def log_probs(self):
        return self.policy([self.prompt], [self.responses], self.features)[0]


# ---- measuring

def clock(f, device):
    """Seconds of f(), the GPU's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    f()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def use(policy, way):
    """Sets the attention functions of a way."""
    text, vision = ("sdpa", "sdpa") if isinstance(way, Plain) else (attention.NAME, attention.SEGMENTS)
    policy.net.set_attn_implementation({"text_config": text, "vision_config": vision})


def phases(way, new, optimizer, device):
    """Seconds of each phase of a step, and peak memory in GB (0 on a CPU)."""
    def train():
        way.policy.train()
        way.log_probs().sum().backward()

    def reference():
        way.policy.eval()
        with torch.no_grad():
            way.log_probs()

    plain = isinstance(way, Plain)
    way.policy.eval()
    use(way.policy, way)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    encode, first, whole = (clock(f, device) for f in (way.encode, lambda: way.rollout(1), lambda: way.rollout(new)))
    seconds = [encode, first, whole - first, clock(reference, device), clock(train, device), clock(optimizer.step, device)]
    optimizer.zero_grad()
    if plain:  # the tower runs again in the rollout, and in every pass
        for i in (1, 3, 4):
            seconds[i] -= encode
        seconds[0] *= TOWER_RUNS
    return dict(zip(PHASES, seconds)), torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0


def rates(device, dtype):
    """What the machine gives: (matrix product FLOP/s, copy bytes/s), best of ten."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    x = torch.zeros(2**30 if device.type == "cuda" else 2**26, device=device, dtype=torch.uint8)
    best = lambda f: min(clock(f, device) for _ in range(10))
    return 2 * n**3 / best(lambda: a @ b), 2 * x.numel() / best(x.clone)


def measure(policy, frames, args, device, matrix, copy, dtype):
    """Both ways at one number of frames -> the figures."""
    prompt = video_prompt(policy, frames, args.height, args.width, args.text)
    vocabulary = policy.config.text_config.vocab_size
    responses = [torch.randint(8, vocabulary, (args.new,)) for _ in range(args.group)]
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        ways = {"plain": Plain(policy, prompt, responses), "ours": Ours(policy, prompt, responses)}
        seen = {name: [] for name in ways}
        for i in range(args.repeat + 1):
            for name, way in ways.items():
                result = phases(way, args.new, optimizer, device)
                if i:  # the first warms up
                    seen[name].append(result)
        log_probs = {}
        for name, way in ways.items():
            policy.eval()
            use(policy, way)
            with torch.no_grad():
                log_probs[name] = way.log_probs().float()
    median = {name: {p: statistics.median(s[p] for s, _ in runs) for p in PHASES} for name, runs in seen.items()}
    rows, now = [("plain", dict(median["plain"]))], dict(median["plain"])
    for name, changed in (("+ encode once", ["encode"]), ("+ shared prefill", ["prefill"]), ("+ shared decode", ["decode"]),
                          ("+ packed rows", ["reference", "train"])):
        now = now | {p: median["ours"][p] for p in changed}
        rows.append((name, dict(now)))
    c, P, G, R = policy.config.text_config, len(prompt.ids), args.group, args.new
    text = sum(p.numel() for p in policy.text.layers.parameters()) + c.vocab_size * c.hidden_size
    size = torch.finfo(dtype).bits // 8
    kv = 2 * c.num_hidden_layers * c.num_key_value_heads * (c.hidden_size // c.num_attention_heads) * size
    floor = ((R - 1) * (text * size + P * kv) + G * kv * R * R / 2) / copy  # weights and prompt once a step, own keys and values
    layers = sum(p.numel() for p in policy.text.layers.parameters())
    attended = 4 * c.num_hidden_layers * c.hidden_size * (P * P / 2 + G * R * (P + R / 2))
    useful = 3 * (2 * layers * (P + G * R) + attended + 2 * c.vocab_size * c.hidden_size * G * R)  # forward 1, backward 2
    again = 1 / 3 * useful  # every layer's forward once more, for its activations
    return dict(frames=frames, prompt_tokens=P, rows=[dict(name=n, **x) for n, x in rows],
                difference=float((log_probs["plain"] - log_probs["ours"]).abs().max()),
                memory={name: max(m for _, m in runs) for name, runs in seen.items()},
                train_utilisation=useful / median["ours"]["train"] / matrix,
                train_utilisation_with_recomputation=(useful + again) / median["ours"]["train"] / matrix,
                decode_floor_share=floor / median["ours"]["decode"])


def table(figures, args):
    """The figures of one number of frames as text."""
    rows, f = figures["rows"], figures
    total = lambda row: sum(row[p] for p in PHASES)
    out = [f"\n{f['frames']} frames, {f['prompt_tokens']} prompt tokens, {args.group} responses of {args.new} tokens; seconds",
           f"{'':18}" + "".join(f"{p:>11}" for p in PHASES) + "       step    faster   tokens/s"]
    for row in rows:
        out.append(f"{row['name']:18}" + "".join(f"{row[p]:11.3f}" for p in PHASES)
                   + f"{total(row):11.3f}{total(rows[0]) / total(row):9.2f}x{args.group * args.new / total(row):10.0f}")
    once = rows[0] | {"encode": rows[0]["encode"] / TOWER_RUNS}  # the rollout's own share
    rollout = [sum(row[p] for p in PHASES[:3]) for row in (once, rows[-1])]
    memory = ", ".join(f"{name} {x:.1f}" for name, x in f["memory"].items())
    out.append(f"training pass {rows[0]['train'] / rows[-1]['train']:.1f}x, rollout "
               f"{rollout[0] / rollout[1]:.1f}x; log-probs differ by "
               f"{f['difference']:.1e} at most; training at {f['train_utilisation']:.0%} of the measured matrix rate "
               f"({f['train_utilisation_with_recomputation']:.0%} with recomputation); decode at {f['decode_floor_share']:.0%} "
               "of the copy rate" + (f"; peak memory in GB: {memory}" if any(f["memory"].values()) else ""))
    return "\n".join(out)


def main(argv=None):
    """The command line."""
    args = parse_args(argv)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    policy = Policy.load(args.model, device=device) if args.model else random_policy(args.shape, device, torch.float32)
    policy.freeze_vision()
    policy.eos_ids = []
    threads = f"{platform.machine()}, {torch.get_num_threads()} threads"
    machine = torch.cuda.get_device_name() if device.type == "cuda" else threads
    matrix, copy = rates(device, dtype)
    head = dict(model=args.model or args.shape, parameters=sum(p.numel() for p in policy.parameters()), machine=machine,
                torch=torch.__version__, matrix_flops=matrix, copy_bytes=copy)
    print(f"{head['model']}: {head['parameters'] / 1e6:.1f} M parameters; {machine}, torch {torch.__version__}: matrix product "
          f"{matrix / 1e9:.0f} GFLOP/s, copy {copy / 1e9:.1f} GB/s")
    results = []
    for frames in args.frames:
        results.append(measure(policy, frames, args, device, matrix, copy, dtype))
        print(table(results[-1], args), flush=True)
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(head | {"flags": vars(args), "results": results}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
