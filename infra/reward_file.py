"""A reward of one's own: a function in a Python file, by --reward my_file.py:score.

    def score(response, sample):          one response -> a number in [0, 1]
    def score(responses, samples):        all at once -> a list of such numbers

A function whose first parameter is called `responses` has the second form: it gets the responses of
a step that are on its rank, and the sample of each. response: the text, with <think> and <answer>.
sample: a data.Sample (question, options, answer, problem_type, path, ...).
The file may import modules that lie beside it; installed modules and this project's come first.
"""

import importlib.util
import inspect
import itertools
import math
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

from infra.errors import DataError

# the keys of log.jsonl and samples.jsonl: no reward may have one of these names
TAKEN = """
    step reward accuracy format length_bonus temporal_bonus advantage response position id path
    data_type problem_type fps segment question options answer orders probability_drops
    shuffled_accuracies shuffled_accuracy probability_drop temporal_passed temporal_vacuous
    temporal_not_applicable truncated frames pixels response_length entropy zero_std_groups loss kl
    clipped ratio entropy_trained mismatch grad_norm updates skipped_updates skipped_update
    trained_groups refills judge_requests judge_fallbacks lr sp skipped_samples tokens_per_second
    peak_memory_gb seconds eval_loss eval_accuracy eval_questions eval_failures eval_by_source
    reward_std
""".split()


# a function whose first parameter has one of these names takes others, as TRL's do, or in turn
OTHER_ORDERS = ("completions", "prompts", "sample", "samples")


def split_spec(spec):
    """Splits "my_file.py:score=0.5" -> ("my_file.py", "score", 0.5). The weight is 1 if none is
    given. Raises DataError."""
    file, _, rest = spec.rpartition(":")
    name, equals, weight = rest.partition("=")
    try:
        weight = float(weight) if equals else 1.0
    except ValueError:
        weight = math.nan
    if not file or not name.isidentifier() or not abs(weight) <= 1e6:  # NaN is not
        raise DataError(
            f"--reward {spec}: expected FILE.py:FUNCTION or FILE.py:FUNCTION=WEIGHT, a weight from "
            "-1e6 to 1e6"
        )
    if name in TAKEN:
        raise DataError(f"--reward {spec}: the logs have a {name} already; rename the function")
    return file, name, weight


@dataclass
class RewardFile:
    """A function of a file that rewards responses."""

    file: str
    name: str  # of the function, and in the logs
    function: Callable
    batched: bool

    def __call__(self, responses, samples):
        """The responses (N,) and the sample of each -> rewards (N,).

        Raises DataError, which names the record, the file and the function: for an exception, and
        for anything but a number in [0, 1].
        """
        if not self.batched:
            pairs = zip(responses, samples)
            return [self._number(self._call([s], r, s), s) for r, s in pairs]
        if not responses:
            return []
        values = self._call(samples, list(responses), list(samples))
        values = values.tolist() if hasattr(values, "tolist") else values
        if not isinstance(values, (list, tuple)) or len(values) != len(responses):
            found = len(values) if isinstance(values, (list, tuple)) else type(values).__name__
            raise DataError(
                f"{self.file}:{self.name} returned {found}, expected a list of {len(responses)} "
                "numbers, one for each response"
            )
        return [self._number(x, s) for x, s in zip(values, samples)]

    def _call(self, asked, *args):
        """The function's value. asked: the samples to name if it raises."""
        try:
            return self.function(*args)
        except (Exception, SystemExit) as e:  # whatever the user's code raises
            records = sorted({s.name for s in asked})
            which = records[0] if len(records) == 1 else f"{records[0]} to {records[-1]}"
            raise DataError(f"{which}: {self.file}:{self.name}{_what(e, self.file)}") from e

    def _number(self, x, sample):
        with suppress(ValueError, RuntimeError):  # an array of several numbers is no number
            x = x.item() if hasattr(x, "item") else x  # of numpy or torch
        if not isinstance(x, Real) or not 0 <= x <= 1:  # NaN is neither
            raise DataError(
                f"{sample.name}: {self.file}:{self.name} returned {x!r:.80}, "
                "expected a number from 0 to 1 (a penalty has a negative weight)"
            )
        return float(x)


def load_rewards(specs):
    """["my_file.py:score=0.5", ...] -> [RewardFile]. Each file is run once. Raises DataError."""
    found, modules = [], {}
    for spec in specs:
        file, name, _ = split_spec(spec)
        if name in [x.name for x in found]:
            raise DataError(f"--reward {spec}: there are two functions called {name}; rename one")
        if file not in modules:
            modules[file] = _run(file)
        function = getattr(modules[file], name, None)
        if not callable(function):
            raise DataError(f"--reward {spec}: {file} has no function {name}")
        parameters = _parameters(function, spec, name)
        found.append(RewardFile(file, name, function, batched=parameters[0] == "responses"))
    _refuse_namesakes({Path(file).resolve().parent for file in modules})
    return found


def _refuse_namesakes(folders):
    """Raises DataError if a module that was imported lies beside reward files in two folders: the
    second file got the first one's."""
    for a, b in itertools.combinations(sorted(folders), 2):
        for name in {f.stem for f in a.glob("*.py")} & {f.stem for f in b.glob("*.py")}:
            file = getattr(sys.modules.get(name), "__file__", None)
            if file and Path(file).resolve().parent in (a, b):
                raise DataError(
                    f"--reward: {a / name}.py and {b / name}.py: Python imports one module of a "
                    "name; rename one"
                )


def _parameters(function, spec, name):
    """The names of a function's parameters. Raises DataError unless it can be called with two."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as e:  # of a function that is not written in Python
        raise DataError(
            f"--reward {spec}: {name}: its parameters are not known ({e}), expected a function "
            f"written in Python: def {name}(response, sample)"
        ) from e
    names = list(signature.parameters)
    try:
        signature.bind("a response", "a sample")
        fits = names[0] not in OTHER_ORDERS
    except TypeError:
        fits = False
    if not fits:
        raise DataError(
            f"--reward {spec}: {name}{signature}: expected the parameters response, sample "
            "(or responses, samples)"
        )
    return names


def own_rewards(functions, texts, samples):
    """Responses (B, G) and the samples of the groups (B,) -> [{name: rewards (G,)}] of each group.

    functions: of load_rewards. Each sees all responses at once. Raises DataError.
    """
    everything = [text for of_group in texts for text in of_group]
    of_each = [s for s, of_group in zip(samples, texts) for _ in of_group]
    groups = [{} for _ in texts]
    for function in functions:
        values = iter(function(everything, of_each))
        for group, of_group in zip(groups, texts):
            group[function.name] = [next(values) for _ in of_group]
    return groups


def _run(file):
    """The module of a Python file. The file's folder stays on sys.path: functions import too."""
    if not Path(file).is_file():
        raise DataError(f"--reward: {file}: no such file")
    folder = str(Path(file).resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    name = f"reward file {file}"  # of no other module
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None:
        raise DataError(f"--reward: {file}: expected a Python file, .py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:  # whatever the user's code raises
        raise DataError(f"--reward: {file} cannot be loaded{_what(e, file)}") from e
    return module


def _what(error, file):
    """An error as ", line 7: ZeroDivisionError: division by zero"; the line is that of the file."""
    path = str(Path(file).resolve())
    lines = [
        x.lineno
        for x in traceback.extract_tb(error.__traceback__)
        if str(Path(x.filename).resolve()) == path
    ]
    if isinstance(error, SyntaxError):
        lines = [error.lineno]
    return f"{f', line {lines[-1]}' if lines else ''}: {type(error).__name__}: {error}"
