"""Every command on README.md, the pages of docs/ and in the first lines of the recipes is one that
its script accepts."""

import argparse
import importlib
import math
import re
import shlex
import warnings
from pathlib import Path

import pytest

import eval as evaluation
import simulate
import train
from conftest import ROOT

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "experiments" / "README.md"]
RECIPES = sorted(ROOT.glob("configs/*.txt"))

EXAMPLES = {"N": "8", "@configs/NAME.txt": "@configs/video_r1_7b.txt"}  # of what stands for any


def commands(page):
    """The commands of a page, each as its words: from blocks of sh, and from `python ...` in a
    line. Comments are left out. Of a recipe: those in its comments."""
    text = page.read_text()
    if page.suffix == ".txt":
        comments = re.findall(r"^# ?(.*)", text, re.M)
        text = "\n".join(comments)
        text = re.sub(
            r"^ *((?:python|torchrun) (?:.*\\\n)*.*)", r"```sh\n\1\n```", text, flags=re.M
        )
    text = text.replace("\\\n", " ")
    lines = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.S)).splitlines()
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    lines += re.findall(r"`((?:python|torchrun|hf) [^`]*)`", prose)
    commands = [command for line in lines for command in line.split("&&")]
    words = [shlex.split(command, comments=True) for command in commands]
    return [command for command in words if command]


def script_and_flags(words):
    """(script, its flags) of a command of python or torchrun; (None, []) for another."""
    if words[0] not in ("python", "torchrun"):
        return None, []
    i = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    if i is None and words[1:2] == ["-m"]:
        return words[2], words[3:]
    if words[0] == "torchrun":
        own = [word for word in words[1:i] if word.startswith("--") and word != "--"]
        assert {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint"}.issuperset(own)
    return words[i], words[i + 1 :]


class Parsed(Exception):
    """Raised by a parser once it has accepted the flags."""


def accept(script, flags, monkeypatch):
    """Parses the flags of a script. SystemExit: they are refused."""
    if script == "train.py":
        asked = train.peek(flags, model=None, data=None, algo="grpo", out=None, seed=0, lora=0)
        recipe = any(word.startswith("@") for word in flags)
        asked.family = "qwen2_5_vl"
        if recipe or asked.data:
            train.parse_args(flags)
        else:
            train.toy_runs(asked, flags)
    elif script == "eval.py":
        if "--filter" in flags:
            target = Path(flags[flags.index("--filter") + 1])
            target.parent.mkdir(parents=True, exist_ok=True)
        given = [] if "--data" in flags else ["--model", "m", "--data", "d"]
        evaluation.parse_args([*given, *flags])
    elif script == "simulate.py":
        _, recipe = simulate.parse_args(flags)
        train.parse_args(["--model", "m", "--data", "d", *recipe])
    else:
        plain = argparse.ArgumentParser.parse_args

        def parse(self, *args, **kw):
            plain(self, *args, **kw)
            raise Parsed

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
        name = script.removesuffix(".py").replace("/", ".").removeprefix("tests.")
        with pytest.raises(Parsed):
            importlib.import_module(name).main(flags)


@pytest.fixture()
def at_root(tmp_path, monkeypatch):
    """A folder with configs/, so that commands write nothing into the project."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", [*PAGES, *RECIPES], ids=lambda page: page.name)
def test_commands_are_accepted(page, at_root, monkeypatch, capsys):
    for words in commands(page):
        script, flags = script_and_flags([EXAMPLES.get(word, word) for word in words])
        if script in (None, "pytest", "tests/clips.py") or "--help" in flags:
            continue
        with monkeypatch.context() as patch:
            try:
                accept(script, flags, patch)
            except SystemExit:
                pytest.fail(f"{page.name}: {shlex.join(words)}: {capsys.readouterr().err}")


def test_the_filter_of_a_recipe_shows_what_its_training_shows(at_root):
    """Also on the page of the recipe: the same pixels and as many new tokens; and one command."""
    found = {}
    for page in [*RECIPES, *PAGES]:
        for words in commands(page):
            script, flags = script_and_flags(words)
            if script == "eval.py" and "--filter" in flags:
                Path(flags[flags.index("--filter") + 1]).parent.mkdir(parents=True, exist_ok=True)
                found[page.name] = vars(evaluation.parse_args(flags))
    recipes = {"longvila_r1_7b.txt": "longvila_r1.md", "video_rts_7b.txt": "video_rts.md"}
    assert found.keys() == {"longvila_r1_7b.txt", *recipes.values()}
    for recipe, page in recipes.items():
        trained = train.parse_args([f"@configs/{recipe}"])
        for asked in [found[page], found.get(recipe, found[page])]:
            for name in ("min_pixels", "max_pixels", "image_max_pixels", "max_new"):
                assert asked[name] == getattr(trained, name), f"{recipe}, {page}: --{name}"
            for name in ("model", "frames", "m"):
                assert asked[name] == found[page][name], f"{recipe}, {page}: --{name}"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_recipe_is_accepted_and_its_products_are_right(recipe, at_root):
    """Such as "--max_pixels 100352  # 128 * 28 * 28"."""
    asked = ["--model", "m", "--data", "d", f"@configs/{recipe.name}"]
    (evaluation if recipe.name == "toy_eval.txt" else train).parse_args(asked)
    for value, product in re.findall(
        r"^--\w+ (\d+) +# ((?:\d+ \* )+\d+)", recipe.read_text(), re.M
    ):
        assert int(value) == math.prod(map(int, product.split(" * ")))


def test_wrong_commands_are_not(at_root, monkeypatch):
    for command in (
        "python train.py @configs/none.txt",
        "torchrun --nproc_per_node 8 train.py @configs/video_r1_7b.txt --no_such_flag 1",
        "python eval.py --frames 7",
        "python prepare.py imagenet FOLDER",
        "python simulate.py @configs/video_r1_7b.txt --gpus none",
    ):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            accept(*script_and_flags(command.split()), patch)


def test_commands_of_a_page_are_found(tmp_path):
    page = tmp_path / "page.md"
    block = "```sh\npip install x && python train.py --lr 1  # fast\nhf download a/b \\\n  --x\n```"
    page.write_text(f"{block}\nSee `python eval.py --tts` and `--m`.\n```\npython no.py\n```\n")
    assert [" ".join(words) for words in commands(page)] == [
        "pip install x",
        "python train.py --lr 1",
        "hf download a/b --x",
        "python eval.py --tts",
    ]
    recipe = tmp_path / "recipe.txt"
    recipe.write_text(
        "# First:\n#   python eval.py \\\n#       --tts\n# See `python ask.py`.\n--lr 1\n"
    )
    assert [" ".join(words) for words in commands(recipe)] == [
        "python eval.py --tts",
        "python ask.py",
    ]


def test_downloads_name_a_pattern_each(monkeypatch, capsys):
    """hf takes one pattern for each --include; another word would be the one file to download."""
    import huggingface_hub.cli.download as download
    from huggingface_hub.cli.hf import app

    asked = []

    def called(name):
        return lambda **how: asked.append((name, how)) or "folder"

    for name in ("snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(download, name, called(name))
    found = [words for page in PAGES for words in commands(page)]
    found = [words for words in found if words[:2] == ["hf", "download"] and len(words) > 2]
    assert len(found) > 5
    for words in found:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            app.main(words[1:], standalone_mode=False)
        name, how = asked.pop()
        patterns = [word for before, word in zip(words, words[1:]) if before == "--include"]
        assert name == "snapshot_download" and (how["allow_patterns"] or []) == patterns
        assert how["repo_id"].count("/") == 1 and how["local_dir"]
        assert how["repo_type"] == ("dataset" if "dataset" in words else "model")


def test_data_sets_and_hub_names_of_the_pages_are_those_of_prepare(at_root):
    import prepare

    hubs = {row.hub for row in prepare.SETS.values()}
    for page in PAGES:
        for words in commands(page):
            if words[:2] == ["hf", "download"] and "dataset" in words:
                assert words[2] in hubs, f"{page.name}: {words[2]}"
