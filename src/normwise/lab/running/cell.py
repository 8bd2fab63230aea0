"""One cell: a training that can be killed anywhere and goes on to the same bits.

Why resuming is exact: what a step draws depends on the seed and the number of the step alone (each
step seeds its generators anew), the learning rate depends on the number of the step alone, and the
rest of the state (weights, buffers, the optimizer's moments, the loss summed over the epoch so far)
is in the checkpoint. No generator's state and no place in a stream has to be kept.

Several processes may train one cell together. Each does all that is below, on its part of every
batch; the first of them alone reads and writes the folder, but for the checkpoint, which all read.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normwise.decay import L2, DecayScheduler, Decoupled, EpsilonShiftedL2, Policy, Window
from normwise.geometry import View, norms
from normwise.lab.environment import environment
from normwise.lab.errors import UsageError
from normwise.lab.parallel import ALONE, Processes, whole
from normwise.lab.recipes.schema import Cell, Training
from normwise.lab.store import METRICS, write_atomically
from normwise.lab.tasks.kinds import kind
from normwise.optim import SGDP, AdamP
from normwise.reparam import CenteredWeightNorm, WeightNorm, WeightStandardization, reparametrize

__all__ = ["CONFIG", "RESULT", "DiskFull", "config_of", "run_cell"]

SCHEMA = 1
CONFIG, RESULT, CHECKPOINT = "config.json", "result.json", "checkpoint.pt"
_NORMALIZATION = {"WN": WeightNorm, "CWN": CenteredWeightNorm, "WS": WeightStandardization}
_POLICY: dict[str, Policy] = {
    "l2": L2(),
    "decoupled": Decoupled(),
    "schedule": Decoupled(per="schedule"),
}
# Whether the loss is still finite is asked this often: asking waits for the device.
_CHECK_EVERY = 20


class DiskFull(UsageError):
    """There is no room to write; what had been written before is whole."""


def config_of(cell: Cell, device: str, processes: Processes = ALONE) -> dict[str, Any]:
    """Everything that decides a cell's outcome, as ``config.json`` holds it.

    The number of processes is part of it: sums over a batch are rounded in another order.
    """
    config = {"schema": SCHEMA, **asdict(cell), "device": device}
    if processes.kind is not None:
        config["parallel"] = {"kind": processes.kind, "processes": processes.size}
    # As it will be read back: tuples become lists.
    return dict(json.loads(json.dumps(config)))


def run_cell(
    cell: Cell,
    out: Path,
    root: Path,
    *,
    device: str = "cpu",
    checkpoint_seconds: float = 60.0,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Train a cell to its end, going on from its checkpoint if it has one.

    Computes in one thread, so that the result does not depend on the number of cores.

    Args:
        cell: what to train.
        out: the output folder; the cell's own is ``out / cell.folder``.
        root: where the data sets are.
        device: where to compute (default: ``"cpu"``).
        checkpoint_seconds: at most so long between checkpoints, in seconds (default: 60).
        processes: those that train it together, each of which calls this (default: one alone).

    Returns:
        The content of its ``result.json``; at once if it was finished before.

    Raises:
        UsageError: if the folder holds another cell, or one of another version, or another process
            runs it, or if processes cannot share a batch of its task.
        DiskFull: if there is no room; run it again when there is.
    """
    if processes.kind is not None and not kind(cell.task).divisible:
        raise UsageError(
            f"task {cell.task!r} is not allowed with --parallel: its loss is not the mean of those "
            "of a batch's parts; train it in one process"
        )
    training = cell.training
    if processes.kind is not None and (
        training.coupling != "own" or training.decay_window != (0.0, 1.0)
    ):
        raise UsageError(
            f"coupling {training.coupling!r} and decay_window {list(training.decay_window)} are "
            "not allowed with --parallel, but for 'own' and [0, 1]; train it in one process"
        )
    folder = out / cell.folder

    def begin() -> dict[str, Any] | None:
        """Take the folder; the result, if there is one already."""
        folder.mkdir(parents=True, exist_ok=True)
        held.enter_context(_locked(folder))
        for leftover in folder.glob(".*"):  # of a write that was killed
            leftover.unlink()
        _same_config(folder, config_of(cell, device, processes))
        return dict(_read_json(folder / RESULT)) if (folder / RESULT).exists() else None

    try:
        with ExitStack() as held, _one_thread():
            result = processes.first(begin)
            if result is None:
                run = processes, folder, checkpoint_seconds
                result = _train(cell, root, torch.device(device), *run)
            return result
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskFull(
                f"no room to write in {folder} ({error.strerror}): the last checkpoint is whole; "
                "make room and run the same command again"
            ) from error
        raise


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, content: Any) -> None:
    write_atomically(path, f"{_as_json(content)}\n".encode())


def _as_json(content: Any, indent: str = "\n") -> str:
    """JSON with a line for each key; a list of numbers is one line, whatever its length."""
    deeper = f"{indent} "
    if isinstance(content, dict) and content:
        pairs = (f"{deeper}{json.dumps(k)}: {_as_json(v, deeper)}" for k, v in content.items())
        return f"{{{','.join(pairs)}{indent}}}"
    if isinstance(content, list) and any(isinstance(item, dict) for item in content):
        return f"[{','.join(deeper + _as_json(item, deeper) for item in content)}{indent}]"
    return json.dumps(content, allow_nan=False, ensure_ascii=False)


def _same_config(folder: Path, config: dict[str, Any]) -> None:
    """Write the config, or compare it with the one that is there."""
    path = folder / CONFIG
    if not path.exists():
        _write_json(path, config)
        return
    there = _read_json(path)
    if there.get("schema") != SCHEMA:
        raise UsageError(
            f"{path} was written by another version (schema {there.get('schema')!r}, not {SCHEMA}) "
            "and cannot be continued: give another --out"
        )
    different = next((k for k in {**config, **there} if there.get(k) != config.get(k)), None)
    if different is not None:
        old, new = there.get(different), config.get(different)
        if isinstance(new, dict) and isinstance(old, dict):
            # A setting that one of them does not have differs too, whatever its value.
            key = next(k for k in {**new, **old} if k not in old or old[k] != new.get(k))
            different = f"{different}: {key}"
            old, new = old.get(key, "not set"), new.get(key, "not set")
        raise UsageError(
            f"{folder} holds another run: its {different} is {old!r}, not {new!r}; give another "
            "--out, or delete it"
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes out; the lock goes when the process does, however it does."""
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        yield
        return
    with (folder / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another process is running {folder}") from None
        yield


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _seed(*of: object) -> int:
    """A seed from names and numbers; torch's generators take 32 bits of it."""
    digest = hashlib.blake2b("/".join(map(str, of)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big")


class _Diverged(ArithmeticError):
    """The loss became infinite or not a number."""


class _Trainer:
    """The state of a training, its checkpoint and its metrics."""

    def __init__(
        self, cell: Cell, folder: Path, root: Path, device: torch.device, processes: Processes
    ) -> None:
        self.cell, self.folder, self.training = cell, folder, cell.training
        self.processes = processes
        torch.manual_seed(_seed("start", cell.seed))
        self.problem = kind(cell.task).build(cell.options, root, device)
        self.device = device
        _normalize(self.problem.model, self.training)
        self.problem.model = processes.distribute(self.problem.model)
        self.optimizer = _prepare(self.problem.model, self.training)
        self.start_norm = _typical_norm(self.problem.model)
        if self.training.batch_size > self.problem.examples:
            raise UsageError(
                f"batch_size {self.training.batch_size} is not allowed: there are "
                f"{self.problem.examples} training examples"
            )
        self.steps = len(self._batches(1))
        _decay_within_window(self.optimizer, self.training, self.training.epochs * self.steps)
        self.epoch, self.step, self.written = 0, 0, 0
        self.total = torch.zeros((), dtype=torch.float64, device=device)

    def _batches(self, epoch: int) -> Tensor:
        draw = torch.Generator().manual_seed(_seed("order", self.cell.seed, epoch))
        return self.problem.batches(self.training.batch_size, draw)

    def stream(self) -> Iterator[Any]:
        """The batches of what is left of this epoch, each drawn from its step's own generator."""
        first = self.epoch * self.steps
        draws = (
            torch.Generator().manual_seed(_seed("batch", self.cell.seed, number))
            for number in range(first + self.step, first + self.steps)
        )
        return self.problem.stream(self._batches(self.epoch)[self.step :], draws)

    def restore(self) -> bool:
        """Load the checkpoint, if there is one, and drop metrics written after it."""
        path, metrics = self.folder / CHECKPOINT, self.folder / METRICS
        resumed = self.processes.first(path.exists)
        if resumed:
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:
                raise UsageError(
                    f"{path} cannot be read ({type(error).__name__}): delete the folder to train "
                    "this cell anew"
                ) from None
            self.processes.restore(self.problem.model, self.optimizer, state)
            self.epoch, self.step = state["epoch"], state["step"]
            self.total, self.written = state["total"].to(self.device), state["written"]

        def cut() -> None:
            with metrics.open("ab") as file:
                file.truncate(self.written)

        self.processes.first(cut)
        return resumed

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        state = {
            **self.processes.state(self.problem.model, self.optimizer),
            "epoch": self.epoch,
            "step": self.step,
            "total": self.total,
            "written": self.written,
        }

        def write() -> None:
            buffer = io.BytesIO()
            torch.save(state, buffer)
            write_atomically(self.folder / CHECKPOINT, buffer.getvalue())

        self.processes.first(write)

    def record(self, line: dict[str, Any]) -> None:
        """Add a line to the metrics, on the disk before the checkpoint that counts it."""
        content = (json.dumps(line, allow_nan=False) + "\n").encode()

        def write() -> None:
            with (self.folder / METRICS).open("ab") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())

        self.processes.first(write)
        self.written += len(content)

    def take(self, batches: Iterator[Any]) -> tuple[float, float]:
        """One step; how long it took, and how much of that was the wait for the batch."""
        begin = time.perf_counter()
        number = self.epoch * self.steps + self.step
        factor = self.training.factor(number, self.training.epochs * self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.training.lr * factor
        # Dropout, and whatever else draws from the global generator: each process for its part.
        rank = self.processes.rank
        torch.manual_seed(_seed("layers", self.cell.seed, number, *([rank] if rank else [])))
        batch = self.processes.share(next(batches))
        made = time.perf_counter()
        self.problem.model.train()
        self.optimizer.zero_grad()
        low = self.training.autocast == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=low):
            loss = self.problem.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no types here
        if self.training.clip is not None:
            nn.utils.clip_grad_norm_(self.problem.model.parameters(), self.training.clip)
        self.optimizer.step()
        self.total += self.processes.mean(loss.detach())
        self.step += 1
        if self.step % _CHECK_EVERY == 0 or self.step == self.steps:
            self._check()
        return time.perf_counter() - begin, made - begin

    def _check(self) -> None:
        if not math.isfinite(float(self.total)):
            raise _Diverged(
                f"the training loss is not finite by step {self.step} of epoch {self.epoch + 1}"
            )

    def line(self, metrics: dict[str, float]) -> dict[str, Any]:
        """What is known after an epoch; epoch 0 is before the first step."""
        norm = _typical_norm(self.problem.model)
        if not 0 < norm < math.inf:
            raise _Diverged(f"the norm of the weights became {norm} in epoch {self.epoch}")
        done = self.epoch * self.steps
        lr = self.training.lr * self.training.factor(
            max(done - 1, 0), self.training.epochs * self.steps
        )
        power = 2 if self.training.optimizer in ("sgd", "sgdp") else 1
        return {
            "epoch": self.epoch,
            "step": done,
            "lr": lr,
            "train_loss": None if self.epoch == 0 else float(self.total) / self.steps,
            "norm": norm,
            "norm_growth": norm / self.start_norm,
            "effective_lr": lr / norm**power,
            **metrics,
        }


def _train(
    cell: Cell,
    root: Path,
    device: torch.device,
    processes: Processes,
    folder: Path,
    checkpoint_seconds: float,
) -> dict[str, Any]:
    log = _Log(folder / "log.txt" if processes.rank == 0 else None)
    starts = folder / "environment.json"

    def note_start() -> None:
        begun = _read_json(starts) if starts.exists() else []
        with_what = {**environment(device.type), "processes": processes.size}
        _write_json(starts, [*begun, {"started": _now(), **with_what}])

    processes.first(note_start)
    with torch.random.fork_rng():
        try:
            trainer = _Trainer(cell, folder, root, device, processes)
            resumed = trainer.restore()
            where = f"epoch {trainer.epoch}, step {trainer.step}"
            log.write(f"resumed after {where}" if resumed else "started")
            _epochs(trainer, checkpoint_seconds)
            evaluation = trainer.problem.evaluate()
            if not all(map(math.isfinite, evaluation.metrics.values())):
                raise _Diverged(f"the test gave {evaluation.metrics}")
            ending: dict[str, Any] = {"status": "ok", "metrics": evaluation.metrics}
            if evaluation.wrong is not None:
                ending["wrong"] = evaluation.wrong
        except _Diverged as error:
            ending = {"status": "failed", "error": str(error)}
        except Exception:
            log.write(traceback.format_exc())
            raise
        result = {
            "schema": SCHEMA,
            **ending,
            "trivial": trainer.problem.trivial,
            "facts": {**trainer.problem.facts, "steps_per_epoch": trainer.steps},
            "weights": _digest(processes.weights(trainer.problem.model)),
        }

    def finish() -> dict[str, Any]:
        _write_json(folder / RESULT, result)
        log.write(f"finished: {result['status']}")
        return dict(_read_json(folder / RESULT))

    return processes.first(finish)


def _epochs(trainer: _Trainer, checkpoint_seconds: float) -> None:
    """The training, from wherever the trainer stands."""
    training = trainer.training
    if trainer.written == 0:
        trainer.record(trainer.line(trainer.problem.evaluate().metrics))
    saved = time.monotonic()

    def due() -> bool:
        """Whether it is long since the last checkpoint; all processes say the same."""
        late = time.monotonic() - saved > checkpoint_seconds
        return float(trainer.processes.mean(torch.tensor(float(late)))) > 0

    while trainer.epoch < training.epochs:
        batches = trainer.stream()
        seconds = waited = 0.0
        taken = 0
        while trainer.step < trainer.steps:
            spent, made = trainer.take(batches)
            seconds, waited, taken = seconds + spent, waited + made, taken + 1
            if trainer.step < trainer.steps and due():
                trainer.save()
                saved = time.monotonic()
        trainer.epoch += 1
        tested = trainer.epoch % training.evaluate_every == 0 or trainer.epoch == training.epochs
        trainer.record(trainer.line(trainer.problem.evaluate().metrics if tested else {}))
        trainer.processes.first(
            partial(_times, trainer.folder, trainer.epoch, taken, seconds, waited)
        )
        trainer.step, trainer.total = 0, torch.zeros_like(trainer.total)
        if trainer.epoch == training.epochs or due():
            trainer.save()
            saved = time.monotonic()


def _times(folder: Path, epoch: int, steps: int, seconds: float, waited: float) -> None:
    """How fast it went, apart from the metrics because no two runs agree in it."""
    line = {
        "epoch": epoch,
        "steps": steps,
        "steps_per_second": round(steps / seconds, 3) if seconds else None,
        "data_share": round(waited / seconds, 4) if seconds else None,
    }
    with (folder / "times.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _prepare(model: nn.Module, training: Training) -> Optimizer:
    """The optimizer of a model that is normalized, and distributed."""
    spared: set[nn.Parameter] = set()
    if training.decay_on == "no-depthwise":
        spared = {p for m in _depthwise(model) for p in m.parameters()}
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            bias = name.rpartition(".")[2] == "bias"
            also = {"no-biases": not bias, "all": True}.get(training.decay_on, False)
            decays = (p.ndim > 1 and p not in spared) or also
            (decayed if decays else others).append(p)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": training.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = _optimizer([group for group in groups if group["params"]], training)
    if training.epsilon_shift is not None:
        with warnings.catch_warnings():
            # ε above the weights' start is what a recipe may want to show.
            warnings.simplefilter("ignore", UserWarning)
            shifted = EpsilonShiftedL2(
                model, weight_decay=training.weight_decay, eps=training.epsilon_shift
            )
        shifted.attach(optimizer)
    if training.coupling != "own" and training.weight_decay > 0:
        _POLICY[training.coupling].attach(optimizer)
    return optimizer


def _depthwise(model: nn.Module) -> list[nn.Conv2d]:
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    return [m for m in convolutions if m.groups == m.in_channels > 1]


def _normalize(model: nn.Module, training: Training) -> None:
    """Normalize the weights as asked."""
    if training.normalization == "none":
        return
    depthwise = _depthwise(model)
    if training.normalize_depthwise and not depthwise:
        raise UsageError("normalize_depthwise is set, but the network has no depthwise convolution")

    def normalize(only: list[nn.Conv2d] | None) -> None:
        reparametrize(
            model,
            _NORMALIZATION[training.normalization],
            gain=training.gain,
            only=only,
            skip=training.normalization_skip,
            eps=training.normalization_eps,
        )

    try:
        normalize(None)
        if training.normalize_depthwise:
            normalize(depthwise)
    except ValueError as error:
        raise UsageError(f"normalization {training.normalization}: {error}") from None


def _decay_within_window(optimizer: Optimizer, training: Training, steps: int) -> None:
    """Switch the decay on and off at the shares of ``steps`` that were asked for.

    The schedule goes into the optimizer's state, and with it into the checkpoint.
    """
    start, stop = (round(share * steps) for share in training.decay_window)
    if (start, stop) == (0, steps):
        return
    if start == stop:
        raise UsageError(
            f"decay_window {list(training.decay_window)} is not allowed: none of the {steps} steps "
            "lies in it"
        )
    schedule = DecayScheduler(optimizer, Window(start, stop))

    def put(_: Optimizer, state: dict[str, Any]) -> None:
        state["decay"] = schedule.state_dict()

    def take(_: Optimizer, state: dict[str, Any]) -> None:
        schedule.load_state_dict(state["decay"])

    optimizer.register_step_post_hook(lambda *_: schedule.step())
    optimizer.register_state_dict_post_hook(put)
    optimizer.register_load_state_dict_pre_hook(take)


def _optimizer(groups: list[dict[str, Any]], t: Training) -> Optimizer:
    betas = (t.betas[0], t.betas[1])
    if t.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=t.lr, momentum=t.momentum, nesterov=t.nesterov)
    if t.optimizer == "adam":
        return torch.optim.Adam(groups, lr=t.lr, betas=betas, eps=t.eps)
    if t.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=t.lr, betas=betas, eps=t.eps)
    # Fused steps sum in another order, and are not everywhere: a cell gives the same bits without.
    shared: dict[str, Any] = {
        "lr": t.lr,
        "eps": t.eps,
        "delta": t.delta,
        "wd_ratio": t.wd_ratio,
        "nesterov": t.nesterov,
        "fused": False,
    }
    if t.optimizer == "sgdp":
        return SGDP(groups, momentum=t.momentum, **shared)
    return AdamP(groups, betas=betas, **shared)


@torch.no_grad()
def _typical_norm(model: nn.Module) -> float:
    """The geometric mean of the norms of all channels of all weights of two or more dimensions.

    A channel of zeros, such as an embedding's padding, is left out.
    """
    every = torch.cat([norms(whole(p), View.channel()) for p in model.parameters() if p.ndim > 1])
    return float(every[every != 0].double().log().mean().exp())


def _digest(state: Mapping[str, Tensor]) -> str:
    """A fingerprint of all weights and buffers."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class _Log:
    """Lines with the time, for a person; without a path, none."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def write(self, text: str) -> None:
        if self.path is None:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{_now()}  pid {os.getpid()}  {text}\n")
