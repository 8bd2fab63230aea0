"""The monitor: hooks around an optimizer's step, buffers on the device, alarms, writers."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normwise.checks import check_at_least_one, check_report
from normwise.figures.tables import paragraph
from normwise.geometry import View
from normwise.monitor.alarms import Alarm, AlarmError, AlarmRule, standard_rules
from normwise.monitor.history import History
from normwise.monitor.measurement import PREDICTIONS, Measurement, aggregate
from normwise.monitor.quantities import STANDARD, Norm, Quantity, SteppedSlices
from normwise.monitor.sharded import (
    ShardedWeight,
    exchange,
    local_gradients,
    slices_from_sums,
)
from normwise.monitor.triggers import Trigger, every
from normwise.monitor.watched import Bucket, Layer, WatchedWeights
from normwise.monitor.whole import WeightQuantity
from normwise.sharding import is_sharded
from normwise.theory import angle_at, equilibrium_of, norm_after, time_to_equilibrium
from normwise.updates import Update, UpdateRule, describe, rule_of

if TYPE_CHECKING:
    from normwise.invariance import Report

__all__ = ["Monitor", "Writer"]

_LOG = logging.getLogger("normwise.monitor")

Writer = Callable[[Measurement], object]
OnAlarm = Literal["log", "raise"] | Callable[[Alarm], object]


@dataclass
class _Taken:
    """What belongs to one measurement on the device."""

    step: int
    rules: list[UpdateRule]  # of each layer
    whole: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # by quantity and layer


@dataclass
class _Batch:
    """Measurements on their way to the host."""

    taken: list[_Taken]
    values: list[Tensor]  # of each bucket: (measurements, quantities, rows)
    first_bad: list[Tensor]  # of each bucket: (rows,)
    whole: list[tuple[list[tuple[int, int, int]], Tensor]]  # measurement, quantity, layer
    events: list[Any]

    def arrived(self) -> bool:
        return all(event.query() for event in self.events)


class Monitor:
    """Measure norms, effective learning rates and angles of weights while an optimizer trains them.

    It hooks into ``optimizer.step()``; nothing else in a training loop changes. At a measured step
    the watched weights are copied before the step, and on an accelerator all slices of one length,
    of all weights, are computed with together. Results stay on the device, and nothing waits for
    it: they are copied to the host in batches, and looked at when they have arrived. A measured
    step needs memory for one copy of the watched weights on a CPU, and for about six in float32
    elsewhere, for as long as it lasts.

    Use it as a context manager, or call :meth:`close` at the end, so that the last measurements are
    fetched and files are complete.

    Args:
        model: gives parameters their names.
        optimizer: whose steps are measured: any torch optimizer, or one of normwise's, or a list
            of several. Steps are counted by the first; a measurement is complete when each has
            stepped once since.
        report: what to watch: a report of :func:`normwise.analyze` (its scale-invariant weights),
            or a mapping from parameter names to views. By default every weight of two dimensions
            or more that the optimizer trains, in the view of its parameter group or by output
            channel, embeddings as a whole; then it is for you to know which are scale-invariant.
        every: when to measure: the first step and every so many, or a trigger (default: 100).
        quantities: what to measure (default: :data:`normwise.monitor.STANDARD`).
        of_weights: what to measure of whole weights besides, each on a schedule of its own, such as
            ``spectral(every(500))``; NaN at other measurements. DTensors are refused with it
            (default: nothing).
        writers: where measurements go: any callables, such as those of
            :mod:`normwise.monitor.writers`. One that has ``close()`` is closed with the monitor.
            One that fails is dropped, with one warning of the logger ``normwise.monitor``.
        alarms: ``"log"`` (the default: a warning of the logger ``normwise.monitor``), ``"raise"``
            (:class:`AlarmError`, out of ``optimizer.step()``), or a function of an :class:`Alarm`.
        rules: what raises alarms (default: :func:`normwise.monitor.standard_rules`).
        fetch_every: measurements a batch; alarms come by so much later (default: 4).
        check_finite: a trigger, such as ``every(1)``, of steps after which every slice is looked
            at, to know exactly which went first to be not finite. Each costs about as much as
            copying the weights (default: only at measured steps).
        update: what sets the length of an update, for an optimizer that
            :func:`normwise.describe` does not know (default: what that says).
        keep: the most measurements that ``history`` holds, 2 or more (default: 2000). When it is
            full, every second one is dropped, and from then on only every second one kept beside
            the latest, so that what is left spans the run evenly.

    Attributes:
        step: how many steps the optimizer has taken.
        history: measurements that have been fetched, ``keep`` at most; all but the latest without
            the values of single slices.
        raised: the alarms so far.
        update: as given, or found.
        writers: as given; more may be appended.

    Raises:
        TypeError: for an argument of another type.
        ValueError: if nothing is left to watch, a view does not fit, a name is unknown, a number is
            out of its range, or a rule needs a quantity that is not measured.
        RuntimeError: out of ``optimizer.step()``, if a watched weight has changed its shape.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        report: Report | Mapping[str, View | str] | None = None,
        *,
        every: int | Trigger = 100,
        quantities: Sequence[Quantity] = STANDARD,
        of_weights: Sequence[WeightQuantity] = (),
        writers: Sequence[Writer] = (),
        alarms: OnAlarm = "log",
        rules: Sequence[AlarmRule] | None = None,
        fetch_every: int = 4,
        check_finite: Trigger | None = None,
        update: Update | None = None,
        keep: int = 2000,
    ) -> None:
        if not (alarms in ("log", "raise") or callable(alarms)):
            raise ValueError(f"Invalid alarms: {alarms!r}; must be 'log', 'raise' or a function")
        check_at_least_one("fetch_every", fetch_every)
        if check_at_least_one("keep", keep) < 2:
            raise ValueError(f"Invalid keep: {keep}; must be 2 or more")
        _check_types("model", [model], nn.Module, "a module")
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else optimizer
        if not isinstance(optimizers, list | tuple) or not optimizers:
            raise TypeError(
                f"Invalid optimizer: {optimizer!r}; must be a torch optimizer or a list"
            )
        _check_types("optimizer", optimizers, Optimizer, "a torch optimizer")
        if len(set(optimizers)) < len(optimizers):
            raise ValueError(f"Invalid optimizer: {optimizers!r}; each may be there once")
        _check_types("quantity", quantities, Quantity, "a Quantity, such as Norm()")
        _check_types("of_weights", of_weights, WeightQuantity, "a WeightQuantity")
        _check_types("writer", writers, Callable, "a function of a Measurement")
        _check_types("rule", rules or (), AlarmRule, "an AlarmRule, such as NotFinite()")
        _check_types("check_finite", [check_finite], Trigger | None, "a trigger, such as every(1)")
        _check_types("update", [update], Update | None, "a normwise.updates.Update")
        self._optimizers = list(optimizers)
        self.update = update or describe(optimizers[0])[0].update
        self._trigger = every if isinstance(every, Trigger) else _interval(every)
        self._check_finite = check_finite
        self._keep, self._stride, self._received = keep, 1, 0
        self._quantities = tuple(quantities)
        self._names = tuple(q.name for q in self._quantities)
        self._of_weights = tuple(of_weights)
        self._model = model
        self._rules = tuple(standard_rules() if rules is None else rules)
        self._check_names()
        self.writers = list(writers)
        self._on_alarm: OnAlarm = alarms
        self._fetch_every = fetch_every

        names = {p: name for name, p in model.named_parameters()}
        every_group = [(i, g) for i, o in enumerate(optimizers) for g in o.param_groups]
        groups = {p: k for k, (_, g) in enumerate(every_group) for p in g["params"]}
        owners = {p: i for i, g in every_group for p in g["params"]}
        views, knows = _views(model, [g for _, g in every_group], report, names, groups)
        self._layout = WatchedWeights(views, names, groups, owners)
        self._knows_invariance = knows
        for layer, p in zip(self._layout.layers, self._layout.params, strict=True):
            if of_weights and is_sharded(p):
                raise ValueError(f"{layer.name} is a DTensor, of which of_weights measures nothing")
        self._results: list[Tensor] | None = None
        self._first_bad: list[Tensor] | None = None
        self._before: dict[int, Tensor] = {}  # by bucket
        self._open: _Taken | None = None
        self._due: set[int] = set()  # the optimizers whose step the open measurement waits for
        self._taken: list[_Taken] = []
        self._under_way: list[_Batch] = []
        self._gradient_squares: Tensor | None = None
        self._expected: dict[int, tuple[float, UpdateRule]] = {}  # the norm of each layer
        self._expected_at = 0
        self._seen: set[tuple[str, str | None]] = set()

        self.step = 0
        self.history: list[Measurement] = []
        self.raised: list[Alarm] = []
        self._hooks = []
        for i, one in enumerate(optimizers):
            self._hooks += [
                one.register_step_pre_hook(functools.partial(self._before_step, i)),
                one.register_step_post_hook(functools.partial(self._after_step, i)),
            ]

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the weights that are watched."""
        return tuple(layer.name for layer in self._layout.layers)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of what is known of a layer: the quantities, and the predicted equilibrium."""
        return (*self._names, *PREDICTIONS, *(q.name for q in self._of_weights))

    def series(self, name: str) -> tuple[list[int], Tensor]:
        """The steps measured so far, and a quantity of each layer at them.

        Args:
            name: of a quantity or a prediction.

        Returns:
            The steps, and a tensor of shape ``(steps, layers)``, the layers as in :attr:`layers`.

        Raises:
            KeyError: for an unknown quantity.
        """
        return self._data().series(name)

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw norms, angular updates, effective learning rates, and measured against predicted.

        Args:
            path: a file whose suffix says the format; without it nothing is written. ``.svg``
                follows the reader's light or dark system.

        Returns:
            The matplotlib figure.

        Raises:
            ImportError: without matplotlib.
            ValueError: if nothing has been measured yet.
        """
        from normwise.figures import matplotlib_figure, save
        from normwise.monitor.plots import picture

        drawn = picture(self._data())
        if path is not None:
            save(drawn, path)
        return matplotlib_figure(drawn)

    def panels(self) -> dict[str, str]:
        """The pictures of :meth:`plot` one by one, as ``<svg>`` elements to put into a page.

        Raises:
            ValueError: if nothing has been measured yet.
        """
        from normwise.monitor.plots import panels

        return panels(self._data())

    def _data(self) -> History:
        return History(
            self.layers, self.names, tuple(self.history), self.update, self._knows_invariance
        )

    def fetch(self) -> None:
        """Get every measurement taken so far; this waits for the device."""
        self._send()
        while self._under_way:
            batch = self._under_way.pop(0)
            for event in batch.events:
                event.synchronize()
            self._receive(batch)

    def close(self) -> None:
        """Fetch what is left, stop measuring and close the writers."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        try:
            self.fetch()
        finally:
            for writer in list(self.writers):
                if hasattr(writer, "close"):
                    self._try(writer, writer.close)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and self._on_alarm == "raise":
            self._on_alarm = "log"  # An error is on its way already; this must not hide it.
        self.close()

    def __str__(self) -> str:
        """What a person wants to know: what is watched, where the norms are, and what is wrong."""
        count = sum(len(layer) for layer in self._layout.layers)
        lines = [
            f"{len(self.layers)} weights, {count:,} slices; {len(self.history)} measurements in "
            f"{self.step:,} steps"
        ]
        if self.history:
            m = self.history[-1]
            lines += [f"step {m.step:,}: {line}" for line in _ranges(m)]
            lines += _settling(m)
        lines += [f"alarm: {alarm}" for alarm in self.raised]
        return "\n".join(map(paragraph, lines))

    def state_dict(self) -> dict[str, Any]:
        """The number of steps, and which alarms have been raised, for a run that goes on."""
        return {"step": self.step, "seen": [list(key) for key in sorted(self._seen, key=str)]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`; history and the rules' memory begin anew.

        Args:
            state: what :meth:`state_dict` returned.
        """
        self.step = int(state["step"])
        self._seen = {(kind, layer) for kind, layer in state["seen"]}

    # Around a step, on the device.

    @torch.no_grad()
    def _before_step(self, which: int, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if which == 0:
            while self._under_way and self._under_way[0].arrived():
                self._receive(self._under_way.pop(0))
            if self._open is None and self._is_measured(self.step + 1):
                gone = UpdateRule("", self.update, math.nan)
                self._open = _Taken(self.step + 1, [gone] * len(self._layout.layers))
                self._due = {bucket.owner for bucket in self._layout.buckets}
        if which in self._due:
            self._check_shapes()
            self._before = {
                k: bucket.gather(bucket.params) for k, bucket in self._buckets_of(which)
            }

    @torch.no_grad()
    def _after_step(self, which: int, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.step += which == 0
        if which == 0:
            for quantity in self._of_weights:
                quantity.after_step(self._model, self.layers)
        if self._check_finite is not None and self._check_finite(self.step):
            self._check_shapes()
            self._look_for_bad(which)
        if which not in self._due:
            return
        self._check_shapes()
        before, self._before = self._before, {}
        self._measure(which, before)
        self._due.remove(which)
        if not self._due and self._open is not None:
            self._open.whole = self._measure_whole(self._open.step)
            self._taken.append(self._open)
            self._open = None
            if len(self._taken) == self._fetch_every:
                self._send()
                if not self._under_way[0].events:
                    self._receive(self._under_way.pop(0))

    def _is_measured(self, step: int) -> bool:
        return self._trigger(step) or any(q.when(step) for q in self._of_weights)

    def _measure_whole(self, step: int) -> dict[tuple[int, int], Tensor]:
        """The quantities of whole weights that are due."""
        index = {name: i for i, name in enumerate(self.layers)}
        return {
            (row, index[name]): value.detach().reshape(())
            for row, quantity in enumerate(self._of_weights)
            if quantity.when(step)
            for name, value in quantity(self._model, self.layers).items()
        }

    def _buckets_of(self, which: int) -> list[tuple[int, Bucket | ShardedWeight]]:
        """The weights that one of the optimizers steps, numbered among all."""
        return [(k, b) for k, b in enumerate(self._layout.buckets) if b.owner == which]

    def _check_shapes(self) -> None:
        for layer, p in zip(self._layout.layers, self._layout.params, strict=True):
            if p.shape != layer.shape:
                raise RuntimeError(
                    f"{layer.name} had shape {layer.shape} when the Monitor was made, and has "
                    f"{tuple(p.shape)}; close this Monitor and make a new one"
                )

    def _measure(self, which: int, before: dict[int, Tensor]) -> None:
        rules = self._update_rules(which)
        if self._results is None:
            self._results = [
                torch.empty(
                    self._fetch_every,
                    len(self._quantities),
                    bucket.rows,
                    dtype=bucket.dtype,
                    device=bucket.device,
                )
                for bucket in self._layout.buckets
            ]
        place = len(self._taken)
        sharded: dict[int, ShardedWeight] = {}
        for k, bucket in self._buckets_of(which):
            if isinstance(bucket, ShardedWeight):
                sharded[k] = bucket
                continue
            old, new = before[k], bucket.read(bucket.params)
            gradient = bucket.read(bucket.gradients())
            lr, decay, exponent = _columns(rules, bucket)
            for part in bucket.chunks:
                s = SteppedSlices(
                    old[part], new[part], gradient[part], lr[part], decay[part], exponent[part]
                )
                for row, quantity in enumerate(self._quantities):
                    self._results[k][place, row, part] = quantity(s)
        if sharded:
            weights = list(sharded.values())
            sums = [
                weight.sums(before[k], weight.read(weight.params), gradient)
                for (k, weight), gradient in zip(
                    sharded.items(), local_gradients(weights), strict=True
                )
            ]
            for (k, weight), found in zip(sharded.items(), exchange(weights, sums), strict=True):
                s = slices_from_sums(found, *_columns(rules, weight))
                for row, quantity in enumerate(self._quantities):
                    self._results[k][place, row] = quantity(s)
        self._keep_rules(rules, which)

    def _keep_rules(self, rules: list[UpdateRule], which: int) -> None:
        """Note what this step has done to the layers of one optimizer."""
        kept: dict[Tensor, Tensor] = {}  # weights of a group share its tensors

        def snapshot(t: Tensor) -> Tensor:
            if t not in kept:
                kept[t] = t.detach().to("cpu", non_blocking=True, copy=True)
            return kept[t]

        if self._open is not None:
            for _, bucket in self._buckets_of(which):
                for p in bucket.params:
                    i = self._layout.index[p]
                    self._open.rules[i] = rules[i].converted(snapshot)

    def _update_rules(self, which: int) -> list[UpdateRule]:
        """What this step of one optimizer has done to each layer."""
        # Looked up anew: policies split groups, and load_state_dict makes others.
        optimizer = self._optimizers[which]
        groups = {p: group for group in optimizer.param_groups for p in group["params"]}
        gone = UpdateRule("", self.update, math.nan)
        rules = [
            rule_of(optimizer, groups[p], p) if p in groups else gone for p in self._layout.params
        ]
        return [
            replace(rule, update=self.update) if rule.update is Update.UNKNOWN else rule
            for rule in rules
        ]

    def _look_for_bad(self, which: int) -> None:
        if self._first_bad is None:
            self._first_bad = [
                torch.zeros(b.rows, dtype=torch.int64, device=b.device)
                for b in self._layout.buckets
            ]
        sharded: dict[int, ShardedWeight] = {}
        for k, bucket in self._buckets_of(which):
            if isinstance(bucket, ShardedWeight):
                sharded[k] = bucket
                continue
            rows, first = bucket.read(bucket.params), self._first_bad[k]
            for part in bucket.chunks:
                fine = rows[part].abs().amax(1).isfinite() | (first[part] > 0)
                first[part] = torch.where(fine, first[part], self.step)
        weights = list(sharded.values())
        counts = [weight.count_bad(weight.read(weight.params)) for weight in weights]
        for k, bad in zip(sharded, exchange(weights, counts) if weights else (), strict=True):
            first = self._first_bad[k]
            fine = (bad.squeeze(1) == 0) | (first > 0)
            first.copy_(torch.where(fine, first, self.step))

    def _send(self) -> None:
        """Start to copy what has been measured to the host."""
        if not self._taken or self._results is None:
            return
        count = len(self._taken)
        values = [_to_host(results[:count]) for results in self._results]
        first_bad = [_to_host(first) for first in self._first_bad or ()]
        places: dict[torch.device, list[tuple[int, int, int]]] = {}
        scalars: dict[torch.device, list[Tensor]] = {}
        for number, taken in enumerate(self._taken):
            for (row, layer), value in taken.whole.items():
                places.setdefault(value.device, []).append((number, row, layer))
                scalars.setdefault(value.device, []).append(value.double())
        whole = [(at, _to_host(torch.stack(scalars[device]))) for device, at in places.items()]
        events = []
        for device in {b.device for b in self._layout.buckets}:
            if device.type == "cuda":
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch has no types here
                event.record(torch.cuda.current_stream(device))
                events.append(event)
        self._under_way.append(_Batch(self._taken, values, first_bad, whole, events))
        self._taken = []
        if self._open is not None:
            for results in self._results:
                results[0] = results[count]

    # On the host.

    def _receive(self, batch: _Batch) -> None:
        values = torch.cat([v.double() for v in batch.values], dim=2)
        first_bad = torch.cat(batch.first_bad) if batch.first_bad else None
        layers = self._layout.layers
        whole = torch.full(
            (len(batch.taken), len(self._of_weights), len(layers)), math.nan, dtype=torch.float64
        )
        for places, found in batch.whole:
            whole[tuple(torch.tensor(places).T)] = found
        for taken, slices, of_weights in zip(batch.taken, values, whole, strict=True):
            rules = tuple(
                self._gated(rule.converted(float), layer, slices)
                for rule, layer in zip(taken.rules, layers, strict=True)
            )
            lrs = tuple(float(rule.lr) for rule in rules)
            measured = aggregate(slices, self._quantities, layers)
            predicted = self._predict(taken.step, slices, rules)
            m = Measurement(
                taken.step,
                layers,
                self.names,
                torch.cat([measured, predicted, of_weights]),
                slices,
                lrs,
                None if first_bad is None else torch.where(first_bad <= taken.step, first_bad, 0),
            )
            self._remember(m)
            for writer in list(self.writers):
                self._try(writer, writer, m)
            for rule in self._rules:
                for alarm in rule(m, rules):
                    self._raise(alarm)

    def _remember(self, m: Measurement) -> None:
        if self.history:
            self.history[-1] = _without_slices(self.history[-1])
        if (self._received - 1) % self._stride:
            self.history.pop()  # kept so far as the latest alone
        self.history.append(m)
        self._received += 1
        if len(self.history) > self._keep:
            self._stride *= 2
            self.history[:] = self.history[::2]
            if self.history[-1] is not m:
                self.history.append(m)

    def _try(self, writer: Writer, action: Callable[..., object], *args: object) -> None:
        """Call a writer, or its ``close``; drop one that fails, since the training goes on."""
        try:
            action(*args)
        except Exception:
            self.writers = [other for other in self.writers if other is not writer]
            _LOG.warning(
                "the writer %r failed and is dropped; the training goes on", writer, exc_info=True
            )

    def _gated(self, rule: UpdateRule, layer: Layer, slices: Tensor) -> UpdateRule:
        """A rule with a gate as this step's cosines let it stand: open if it is for every slice."""
        if rule.is_projected is not None or "gradient_cosine" not in self._names:
            return rule
        cosines = slices[self._names.index("gradient_cosine")][layer.slices]
        return rule.with_gate(bool(cosines.max() < rule.delta / math.sqrt(layer.entries)))

    def _predict(self, step: int, slices: Tensor, rules: tuple[UpdateRule, ...]) -> Tensor:
        """The equilibrium of each layer, and where the rates so far lead to.

        E‖g̃‖² is the mean over the last ten or so measurements.
        """
        predicted = torch.full((len(PREDICTIONS), len(rules)), math.nan, dtype=torch.float64)
        steps = step - self._expected_at if self._expected else 0
        self._expected_at = step
        now = None
        if Norm.name in self._names:
            now = slices[self._names.index(Norm.name)].double().log()
        usual = self._gradient_squares
        if "scaled_gradient" in self._names:
            squares = slices[self._names.index("scaled_gradient")].square()
            old = usual
            self._gradient_squares = squares if old is None else old.lerp(squares, 0.1)
        for i, (layer, rule) in enumerate(zip(self._layout.layers, rules, strict=True)):
            mean = math.nan
            if self._gradient_squares is not None:
                mean = _mean_square(self._gradient_squares[layer.slices])
            present = math.nan if now is None else float(now[layer.slices].mean().exp())
            settled = _prediction(rule, mean, layer, present)
            before, last = self._expected.get(i, (present, rule))
            norm = _expected_norm(_midway(last, rule), mean, layer, before, steps)
            self._expected[i] = (norm, rule)
            # Without this gradient, which is what an expectation is there to judge.
            past = mean if usual is None else _mean_square(usual[layer.slices])
            now_expected = (norm, _expected_angle(rule, past, layer, present))
            predicted[:, i] = torch.tensor((*settled, *now_expected))
        return predicted

    def _raise(self, alarm: Alarm) -> None:
        key = (alarm.kind, alarm.layer)
        if key in self._seen:
            return
        self._seen.add(key)
        self.raised.append(alarm)
        if self._on_alarm == "log":
            _LOG.warning("%s", alarm)
        elif self._on_alarm == "raise":
            raise AlarmError(alarm)
        else:
            self._on_alarm(alarm)

    def _check_names(self) -> None:
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"two quantities have one name: {', '.join(self.names)}")
        for rule in self._rules:
            missing = set(rule.needs) - set(self._names)
            if missing:
                raise ValueError(
                    f"the rule {type(rule).__name__} needs {', '.join(sorted(missing))}, which "
                    "quantities= does not have"
                )


def _prediction(
    rule: UpdateRule, square: float, layer: Layer, present: float
) -> tuple[float, float, float]:
    """The norm and the RMS angle per step at equilibrium, and the steps there from a norm.

    NaN where there is none, or none that is known.
    """
    time = math.nan
    try:
        found = equilibrium_of(rule, **_known(square, layer))
        if rule.norm == "fixed":
            return present, found.angle, 0.0
        if 0 < found.norm < math.inf and 0 < present < math.inf:
            time = time_to_equilibrium(rule, present / found.norm)
    except ValueError:  # beyond where one exists
        return math.nan, math.nan, math.nan
    if not found.angle > 0:  # without decay
        return math.nan, math.nan, math.nan
    return found.norm, found.angle, time


def _mean_square(squares: Tensor) -> float:
    """The geometric mean over the slices that have a gradient; NaN without any."""
    return float(squares[squares > 0].log().mean().exp())


def _midway(a: UpdateRule, b: UpdateRule) -> UpdateRule:
    """The rule between two measurements, over which rates are taken to change evenly."""
    return replace(
        b,
        lr=(float(a.lr) + float(b.lr)) / 2,
        decay_per_step=(float(a.decay_per_step) + float(b.decay_per_step)) / 2,
    )


def _expected_norm(
    rule: UpdateRule, square: float, layer: Layer, before: float, steps: int
) -> float:
    """The norm that steps at these rates lead to; NaN where that is not known."""
    if not 0 < before < math.inf or steps == 0:
        return before
    try:
        return norm_after(rule, before, steps, **_known(square, layer))
    except (ValueError, OverflowError):  # beyond where the closed form holds
        return math.nan


def _expected_angle(rule: UpdateRule, square: float, layer: Layer, present: float) -> float:
    """The RMS angle of a step at the present norm; NaN where that is not known."""
    if not 0 < present < math.inf:
        return math.nan
    try:
        return angle_at(rule, present, **_known(square, layer))
    except ValueError:
        return math.nan


def _known(square: float, layer: Layer) -> dict[str, Any]:
    """What the closed forms want to know of a layer."""
    return {
        "gradient_square": square if 0 < square < math.inf else math.nan,
        "entries": layer.entries,
        "shape": layer.shape,
    }


def _ranges(m: Measurement) -> Iterator[str]:
    for name, what in (("norm", "norms"), ("angular_update", "angles per step, in radians")):
        values = [v for v in m[name].values() if math.isfinite(v)] if name in m.names else []
        if values:
            yield f"{what}, from {min(values):.3g} to {max(values):.3g}"


def _settling(m: Measurement) -> Iterator[str]:
    """How many weights are at the predicted equilibrium, and how long the others would take."""
    times = {name: time for name, time in m["steps_to_equilibrium"].items() if time >= 0}
    if not times:
        yield "no equilibrium of the norms is known for this optimizer, or without decay"
        return
    away = {name: time for name, time in times.items() if time > 0}
    yield (
        f"{len(times) - len(away)} of {len(times)} weights are within 10% of the norm at which "
        "they would settle"
    )
    if away:
        slowest = max(away, key=lambda name: away[name])
        yield (
            f"not settled: {len(away)}, which would take up to {math.ceil(away[slowest]):,} more "
            f"steps at the present learning rate ({slowest}); until then the predicted norms and "
            "angles are not theirs"
        )


def _check_types(name: str, values: Iterable[object], kind: Any, wanted: str) -> None:
    for value in values:
        if not isinstance(value, kind):
            raise TypeError(f"Invalid {name}: {value!r}; must be {wanted}")


def _interval(steps: int) -> Trigger:
    return every(steps)


def _column(values: Sequence[float | Tensor], bucket: Bucket | ShardedWeight) -> Tensor:
    """A value of each layer, spread over the slices of a bucket."""
    if any(isinstance(value, Tensor) for value in values):
        of_layers = torch.stack(
            [
                torch.as_tensor(value, dtype=bucket.dtype, device=bucket.device).reshape(())
                for value in values
            ]
        )
    else:
        of_layers = torch.tensor(values, dtype=bucket.dtype, device=bucket.device)
    return of_layers.index_select(0, bucket.layer_index)


def _columns(
    rules: Sequence[UpdateRule], bucket: Bucket | ShardedWeight
) -> tuple[Tensor, Tensor, Tensor]:
    """Learning rate, pull of decay and exponent of each slice."""
    return (
        _column([rule.lr for rule in rules], bucket),
        _column([rule.shrink for rule in rules], bucket),
        _column([float(rule.update.exponent) for rule in rules], bucket),
    )


def _to_host(t: Tensor) -> Tensor:
    if t.device.type == "cpu":
        return t.clone()
    host = torch.empty(t.shape, dtype=t.dtype, pin_memory=t.device.type == "cuda")
    return host.copy_(t, non_blocking=t.device.type == "cuda")


def _without_slices(m: Measurement) -> Measurement:
    return Measurement(m.step, m.layers, m.names, m.values, m.slices[:0], m.lrs)


def _views(
    model: nn.Module,
    param_groups: Sequence[dict[str, Any]],
    report: Report | Mapping[str, View | str] | None,
    names: Mapping[nn.Parameter, str],
    groups: Mapping[nn.Parameter, int],
) -> tuple[dict[nn.Parameter, View], bool]:
    """What to watch, in the model's order, and whether it is known to be scale-invariant."""
    views: dict[nn.Parameter, View] = {}
    knows = report is not None
    if isinstance(report, Mapping):
        by_name = dict(model.named_parameters(remove_duplicate=False))
        for name, view in report.items():
            if name not in by_name:
                raise ValueError(f"the model has no parameter {name!r}")
            views[by_name[name]] = view if isinstance(view, View) else View.parse(view)
    elif report is not None:
        check_report(report, "a mapping from names, or")
        views = dict(report.parameter_views(model))
        if not views:
            knows = False
            views = _in_symmetries(model, report)
            _LOG.warning(
                "no weight of this network is scale-invariant by itself; %s, and no equilibrium is "
                "predicted",
                f"watching the {len(views)} weights of its symmetries" if views else "watching all",
            )
    if not views and not isinstance(report, Mapping):
        tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
        for p in names:
            if p in groups and p.ndim > 1:
                option = param_groups[groups[p]].get("view")
                whole = View.layer() if p in tables else View.channel()
                views[p] = option if isinstance(option, View) else whole
    views = {p: view for p, view in views.items() if p in groups and p.numel()}
    if not views:
        raise ValueError("nothing to watch: the optimizer trains none of the weights in question")
    for p in views:
        if not p.is_floating_point() and not p.is_complex():
            raise ValueError(f"{names[p]} is of dtype {p.dtype}; only floating-point has a norm")
        if is_sharded(p) and p.is_complex():
            raise ValueError(f"{names[p]} is a complex DTensor; a Monitor reads real ones only")
    return views, knows


def _in_symmetries(model: nn.Module, report: Report) -> dict[nn.Parameter, View]:
    """The weights that can be scaled together with others, each as its largest family splits it."""
    params = report.parameters(model)
    found: dict[nn.Parameter, tuple[int, View]] = {}
    for symmetry in report.symmetries:
        for term in symmetry.terms:
            p = params[term.parameter]
            if p.ndim > 1 and isinstance(term.view, View):
                units = found.get(p, (0, term.view))[0]
                if symmetry.units > units:
                    found[p] = (symmetry.units, term.view)
    return {p: view for p, (_, view) in found.items()}
