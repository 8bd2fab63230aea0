"""Where cells run: one after the other, in several processes, or on a Ray cluster."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context, parent_process
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

from normwise.lab.errors import Damaged, UsageError
from normwise.lab.parallel import ALONE, Processes
from normwise.lab.recipes.schema import RecipeCell
from normwise.lab.running.cell import (
    CHECKPOINT_SECONDS,
    OutOfTime,
    check_device,
    config_of,
    run_cell,
)
from normwise.lab.running.events import Event, Finished, Observer, Started, ignore
from normwise.lab.running.graphs import check_graphs, run_as_graphs
from normwise.lab.trust import trusting

__all__ = ["EXECUTORS", "check_parallel", "check_trust", "run_cells"]

EXECUTORS = ("local", "ray", "graphs")
_RAY_SECONDS = 25


@dataclass(frozen=True)
class _Work:
    """All that a process needs besides the cell; can be sent to it.

    Args:
        out, root, device, checkpoint_seconds, trust, until: as of :func:`run_cell`.
        place: the folder in which modules and data of the user's are found.
        observe: called where the cell is trained.
    """

    out: Path
    root: Path
    device: str
    checkpoint_seconds: float
    trust: tuple[str, ...]
    until: float
    place: Path
    observe: Observer

    def __call__(self, cell: RecipeCell, processes: Processes = ALONE) -> dict[str, Any]:
        """Run a cell; one that cannot go on from its files is skipped, with the reason."""
        try:
            return run_cell(
                cell,
                self.out,
                self.root,
                device=self.device,
                checkpoint_seconds=self.checkpoint_seconds,
                processes=processes,
                observe=self.observe,
                trust=self.trust,
                until=self.until,
            )
        except Damaged as error:
            return {"status": "skipped", "error": str(error)}
        except OutOfTime:
            return {"status": "unfinished"}


def run_cells(
    cells: Sequence[RecipeCell],
    out: Path,
    root: Path,
    *,
    jobs: int = 1,
    executor: str = "local",
    device: str = "cpu",
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    observe: Observer = ignore,
    processes: Processes = ALONE,
    trust: Sequence[str] = (),
    until: float = math.inf,
) -> list[dict[str, Any]]:
    """Run cells; those that are finished are only read.

    A cell with a damaged file is skipped: its result has the status ``skipped`` and an error. One
    for which time is over has the status ``unfinished``, and goes on when the same is run again.

    Args:
        cells: what to run.
        out: the output folder, which on a cluster all machines must see under this name.
        root: where the data sets are.
        jobs: how many at once on this machine (default: 1).
        executor: ``local``; ``ray`` for an existing Ray cluster; or ``graphs``, which trains
            ``jobs`` cells in this process, their steps as CUDA graphs side by side (default:
            local).
        device: where to compute (default: ``"cpu"``).
        checkpoint_seconds: the most time between checkpoints, in seconds (default: 60).
        observe: called with what happens (default: nothing is); with several jobs not with
            :class:`Started`, on Ray with :class:`Finished` alone.
        processes: those that train one cell after the other together, each of which calls this
            (default: one alone).
        trust: the modules of the user's whose code the cells may run (default: none).
        until: when cells stop, on the clock of :func:`time.time`; not with ``processes`` (default:
            never).

    Returns:
        The results in the order of the cells. They do not depend on the executor.

    Raises:
        UsageError: as :func:`run_cell`, or if there is no Ray or no cluster, or for several jobs
            or Ray with ``processes``. What is running when it is raised is stopped, and resumes
            when the same is run again.
    """
    check_parallel(processes.kind, jobs, executor)
    if executor != "ray":
        check_device(device)
    if executor == "graphs":
        check_graphs(cells)
    check_trust(cells, trust)
    # Those that start from another training come when all others are finished.
    waves = [[c for c in cells if (c.start is None) == first] for first in (True, False)]
    given = out.absolute(), root.absolute(), device, checkpoint_seconds, tuple(trust)
    where = *given, until, Path.cwd()
    results: dict[str, dict[str, Any]] = {}
    for wave in filter(None, waves):
        if executor == "ray":
            made = _on_ray(wave, _Work(*where, ignore), observe)
        elif executor == "graphs":
            made = run_as_graphs(
                wave, out, root, jobs=jobs, device=device, observe=observe, until=until
            )
        elif jobs > 1:
            made = _in_processes(wave, _Work(*where, _relay), jobs, observe)
        else:
            made = _in_turn(wave, _Work(*where, observe), observe, processes)
        results |= {cell.folder: result for cell, result in zip(wave, made, strict=True)}
    return [results[cell.folder] for cell in cells]


def _in_turn(
    cells: Sequence[RecipeCell], work: _Work, observe: Observer, processes: Processes
) -> list[dict[str, Any]]:
    results = []
    for cell in cells:
        results.append(work(cell, processes))
        observe(Finished(cell, results[-1]))
    return results


def check_trust(cells: Sequence[RecipeCell], trust: Sequence[str]) -> None:
    """Raise ``UsageError`` if a cell would run code of a module that is not in ``trust``."""
    with trusting(trust):
        for cell in cells:
            config_of(cell, "cpu")


def check_parallel(parallel: str | None, jobs: int, executor: str) -> None:
    """Raise ``UsageError`` for several jobs or Ray with ``--parallel``."""
    if parallel is None:
        return
    for option, value, needed in (("--jobs", jobs, 1), ("--executor", executor, "local")):
        if value != needed:
            raise UsageError(
                f"{option} {value} is not allowed with --parallel: must be {needed}, since all "
                "processes train one cell together"
            )


# In a worker: where its events go.
_to_parent: SimpleQueue[Event] | None = None


def _begin_worker(queue: SimpleQueue[Event]) -> None:
    """Leave Ctrl-C, which a terminal sends to every process, to the parent; end when it does."""
    global _to_parent
    _to_parent = queue
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _relay(event: Event) -> None:
    """Tell the parent; a monitor stays where it is."""
    if _to_parent is not None and not isinstance(event, Started):
        _to_parent.put(event)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # nothing is lost: the cell goes on from its checkpoint


def _in_processes(
    cells: Sequence[RecipeCell], work: _Work, jobs: int, observe: Observer
) -> list[dict[str, Any]]:
    # Fork would copy the state of torch's threads; a fresh process starts like any other run.
    context = get_context("spawn")
    events = context.SimpleQueue()

    def show() -> None:
        while not events.empty():
            observe(events.get())

    with ProcessPoolExecutor(
        jobs, mp_context=context, initializer=_begin_worker, initargs=(events,)
    ) as pool:
        futures: dict[Future[dict[str, Any]], RecipeCell] = {
            pool.submit(work, cell): cell for cell in cells
        }
        left = set(futures)
        try:
            while left:
                done, left = wait(left, timeout=0.1, return_when=FIRST_COMPLETED)
                show()
                for future in done:
                    observe(Finished(futures[future], future.result()))
        except BrokenProcessPool:
            raise UsageError(
                "a process that trained was killed (out of memory?): run the same command again to "
                "go on, perhaps with fewer --jobs"
            ) from None
        except BaseException:
            # Those that train are stopped at once, and their cells resume; shutdown forgets them.
            workers = list(pool._processes.values())
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in workers:
                worker.terminate()
            raise
        return [future.result() for future in futures]


def _connect_to_ray() -> Any:
    try:
        # Its types, where it is installed, do not know keyword arguments of remote functions.
        ray: Any = import_module("ray")
    except ImportError:
        raise UsageError('--executor ray needs Ray: pip install "normwise[ray]"') from None
    if ray.is_initialized():
        return ray
    address = os.environ.get("RAY_ADDRESS", "auto")
    # A head that is dead or does not answer keeps Ray waiting far longer than a user does, in
    # threads that bring a process down when it ends. So a process of its own asks first.
    code = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False)"
    try:
        asked = subprocess.run(
            [sys.executable, "-c", code, address],
            capture_output=True,
            text=True,
            timeout=_RAY_SECONDS,
        )
        lines = asked.stderr.strip().splitlines() or ["no reason"]
        reason = lines[-1] if asked.returncode else None
    except subprocess.TimeoutExpired:
        reason = f"no answer within {_RAY_SECONDS} s"
    if reason is not None:
        raise UsageError(
            f"no Ray cluster at {address!r} ({reason}): start one with `ray start --head`, or let "
            "RAY_ADDRESS name one"
        )
    ray.init(address=address, log_to_driver=False)
    return ray


def _run(work: _Work, cell: RecipeCell) -> dict[str, Any]:
    os.chdir(work.place)  # a worker of Ray's begins elsewhere
    return work(cell)


def _on_ray(cells: Sequence[RecipeCell], work: _Work, observe: Observer) -> list[dict[str, Any]]:
    ray = _connect_to_ray()
    gpus = 1 if work.device.startswith("cuda") else 0
    remote = ray.remote(num_cpus=1, num_gpus=gpus)(_run)
    references = {remote.remote(work, cell): cell for cell in cells}
    left = list(references)
    results = {}
    while left:
        done, left = ray.wait(left)
        for reference in done:
            try:
                results[reference] = ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                cause = error.cause
                raise cause if isinstance(cause, UsageError) else error from None
            observe(Finished(references[reference], results[reference]))
    return [results[reference] for reference in references]
