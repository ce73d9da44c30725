"""What torchrun starts as Python (PYTHON_EXEC): a rank, in a fork of the fork server.

    python tests/forked_python.py ADDRESS -u SCRIPT ...

See `forked_python` in conftest.py. SIGTERM, by which torchrun stops a rank, is passed on.
"""

import contextlib
import os
import signal
import sys

import forkserver


def stop(number, frame):
    with contextlib.suppress(ProcessLookupError):  # it has ended
        os.kill(process.pid, number)


address, _, *command = sys.argv[1:]
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # until there is a rank to stop
process = forkserver.start(
    address, command, sys.stdout, sys.stderr, cwd=os.getcwd(), env={**os.environ}
)
signal.signal(signal.SIGTERM, stop)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
sys.exit(process.wait())
