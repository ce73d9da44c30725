"""mrsp.py: ranks that share a row compute what one rank computes, and no stale embedding is used.

Gradients of ranks that share rows: test_train.py.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import data
import model
import mrsp
import tgrpo
import toy
import train
from conftest import ROOT, Script, flags, run
from infra import embedding_cache
from infra.model_folder import newest_checkpoint
from infra.ranks import seed

slow = pytest.mark.slow


# ---- ranks that share rows


@pytest.fixture(scope="module")
def results(made_once, world):
    """What tests/mrsp_worker.py computes on one to four ranks."""

    def make(folder):
        folder.mkdir()
        for ranks in (1, 2, 3, 4):
            run("tests/mrsp_worker.py", world, folder / f"of{ranks}", ranks=ranks)

    out = made_once("mrsp", make)
    return {
        ranks: [torch.load(out / f"of{ranks}.{r}") for r in range(ranks)] for ranks in (1, 2, 3, 4)
    }


def assert_close(a, b, atol=2e-6):  # RMSNorm and RoPE are fp32 in transformers
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


@slow
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_group_computes_what_one_rank_computes(results, ranks):
    """Videos of several shapes, images and text in one row, groups of unequal size.

    No number of ranks divides the visual tokens.
    """
    (one,) = results[1]
    for many in results[ranks]:
        for a, b in zip(many["visual_embeds"], one["visual_embeds"], strict=True):
            assert_close(a, b, atol=1e-12)
        for name in (
            "logp",
            "entropy",
            "one token",
            "greedy logps",
            "sampled logps",
            "sampled entropies",
            "greedy scored",
        ):
            assert_close(many[name], one[name])
        for name in ("greedy", "sampled"):
            assert [len(g) for g in many[name]] == [5] * 7
            assert many[f"{name} truncated"] == one[f"{name} truncated"]
            for g, h in zip(many[name], one[name]):
                assert [x.tolist() for x in g] == [x.tolist() for x in h]


@slow
@pytest.mark.parametrize("ranks", [1, 3])
def test_mistakes_of_the_release(results, ranks):
    """Four that LongVILA-R1's released code makes.

    Embeddings of another video after re-ordering; videos mixed in a row; the first response token's
    logits taken elsewhere; positions of the sampler and of the scorer that differ.
    """
    for r in results[ranks]:
        for a, b in zip(r["visual_embeds"], r["reversed"], strict=True):
            assert torch.allclose(a, b, atol=1e-12)
        assert not torch.allclose(r["visual_embeds"][3], r["visual_embeds"][4], atol=1e-3)
        lengths = [len(response) for group in r["greedy"] for response in group]
        scored = torch.cat([x[:n] for x, n in zip(r["greedy scored"], lengths)])
        assert_close(scored, r["greedy logps"])


@slow
def test_a_row_is_the_rows_of_its_groups(results):
    """A group's log-probs do not depend on what else is in the row, whoever has its tokens.

    The last group's row is text alone."""
    for ranks in (1, 2, 3, 4):
        r, i = results[ranks][0], 0
        for alone in r["alone"]:
            n, longest = alone.shape
            assert_close(r["logp"][i : i + n, :longest], alone)
            i += n
        assert i == len(r["logp"])


@slow
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_video_is_encoded_once_by_the_group_together(results, ranks):
    """13 grids of 28 x 28 and 6 of 84 x 84 pixels; the sixth prompt's video is the first's."""
    shares = [r["patches"] for r in results[ranks]]
    assert sum(shares) == 13 * 4 + 6 * 36
    assert max(shares) <= sum(shares) / ranks + 36  # a grid is never split


# ---- dealing


def test_every_token_is_dealt_once_for_any_lengths_and_any_size():
    random = np.random.default_rng(0)
    for _ in range(300):
        size = int(random.integers(1, 9))
        lengths = [
            (int(random.integers(1, 60)), random.integers(0, 9, random.integers(0, 5)).tolist())
            for _ in range(3)
        ]
        held = [mrsp.tokens_of_share(share).tolist() for share in mrsp.shares_of_row(lengths, size)]
        assert sorted(sum(held, [])) == list(range(sum(P + sum(R) for P, R in lengths)))
        counts = [len(tokens) for tokens in held]
        assert max(counts) - min(counts) <= 3 * len(lengths)


def test_the_work_is_balanced():
    """Attention of a long prompt: each rank within 2 % of its share.

    Contiguous slices would give the last of 4 ranks 1.75 of its share.
    """
    P, size = 4001, 4
    fair = P * (P + 1) / 2 / size  # pairs of a query and a key
    for share in mrsp.shares_of_row([(P, [])], size):
        pairs = int((mrsp.tokens_of_share(share) + 1).sum())
        assert 0.98 < pairs / fair < 1.02


def test_grids_are_dealt_by_cost():
    assert mrsp.share_out([1] * 8, 2) == [0] * 4 + [1] * 4  # one long video is split
    assert mrsp.share_out([4, 1, 1, 1, 1], 2) == [0, 1, 1, 1, 1]  # a big one here, small ones there
    assert mrsp.share_out([5], 3) == [1] and mrsp.share_out([], 3) == []


def test_few_prompts_are_loaded_in_different_groups():
    def order(world, sp="auto"):
        return sorted(range(world), key=lambda rank: mrsp.turn(rank, world, sp))

    assert order(24, "8")[:4] == [0, 8, 16, 1] and order(4, "1") == order(4, "4") == [0, 1, 2, 3]
    assert (
        order(8) == [0, 4, 2, 6, 1, 5, 3, 7]
        and order(6)[:2] == [0, 3]
        and order(3) == [0, 1, 2]
        and order(1) == [0]
    )


# ---- the embedding cache


@pytest.fixture()
def media(world):
    sample = next(s for s in data.load_samples(world / "train.json") if s.data_type == "video")
    return data.load_media(sample, min_pixels=784)


def cache(folder, gigabytes=1.0, tower="digest"):
    return embedding_cache.EmbeddingCache(folder, gigabytes, tower)


def test_an_entry_comes_back_bit_for_bit_and_only_for_its_own_key(tmp_path, media):
    x = torch.randn(8, 16, dtype=torch.bfloat16)
    assert cache(tmp_path).get(media) is None
    cache(tmp_path).put(media, x)
    assert (
        torch.equal(cache(tmp_path).get(media), x) and cache(tmp_path).get(media).dtype == x.dtype
    )
    assert cache(tmp_path, tower="other weights").get(media) is None
    assert cache(tmp_path).get(replace(media, key=None)) is None


def test_another_file_other_frames_or_another_size_is_another_entry(tmp_path, world):
    path = tmp_path / "x.y4m"
    sample = next(s for s in data.load_samples(world / "train.json") if s.data_type == "video")
    shutil.copyfile(sample.path, path)
    sample = replace(sample, path=str(path))

    def load(**how):
        return data.load_media(sample, **{"min_pixels": 784, **how}).key

    first = load()
    assert load() == first
    assert len({first, load(max_frames=8), load(min_pixels=5000)}) == 3
    stat = path.stat()
    os.utime(
        path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1)
    )  # replaced by a file of the same size
    assert load() != first


def test_frames_in_another_order_have_no_entry(world, prompts):
    """T-GRPO's shuffled frames must not be answered with the embedding of the ordered ones."""
    args = SimpleNamespace(shuffle="frame", seed=0)
    asked = [s.prompt for s in tgrpo.shuffle_prompts(list(enumerate(prompts)), [None] * 6, 0, args)]
    assert len(asked) == 4 and all(p.media[0].key for p in prompts)
    assert all(p.media[0].key is None for p in asked)
    order = tgrpo.permutation(16, seed(0, 0, 0, "order 0"))
    expected = tgrpo.reorder(prompts[0].media[0].frames, order)
    assert torch.equal(asked[0].media[0].frames, expected)


def test_a_torn_or_wrong_entry_is_none(tmp_path, media, world):
    x = torch.randn(8, 16)
    for spoil in (
        lambda f: f.write_bytes(f.read_bytes()[:-20]),  # truncated
        lambda f: f.write_bytes(f.read_bytes()[:-4] + b"\0\1\2\3"),  # torn in the middle of a write
        lambda f: f.write_bytes(b""),
        lambda f: shutil.copyfile(other, f),  # another video under this name
    ):
        sample = [s for s in data.load_samples(world / "train.json") if s.data_type == "video"][-1]
        cache(tmp_path / "other").put(data.load_media(sample, min_pixels=784), torch.randn(8, 16))
        (other,) = (tmp_path / "other").glob("*.safetensors")
        cache(tmp_path / "a").put(media, x)
        (entry,) = (tmp_path / "a").glob("*.safetensors")
        spoil(entry)
        assert cache(tmp_path / "a").get(media) is None
        cache(tmp_path / "a").put(media, x)
        assert torch.equal(cache(tmp_path / "a").get(media), x)


def test_the_bound_is_kept_and_what_was_used_longest_ago_goes_first(tmp_path, media):
    named = [replace(media, key=f"video {i}") for i in range(5)]
    x = torch.randn(8, 1000)  # 32 kB
    store = cache(tmp_path, gigabytes=100e3 / 1e9)
    for m in named[:3]:
        store.put(m, x)
        time.sleep(0.01)
    assert store.get(named[0]) is not None  # used again
    store.put(named[3], x)
    assert [store.get(m) is not None for m in named] == [True, False, True, True, False]
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) <= 100e3


@slow
def test_two_processes_write_at_once(tmp_path):
    """Each puts and gets the same few entries, of which only some fit: no wrong one, no error."""
    code = """
import random, sys, torch
from data import Media
from infra.embedding_cache import EmbeddingCache
store = EmbeddingCache(sys.argv[1], 70e3 / 1e9, "t")
hits = 0
for i in range(200):
    n = random.randrange(4)
    m = Media(torch.zeros(16, 3, 28, 28), "video", key=f"video {n}")
    x = store.get(m)
    assert x is None or torch.equal(x, torch.full((8, 1000), float(n)))
    hits += x is not None
    store.put(m, torch.full((8, 1000), float(n)))
print(hits)
"""
    scripts = [Script("-c", code, tmp_path) for _ in range(2)]
    for script in scripts:
        output = script.output(timeout=120)
        assert script.process.returncode == 0, output
        assert int(output) > 0
    assert not list(tmp_path.glob("*.partial"))


def test_features_with_and_without_the_cache_are_the_same(tmp_path, policy, prompts, text_prompts):
    """Also of text, which has none and no entry."""
    grids, prompts = [], [*prompts, text_prompts[0]]
    policy.net.model.visual.register_forward_pre_hook(
        lambda module, args, kwargs: grids.append(int(kwargs["grid_thw"][:, 0].sum())),
        with_kwargs=True,
    )
    with torch.no_grad():
        plain = policy.encode(prompts)
        policy.embedding_cache = cache(tmp_path)
        cold, count = policy.encode(prompts), sum(grids)
        warm = policy.encode(prompts[::-1])[::-1]
    assert sum(grids) == count  # nothing was encoded again
    for a, b, c in zip(plain, cold, warm, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert plain[-1].shape == (0, policy.config.text_config.hidden_size)
    assert len(entries(tmp_path)) == 6
    policy.encode(prompts[:1])  # with gradient, for a tower that is trained: not from the cache
    assert sum(grids) > count


def test_a_policy_makes_its_cache_by_its_tower(tmp_path, world, prompts):
    """Another tower's embeddings are not found: the fingerprint is of its weights and dtype."""

    def load():
        policy = model.Policy.load(world / "model", embedding_cache=(tmp_path / "cache", 1.0))
        with torch.no_grad():
            return policy, policy.encode(prompts)

    first, embeds = load()
    files = entries(tmp_path / "cache")
    again, found = load()
    assert files and entries(tmp_path / "cache") == files
    assert all(torch.equal(a, b) for a, b in zip(embeds, found, strict=True))
    digest = embedding_cache.tensor_digest(*first.net.model.visual.parameters())
    assert again.embedding_cache.tower == ["torch.float32", "cpu", digest]
    again.net.model.visual.merger.ln_q.weight.data.mul_(2)
    assert again.tower_fingerprint() != first.tower_fingerprint()


# ---- how many ranks share a row


def test_policies_share_rows_only_inside():
    reference, sp = SimpleNamespace(sp=mrsp.ONE_RANK), mrsp.SequenceParallel(2, 1)
    with pytest.raises(KeyError), mrsp.share_rows(sp, None, reference):
        assert reference.sp is sp
        raise KeyError
    assert reference.sp is mrsp.ONE_RANK


def test_auto_takes_as_few_ranks_as_fit_and_leaves_none_idle(world):
    policy = model.Policy.load(world / "model", dtype=torch.float64)
    args = SimpleNamespace(algo="grpo", sp="auto", group=8, row_tokens=1000, fsdp=False)

    def choose(lengths):
        return mrsp.smallest_team(policy, None, lengths, 128, 3e9, args, 8)

    assert [choose([100] * n)[0] for n in (8, 2, 1, 0)] == [1, 4, 8, 8]
    sizes = [choose([int(2 ** (n / 4))] * 8)[0] for n in range(40, 120)]
    assert sizes == sorted(sizes) and set(sizes) == {1, 2, 4, 8}
    text = choose([100] * 8)[1]
    assert "weights, moments" in text and "gradients" in text
    args.sp = "2"
    assert choose([100] * 8)[0] == 2


def test_full_training_of_a_7b_fits_8_gpus_of_80_gb_when_it_is_sharded(monkeypatch):
    """Qwen2.5-VL-7B's sizes, the recipe's flags, the longest prompts of 16 frames, a reference."""
    text = dict(
        hidden_size=3584,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
    )
    vision = dict(
        depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=3584
    )
    config = Qwen2_5_VLConfig(
        text_config=text | dict(intermediate_size=18944), vision_config=vision
    )
    with torch.device("meta"):
        net = Qwen2_5_VLForConditionalGeneration(config)
    assert sum(p.numel() for p in net.parameters()) == 8_292_166_656
    # the estimate for a GPU, where there is none
    monkeypatch.setattr(model.Policy, "device", torch.device("cuda"))
    policy = model.Policy(net, ROOT / "configs")
    policy.set_grad_checkpointing(1)
    args = train.parse_args([f"@{ROOT}/configs/video_r1_7b.txt"])
    about = ([2500] * 8, 8 * 768, 80e9, args, 8)
    size, text = mrsp.smallest_team(policy, policy, *about)
    assert size == 1
    # 12 bytes / 8; 2 / 8, and a tower; all weights in bf16
    assert "weights, moments 12.44 + reference 3.26 + " in text
    assert "in decoding" in text and "gathered weights 16.58" in text
    assert 35 < float(text.split(" GB of ")[0].split()[-1]) < 36
    args.fsdp = False
    _, text = mrsp.smallest_team(policy, None, *about)
    assert "weights, moments 99.51 + gradients 33.17 + copies in bf16 16.58 + " in text


# ---- whole runs


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def frozen_tower(command):
    return [x for x in command if x != "--train_vision"]


def entries(folder):
    """The entries of an embedding cache, and which files they are."""
    return {file.name: file.stat().st_ino for file in folder.glob("*.safetensors")}


@slow
def test_a_run_on_a_group_is_the_run_on_one_rank_with_and_without_the_cache(
    tmp_path, world, cold_start
):
    common = dict(steps=2, model=cold_start, prompts=4, beta=0.1)
    run(*frozen_tower(flags(world, tmp_path / "one", "tgrpo", **common)))
    common["embedding_cache"] = tmp_path / "cache"
    for i, sp in enumerate((2, "auto")):
        before = entries(tmp_path / "cache")
        command = flags(world, tmp_path / f"two{i}", "tgrpo", sp=sp, **common)
        out = run(*frozen_tower(command), ranks=2)
        assert "sequence parallelism: " in out and ("layer inputs" in out or "prompts' K/V" in out)
        for a, b in zip(log(tmp_path / "one"), log(tmp_path / f"two{i}"), strict=True):
            for key in (
                "accuracy",
                "response_length",
                "loss",
                "kl",
                "entropy",
                "frames",
                "zero_std_groups",
                "shuffled_accuracy",
            ):
                assert a.get(key) == pytest.approx(b.get(key), abs=1e-4), key
            assert (a["sp"], b["sp"]) == (1, 1 if i else 2)
    assert entries(tmp_path / "cache") == before  # the second run found every embedding


@slow
def test_a_cold_start_uses_the_cache_and_another_tower_does_not(tmp_path, world, cold_start):
    def steps(name, start):
        cache = tmp_path / "cache"
        command = flags(world, tmp_path / name, "sft", steps=2, model=start, embedding_cache=cache)
        run(*frozen_tower(command))
        return entries(cache)

    first = steps("a", cold_start)
    assert first and steps("b", cold_start) == first
    assert log(tmp_path / "a")[-1]["loss"] == log(tmp_path / "b")[-1]["loss"]
    other = steps("c", world / "model")  # another checkpoint: other weights of the tower
    assert len(other) == 2 * len(first) and first.items() <= other.items()


@pytest.mark.parametrize(
    "change, message",
    [
        (["--sp", "3"], "--sp 3: expected auto or a divisor of the 1 ranks"),
        (["--embedding_cache", "x"], "--embedding_cache: expected a frozen vision tower"),
    ],
)
def test_flags_that_do_not_go_together(tmp_path, world, capsys, change, message):
    with pytest.raises(SystemExit):
        train.parse_args([*map(str, flags(world, tmp_path / "a", steps=1)[1:]), *change])
    assert message in " ".join(capsys.readouterr().err.split())


@slow
def test_a_rank_that_dies_ends_the_run_which_resumes_on_another_number_of_ranks(
    tmp_path, world, cold_start
):
    out = tmp_path / "a"
    command = list(map(str, flags(world, out, steps=400, model=cold_start, sp=2, save_every=1)))
    script = Script(*command, ranks=2, torchrun=True)
    script.wait_until((out / "checkpoint-000002").exists)
    os.kill(script.pids()[-1], signal.SIGKILL)
    printed = script.output(timeout=90)  # bounded
    assert script.process.returncode and "exitcode  : -9" in printed
    reached = int(newest_checkpoint(out).name.split("-")[1])
    command = [x for x in command if x not in ("--sp", "2")]
    command[command.index("--steps") + 1] = str(reached + 1)
    run(*command, "--resume")
    assert log(out)[-1]["step"] == reached + 1 and log(out)[-1]["grad_norm"] > 0


@slow
def test_an_hour_of_video_on_two_ranks(tmp_path, world, cold_start):
    """3,600 frames through decode, encode, prefill, both of T-GRPO's rollouts and a step."""
    rng = np.random.default_rng(0)
    frames = np.repeat(rng.integers(0, 255, (3600, 1, 1, 3), np.uint8), 28, 1).repeat(28, 2)
    toy.write_y4m(tmp_path / "hour.y4m", frames, fps=1)
    record = json.loads((world / "train.json").read_text())[0] | {
        "path": "hour.y4m",
        "data_type": "video",
    }
    (tmp_path / "hour.json").write_text(json.dumps([record]))
    extra = dict(
        data=tmp_path / "hour.json",
        model=cold_start,
        sp=2,
        fps=1,
        max_frames=3600,
        prompts=1,
        steps=1,
        beta=0.01,
    )
    run(*flags(world, tmp_path / "a", "tgrpo", **extra), ranks=2)
    (entry,) = log(tmp_path / "a")
    assert entry["frames"] == 3600 and entry["trained_groups"] == 1 and "shuffled_accuracy" in entry
    assert entry["skipped_samples"] == 0 and entry["mismatch"] < 1e-4


@slow
def test_decoding_an_hour_holds_resized_frames_only(tmp_path):
    """The worker's peak memory over 3,600 frames of 112 x 112, shown at 28 x 28 (8 MB).

    It is far below the 135 MB of the whole.
    """
    frame = b"FRAME\n" + bytes(3 * 112 * 112)
    header = b"YUV4MPEG2 W112 H112 F1:1 Ip A1:1 C444\n"
    (tmp_path / "hour.y4m").write_bytes(header + 3600 * frame)
    code = """
import resource, sys
from infra import video
how = dict(target_fps=1, min_frames=4, min_pixels=784, max_pixels=784)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000

video.decode(sys.argv[1], max_frames=64, **how)
before = peak()
reply, frames = video.decode(sys.argv[1], max_frames=3600, **how)
print(len(reply["indices"]), sum(frame.nbytes for frame in frames) / 1e6, peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "hour.y4m"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    n, megabytes, grown = map(float, done.stdout.split())
    assert n == 3600 and megabytes == pytest.approx(8.5, abs=0.1) and grown < 50
