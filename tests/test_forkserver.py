"""forkserver.py: a fork runs a command as `python` and torchrun would."""

import socket
import time

import pytest

import forkserver
from conftest import Script, run

RANKS = """
import os, sys
import torch.distributed as dist
dist.init_process_group("gloo")
seen = [None] * dist.get_world_size()
dist.all_gather_object(seen, (os.getpid(), os.environ["RANK"], os.environ["LOCAL_RANK"]))
if dist.get_rank() == 0:
    print(len({pid for pid, *_ in seen}), [rank for _, *rank in seen])
dist.destroy_process_group()
"""


def test_output_arguments_environment_and_name_are_those_of_the_command():
    code = "import os, sys; print(sys.argv, os.environ['COLOUR'], __name__)"
    code += "; print('!', file=sys.stderr)"
    assert run("-c", code, 1, "b", COLOUR="red") == "['-c', '1', 'b'] red __main__\n!\n"


@pytest.mark.parametrize(
    "code, expected",
    [("", 0), ("raise SystemExit(3)", 3), ("raise SystemExit('no')", 1), ("1/0", 1)],
)
def test_the_return_code(code, expected):
    script = Script("-c", code)
    printed = script.output()
    assert script.process.returncode == expected
    assert ("ZeroDivisionError" in printed) == ("/" in code) and ("no" in printed) == ("no" in code)


def test_the_return_code_of_what_ends_at_once_is_not_lost():
    """It may have arrived before the process ids are read."""
    ours, theirs = socket.socketpair()
    theirs.sendall(b"[7]\n3")
    forked = forkserver.Forked(ours, {})
    assert forked.pids == [7] and forked.wait(timeout=5) == 3


def test_what_runs_at_exit_runs():
    code = "import atexit; atexit.register(print, 'at exit'); print('before')"
    assert run("-c", code) == "before\nat exit\n"


def test_ranks_meet():
    assert run("-c", RANKS, ranks=3) == "3 [['0', '0'], ['1', '1'], ['2', '2']]\n"


def test_a_rank_that_fails_stops_the_others():
    code = "import os, time; os.environ['RANK'] == '1' and exit(5); time.sleep(100)"
    script, start = Script("-c", code, ranks=3), time.monotonic()
    script.output()
    assert script.process.returncode == 5 and time.monotonic() - start < 50


def test_forks_draw_different_random_numbers():
    code = "import random, numpy; print(random.random(), numpy.random.rand())"
    assert run("-c", code) != run("-c", code)


def test_no_module_of_the_project_is_there_before_the_script():
    code = (
        "import sys; print([name for name in ('model', 'train', 'infra') if name in sys.modules])"
    )
    assert run("-c", code) == "[]\n"
