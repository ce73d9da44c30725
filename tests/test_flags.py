"""Flags: earlier names, flag files, the place of an error, what a resumed run must not change."""

import pytest
import torch

import eval
import grpo
import rollout
import simulate
import train
from infra.flags import Parser, by_name, flag_lines, refuse_changes, renamed

REQUIRED = ["--model", "m", "--data", "d"]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("--updates", "--minibatches"),
        ("--updates=2", "--minibatches=2"),
        ("--updates 2", "--minibatches 2"),
        ("--checkpointing 4", "--grad_checkpointing 4"),
        ("--updates_per_day 2", "--updates_per_day 2"),
        ("--out updates", "--out updates"),
        ("updates", "updates"),
    ],
)
def test_an_earlier_flag_name_is_replaced(text, expected):
    assert renamed(text) == expected


@pytest.mark.parametrize(
    "flags", ["--updates 2 --checkpointing 4", "--updates=2 --checkpointing=4"]
)
def test_recipes_with_earlier_flag_names_are_read(tmp_path, flags):
    (tmp_path / "recipe.txt").write_text(flags)
    for words in (flags.split(), [f"@{tmp_path}/recipe.txt"]):
        args = train.parse_args([*REQUIRED, *words])
        assert (args.minibatches, args.grad_checkpointing) == (2, 4)
        assert "--minibatches 2" in flag_lines(args)


def test_an_error_names_the_flag_as_it_is_called_now_and_where_it_stands(tmp_path, capsys):
    (tmp_path / "recipe.txt").write_text("--lr 1\n--updates 0\n")
    with pytest.raises(SystemExit):
        train.parse_args([*REQUIRED, f"@{tmp_path}/recipe.txt"])
    place = f"{tmp_path}/recipe.txt, line 2: "
    assert capsys.readouterr().err == f"error: {place}--minibatches 0: expected at least 1\n"


def config_of(folder, flags, comments=()):
    """Writes a config.txt with these lines."""
    folder.mkdir(exist_ok=True)
    file = folder / "config.txt"
    file.write_text("\n".join([*comments, *flags]) + "\n")
    return file


@pytest.mark.parametrize("earlier", ["--updates 2", "--minibatches 2"])
def test_a_run_with_earlier_flag_names_resumes_with_the_same_settings_only(tmp_path, earlier):
    def command(minibatches):
        return flag_lines(train.parse_args([*REQUIRED, "--minibatches", minibatches]))

    same = command("2")
    before = [earlier if line == "--minibatches 2" else line for line in same]
    config = config_of(tmp_path / "run", before)
    names = vars(train.parse_args(REQUIRED))
    refuse_changes(config, same, names)
    message = (
        f"error: {tmp_path}/run cannot be resumed with other settings: "
        "--minibatches 3 now, --minibatches 2 when it started. "
    )
    with pytest.raises(SystemExit, match=message):
        refuse_changes(config, command("3"), names)


def test_every_change_of_a_compared_setting_is_named(tmp_path):
    config = config_of(
        tmp_path, ["--prompts 4", "--group 8", "--steps 9", "--tts"], ["# records 12", "# commit a"]
    )
    lines = ["# records 34", "# commit b", "# reference 5", "--prompts 3", "--steps 7", "--beta 1"]
    names = ("prompts", "group", "tts", "beta", "# records", "# reference")
    with pytest.raises(SystemExit) as error:
        refuse_changes(config, lines, names)
    changes = str(error.value).partition("settings: ")[2].partition(". ")[0]
    assert changes.split("; ") == [
        "# records 34 now, # records 12 when it started",
        "--prompts 3 now, --prompts 4 when it started",
        "none now, --group 8 when it started",
        "none now, --tts when it started",
        "--beta 1 now, none when it started",
    ]


def test_a_flag_that_is_newer_than_the_run_is_compared_by_its_default(tmp_path):
    config = config_of(tmp_path, ["--prompts 4"])
    refuse_changes(config, ["--prompts 4", "--kl k3"], ("prompts", "kl"), ["--kl k3"])
    with pytest.raises(SystemExit, match="--kl k1 now, --kl k3 when it started"):
        refuse_changes(config, ["--prompts 4", "--kl k1"], ("prompts", "kl"), ["--kl k3"])


def test_lines_by_name():
    lines = ["# records 1234", "", "--prompts 4", "--tts", "--updates 2", "--out 'a  b'"]
    assert by_name(lines) == {
        "# records": "# records 1234",
        "prompts": "--prompts 4",
        "tts": "--tts",
        "minibatches": "--minibatches 2",
        "out": "--out 'a  b'",
    }


def test_flag_files_stand_for_their_words_and_what_follows_wins(tmp_path):
    (tmp_path / "inner.txt").write_text("--lr 1  # a comment\n--seed 3\n")
    (tmp_path / "outer.txt").write_text(f"@{tmp_path}/inner.txt\n--seed=4 --name 'a b'\n")
    p = Parser()
    g = p.section("all")
    g.value("lr", 0.5, "")
    g.value("seed", 0, "")
    g.value("name", None, "")
    g.value("sizes", [1], "", "at least 1", nargs="+")
    g.switch("fast", "")
    args = p.parse_args(["--lr", "9", f"@{tmp_path}/outer.txt", "--seed", "5", "--sizes", "2", "3"])
    assert vars(args) == dict(lr=1.0, seed=5, name="a b", sizes=[2, 3], fast=False)


def test_an_error_names_the_place_of_the_value_that_is_wrong(tmp_path, capsys):
    """Of a flag that is given three times."""
    (tmp_path / "f.txt").write_text("--seed 1\n--seed two\n--seed 3\n")
    with pytest.raises(SystemExit):
        train.parse_args([*REQUIRED, f"@{tmp_path}/f.txt"])
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/f.txt, line 2: --seed two: ")


def test_a_run_with_a_flag_that_is_gone_is_read_if_its_value_is_built_in(tmp_path, capsys):
    now = flag_lines(train.parse_args(REQUIRED))
    config = config_of(tmp_path, [*now, "--shuffles 1"])
    assert flag_lines(train.parse_args([f"@{config}"])) == now
    refuse_changes(config, now, {"lr"})
    config.write_text("\n".join([*now, "--shuffles 2"]))
    with pytest.raises(SystemExit):
        train.parse_args([f"@{config}"])
    assert "--shuffles 2: this flag is gone; 1 is built in" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--shuffles 2 when it started"):
        refuse_changes(config, now, {"lr"})


def test_an_earlier_name_is_understood_only_where_its_flag_is():
    answering = ["--updates", "2"]
    found, left = Parser().parse_known_args(answering)
    assert (vars(found), left) == ({}, answering)
    _, left = Parser().parse_known_args(["--shuffles", "1"])
    assert left == ["--shuffles", "1"]


def test_a_folder_of_answers_of_before_is_read_again(tmp_path):
    """Its config.txt has --frames beside --tts; typed, that is an error."""
    (tmp_path / "config.txt").write_text("--model m\n--data d\n--frames 16\n--tts\n")
    assert eval.parse_args([f"@{tmp_path}/config.txt"]).tts
    with pytest.raises(SystemExit):
        eval.parse_args([f"@{tmp_path}/config.txt", "--frames", "8"])


# Every flag with a fraction: the least and the most that train.py takes. A bound that is not 0 or 1
# keeps fp32 from overflow, or from a gradient of 0. None: no bound, because a value beyond fp32
# cannot get into a tensor (a time, a rate, GB), or because the run says what went wrong (lr).
RANGES = {
    "fps": (5e-324, None),
    "decode_timeout": (5e-324, 86400),
    "temperature": (1e-6, 100),
    "top_p": (5e-324, 1),
    "w_accuracy": (0, 1e6),
    "w_format": (0, 1e6),
    "len_bonus": (0, 1e6),
    "judge_timeout": (5e-324, 86400),
    "alpha": (0, 1e6),
    "mu": (0, 1e6),
    "correct": (0, 1 - 2**-53),
    "beta": (0, 1e6),
    "clip_low": (0, 1),
    "clip_high": (0, 1e6),
    "tau_pos": (1e-6, 1e6),
    "tau_neg": (1e-6, 1e6),
    "dual_clip": (0, 1e6),
    "lr": (0, None),
    "beta2": (0, 1 - 2**-53),
    "weight_decay": (0, 100),
    "clip_grad": (1e-6, None),
    "cache_gb": (5e-324, None),
}


def test_every_flag_with_a_fraction_has_a_range():
    args = vars(train.parse_args(REQUIRED))
    assert {name for name, value in args.items() if isinstance(value, float)} == RANGES.keys()


@pytest.mark.parametrize("name", RANGES)
def test_the_ends_of_the_range_are_taken_and_nothing_beyond(name, capsys):
    least, most = RANGES[name]
    for value in (least, 1e300 if most is None else most):
        assert vars(train.parse_args([*REQUIRED, f"--{name}", repr(value)]))[name] == value
    beyond = [least * (1 - 1e-9) if least > 5e-324 else least - 5e-324, "nan", "inf", "-inf"]
    beyond += [] if most is None else [most * (1 + 1e-9)]
    for value in beyond:
        with pytest.raises(SystemExit):
            train.parse_args([*REQUIRED, f"--{name}={value}"])
        assert f"error: --{name} {value}: expected " in capsys.readouterr().err


def test_within_their_ranges_the_flags_of_the_loss_give_finite_numbers():
    """In fp32: loss, and gradient norm."""
    torch.manual_seed(0)
    old, ref = torch.randn(2, 4, 6).log_softmax(-1)
    logp = (old + 0.1 * torch.randn(4, 6)).requires_grad_()
    advantages, mask = torch.tensor([5.0, -5.0, 0.0, 0.5]), torch.ones(4, 6)
    flags = "tau_pos tau_neg clip_low clip_high dual_clip beta".split()
    for variant in grpo.VARIANTS:
        for name in flags:
            for value in RANGES[name]:
                how = {"variant": variant, "beta": 0.1, name: value}
                loss, _ = grpo.grpo_loss(logp, old, advantages, mask, ref_logp=ref, **how)
                (gradient,) = torch.autograd.grad(loss, logp)
                assert loss.isfinite() and gradient.norm().isfinite(), how
    for value in RANGES["temperature"]:
        token, logp, entropy = rollout.sample(100 * old, torch.rand(4), value, 1.0)
        assert logp.isfinite().all() and entropy.isfinite().all()


def test_lora_alpha_has_an_upper_bound(capsys):
    flags = [*REQUIRED, "--lora", "4", "--lora_alpha"]
    assert train.parse_args([*flags, "1000000"]).lora_alpha == 10**6
    with pytest.raises(SystemExit):
        train.parse_args([*flags, "1000001"])
    assert "--lora_alpha 1000001: expected at least 0, at most 1e6" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag, value, expected",
    [
        *[("memory", value, "expected at least one GPU with memory") for value in ("nan", "inf")],
        *[("write", value, "expected a file, in a folder that exists") for value in (".", "no/x")],
    ],
)
def test_the_simulation_refuses_before_it_simulates(flag, value, expected, capsys):
    with pytest.raises(SystemExit):
        simulate.parse_args([f"--{flag}", value])
    assert expected in capsys.readouterr().err
