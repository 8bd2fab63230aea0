"""Ranks that talk over gloo, started once for all tests of a module."""

import contextlib
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Listener, wait
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("worker.py")


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the mark in this hook
def pytest_collection_modifyitems(items):
    """One worker of pytest-xdist runs all of these, so that the ranks are started once."""
    for item in items:
        if item.path.parent == WORKER.parent:
            item.add_marker(pytest.mark.xdist_group("ranks"))


class World:
    """Some processes of one process group; a call is made on all of them."""

    def __init__(self, size, timeout=300):
        self.size, self.timeout = size, timeout
        self._folder = tempfile.TemporaryDirectory()
        address = f"{self._folder.name}/socket"
        arguments = [sys.executable, str(WORKER), address]
        with Listener(address) as listener:
            listener._listener._socket.settimeout(timeout)
            store = f"{self._folder.name}/store"
            self.processes = [
                subprocess.Popen([*arguments, str(rank), str(size), store]) for rank in range(size)
            ]
            self._pipes = [None] * size
            for _ in range(size):
                pipe = listener.accept()
                self._pipes[pipe.recv()] = pipe

    def __call__(self, function, *args, **kwargs):
        """Call a function of a test module on all ranks; return what each of them returned."""
        request = (function.__code__.co_filename, function.__name__, args, kwargs)
        for pipe in self._pipes:
            pipe.send(request)
        answers = [None] * self.size
        deadline = time.monotonic() + self.timeout
        while None in answers:
            waiting = {p: r for r, p in enumerate(self._pipes) if answers[r] is None}
            ready = wait(list(waiting), max(0, deadline - time.monotonic()))
            if not ready:
                self.close()
                pytest.fail(f"ranks {sorted(waiting.values())} hang in {function.__name__}{args}")
            for pipe in ready:
                answers[waiting[pipe]] = received(pipe)
        for rank, (fine, answer) in enumerate(answers):
            if not fine:
                pytest.fail(f"rank {rank}: {answer}")
        return [answer for _, answer in answers]

    def close(self):
        for pipe in self._pipes:
            with contextlib.suppress(OSError, BrokenPipeError):
                pipe.send(None)
        for process in self.processes:
            end(process)
        self._folder.cleanup()


def received(pipe):
    try:
        return pipe.recv()
    except (EOFError, ConnectionError):
        return False, "this rank died"


def end(process):
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.fixture(scope="package")
def worlds():
    """``worlds(n)`` is a :class:`World` of n ranks, a new one where a rank of the last has died."""
    known = {}

    def get(size):
        if size not in known or any(p.poll() is not None for p in known[size].processes):
            known[size] = World(size)
        return known[size]

    yield get
    for world in known.values():
        world.close()


@pytest.fixture
def world2(worlds):
    return worlds(2)


@pytest.fixture
def world4(worlds):
    return worlds(4)


@pytest.fixture
def torchrun():
    """Runs ``normwise`` with some arguments on two processes that torchrun starts."""

    def run(*arguments, **options):
        words = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "normwise",
        ]
        command = [sys.executable, *words, *arguments]
        done = subprocess.run(command, timeout=300, capture_output=True, text=True, **options)
        assert done.returncode == 0, done.stderr
        return done

    return run
