"""A run: its flags, its ranks, its clock, and its folder, which survives a kill at any moment.

    config.txt      the flags, as a flag file: `python train.py @RUN/config.txt --out NEW` is the same run again
    log.jsonl       one object a step; what a killed run wrote after its last checkpoint is dropped when it resumes
    samples.jsonl   all responses of two groups a step, with their rewards
    checkpoint-N/   a model folder (weights, config, tokenizer) with optimizer.pt and state.json beside. Its weights have the
                    dtype that they came in; optimizer.pt then also holds the trained ones in fp32, to resume from
    lock            held by the processes that write to the folder
"""

import argparse
import contextlib
import errno
import functools
import gc
import hashlib
import json
import math
import operator
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

import fsdp
from data import DataError
from model import ModelError, checkpoints, fingerprint, local_folder, weight_files

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

RANK, WORLD, LOCAL = (int(os.environ.get(k, default)) for k, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
# flags that load_media takes
MEDIA = ("fps", "min_frames", "min_pixels", "max_pixels", "image_max_pixels", "reader", "decode_timeout")


# ---- flags

HOLDS = {"above": operator.gt, "at least": operator.ge, "at most": operator.le, "below": operator.lt}


def number(parser, name, default, within, text):
    """The value of a numeric flag from its text: of the default's kind, finite unless the default is not, and within bounds
    such as "above 0, at most 1". Anything else is the parser's error, which names the flag, the value and the bounds."""
    try:
        x = type(default)(text)
    except ValueError:
        x = math.nan
    if x != x or (abs(x) == math.inf and math.isfinite(default)):
        kind = "whole" if isinstance(default, int) else "finite"
        parser.error(f"--{name} {text}: expected a {kind} number, {within}")
    for words, limit in (bound.rsplit(" ", 1) for bound in within.split(", ")):
        if not HOLDS[words](x, float(limit)):
            parser.error(f"--{name} {x}: expected {within}")
    return x


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose error is one line, of rank 0, without the usage. @FILE stands for the words of a flag file."""

    def __init__(self, *a, **kw):
        super().__init__(*a, **kw)
        self.places = {}  # {word: [(file and line, or "" for the command line; the word after it), ...]}

    def error(self, message):
        words = (word.strip(":,'").split("=")[0] for word in message.split())
        found = next((self.places[word] for word in words if word in self.places), [("", "")])
        place = next((place for place, value in reversed(found) if value in message), found[-1][0])
        self.exit(2, f"error: {place}{message}\n" if RANK == 0 else None)

    def parse_known_args(self, args=None, namespace=None):
        self.places.clear()
        return super().parse_known_args(self._expand(sys.argv[1:] if args is None else args, "", ()), namespace)

    def _expand(self, words, place, inside):
        """The words with those of the flag files that they name. place: where they stand; inside: the files around them."""
        out = []
        for word, following in zip(words, [*words[1:], ""]):
            if not word.startswith("@"):
                flag, equals, value = word.partition("=")
                self.places.setdefault(flag, []).append((place, value if equals else following))
                out.append(word)
                continue
            file = Path(word[1:])
            if file.resolve() in inside:
                self.error(f"{place}{word}: a flag file that includes itself")
            try:
                lines = flag_words(file)
            except DataError as e:
                self.error(f"{place}{e}")
            for i, more in lines.items():
                out += self._expand(more, f"{file}, line {i}: ", (*inside, file.resolve()))
        return out


def flag_words(file):
    """The lines of a flag file -> {number, from 1: its words}. Quotes are those of a shell, # begins a comment, and a backslash
    is itself, as in a path of Windows. Raises DataError, which names the file and the line."""
    found = {}
    for i, line in enumerate(read_config(file).splitlines(), 1):
        lexer = shlex.shlex(line, posix=True)
        lexer.whitespace_split, lexer.escape = True, ""
        try:
            found[i] = list(lexer)
        except ValueError as e:
            raise DataError(f"{file}, line {i}: cannot be read: {e}: {line[:80]!r}") from e
        if "--" in found[i]:
            raise DataError(f"{file}, line {i}: -- is no flag: {line[:80]!r}")
    return found


def flag_parser(doc, **kw):
    """A parser for @FILE flag files, one flag a line, # begins a comment; no flag may be abbreviated
    -> (parser, add(group, name, default, help), flag(group, name, help)).

    The default tells the type. within: the bounds of a number (see number), or of each number of a list.
    """
    p = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kw)
    p._negative_number_matcher = re.compile(r"-\.?\d|-inf|-nan")  # -1e-3 is a value too, which argparse takes for a flag

    def add(group, name, default, help, within="at least 0", **kw):
        one = default[0] if isinstance(default, list) else default
        if isinstance(one, (int, float)):
            kw["type"] = functools.partial(number, p, name, one, within)
        if default not in (None, ""):
            help += " (default: %(default)s)"
        group.add_argument(f"--{name}", default=default, help=help, **kw)

    def flag(group, name, help):
        group.add_argument(f"--{name}", action="store_true", help=help)

    return p, add, flag


def media_flags(p, add, *, fps, max_pixels, max_prompt):
    """The flags of media and prompts, with a script's own defaults -> their group."""
    g = p.add_argument_group("media and prompts")
    add(g, "fps", fps, "frames shown for each second of video, at most", "above 0")
    add(g, "min_frames", 4, "at least this many frames, whatever --fps says", "at least 2")
    add(g, "min_pixels", 4 * 28 * 28, "a smaller frame is scaled up", "at least 1")
    add(g, "max_pixels", max_pixels, "of a video frame; a larger one is scaled down", "at least 1")
    add(g, "image_max_pixels", 256 * 28 * 28, "of an image", "at least 1")
    add(g, "max_prompt", max_prompt, "tokens; a sample with a longer prompt is refused and counted, never cut", "at least 1")
    add(g, "reader", "av", "of videos: av shows the right frames or refuses a file; decord can show wrong ones (README)",
        choices=("av", "decord"))
    add(g, "decode_timeout", 60.0, "seconds for one video, after which its decoder is killed and the sample refused",
        "above 0, at most 86400")
    add(g, "workers", 2, "threads that load media ahead, each with a decoder process", "at least 1")
    return g


def ordered(p, args, *pairs):
    """Ends the program unless, of each pair of flags, the second is at least the first."""
    for low, high in pairs:
        if getattr(args, high) < getattr(args, low):
            p.error(f"--{high} {getattr(args, high)}: expected at least {getattr(args, low)}, the value of --{low}")


def peek(argv, **defaults):
    """A few flags of a command line, whatever its others are -> namespace."""
    p, add, _ = flag_parser("", add_help=False)
    for name, default in defaults.items():
        add(p, name, default, "")
    return p.parse_known_args(argv)[0]


def flag_lines(args):
    """The flags as the lines of a flag file."""
    flags = {k: v for k, v in vars(args).items() if v is not None and v is not False and k != "resume"}
    return [f"--{k}" if v is True else f"--{k} {shlex.quote(str(v))}" for k, v in flags.items()]


def by_name(lines):
    """The lines of a flag file, or comments such as "# records 1234", by name: "prompts", "# records"."""
    words = {line: line.removeprefix("--").split() for line in lines}
    return {" ".join(w[:2]) if w[0] == "#" else w[0]: line for line, w in words.items() if w}


def read_config(file):
    """The text of a flag file, in UTF-8 with or without a byte order mark. Raises DataError, which names the file."""
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise DataError(f"{file}: not UTF-8 text, expected flags, one a line ({e})") from e
    except OSError as e:
        raise DataError(f"{file}: cannot be read: {e.strerror}") from e


def refuse_changes(config, lines, names, defaults=()):
    """Ends the program if a flag or comment that is named differs between the file of an earlier run and `lines`.
    defaults: the lines of flags that the file may not have, as it is older than they are; comments it need not have."""
    now = by_name(lines)
    before = by_name(defaults) | by_name(read_config(config).splitlines())
    was, now = ([line for name, line in a.items() if b.get(name) != line and name in names and (name in b or name[0] != "#")]
                for a, b in ((before, now), (now, before)))
    if was or now:
        raise SystemExit(f"error: {config.parent} was run otherwise, so it cannot be resumed: it had {', '.join(was) or 'not'}; "
                         f"now {', '.join(now) or 'not'}. Another --out starts anew, and so does deleting that folder")


def digest(path):
    """Hex digits that tell a file's content from others. Raises DataError."""
    try:
        return hashlib.blake2b(Path(path).read_bytes(), digest_size=12).hexdigest()
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e}") from e


@contextlib.contextmanager
def naming(path):
    """Around the writing of a file: an OSError that names no file, as that of a full disk, names this one."""
    try:
        yield
    except OSError as e:
        if e.filename is not None:
            raise
        raise OSError(e.errno, e.strerror, str(path)) from e


def write_whole(path, text, errors="strict"):
    """Writes a file under another name and moves it into place: a file that has its name is whole. errors: as in open, for
    what UTF-8 does not have. Raises OSError, which names the file; nothing is left under the other name."""
    partial = Path(f"{path}.partial")
    try:
        with naming(path):
            partial.write_text(text, encoding="utf-8", errors=errors)
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


# ---- ranks, clock, log

def start_ranks(patience):
    """Joins the other processes of torchrun, if there are any -> this rank's device. patience: a timedelta, for each wait."""
    if WORLD > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(LOCAL)
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=patience)
    return torch.device("cuda", LOCAL) if torch.cuda.is_available() else torch.device("cpu")


def stop_ranks():
    """Leaves the other processes. The group's threads end with the last reference to it, which a cycle may hold; a thread that
    outlives the interpreter aborts the process."""
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()


@contextlib.contextmanager
def ranks(patience, stopped="stopped"):
    """start_ranks and stop_ranks around the body; an error that ends it is one line, from the rank that fails first.
    stopped: the line for ctrl-C. What is no error of the user's has its traceback, also from one rank only."""
    device = start_ranks(patience)
    try:
        yield device
    except (DataError, ModelError, OSError) as e:  # an OSError names its file
        raise SystemExit(f"error: {e}" if _first_to_fail() else 1) from e
    except KeyboardInterrupt:
        if _first_to_fail():
            print(f"\n{stopped}", file=sys.stderr)
        raise SystemExit(130) from None
    except SystemExit as e:
        if isinstance(e.code, str) and not _first_to_fail():
            raise SystemExit(1) from None
        raise
    except Exception:  # where another rank has failed first, only the news that it has left
        if not _first_to_fail():
            raise SystemExit(1) from None
        raise
    finally:
        stop_ranks()


def _first_to_fail():
    if WORLD == 1:
        return True
    try:
        return dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    except RuntimeError:  # rank 0 kept the count, and has left
        return False


def seed(*parts):
    """A seed from the run's seed, the step, and whatever else tells this random choice from all others."""
    return random.Random(" ".join(map(str, parts))).getrandbits(62)


def gather(x, every=1):
    """The objects of all ranks, as a list; every: of the first rank of every so many, which all have the same."""
    if WORLD == 1:
        return [x]
    out = [None] * WORLD
    dist.all_gather_object(out, x)
    return out[::every]


def commit():
    """The version of the code, with -dirty where files differ from it."""
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"]
    with contextlib.suppress(OSError):  # no git
        return subprocess.run(describe, capture_output=True, text=True).stdout.strip() or "unknown"
    return "unknown"


def say(text):
    """Prints a line, on rank 0, above the progress bar."""
    if RANK == 0:
        tqdm.write(text)
        sys.stdout.flush()


seconds = {}  # of the phases of the step


@contextlib.contextmanager
def timed(phase):
    """Adds the seconds of its body to the phase, the GPU's work included."""
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start


def append(path, objects):
    """Appends objects to a .jsonl file. Raises OSError, which names the file."""
    with naming(path), open(path, "a", encoding="utf-8") as f:
        f.writelines(json.dumps(_finite(o)) + "\n" for o in objects)


def _finite(o):
    """NaN and infinity as null: JSON has neither."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in o.items()}


# ---- the run folder

# what a resumed run may change: where things are, how long it runs, what it shows and keeps, and what it costs
MAY_CHANGE = ("out", "resume", "data", "media_root", "eval_data", "steps", "log_every", "eval_every", "save_every", "keep",
              "workers", "decode_timeout", "row_tokens", "cuda_graph", "checkpointing", "fsdp", "sp", "embedding_cache",
              "cache_gb")


def lock(file, *, shared=False, wait=False):
    """Locks an open file until it is closed -> whether other processes allow it. shared: with others that share it; on Windows,
    whose locks are one process's, nothing is done for a shared one. wait: until they allow it."""
    try:
        if fcntl:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        elif not shared:
            import msvcrt
            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
    except OSError as e:
        if e.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False
        if e.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        if not shared:
            say(f"{file.name}: this file system has no locks, so nothing keeps other processes from writing there too")
    return True


@contextlib.contextmanager
def claimed(out):
    """The folder `out` is made, and is this run's inside. Ends the program where other processes are writing to it: ranks of a
    run whose torchrun was killed can live on. Every rank must enter."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / "lock", "a+")
    except OSError as e:
        raise SystemExit(f"error: the run folder {out} cannot be written: {e}") from e
    with file:
        if RANK == 0 and not lock(file):
            raise SystemExit(f"error: other processes are writing to {out}: wait for them, or end them")
        gather(None)
        lock(file, shared=True, wait=True)
        yield


def _rewind(path, step):
    """Drops the entries after `step`, and a half-written last line. Lines that cannot be read are dropped, too, and counted on
    the console; so is a file that should be there, as the step is not the first."""
    if not path.exists():
        if step >= 0:
            say(f"{path}: no such file, so what was logged up to step {step} is lost; the log begins again")
        return
    kept, unreadable = [], 0
    *lines, _ = path.read_bytes().split(b"\n")
    for line in lines:
        try:
            text = line.decode()
            if json.loads(text)["step"] <= step:
                kept.append(text + "\n")
        except (ValueError, KeyError, TypeError):
            unreadable += 1
    if unreadable:
        say(f"{path}: {unreadable} of {len(lines)} lines hold no entry of a step; they are dropped")
    write_whole(path, "".join(kept))


def torn(checkpoint):
    """Why a checkpoint cannot be resumed from, or None: a file that is missing or cut off, as a disk that was full or lost its
    power leaves it. Sizes are compared, not every byte. Raises OSError for a file that is there and cannot be read."""
    file = checkpoint / "state.json"
    try:
        if checkpoint.name != f"checkpoint-{json.loads(file.read_bytes())['step']:06d}":
            return "state.json: of another step"
        file = checkpoint / "config.json"
        json.loads(file.read_bytes())
        file = checkpoint / "optimizer.pt"
        zipfile.ZipFile(file).close()
        file = checkpoint / "model.safetensors.index.json"
        weights = weight_files(checkpoint)
        for file in weights:
            with safe_open(file, "pt"):
                pass
    except FileNotFoundError:
        return f"{file.name}: no such file"
    except (ValueError, TypeError, KeyError, zipfile.BadZipFile, SafetensorError) as e:
        return f"{file.name}: {e}"
    return None if weights else "no weights (*.safetensors)"


def _newest_whole(out):
    """The newest checkpoint of a run that is whole, or None if it has none -> (checkpoint, [(newer one, why it is torn), ...]).
    Ends the program if all are torn."""
    found = []
    for checkpoint in reversed(checkpoints(out)):
        if (reason := torn(checkpoint)) is None:
            return checkpoint, found
        found.append((checkpoint, reason))
    if found:
        raise SystemExit(f"error: {out}: no checkpoint is whole ({'; '.join(f'{c.name}: {why}' for c, why in found)}). "
                         "Delete them to start anew")
    return None, []


def open_run(args, defaults):
    """Opens the claimed folder args.out -> the checkpoint to resume from, or None. Ends the program rather than write over a
    run or resume another one. A folder without a checkpoint holds nothing to resume: it is written over.
    defaults: the flags of a run that sets none."""
    checkpoint = None
    if RANK == 0:
        out = Path(args.out)
        if not args.resume and checkpoints(out):
            raise SystemExit(f"error: {out} holds a run: --resume goes on with it, another --out starts a new one")
        checkpoint, torn_ones = _newest_whole(out)
        lines = [f"# commit {commit()}", f"# records {digest(args.data)}", *flag_lines(args)]
        if args.beta and args.algo != "sft":
            lines.insert(2, f"# reference {fingerprint(local_folder(args.model))}")
        if checkpoint:
            same = {*vars(args), "# records", "# reference"} - {*MAY_CHANGE}
            same |= {"steps"} if args.schedule == "cosine" else set()  # the learning rate depends on it
            refuse_changes(out / "config.txt", lines, same, flag_lines(defaults))
        elif args.resume or (out / "log.jsonl").exists():
            say(f"{out}: no checkpoint to resume from, so the run starts anew")
        for bad, reason in torn_ones:
            aside = bad.with_name(f"{bad.name}.torn")
            say(f"{bad}: {reason}. It is moved to {aside.name}; the run resumes from {checkpoint.name}")
            shutil.rmtree(aside, ignore_errors=True)
            bad.rename(aside)
        for partial in out.glob("checkpoint-*.partial"):  # what a kill in mid-write leaves
            shutil.rmtree(partial)
        write_whole(out / "config.txt", "\n".join(lines) + "\n")
        for name in ("log.jsonl", "samples.jsonl"):
            _rewind(out / name, int(checkpoint.name.split("-")[1]) if checkpoint else -1)
    return gather(checkpoint)[0]


@contextlib.contextmanager
def stop_signals():
    """Inside, the first SIGTERM or ctrl-C is only noted: its number, in the list that is yielded. A second one ends the process
    at once. Signals that are ignored (a shell's background jobs) stay so, and all do in another thread than the main one."""
    noted, in_main = [], threading.current_thread() is threading.main_thread()
    signals = [s for s in (signal.SIGINT, signal.SIGTERM) if in_main and signal.getsignal(s) is not signal.SIG_IGN]

    def note(number, _):
        noted.append(number)
        for s in signals:
            signal.signal(s, signal.SIG_DFL)
        if RANK == 0:
            os.write(2, b"\nstopping after this step and its checkpoint; the same signal again stops at once\n")

    before = [signal.signal(s, note) for s in signals]
    try:
        yield noted
    finally:
        for s, handler in zip(signals, before):
            signal.signal(s, handler)


def resume_command():
    """The command of this process, with --resume."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", WORLD))
    nodes = f"--nnodes {WORLD // local} " if WORLD > local else ""
    launcher = f"torchrun {nodes}--nproc_per_node {local} --" if WORLD > 1 else "python"
    return f"{launcher} {shlex.join(sys.argv)}" + ("" if "--resume" in sys.argv else " --resume")


@contextlib.contextmanager
def resumable():
    """Inside, an OSError ends the program with one line: the error, and the command that resumes."""
    try:
        yield
    except OSError as e:
        raise SystemExit(f"error: {e}; to resume: {resume_command()}") from e


def _disk_is_full(folder):
    """Words for an error if less than 1 MB is free, else "": torch and safetensors do not always say why a write failed."""
    free = shutil.disk_usage(folder).free
    return f" (no space left: {free} bytes are free)" if free < 1e6 else ""


def _sync(path):
    """Brings a file, or a folder's list of names, to the disk."""
    if path.is_dir() and os.name == "nt":  # which opens no folders
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as e:
        if e.errno != errno.EINVAL:  # a network file system that does not sync folders
            raise
    finally:
        os.close(handle)


def save(policy, optimizer, step, args):
    """Writes checkpoint-N under another name and moves it into place, on rank 0: a checkpoint that has its name is whole.
    Every rank must call it: what is sharded is gathered. Raises ModelError for a policy whose logits are not finite."""
    if not policy.is_sound():
        raise ModelError(f"step {step}: the policy's logits are not finite (a lower --lr?), so no checkpoint of it is saved")
    weights, moments = fsdp.full_state(policy, optimizer)
    if RANK:
        return
    folder = Path(args.out) / f"checkpoint-{step:06d}"
    partial = folder.with_suffix(".partial")
    # all randomness is a function of (seed, step, position in the step): these are the state of every generator
    state = {"step": step, "seed": args.seed, "data_position": step * args.prompts}
    try:
        shutil.rmtree(partial, ignore_errors=True)
        policy.save(partial, weights)
        torch.save(moments, partial / "optimizer.pt")
        (partial / "state.json").write_text(json.dumps(state))
        for path in (*partial.iterdir(), partial):  # a power cut must not leave the name without the content
            _sync(path)
        partial.rename(folder)
        _sync(folder.parent)
    except (OSError, RuntimeError, SafetensorError) as e:  # a full disk is a RuntimeError in torch, the third in safetensors
        full = _disk_is_full(folder.parent)
        shutil.rmtree(partial, ignore_errors=True)
        before = "The checkpoint before it is whole; --resume resumes from there"
        rest = before if checkpoints(folder.parent) else "The run has no checkpoint before it"
        raise SystemExit(f"error: {folder} could not be written: {e}{full}. {rest}") from e
    for old in checkpoints(folder.parent)[: -args.keep]:
        shutil.rmtree(old, ignore_errors=True)
