"""A Ray head that does not answer is named, and soon."""

import contextlib
import os
import socket
import subprocess
import sys
import threading

import pytest

from normwise.lab.running import executors

SLOW = pytest.mark.slow

# In a process of its own: Ray ends the one that it is in when it gives up.
CODE = """
import sys
from normwise import cli
from normwise.lab.running import executors
executors._RAY_SECONDS = 3
sys.exit(cli.main(["paper", "run", "digits", "--executor", "ray", "--out", sys.argv[1]]))
"""


def silent(listener):
    """Connections are taken, and nothing is said."""


def rejecting(listener):
    """Connections are closed as soon as they are made."""
    with contextlib.suppress(OSError):  # until the listener is closed
        while True:
            listener.accept()[0].close()


@pytest.mark.parametrize(
    "head",
    [silent, pytest.param(rejecting, marks=SLOW), pytest.param(None, marks=SLOW)],
)
def test_a_head_that_does_not_answer_is_named(head, tmp_path):
    pytest.importorskip("ray", reason="needs Ray")
    assert executors._RAY_SECONDS <= 30
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        if head is None:
            listener.close()
        else:
            threading.Thread(target=head, args=[listener], daemon=True).start()
        done = subprocess.run(
            [sys.executable, "-c", CODE, str(tmp_path)],
            env=os.environ | {"RAY_ADDRESS": address},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("normwise: error")]
    assert f"no Ray cluster at '{address}'" in line
    assert "ray start --head" in line
