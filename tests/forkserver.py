"""Runs the project's scripts in processes of their own, without 4 s of imports for each.

A server process imports the libraries once, nothing of the project, and forks. Each fork sets its
environment, arguments and output, then runs the real script as `__main__`, as `python script` does.
N ranks get the environment and the store that torchrun gives them. When one fails, the others are
stopped, as torchrun does.

A fork does not show how Python or torchrun start and end, and all forks of a server hash strings
alike. Tests of those use the real ones: run(..., torchrun=True) in conftest.py.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

LIBRARIES = (
    "numpy",
    "tqdm",
    "torch",
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "torch.nn.parallel",
    "torch.utils.checkpoint",
    "safetensors.torch",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen2.tokenization_qwen2",
    "transformers.models.qwen2_vl.modeling_qwen2_vl",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "transformers.models.qwen3_vl.modeling_qwen3_vl",
)
GRACE = 30  # seconds from SIGTERM to SIGKILL, as torchrun has it


# ---- the side of the tests


class Server:
    """The server process. start() asks it, by its address, for the process of a command."""

    def __init__(self):
        self.folder = tempfile.TemporaryDirectory()
        self.address = f"{self.folder.name}/socket"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.address)
        listener.listen()
        self.alive, theirs = socket.socketpair()
        files = [listener.fileno(), theirs.fileno()]
        self.process = subprocess.Popen(
            [sys.executable, __file__, *map(str, files)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=files,
            start_new_session=True,
        )
        listener.close()
        theirs.close()

    def close(self):
        self.alive.close()  # the server reads its end, and leaves
        self.process.wait()
        self.folder.cleanup()


def start(address, command, stdout, stderr, *, cwd, env, ranks=1):
    """Starts `python command` on N ranks, with its output to two open files -> Forked."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    socket.send_fds(connection, [b"fork"], [stdout.fileno(), stderr.fileno()])
    return Forked(
        connection, dict(command=[str(x) for x in command], cwd=str(cwd), env=env, ranks=ranks)
    )


class Forked:
    """The processes of one command, with the methods of subprocess.Popen that tests need.

    pids: of the ranks.  returncode: None while one runs, else that of the first rank that failed.
    """

    def __init__(self, connection, request):
        self.connection = connection
        self.returncode = None
        connection.sendall(f"{json.dumps(request)}\n".encode())
        line = b""
        while not line.endswith(b"\n"):  # and no byte of the return code, which may be next
            byte = connection.recv(1)
            assert byte, "the fork server has ended"
            line += byte
        self.pids = json.loads(line)
        self.pid = self.pids[0]

    def poll(self):
        with contextlib.suppress(TimeoutError):
            self.wait(timeout=0)
        return self.returncode

    def wait(self, timeout=None):
        """The return code. Raises TimeoutError after `timeout` seconds."""
        if self.returncode is None:
            self.connection.settimeout(1e-3 if timeout == 0 else timeout)
            line = self.connection.recv(64)
            self.returncode = json.loads(line)
        return self.returncode

    def send_signal(self, number, rank=0):
        if self.poll() is None:
            os.kill(self.pids[rank], number)

    def kill(self):
        """Ends all ranks, and waits for their end."""
        for pid in self.pids if self.poll() is None else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait()


# ---- the side of the server


def serve(listener, alive):
    """Forks a keeper for each request. Returns in the forked rank only -> (its request, files)."""
    while True:
        ready, _, _ = select.select([listener, alive], [], [])
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # keepers that have ended
                pass
        if alive in ready:
            os._exit(0)  # the tests have ended
        connection, _ = listener.accept()
        _, files, _, _ = socket.recv_fds(connection, 4, 2)
        if files and os.fork() == 0:  # without files: who asked has ended
            listener.close()
            alive.close()
            return keep(connection, *files)
        connection.close()
        for file in files:
            os.close(file)


def keep(connection, stdout, stderr):
    """What torchrun is to its ranks: forks them, waits for all, reports. Returns in a rank."""
    import torch.distributed as dist  # not above: the tests' side has no need of it

    stream = connection.makefile("rw")
    request = json.loads(stream.readline())
    ranks, env = request["ranks"], request["env"]
    listener = socket.create_server(("127.0.0.1", 0))  # a port that nobody else has
    pids, store = [], None
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            port = listener.getsockname()[1]
            for ours in (stream, connection, listener):
                ours.close()
            if ranks > 1:
                env.update(rank_environment(rank, ranks, port))
            return request, stdout, stderr
        pids.append(pid)
    if ranks > 1:
        port = listener.getsockname()[1]
        store = dist.TCPStore(
            "127.0.0.1",
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
    print(json.dumps(pids), file=stream, flush=True)
    code = wait_for(pids)
    del store
    connection.send(json.dumps(code).encode())
    os._exit(0)


def rank_environment(rank, ranks, port):
    """The variables that torchrun sets and torch.distributed reads."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the keeper serves it, as torchrun does
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def wait_for(pids):
    """Waits for all; when one fails, stops the others -> the first code that is not 0, or 0."""
    running, failed = set(pids), 0

    def send(number):
        for pid in running:
            os.kill(pid, number)

    signal.signal(signal.SIGALRM, lambda *_: send(signal.SIGKILL))
    while running:
        pid, status = os.wait()
        running.discard(pid)
        code = os.waitstatus_to_exitcode(status)
        if code and not failed:
            failed = code
            time.sleep(0.1)  # others that fail of themselves may say why
            send(signal.SIGTERM)
            signal.alarm(GRACE)
    return failed


def become(request, stdout, stderr):
    """Makes this fork the process of its command, and runs it."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for file, number in ((stdout, 1), (stderr, 2)):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    random.seed()  # a new process has a state of its own
    sys.modules["numpy"].random.seed()
    name, *arguments = request["command"]
    sys.argv = [name, *arguments]
    code = 0
    try:
        run_script(name, arguments, request["cwd"])
    except SystemExit as e:
        code = e.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    # the end of a Python process, but for 0.3 s that free what the fork shares with its server
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def run_script(name, arguments, folder):
    """As `python name arguments` in the folder."""
    if name == "-c":
        sys.path[0], sys.argv = "", ["-c", *arguments[1:]]
        exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
    elif name == "-m":
        sys.path[0], sys.argv = folder, arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(folder, name).parent)
        runpy.run_path(name, run_name="__main__")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    listener, alive = (socket.socket(fileno=int(x)) for x in sys.argv[1:])
    for library in LIBRARIES:
        importlib.import_module(library)
    # transformers' table of renamed weights: 1,076 regular expressions that every run would compile
    sys.modules["transformers.conversion_mapping"].get_checkpoint_conversion_mapping("")
    gc.collect()
    gc.freeze()  # so that a fork's collections do not touch, and copy, what it shares
    become(*serve(listener, alive))
