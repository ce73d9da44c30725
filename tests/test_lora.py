"""lora.py: an adapter changes nothing until it is trained, and what it learns can be merged.

Gradients on several ranks: test_train.py.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

import lora
import model
import mrsp
import train
from conftest import ROOT, flags, run
from data import Prompt
from infra.errors import ModelError
from infra.model_folder import base_folder, fingerprint, text_fingerprint
from infra.optimizer import make_optimizer, update
from rollout import generate

slow = pytest.mark.slow


@pytest.fixture()
def responses(prompts):
    """Two responses to each prompt, of unequal lengths."""
    random = torch.Generator().manual_seed(0)
    return [[torch.randint(70, 300, (n,), generator=random) for n in (5, 3)] for _ in prompts]


def train_steps(policy, prompts, responses, steps=3):
    """Some steps of train.py's own AdamW that raise the log-probs of the responses."""
    args = train.parse_args("--model m --data d --lr 1e-2 --weight_decay 0.1".split())
    optimizer = make_optimizer(policy, args)
    policy.train()
    for step in range(steps):
        logp, _ = policy(prompts, responses)
        (-logp.mean()).backward()
        update(policy, optimizer, step, args)
    policy.eval()


@torch.no_grad()
def scores(policy, prompts, responses):
    return policy(prompts, responses)[0]


# ---- one layer


def test_a_layer_and_its_gradients_by_hand():
    """y = W x + b + s B A x. With g = dL/dy: dL/dA = s B^T g x^T, dL/dB = s g (A x)^T, dL/dx."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(5, 4, dtype=torch.float64).requires_grad_(False)
    layer = lora.LoraLinear(linear, rank=2, scale=1.5)
    A, B = torch.randn(2, 5, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    layer.lora_A.data.copy_(A)
    layer.lora_B.data.copy_(B)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)  # three tokens
    g = torch.randn(3, 4, dtype=torch.float64)
    y = layer(x)
    W, b = linear.weight, linear.bias
    torch.testing.assert_close(y, x @ (W + 1.5 * B @ A).T + b)
    (y * g).sum().backward()
    torch.testing.assert_close(layer.lora_A.grad, 1.5 * B.T @ g.T @ x.detach())
    torch.testing.assert_close(layer.lora_B.grad, 1.5 * g.T @ (x.detach() @ A.T))
    torch.testing.assert_close(x.grad, g @ (W + 1.5 * B @ A))
    assert layer.weight is W and layer.weight.grad is None
    torch.testing.assert_close(layer.merged(W), W + 1.5 * B @ A)


def test_adapters_stay_in_fp32_beside_half_weights():
    """Both of a forward in bf16 and of one under autocast, the layer's output is bf16."""
    linear = torch.nn.Linear(8, 8, dtype=torch.bfloat16)
    layer = lora.LoraLinear(linear, rank=2, scale=2.0)
    layer.lora_A.data.normal_()
    layer.lora_B.data.normal_()
    x = torch.randn(3, 8).bfloat16()
    y = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = layer(x.float())
    assert y.dtype == under_autocast.dtype == torch.bfloat16 and torch.equal(y, under_autocast)
    y.sum().backward()
    assert layer.lora_A.grad.dtype == layer.lora_B.dtype == torch.float32
    exact = x.double() @ (linear.weight + 2 * layer.lora_B @ layer.lora_A).double().T
    torch.testing.assert_close(y.double(), exact + linear.bias, atol=0.5, rtol=0.02)


def test_merging_into_half_weights_rounds_once():
    """1 + 2^-9 is 1 in bf16: an adapter's change of half a step is lost, one of a whole is kept."""
    linear = torch.nn.Linear(2, 1, bias=False, dtype=torch.bfloat16)
    linear.weight.data.fill_(1.0)
    layer = lora.LoraLinear(linear, rank=1, scale=1.0)
    layer.lora_A.data.copy_(torch.tensor([[2.0**-9, 2.0**-7]]))
    layer.lora_B.data.fill_(1.0)
    merged = layer.merged(layer.weight)
    assert merged.dtype == torch.bfloat16 and merged.tolist() == [[1.0, 1 + 2.0**-7]]


# ---- a policy


def test_where_the_adapters_are_and_how_they_begin(policy):
    """q, k, v, o, gate, up, down of every layer of the language model; A as PEFT draws it, B 0."""
    lora.add(policy, rank=4, alpha=8, seed=3)
    layers = lora.adapters(policy.net)
    ends = [f"self_attn.{x}_proj" for x in "qkvo"]
    ends += [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    expected = {f"model.language_model.layers.{i}.{end}" for i in range(4) for end in ends}
    assert set(layers) == expected
    for layer in layers.values():
        bound = layer.in_features**-0.5  # kaiming uniform with a = sqrt(5)
        assert layer.lora_A.shape == (4, layer.in_features) and layer.scale == 2
        assert 0.9 * bound < layer.lora_A.abs().max() <= bound
        assert not layer.lora_B.any()
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * len(expected)
    assert all(name.endswith((".lora_A", ".lora_B")) for name in trained)
    again = model.Policy.load(policy.folder, dtype=torch.float64)
    lora.add(again, rank=4, alpha=8, seed=3)  # as another rank does
    for name, p in again.named_parameters():
        assert torch.equal(p, policy.get_parameter(name))


def test_a_new_adapter_is_the_base_bit_for_bit(policy, prompts, responses):
    before = scores(policy, prompts, responses)
    sampled = generate(policy, prompts[:2], 3, max_new=8)
    lora.add(policy, rank=4, alpha=8)
    assert torch.equal(scores(policy, prompts, responses), before)
    for a, b in zip(generate(policy, prompts[:2], 3, max_new=8), sampled):
        assert all(map(torch.equal, a.responses, b.responses))
        assert all(map(torch.equal, a.logps, b.logps))


def test_the_reference_is_the_policy_with_its_adapters_off(policy, prompts, responses):
    """Exactly, after training; and the weights beside the adapters are as they were."""
    before = scores(policy, prompts, responses)
    weights = {name: p.clone() for name, p in policy.named_parameters()}
    lora.add(policy, rank=4, alpha=8)
    train_steps(policy, prompts, responses)
    after = scores(policy, prompts, responses)
    assert (after - before).abs().max() > 0.1
    with pytest.raises(KeyError), lora.off(policy):
        assert torch.equal(scores(policy, prompts, responses), before)
        raise KeyError
    assert torch.equal(scores(policy, prompts, responses), after)
    for name, x in weights.items():
        assert torch.equal(policy.get_parameter(name), x)
    sampled = generate(policy, prompts[:2], 3, max_new=8)  # the sampler has the adapters too
    scored = scores(policy, prompts[:2], [g.responses for g in sampled])
    lengths = [len(r) for g in sampled for r in g.responses]
    scored = torch.cat([x[:n] for x, n in zip(scored, lengths)])
    logps = torch.cat([x for g in sampled for x in g.logps])
    torch.testing.assert_close(scored, logps, atol=2e-6, rtol=0)


def test_a_reference_pass_between_forward_and_backward_changes_no_gradient(world, prompts):
    """With recomputed layers: the backward pass recomputes them with the adapters on."""
    tokens = [[torch.arange(80, 86)] for _ in prompts[:3]]

    def gradients(n, with_reference):
        policy = model.Policy.load(world / "model", dtype=torch.float64, grad_checkpointing=n)
        lora.add(policy, rank=4, alpha=8)
        for i, layer in enumerate(lora.adapters(policy).values()):
            layer.lora_B.data.fill_(0.01 * (i % 5 - 2))
        policy.train()
        logp, _ = policy(prompts[:3], tokens)
        if with_reference:
            with torch.no_grad(), lora.off(policy):
                assert (policy(prompts[:3], tokens)[0] - logp).abs().max() > 1e-3
        logp.sum().backward()
        return [p.grad for p in policy.parameters() if p.requires_grad]

    plain = gradients(0, False)
    assert max(g.abs().max() for g in plain) > 1e-2
    for a, b in zip(plain, gradients(1, True), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


def test_merged_equals_beside_in_memory_and_on_disk(tmp_path, world, prompts, responses, capsys):
    policy = model.Policy.load(world / "model")  # fp32
    lora.add(policy, rank=4, alpha=8)
    train_steps(policy, prompts, responses, steps=1)
    beside = scores(policy, prompts, responses)
    policy.save(tmp_path / "adapter")
    assert sorted(x.name for x in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    again = model.Policy.load(tmp_path / "adapter")
    assert torch.equal(scores(again, prompts, responses), beside)
    assert not any(p.requires_grad for p in again.parameters())
    lora.main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")])
    merged = model.Policy.load(tmp_path / "merged")
    assert merged.adapter is None and all(p.requires_grad for p in merged.parameters())
    loaded = model.Policy.load(tmp_path / "adapter", merged=True)
    lora.merge(policy)
    for other in (merged, loaded, policy):
        assert not lora.adapters(other)
        largest = (scores(other, prompts, responses) - beside).abs().max()
        assert largest < 5e-6 * beside.abs().max()
    before, after = (
        load_file(folder / "model.safetensors") for folder in (world / "model", tmp_path / "merged")
    )
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 28 and all("_proj.weight" in name for name in changed)
    files = {x.name for x in (world / "model").iterdir()}
    assert files == {x.name for x in (tmp_path / "merged").iterdir()}
    with pytest.raises(SystemExit, match="merged: exists already"):
        lora.main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")])
    with pytest.raises(SystemExit, match="an ordinary model folder, expected an adapter's"):
        lora.main(["merge", str(world / "model"), str(tmp_path / "other")])
    capsys.readouterr()
    with pytest.raises(SystemExit, match="^0$"):
        lora.main(["merge", "--help"])
    assert "In bf16 the sum is rounded" in " ".join(capsys.readouterr().out.split())


# ---- PEFT


@pytest.fixture()
def ours(tmp_path, policy):
    """An adapter folder of a random adapter of the toy's model, and the policy."""
    lora.add(policy, rank=4, alpha=12)
    random = torch.Generator().manual_seed(5)
    for layer in lora.adapters(policy).values():
        layer.lora_B.data.normal_(std=0.05, generator=random)
    policy.save(tmp_path / "ours")
    return tmp_path / "ours"


def network(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64)


def logits(net, ids):
    with torch.no_grad():
        return net(input_ids=ids[None]).logits[0].log_softmax(-1)


def our_logps(policy, ids):
    """Log-probs of tokens 1, 2, ... of plain text, one by one in a response."""
    prompt = Prompt(None, ids[:1])
    return scores(policy, [prompt], [[ids[1:]]])[0]


def assert_same_policy(policy, net):
    ids = torch.arange(70, 90)
    expected = logits(net, ids)[:-1]
    expected[:, policy.banned] = -torch.inf  # vision tokens are impossible here
    expected = expected.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    torch.testing.assert_close(our_logps(policy, ids), expected, atol=5e-6, rtol=0)


@pytest.mark.filterwarnings("ignore")
def test_peft_loads_our_adapter(world, policy, ours):
    from peft import PeftModel

    plain = logits(network(world / "model"), torch.arange(70, 90))
    net = PeftModel.from_pretrained(network(world / "model"), ours)
    assert_same_policy(policy, net)
    assert (logits(net, torch.arange(70, 90)) - plain).abs().max() > 0.05
    named = {n for n, _ in net.named_parameters() if "lora_" in n}
    assert len(named) == 56 and not any("visual" in name for name in named)
    assert net.peft_config["default"].base_model_name_or_path == str((world / "model").resolve())


@pytest.mark.filterwarnings("ignore")
def test_we_load_an_adapter_that_peft_wrote(tmp_path, world):
    """Of two of the seven kinds of layers, in half precision; then it is trained further."""
    from peft import LoraConfig, get_peft_model

    chosen = r".*language_model\.layers.*\.(q_proj|v_proj)"
    config = LoraConfig(r=3, lora_alpha=5, lora_dropout=0.1, target_modules=chosen)
    net = get_peft_model(network(world / "model"), config).eval()
    random = torch.Generator().manual_seed(5)
    for name, p in net.named_parameters():
        if "lora_" in name:
            p.data.copy_(0.1 * torch.randn(p.shape, generator=random).bfloat16())
    net.save_pretrained(tmp_path)
    policy = model.Policy.load(tmp_path, dtype=torch.float64)
    assert len(lora.adapters(policy)) == 8 and policy.folder == world / "model"
    assert_same_policy(policy, net)
    with pytest.raises(ModelError, match=r"rank 3 and alpha 5, expected --lora 4 and --lora_alpha"):
        lora.add(policy, rank=4, alpha=8)
    lora.add(policy, rank=3, alpha=5)
    assert sum(p.requires_grad for p in policy.parameters()) == 16
    policy.save(tmp_path / "again")
    kept = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert kept["target_modules"] == chosen
    (saved, found) = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "again", tmp_path)
    )
    assert saved.keys() == found.keys()
    assert all(torch.equal(saved[name], found[name].double()) for name in found)


@pytest.mark.parametrize(
    "field, value",
    [
        ("peft_type", "LOHA"),
        ("use_rslora", True),
        ("use_dora", True),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("rank_pattern", {"q_proj": 8}),
        ("alpha_pattern", {"q_proj": 8}),
        ("fan_in_fan_out", True),
        ("init_lora_weights", "pissa"),
        ("revision", "v1.0"),
        ("something_new", 1),
        ("r", 0),
        ("lora_alpha", None),
    ],
)
def test_another_kind_of_adapter_is_refused_by_name(world, ours, field, value):
    file = ours / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(ModelError, match=f"adapter_config.json: '?.*{field}"):
        model.Policy.load(ours)


LAYER = "model.language_model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "change, message",
    [
        ("tower", "visual.blocks.0.attn.qkv.lora_A.weight is not of a linear layer of the"),
        ("head", "base_model.model.lm_head.lora_A.weight is not of a linear layer of the language"),
        ("missing", rf"{LAYER}.lora_B: found nothing, expected finite numbers of shape \[128, 4\]"),
        ("shape", rf"{LAYER}.lora_A: found a tensor of shape \[3, 128\], expected finite numbers"),
        ("nan", rf"{LAYER}.lora_A: found a tensor of shape \[4, 128\], expected finite numbers"),
        ("cut", "adapter_model.safetensors: cannot be read"),
    ],
)
def test_a_matrix_that_does_not_fit_is_named(ours, change, message):
    file = ours / "adapter_model.safetensors"
    tensors = load_file(file)
    a = f"{lora.PREFIX}{LAYER}.lora_A.weight"
    if change == "tower":
        tensors[f"{lora.PREFIX}model.visual.blocks.0.attn.qkv.lora_A.weight"] = tensors[a].clone()
    elif change == "head":
        tensors[f"{lora.PREFIX}lm_head.lora_A.weight"] = tensors[a].clone()
    elif change == "missing":
        del tensors[f"{lora.PREFIX}{LAYER}.lora_B.weight"]
    elif change == "shape":
        tensors[a] = tensors[a][:3].clone()
    elif change == "nan":
        tensors[a][0, 0] = torch.nan
    save_file(tensors, file)
    if change == "cut":
        file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ModelError, match=message):
        model.Policy.load(ours)


# ---- folders


def test_a_base_that_is_missing_is_named_with_its_adapter(tmp_path, ours):
    file = ours / "adapter_config.json"
    config = json.loads(file.read_text())

    def named(base):
        file.write_text(json.dumps(config | {"base_model_name_or_path": base}))
        with pytest.raises(ModelError) as error:
            model.Policy.load(ours)
        return str(error.value)

    message = named(str(tmp_path / "gone"))
    assert str(file) in message and f"{tmp_path}/gone: no such model folder" in message
    assert "found None, expected the model folder or hub name" in named(None)
    shutil.copytree(ours, tmp_path / "second")
    assert f"the base {tmp_path}/second is an adapter itself" in named(str(tmp_path / "second"))


def test_an_adapters_fingerprint_is_of_it_and_of_its_base(tmp_path, world, ours):
    """Else eval.py would resume the answers of one adapter with another."""
    base = tmp_path / "base"
    shutil.copytree(world / "model", base)
    file = ours / "adapter_config.json"
    config = json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}
    file.write_text(json.dumps(config))
    assert base_folder(ours) == base and base_folder(base) == base

    def both():
        return fingerprint(ours), text_fingerprint(ours)

    first = both()
    assert both() == first and fingerprint(ours) != fingerprint(base)
    file.write_text(json.dumps(config | {"lora_alpha": 13}))
    assert both()[0] == first[0] and both()[1] != first[1]
    file.write_text(json.dumps(config))
    for weights, name in ((ours / "adapter_model.safetensors", None), (base, "model.safetensors")):
        weights = weights / name if name else weights
        tensors = load_file(weights)
        save_file({n: x + 1 for n, x in tensors.items()}, weights, metadata={"format": "pt"})
        assert both()[0] != first[0]
        save_file(tensors, weights, metadata={"format": "pt"})
        assert both() == first
    (base / "tokenizer_config.json").write_text("{}")
    assert both()[0] == first[0] and both()[1] != first[1]


# ---- flags and memory


@pytest.mark.parametrize(
    "extra, message",
    [
        ("--lora 4 --train_vision", "--lora: expected without --train_vision"),
        ("--lora_alpha 4", "--lora_alpha 4: expected --lora beside it"),
    ],
)
def test_flags_that_do_not_go_together(capsys, extra, message):
    with pytest.raises(SystemExit):
        train.parse_args(["--model", "m", "--data", "d", *extra.split()])
    assert message in capsys.readouterr().err


def test_the_toys_tower_is_frozen_beside_adapters():
    assert "--train_vision" in train.toy_recipe("grpo")
    words = train.toy_recipe("grpo", lora=4)
    assert set(train.toy_recipe("grpo")) - set(words) == {"--train_vision"}


def test_the_estimate_of_memory_counts_what_adapters_save(monkeypatch):
    """Qwen2.5-VL-7B's sizes, by hand. 8.29 G parameters in bf16, no gradients, no reference.

    Adapters of rank 16: 16 * (2 * 7168 + 2 * 4096 + 3 * 22528) = 1.44 M parameters in each of 28
    layers, with 16 bytes each. The head in fp32: 4 * 152064 * 3584 bytes.
    """
    text = dict(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28)
    text |= dict(num_key_value_heads=4, vocab_size=152064, intermediate_size=18944)
    vision = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16)
    vision |= dict(out_hidden_size=3584)
    with torch.device("meta"):
        net = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision)
        ).bfloat16()
    policy = model.Policy(net, ROOT / "configs")
    lora.add(policy, rank=16, alpha=32)
    monkeypatch.setattr(model.Policy, "device", torch.device("cuda"))
    adapters = 28 * 16 * (2 * 7168 + 2 * 4096 + 3 * 22528)
    assert mrsp.count(policy, trained=True) == adapters == 40_370_176
    policy.set_grad_checkpointing(1)
    args = train.parse_args(["--model", "m", "--data", "d", "--lora", "16"])
    most = mrsp.most_tokens([2000], 1000, 1, args, 1)
    terms = mrsp.memory(policy, None, most, 1)["decoding"]
    assert terms["weights, moments"] == 2 * 8_292_166_656 + 12 * adapters
    assert terms["gradients"] == 0 and terms["reference"] == 0
    # of one process: as gradients come, copies go
    backward = mrsp.memory(policy, None, most, 1)["a layer's backward pass"]
    assert backward["gradients"] == backward["copies in bf16"] == 2 * adapters
    assert terms["head in fp32"] == 4 * 152064 * 3584
    assert terms["prompts' K/V"] == 2000 * 28 * 2 * 4 * 128 * 2
    sharded = mrsp.memory(policy, None, most, 1, world=4, fsdp=True)["decoding"]
    tower = 2 * mrsp.count(net.model.visual)  # frozen: whole on every rank
    rest = 2 * 8_292_166_656 - tower + 12 * adapters
    assert sharded["weights, moments"] == tower + rest / 4 and sharded["gradients"] == 0


def test_shards_are_read_as_the_whole_is(tmp_path, world):
    """On 3 ranks, which divide few of the shapes: weights of a tied head in bf16; adapters beside
    them, and merged."""
    shutil.copytree(world / "model", tmp_path / "half")
    file = tmp_path / "half" / "model.safetensors"
    half = {name: x.bfloat16() for name, x in load_file(file).items()}
    save_file(half, file, metadata={"format": "pt"})
    policy = model.Policy.load(tmp_path / "half")
    lora.add(policy, rank=4, alpha=8)
    for layer in lora.adapters(policy).values():
        torch.nn.init.normal_(layer.lora_B)
    policy.save(tmp_path / "adapter")
    run("tests/load_worker.py", tmp_path / "half", tmp_path / "adapter", ranks=3)


# ---- whole runs


def command(world, out, algo="grpo", **extra):
    """A small run with adapters."""
    words = flags(world, out, algo, **{"lora": 4, **extra})
    return [word for word in words if word != "--train_vision"]


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def adapter(out, step):
    return load_file(out / f"checkpoint-{step:06d}" / "adapter_model.safetensors")


def without_times(entries):
    return [
        {k: v for k, v in e.items() if k not in ("seconds", "tokens_per_second")} for e in entries
    ]


def answers(world, model_folder, out):
    """eval.py's responses to the held-out questions."""
    command = ["eval.py", "--model", model_folder, "--data", world / "test.json", "--out", out]
    run(*command, "--max_new", 16, "--min_pixels", 784)
    lines = (out / "greedy-16.rank0.jsonl").read_text().splitlines()
    return {x["record"]: x["rounds"][0]["responses"] for x in map(json.loads, lines)}


@slow
def test_from_a_cold_start_to_answers(tmp_path, world, cold_start):
    """SFT, GRPO from its adapter, evaluation, merge: the merged model gives the same answers.

    Two reference policies: the base itself, and the adapter that GRPO starts from. Both give a KL
    of zero before the first update.
    """
    sft, rl, other = (tmp_path / name for name in ("sft", "rl", "other"))
    run(*command(world, sft, "sft", model=cold_start, steps=2))
    how = dict(steps=3, beta=0.1, save_every=1, keep=9, eval_data=world / "few.json")
    run(*command(world, rl, model=sft, **how))
    run(*command(world, other, model=cold_start, **how))
    for out in (rl, other):
        kl = [entry["kl"] for entry in log(out)[1:]]
        assert kl[0] == 0 and kl[2] > 0 and all(e["mismatch"] < 1e-4 for e in log(out)[1:])
    before, after = adapter(sft, 2), adapter(rl, 3)
    assert before.keys() == after.keys() and len(after) == 56
    assert any((after[name] - before[name]).abs().max() > 1e-4 for name in after)
    run("lora.py", "merge", rl, tmp_path / "merged")
    beside = answers(world, rl, tmp_path / "beside")
    assert beside == answers(world, tmp_path / "merged", tmp_path / "of merged")
    refused = ["eval.py", "--model", other, "--data", world / "test.json"]
    refused += ["--out", tmp_path / "beside", "--max_new", 16, "--min_pixels", 784]
    assert "cannot be resumed with other settings: # weights" in run(*refused, expect=1)
    # a full run starts from base and adapter, merged; so does its reference
    full = flags(world, tmp_path / "full", model=rl, steps=1, beta=0.1)
    run(*full)
    assert log(tmp_path / "full")[0]["kl"] == 0
    assert (tmp_path / "full" / "checkpoint-000001" / "model.safetensors").exists()


@slow
def test_a_run_resumes_bit_for_bit(tmp_path, world, cold_start):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    how = dict(model=cold_start, steps=3, beta=0.1, save_every=1, keep=9)
    run(*command(world, whole, **how))
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoint-000003")
    (cut / "checkpoint-000002" / "adapter_model.safetensors").write_bytes(b"torn")
    printed = run(*command(world, cut, **how), "--resume")
    assert "checkpoint-000002: adapter_model.safetensors: " in printed
    found, expected = adapter(cut, 3), adapter(whole, 3)
    assert all(torch.equal(found[name], x) for name, x in expected.items())
    assert without_times(log(cut)) == without_times(log(whole))
    start = adapter(whole, 1)
    assert any((expected[name] - start[name]).abs().max() > 1e-4 for name in start)
    changed = command(world, cut, **{**how, "lora": 8})
    assert "--lora 8 now, --lora 4 when it started" in run(*changed, "--resume", expect=1)


@slow
def test_the_base_may_move_but_not_change(tmp_path, world, cold_start):
    """A checkpoint names its base. After a move, that name and --model are edited."""
    base, out = tmp_path / "base", tmp_path / "run"
    shutil.copytree(sorted(cold_start.glob("checkpoint-*"))[-1], base)
    how = dict(steps=2, beta=0.1)
    run(*command(world, out, model=base, **how))
    base = base.rename(tmp_path / "moved")

    def name_base(folder):
        for file in out.glob("checkpoint-*/adapter_config.json"):
            config = json.loads(file.read_text()) | {"base_model_name_or_path": str(folder)}
            file.write_text(json.dumps(config))

    again = [*command(world, out, model=base, **how | {"steps": 3}), "--resume"]
    name_base(base)
    run(*again)
    name_base(world / "model")
    assert "another model than --model" in run(*again, expect=1)
    name_base(base)
    config = base / "config.json"
    config.write_text(config.read_text().replace("1e-06", "1e-02"))
    assert "# reference" in run(*again, expect=1)


@slow
@pytest.mark.parametrize("extra", [{}, {"fsdp": True}, {"sp": 2}])
def test_two_ranks_train_the_adapter_of_one(tmp_path, world, cold_start, extra):
    """Steps and checkpoints, with the embedding cache; whole, sharded, and sharing rows."""
    how = dict(model=cold_start, steps=2, lr=1e-4, beta=0.1, embedding_cache=tmp_path / "cache")
    run(*command(world, tmp_path / "one", **how))
    run(*command(world, tmp_path / "two", **how, **extra), ranks=2)
    one, two = adapter(tmp_path / "one", 2), adapter(tmp_path / "two", 2)
    assert one.keys() == two.keys()
    differences = torch.cat([(two[name] - one[name]).flatten() for name in one])
    assert differences.abs().max() <= 4.1e-4  # two steps of Adam, each of +-lr
    assert (differences.abs() < 1e-6).double().mean() > 0.98


def test_half_weights_and_fp32_adapters_are_sharded_together(tmp_path, world):
    """FSDP gathers layers whose parameters have two dtypes. Up to the rounding of bf16."""
    worker = ["tests/gradient_worker.py", world, world / "model"]
    extra = ["--algo", "sft", "--lora", "4", "half"]
    run(*worker, tmp_path / "one", *extra)
    run(*worker, tmp_path / "two", *extra, "--fsdp", ranks=2)
    one = torch.load(tmp_path / "one.0")["grads"]
    for rank in range(2):
        two = torch.load(tmp_path / f"two.{rank}")["grads"]
        assert two.keys() == one.keys() and len(one) == 56
        for name, g in one.items():
            assert g.dtype == two[name].dtype == torch.float32
            assert (two[name] - g).norm() < 0.03 * g.norm(), name
