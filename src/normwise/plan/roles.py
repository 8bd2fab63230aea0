"""What each role of a network's weights will be stepped by, how long it remembers, its norms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from normwise.figures.tables import Column, Table
from normwise.optim.by_role import Block, groups
from normwise.plan.settings import OF_MATRICES, Settings
from normwise.plan.timescales import TIMES, Timescale, timescale
from normwise.protocols import AnalysisReport, ReportRow
from normwise.theory import equilibrium_of
from normwise.updates import UpdateRule, rule_of

__all__ = ["RoleRow", "Roles", "optimizer_for", "roles"]

# In the order of a table.
_NAMES = {
    "embedding": "embeddings",
    "tied": "tied embeddings",
    "hidden": "hidden matrices",
    "router": "routers",
    "readout": "readouts",
    "gain": "gains",
    "bias": "biases",
    "other": "others",
}

_COLUMNS = (
    "role",
    Column("invariant", words=True),
    Column("tensors"),
    Column("weights"),
    Column("optimizer", words=True),
    Column("η"),
    Column("λ"),
    *TIMES,
    Column("equilibrium norm", "of a slice", words=True),
)


@dataclass(frozen=True)
class RoleRow:
    """The weights of one role that are stepped alike.

    Attributes:
        role: as :attr:`normwise.Report` tells it: ``"hidden"``, ``"embedding"``, ``"readout"``, …
        invariant: whether they are scale-invariant, each by itself.
        parameters: their names.
        weights: the number of their entries.
        optimizer: the class that steps them; empty for none.
        lr: η.
        weight_decay: λ.
        timescale: how long they remember an update.
        norm: ``"fixed"`` if the optimizer keeps it, else ``"free"``.
        norms: the least and the largest norm of a slice at equilibrium: infinite without decay;
            NaN where there is none, as of weights that are not scale-invariant, or none is known.
    """

    role: str
    invariant: bool
    parameters: tuple[str, ...]
    weights: int
    optimizer: str
    lr: float
    weight_decay: float
    timescale: Timescale
    norm: Literal["free", "fixed"]
    norms: tuple[float, float]

    @property
    def equilibrium(self) -> str:
        """The norms at equilibrium, or why there is none."""
        if not self.optimizer:
            return "stays: frozen"
        if self.norm == "fixed":
            return "stays: fixed"
        if not self.invariant:
            return "none: not invariant"
        least, most = self.norms
        if math.isinf(most):
            return "none: grows without decay"
        if math.isnan(most):
            return "not known"
        low, high = f"{least:.3g}", f"{most:.3g}"
        return low if low == high else f"{low} to {high}"


class Roles(tuple[RoleRow, ...]):
    """A row for each role and what steps it; ``str()`` is a table."""

    def __str__(self) -> str:
        def cells(row: RoleRow) -> tuple[str, ...]:
            trained = bool(row.optimizer)
            return (
                _NAMES[row.role],
                "yes" if row.invariant else "no",
                str(len(row.parameters)),
                f"{row.weights:,}",
                row.optimizer or "none",
                f"{row.lr:.3g}" if trained else "–",
                f"{row.weight_decay:.3g}" if trained else "–",
                *(row.timescale.cells() if trained else "––––"),
                row.equilibrium,
            )

        return str(Table.of(_COLUMNS, map(cells, self)))


def optimizer_for(
    report: AnalysisReport, settings: Settings, others: Settings | None = None
) -> Optimizer:
    """The optimizer of a network that settings describe, by :func:`normwise.groups`.

    Hidden matrices are stepped as ``settings`` says and all else as ``others`` says; gains, biases
    and other vectors are not decayed.

    Args:
        report: of :func:`normwise.analyze`.
        settings: of hidden matrices.
        others: of all else (default: ``settings``).

    Returns:
        One optimizer, or several behind one interface.

    Raises:
        ValueError: if ``settings`` are for matrices alone and no others are given.
    """
    if others is None and settings.optimizer in OF_MATRICES:
        raise ValueError(
            f"{settings.optimizer} is for hidden matrices alone: say what steps all other weights, "
            "such as --others adamw --others-lr 1e-3 (in Python: others=Settings(...))"
        )
    others = others or settings
    unknown = {
        row.name: "others" for row in report if row.role.kind == "other" and not row.is_vector
    }
    options: dict[str, Any] = {"assign": unknown}
    if settings.optimizer == others.optimizer:
        matrices, rest = ({"lr": s.lr, "weight_decay": s.weight_decay} for s in (settings, others))
        return settings.make(groups(report, matrices=matrices, others=rest, **options))
    return groups(report, matrices=settings.make, others=others.make, **options)


def roles(
    report: AnalysisReport,
    optimizer: Optimizer | Any,
    *,
    steps: int | None = None,
    batch: float | None = None,
    gradient: float = 1.0,
) -> Roles:
    """How each role of a network's weights is stepped, how long it remembers, and its norms.

    Args:
        report: of :func:`normwise.analyze`, of a model that is there.
        optimizer: of the model; any that :func:`normwise.describe` knows.
        steps: of the run (default: not known).
        batch: tokens, or samples, of a step (default: not known).
        gradient: √E‖g̃‖² of :class:`Settings`, for SGD and its kin (default: 1).

    Returns:
        A row for each role, by whether it is scale-invariant and how it is stepped; ``print`` them.

    Raises:
        ValueError: for settings beyond where the closed forms hold.
    """
    while not isinstance(optimizer, Optimizer):
        optimizer = optimizer.optimizer
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    blocks = {route.name: route.blocks for route in getattr(optimizer, "routes", ())}
    params = report.parameters()
    found: dict[tuple[Any, ...], list[tuple[ReportRow, UpdateRule | None, float]]] = {}
    for row in report:
        p = params[row.name]
        rule, norm = None, math.nan
        if p in group_of and p.requires_grad:
            rule = rule_of(optimizer, group_of[p], p).converted(float)
            rule = rule.with_gate(row.view is not None)
            if row.view is not None:
                shape = _stepped_shape(p, blocks.get(row.name, ()))
                norm = equilibrium_of(
                    rule,
                    gradient_square=gradient**2,
                    entries=p.numel() // len(row.view.slices(p.detach())),
                    shape=shape,
                ).norm
        key = row.role.kind, row.view is not None, _alike(rule)
        found.setdefault(key, []).append((row, rule, norm))
    rows = (
        _row(role, invariant, members, params, steps, batch)
        for (role, invariant, _), members in found.items()
    )
    order = list(_NAMES)
    return Roles(sorted(rows, key=lambda row: (order.index(row.role), not row.invariant)))


Member = tuple[ReportRow, UpdateRule | None, float]


def _row(
    role: str,
    invariant: bool,
    members: Sequence[Member],
    params: Mapping[str, nn.Parameter],
    steps: int | None,
    batch: float | None,
) -> RoleRow:
    names = tuple(row.name for row, _, _ in members)
    weights = sum(params[name].numel() for name in names)
    rule = members[0][1]
    if rule is None:
        never = Timescale(role, math.inf, math.inf)
        return RoleRow(
            role, invariant, names, weights, "", 0.0, 0.0, never, "free", (math.nan, math.nan)
        )
    norms = [norm for _, _, norm in members]
    known = not any(map(math.isnan, norms))
    return RoleRow(
        role,
        invariant,
        names,
        weights,
        _label(rule),
        float(rule.lr),
        float(rule.weight_decay) / rule.rate,
        timescale(rule, steps=steps, batch=batch, name=role),
        rule.norm,
        (min(norms), max(norms)) if known else (math.nan, math.nan),
    )


def _alike(rule: UpdateRule | None) -> tuple[Any, ...]:
    """What weights of one row have in common."""
    if rule is None:
        return ()
    return _label(rule), rule.lr, rule.weight_decay, rule.norm, rule.is_projected


def _label(rule: UpdateRule) -> str:
    """Who steps; of a relative step on a sphere it does not matter what is inside."""
    if rule.norm == "fixed" and rule.update.is_relative:
        return "sphere"
    return rule.name


def _stepped_shape(p: nn.Parameter, blocks: Sequence[Block]) -> tuple[int, ...]:
    """That of the matrices as which a weight is stepped; () where they are of several shapes."""
    order = tuple(range(1, p.ndim))
    shapes = {tuple(block.of(p.detach(), order).shape) for block in blocks} or {tuple(p.shape)}
    return shapes.pop() if len(shapes) == 1 else ()
