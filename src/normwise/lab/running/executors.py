"""Where cells run: one after the other, in several processes, or on a Ray cluster."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from normwise.lab.errors import UsageError
from normwise.lab.parallel import ALONE, Processes
from normwise.lab.recipes.schema import Cell
from normwise.lab.running.cell import run_cell

__all__ = ["EXECUTORS", "check_parallel", "run_cells"]

EXECUTORS = ("local", "ray")
Observer = Callable[[Cell, dict[str, Any]], None]


def run_cells(
    cells: Sequence[Cell],
    out: Path,
    root: Path,
    *,
    jobs: int = 1,
    executor: str = "local",
    device: str = "cpu",
    observe: Observer = lambda cell, result: None,
    processes: Processes = ALONE,
) -> list[dict[str, Any]]:
    """Run cells; those that are finished are only read.

    Args:
        cells: what to run.
        out: the output folder, which on a cluster all machines must see under this name.
        root: where the data sets are.
        jobs: how many at once on this machine (default: 1).
        executor: ``local``, or ``ray`` for an existing Ray cluster (default: local).
        device: where to compute (default: ``"cpu"``).
        observe: called with each cell and its result as it is finished.
        processes: those that train one cell after the other together, each of which calls this
            (default: one alone).

    Returns:
        The results in the order of the cells. They do not depend on the executor.

    Raises:
        UsageError: as :func:`run_cell`, or if there is no Ray or no cluster, or for several jobs
            or Ray with ``processes``. What is running when it is raised is stopped, and resumes
            when the same is run again.
    """
    check_parallel(processes.kind, jobs, executor)
    out, root = out.absolute(), root.absolute()
    if executor == "ray":
        return _on_ray(cells, out, root, device, observe)
    if jobs == 1:
        results = []
        for cell in cells:
            results.append(run_cell(cell, out, root, device=device, processes=processes))
            observe(cell, results[-1])
        return results
    return _in_processes(cells, out, root, jobs, device, observe)


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


def _ignore_ctrl_c() -> None:
    """Leave Ctrl-C, which a terminal sends to every process, to the one that can tell the user."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _in_processes(
    cells: Sequence[Cell], out: Path, root: Path, jobs: int, device: str, observe: Observer
) -> list[dict[str, Any]]:
    # Fork would copy the state of torch's threads; a fresh process starts like any other run.
    context = get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_ignore_ctrl_c) as pool:
        futures: dict[Future[dict[str, Any]], Cell] = {
            pool.submit(run_cell, cell, out, root, device=device): cell for cell in cells
        }
        left = set(futures)
        try:
            while left:
                done, left = wait(left, return_when=FIRST_COMPLETED)
                for future in done:
                    observe(futures[future], future.result())
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


def _on_ray(
    cells: Sequence[Cell], out: Path, root: Path, device: str, observe: Observer
) -> list[dict[str, Any]]:
    try:
        # Its types, where it is installed, do not know keyword arguments of remote functions.
        ray: Any = import_module("ray")
    except ImportError:
        raise UsageError('--executor ray needs Ray: pip install "normwise[ray]"') from None
    if not ray.is_initialized():
        try:
            ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), log_to_driver=False)
        except ConnectionError:
            raise UsageError(
                "no Ray cluster found: start one with `ray start --head`, or let RAY_ADDRESS name "
                "one"
            ) from None
    gpus = 1 if device.startswith("cuda") else 0
    remote = ray.remote(num_cpus=1, num_gpus=gpus)(run_cell)
    references = {remote.remote(cell, out, root, device=device): cell for cell in cells}
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
            observe(references[reference], results[reference])
    return [results[reference] for reference in references]
