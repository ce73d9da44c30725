"""What torchrun starts as Python (PYTHON_EXEC): a rank, in a fork of the fork server.

    python tests/forked_python.py ADDRESS -u SCRIPT ...

See `forked_python` in conftest.py. SIGTERM, by which torchrun stops a rank, is passed on.
"""

import os
import signal
import sys

import forkserver

address, _, *command = sys.argv[1:]
process = forkserver.start(
    address, command, sys.stdout, sys.stderr, cwd=os.getcwd(), env={**os.environ}
)
signal.signal(signal.SIGTERM, lambda number, frame: os.kill(process.pid, number))
sys.exit(process.wait())
