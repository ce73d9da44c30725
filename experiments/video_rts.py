"""Video-RTS: RL on few questions matches SFT on many; sparse-to-dense test-time scaling saves
tokens; the two add up.

python -m experiments.claims video_rts
"""

import json
from functools import partial

from data import load_samples
from experiments.lab import last
from experiments.shared import SHARE, Claim, Panel, cold_start, first_of, more_sft, rl
from infra.summary import mean
from rewards import accuracy_reward, extract_answer


def run(lab):
    """The claim about training, and those about answering."""
    return {**questions(lab), **scaling(lab)}


def questions(lab):
    """From the cold start, on n of the training questions: RL, which sees their answers, and SFT
    on the reasoning and the answers of a teacher without mistakes."""
    cold, world = cold_start(lab), lab.world()
    train = world / "train.json"
    total = len(json.loads(train.read_text()))
    explained = lab.records("explained", explain, train, world / "cot.json")
    by_rl, by_sft = {}, {}
    for n in sorted({min(n, total) for n in (30, 100, 300, total)}):
        some = partial(first_of, n, lab.seed)
        asked = lab.records(f"train-{n}", some, train)
        run = rl(lab, f"rl-{n}", cold, asked) if n < total else rl(lab, "grpo", cold)
        by_rl[str(n)] = last(run)
        taught = lab.records(f"explained-{n}", some, explained)
        by_sft[str(n)] = last(more_sft(lab, f"sft-{n}", taught, points=1))
    on_all = str(total)
    return {
        "questions": {"RL, answers only": by_rl, "SFT, perfect teacher": by_sft},
        "RL minus SFT": {n: by_rl[n] - by_sft[n] for n in by_rl},
        "RL minus SFT on all": {n: by_rl[n] - by_sft[on_all] for n in by_rl},
        "RL on all minus SFT": {n: by_rl[on_all] - by_sft[n] for n in by_rl},
    }


def scaling(lab):
    """Sparse-to-dense, and greedy answers and votes of five at a fixed number of frames, before
    and after RL."""
    test = lab.world() / "test.json"
    cold = cold_start(lab)
    before = lab.answers("cold-tts", cold, test, "--tts", "--compare")
    after = lab.answers("grpo-tts", rl(lab, "grpo", cold), test, "--tts", "--compare")
    accuracy, tokens, response_tokens = {}, {}, {}
    for method, (summary, lines) in after.items():
        was = before[method][0]["accuracy"]
        accuracy[method] = {"before RL": was, "after RL": summary["accuracy"]}
        tokens[method] = summary["mean_visual_tokens"]
        response_tokens[method] = mean(length(line) for line in lines)
    greedy, vote, search = accuracy["greedy-16"], accuracy["vote-16"], accuracy["s2d-4-16"]
    truth = load_samples(test)
    one = {
        "before RL": one_response(before["vote-16"][1], truth),
        "after RL": one_response(after["vote-16"][1], truth),
    }
    rounds = {
        "before RL": before["s2d-4-16"][0]["mean_rounds"],
        "after RL": after["s2d-4-16"][0]["mean_rounds"],
    }
    return {
        "accuracy": accuracy,
        "tokens": tokens,
        "response tokens": response_tokens,
        "rounds": rounds,
        "one response at 16 frames": one,
        "dense vote minus one response": minus(vote, one),
        "gains": {
            "RL": greedy["after RL"] - greedy["before RL"],
            "sparse-to-dense before RL": search["before RL"] - greedy["before RL"],
            "sparse-to-dense after RL": search["after RL"] - greedy["after RL"],
        },
        "dense vote minus a greedy answer": minus(vote, greedy),
        "sparse-to-dense minus dense vote": minus(search, vote),
        "wrong after RL": {
            "vote-16": missed(after["vote-16"][1]),
            "s2d-4-16": missed(after["s2d-4-16"][1]),
        },
    }


def minus(a, b):
    """a - b, key by key."""
    return {key: a[key] - b[key] for key in a}


def length(line):
    """The tokens of all responses to a question, in all rounds."""
    return sum(sum(turn["tokens"]) for turn in line["rounds"])


def one_response(lines, truth):
    """The accuracy of a single sampled response: the mean over all that were sampled for the
    votes."""
    right = []
    for line in lines:
        for response in line["rounds"][0]["responses"]:
            right.append(accuracy_reward(response, truth[line["record"]]))
    return mean(right)


def missed(lines):
    """Answers of one method -> shares of its questions: wrong, wrong by kind, and wrong although
    all responses agreed."""
    wrong = [line for line in lines if line["score"] <= 0.5]
    kinds = [line["about"]["data_source"] for line in wrong]
    agreed = []  # on how many frames the responses agreed
    for line in wrong:
        end = line["rounds"][-1]
        if len(set(end["votes"])) == 1 and None not in end["votes"]:
            agreed.append(end["frames"])
    few_frames = [n for n in agreed if n in (4, 8)]
    return {
        "all": len(wrong) / len(lines),
        "counting": kinds.count("count") / len(lines),
        "motion": kinds.count("motion") / len(lines),
        "agreed on": len(agreed) / len(lines),
        "agreed on at 4 or 8 frames": len(few_frames) / len(lines),
    }


def explain(records, cot):
    """The records with the reasoning of a teacher without mistakes, in the words of cot.json."""
    start = {r["data_source"]: r["process"].rsplit(" ", 1)[0] for r in cot}
    out = []
    for r in records:
        seen = extract_answer(r["solution"])
        for option in r["options"]:  # "B. green"
            letter, word = option.split(". ")
            if letter == seen:
                seen = word
                break
        out.append(r | {"process": f"{start[r['data_source']]} {seen}</think>"})
    return out


CLAIM = Claim(
    paper="Video-RTS",
    line="RL on few questions matches SFT on many; sparse-to-dense saves tokens; the two add up",
    minutes=15,
    run=run,
    panels=[
        Panel(
            "lines",
            "questions",
            "RL against SFT from the same start",
            "questions trained on",
            SHARE,
            log=True,
        ),
        Panel(
            "bars",
            "gains",
            "Gains over a greedy answer at 16 frames",
            "",
            "difference in accuracy",
        ),
        Panel("bars", "accuracy", "Ways to answer", "", SHARE),
        Panel(
            "bars",
            "tokens",
            "Their visual tokens, after RL",
            "",
            "visual tokens a question, all rounds",
        ),
    ],
)
