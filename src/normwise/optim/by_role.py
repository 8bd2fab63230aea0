"""Several optimizers behind one interface, each for the weights whose role asks for it.

What a parameter is for comes from an analysis, never from its name or from its number of
dimensions alone.
"""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normwise.figures.tables import Table
from normwise.geometry import View
from normwise.optim.wrapping import Wrapper
from normwise.protocols import AnalysisReport, ReportRow
from normwise.sharding import is_sharded
from normwise.updates import UpdateRule, rule_of

__all__ = ["Block", "ByRole", "Route", "destination_of", "groups"]

Factory = Callable[[list[dict[str, Any]]], Optimizer]
Options = Mapping[str, Any]
Destination = Literal["matrices", "others", "embeddings", "readouts", "routers"]

# Which destination is for which role; what is not here goes to "others".
_DESTINATIONS: dict[str, Destination] = {
    "hidden": "matrices",
    "embedding": "embeddings",
    "tied": "embeddings",
    "readout": "readouts",
    "router": "routers",
}


@dataclass(frozen=True)
class Block:
    """One matrix within a weight.

    Args:
        index: which of a stack of matrices (default: the weight is no stack).
        dim: the dimension along which a matrix is cut.
        start: the first index of the block along ``dim``.
        length: how many indices it has (default: all).
    """

    index: int | None = None
    dim: int = 0
    start: int = 0
    length: int | None = None

    def of(self, t: Tensor, order: Sequence[int]) -> Tensor:
        """The block of a tensor of the weight's shape; an alias where its memory allows one.

        Args:
            t: the weight, its gradient, or state of the same shape.
            order: of the dimensions after the first, if they are to be flattened.
        """
        if self.index is not None:
            return t[self.index]
        if t.ndim > 2:
            t = t.permute(0, *order).flatten(1)
        return t if self.length is None else t.narrow(self.dim, self.start, self.length)

    def __str__(self) -> str:
        if self.index is not None:
            return f"matrix {self.index}"
        if self.length is None:
            return "flattened"
        side = "rows" if self.dim == 0 else "columns"
        return f"{side} {self.start} to {self.start + self.length - 1}"


@dataclass(frozen=True)
class Route:
    """Where a parameter went, and why.

    Args:
        name: of the parameter.
        destination: the optimizer that steps it.
        why: its role and what was seen of it, or the pattern that said so.
        blocks: the matrices that a matrix optimizer takes it for; empty if it is one matrix.
        view: in which it is scale-invariant, for optimizers that project.
        is_vector: whether it has one dimension only, and so is not decayed.
    """

    name: str
    destination: Destination
    why: str
    blocks: tuple[Block, ...] = ()
    view: View | None = None
    is_vector: bool = False


class ByRole(Optimizer):
    r"""Several optimizers that step together, made by :func:`groups`.

    It is one torch optimizer: its groups hold whole parameters, each group with the key
    ``"optimizer"`` that says who steps it; schedulers, gradient scalers, clipping, hooks, closures
    and checkpoints see nothing else. State is kept whole too, so a checkpoint does not depend on
    how weights are cut into blocks.

    Attributes:
        optimizers: the optimizers by destination. Their options are those of this one's groups.
        routes: where each parameter went, and why; ``print(optimizer.account())`` is a table.
    """

    def __init__(
        self,
        optimizers: Mapping[Any, Factory],
        params: Mapping[str, nn.Parameter],
        routes: Sequence[Route],
    ) -> None:
        self.routes = tuple(routes)
        self._blocks: dict[Tensor, tuple[Block, ...]] = {
            params[route.name]: route.blocks for route in routes if route.blocks
        }
        self._parts: dict[Tensor, list[nn.Parameter]] = {
            p: [nn.Parameter(self._cut(p, block, p.detach())) for block in blocks]
            for p, blocks in self._blocks.items()
        }
        plain = _plain_groups(params, routes)
        self.optimizers: dict[str, Optimizer] = {}
        whole: list[dict[str, Any]] = []
        for destination, factory in optimizers.items():
            mine = [group for group in plain if group["optimizer"] == destination]
            if not mine:
                continue
            inner = factory([_without_names(self._inner_group(group)) for group in mine])
            if not isinstance(inner, Optimizer):
                raise TypeError(
                    f"Invalid {destination}: it made {type(inner).__name__}; must make a torch "
                    "optimizer"
                )
            if isinstance(inner, Wrapper):
                raise TypeError(
                    f"Invalid {destination}: it made a {type(inner).__name__}, whose views and "
                    "radii would be of blocks, not of weights; put it around the whole instead: "
                    "sphere(groups(...), {weight: view, ...})"
                )
            for group, filled in zip(mine, inner.param_groups, strict=True):
                options = {k: v for k, v in filled.items() if k != "params"}
                names = group["param_names"]
                whole.append(options | {"params": list(zip(names, group["params"], strict=True))})
            self.optimizers[destination] = inner
        super().__init__(whole, {})

    def __getstate__(self) -> dict[str, Any]:
        names = ("optimizers", "routes", "_blocks", "_parts")
        return super().__getstate__() | {name: self.__dict__[name] for name in names}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, whose key ``"optimizer"`` says which optimizer is to step it.

        Raises:
            ValueError: without such a key, or for an optimizer that is not there.
        """
        destination = param_group.get("optimizer")
        if destination not in self.optimizers:
            raise ValueError(
                f"Invalid optimizer: {destination!r}; a group of several optimizers needs the key "
                f"'optimizer', one of {', '.join(self.optimizers)}"
            )
        super().add_param_group(self.optimizers[destination].defaults | param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let each optimizer take its step.

        Args:
            closure: reevaluates the model, computes the gradients and returns the loss; it is
                called once.

        Returns:
            What ``closure`` returned, or ``None``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._hand_out()
        try:
            for destination, inner in self.optimizers.items():
                mine = [g for g in self.param_groups if g["optimizer"] == destination]
                # Made anew: schedulers, policies and checkpoints change or replace groups.
                inner.param_groups = [self._inner_group(group) for group in mine]
                inner.state = self.state
                inner.step()
                for group, stepped in zip(mine, inner.param_groups, strict=True):
                    if stepped is not group:
                        group.update({k: v for k, v in stepped.items() if k != "params"})
        finally:
            self._collect()
        return loss

    def update_rule(self, group: dict[str, Any], p: Tensor | None) -> UpdateRule:
        """What the optimizer of a group does; see :func:`normwise.describe`."""
        inner = self.optimizers[group["optimizer"]]
        parts = self._parts.get(p) if p is not None else None
        return rule_of(inner, self._inner_group(group), parts[0] if parts else p)

    def account(self) -> str:
        """A table of where each parameter went, and why."""
        rows = []
        for destination, inner in self.optimizers.items():
            for route in self.routes:
                if route.destination == destination:
                    cut = f", as {len(route.blocks)} matrices" if len(route.blocks) > 1 else ""
                    made = f"{destination} ({type(inner).__name__})"
                    rows.append((route.name, made, route.why + cut))
        return str(Table.of(("parameter", "goes to", "why"), rows))

    def _inner_group(self, group: dict[str, Any]) -> dict[str, Any]:
        """A group as its optimizer sees it: itself, or with blocks in the place of weights."""
        if not any(p in self._parts for p in group["params"]):
            return group
        parts = [q for p in group["params"] for q in self._parts.get(p, [p])]
        return _without_names(group) | {"params": parts}

    @torch.no_grad()
    def _hand_out(self) -> None:
        """Give each block its memory, its gradient and its state."""
        for p, parts in self._parts.items():
            state = self.state.get(p, {})
            for i, (part, block) in enumerate(zip(parts, self._blocks[p], strict=True)):
                part.data = self._cut(p, block, p.detach())
                part.grad = None if p.grad is None else self._cut(p, block, p.grad)
                if state:
                    self.state[part] = {
                        key: self._share(p, block, i, value) for key, value in state.items()
                    }

    def _share(self, p: Tensor, block: Block, i: int, value: Any) -> Any:
        """A block's share of a weight's state."""
        if isinstance(value, Tensor):
            # Counters are counted up in place, once a block.
            return self._cut(p, block, value) if value.shape == p.shape else value.clone()
        return value[i] if isinstance(value, list) else value

    @torch.no_grad()
    def _collect(self) -> None:
        """Take each block's state back into its weight's."""
        for p, parts in self._parts.items():
            states = [self.state.pop(part, {}) for part in parts]
            for part in parts:
                part.grad = None
            for key in states[0]:
                values = [state[key] for state in states]
                first = values[0]
                if not isinstance(first, Tensor) or first.numel() == 1 < parts[0].numel():
                    self.state[p][key] = first
                elif first.shape == parts[0].shape:
                    whole = self.state[p].get(key)
                    if whole is None:
                        whole = self.state[p][key] = torch.empty_like(p, dtype=first.dtype)
                    for block, value in zip(self._blocks[p], values, strict=True):
                        self._write(p, block, whole, value)
                else:
                    self.state[p][key] = values

    def _cut(self, p: Tensor, block: Block, t: Tensor) -> Tensor:
        return block.of(t, _order(p))

    def _write(self, p: Tensor, block: Block, whole: Tensor, value: Tensor) -> None:
        place = self._cut(p, block, whole)
        if place.data_ptr() == value.data_ptr():
            return  # stepped in place
        if place.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr():
            place.copy_(value)
        else:  # flattened in an order of which this memory gives no alias
            order = _order(p)
            back = value.reshape(len(value), *(whole.shape[d] for d in order))
            inverse = torch.tensor([0, *order]).argsort().tolist()
            whole.copy_(back.permute(inverse))


@overload
def groups(
    report: AnalysisReport,
    *,
    matrices: Factory,
    others: Factory,
    embeddings: Factory | None = None,
    readouts: Factory | None = None,
    routers: Factory | None = None,
    heads: Literal["whole", "split"] = "whole",
    fused: Literal["whole", "split"] = "split",
    assign: Mapping[str, Destination] | None = None,
    model: nn.Module | None = None,
) -> ByRole: ...


@overload
def groups(
    report: AnalysisReport,
    *,
    matrices: Options,
    others: Options,
    embeddings: Options | None = None,
    readouts: Options | None = None,
    routers: Options | None = None,
    heads: Literal["whole", "split"] = "whole",
    fused: Literal["whole", "split"] = "split",
    assign: Mapping[str, Destination] | None = None,
    model: nn.Module | None = None,
) -> list[dict[str, Any]]: ...


def groups(
    report: AnalysisReport,
    *,
    matrices: Factory | Options,
    others: Factory | Options,
    embeddings: Factory | Options | None = None,
    readouts: Factory | Options | None = None,
    routers: Factory | Options | None = None,
    heads: Literal["whole", "split"] = "whole",
    fused: Literal["whole", "split"] = "split",
    assign: Mapping[str, Destination] | None = None,
    model: nn.Module | None = None,
) -> ByRole | list[dict[str, Any]]:
    """Give each parameter to the optimizer that its role asks for, as one optimizer.

    Hidden matrices go to ``matrices``: those of stacks of experts one by one, the kernels of
    convolutions flattened to (outputs, all else). Biases, gains and all that is left go to
    ``others``; vectors are not decayed. Frozen parameters go nowhere.

    Args:
        report: of :func:`normwise.analyze`, with symmetries (``joint=True``, its default) where
            heads, fused blocks or routers are to be seen.
        matrices: makes the optimizer of hidden matrices from parameter groups:
            ``torch.optim.Muon``, or ``functools.partial(torch.optim.Muon, lr=0.02)``. With options
            (a mapping) here and below, the result is a list of groups for one optimizer instead.
        others: likewise, of everything else.
        embeddings: of tables whose rows are looked up, tied ones too (default: ``others``).
        readouts: of the last matrix (default: ``others``).
        routers: of what chooses among experts (default: ``others``).
        heads: whether a matrix optimizer steps the matrices of attention heads one by one,
            ``"split"``, or together, ``"whole"`` (default).
        fused: likewise for the parts of fused projections (default: ``"split"``).
        assign: destinations by patterns of names, for what analysis cannot know or you want
            otherwise, as ``{"decoder.*": "others"}`` (default: none).
        model: whose parameters to take (default: those of the model analyzed).

    Returns:
        A :class:`ByRole`, a torch optimizer; or a list of parameter groups if options were given.

    Raises:
        TypeError: for optimizers and options mixed.
        ValueError: naming the parameters of two dimensions or more whose role nothing shows, that
            ``matrices`` would get though they are no matrices, that are sharded and would have to
            be split, or that the report does not have; for a pattern that matches nothing.
    """
    for name, value in (("heads", heads), ("fused", fused)):
        if value not in ("whole", "split"):
            raise ValueError(f"Invalid {name}: {value!r}; must be 'whole' or 'split'")
    given: dict[Destination, Any] = {"matrices": matrices, "others": others}
    optional = {"embeddings": embeddings, "readouts": readouts, "routers": routers}
    given |= {name: value for name, value in optional.items() if value is not None}  # type: ignore[misc]  # values of unlike types
    are_options = {isinstance(value, Mapping) for value in given.values()}
    if len(are_options) > 1:
        raise TypeError("all of matrices, others, … must be optimizers, or all of them options")
    params = report.parameters(model)
    routes = _routes(report, params, given, assign or {}, heads, fused, are_options.pop())
    if not isinstance(matrices, Mapping):
        return ByRole(given, params, routes)
    found = _plain_groups(params, routes)
    # A group that brings a decay of its own is of vectors, which are not decayed.
    undecayed = {"weight_decay": 0.0}
    return [
        group | dict(given[group["optimizer"]]) | (undecayed if "weight_decay" in group else {})
        for group in found
    ]


def destination_of(row: ReportRow, given: Collection[str]) -> Destination:
    """Where a parameter goes by its role; a vector goes with the others, whatever it does.

    Args:
        row: of a report.
        given: the destinations that there are.
    """
    to = "others" if row.is_vector else _DESTINATIONS.get(row.role.kind, "others")
    return to if to in given else "others"


def _plain_groups(
    params: Mapping[str, nn.Parameter], routes: Iterable[Route]
) -> list[dict[str, Any]]:
    """Groups of parameters that go to one optimizer and are treated alike."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for route in routes:
        # A view is of whole weights, which an optimizer of blocks does not see.
        view = None if route.blocks or route.is_vector or route.view is None else str(route.view)
        name = "vectors" if route.is_vector else f"{route.destination} {view or ''}".rstrip()
        if route.blocks:
            name = f"{name} in blocks"
        key = (route.destination, name)
        group = found.setdefault(
            key,
            {"params": [], "param_names": [], "name": name, "view": view}
            | {"optimizer": route.destination}
            | ({"weight_decay": 0.0} if route.is_vector else {}),
        )
        group["params"].append(params[route.name])
        group["param_names"].append(route.name)
    return list(found.values())


def _routes(
    report: AnalysisReport,
    params: Mapping[str, nn.Parameter],
    given: Mapping[Destination, Any],
    assign: Mapping[str, Destination],
    heads: str,
    fused: str,
    are_options: bool,
) -> list[Route]:
    unknown, sharded, used = [], [], set()
    for pattern, destination in assign.items():
        if destination not in given:
            raise ValueError(
                f"Invalid assign: {pattern!r} to {destination!r}, which is none of "
                f"{', '.join(given)}"
            )
    routes: list[Route] = []
    for row in report:
        p = params[row.name]
        matching = [
            pattern
            for pattern in assign
            if any(fnmatch.fnmatchcase(name, pattern) for name in (row.name, *row.aliases))
        ]
        used |= set(matching)
        if not p.requires_grad:
            continue
        if matching:
            to, why = assign[matching[0]], f"as assign says of {matching[0]!r}"
        else:
            if not row.is_vector and row.role.kind == "other":
                unknown.append(f"{row.name} ({row.role.evidence or 'no role was looked for'})")
            to = destination_of(row, given)
            why = f"{row.role.kind}: {row.role.evidence}"
        blocks: tuple[Block, ...] = ()
        if to == "matrices" and not are_options:
            if len(row.shape) < 2:
                raise ValueError(f"{row.name} is sent to matrices, but its shape is {row.shape}")
            blocks = _blocks(report, row, heads == "split", fused == "split")
        if blocks and is_sharded(p):
            sharded.append(row.name)
        routes.append(Route(row.name, to, why, blocks, row.view, row.is_vector))
    if unknown:
        raise ValueError(
            f"nothing shows what these parameters are for: {', '.join(unknown)}; freeze them, or "
            "say where they go, as assign={'name': 'others'}"
        )
    if sharded:
        raise ValueError(
            f"{', '.join(sharded)} would be stepped in blocks, and blocks of DTensors are not "
            "supported; give heads='whole' and fused='whole', or assign= to another optimizer"
        )
    if left := assign.keys() - used:
        raise ValueError(f"Invalid assign: {sorted(left)} match no parameter")
    return routes


def _blocks(report: AnalysisReport, row: ReportRow, heads: bool, fused: bool) -> tuple[Block, ...]:
    """The matrices that a weight consists of; empty for one matrix that is whole."""
    if len(row.shape) > 2:
        if "conv" in row.role.evidence:
            return (Block(),)
        if len(row.shape) > 3:
            raise ValueError(
                f"{row.name} is sent to matrices, but its shape {row.shape} is no matrix, no stack "
                "of matrices and of no convolution; give assign={'" + row.name + "': 'others'}"
            )
        return tuple(Block(index=i) for i in range(row.shape[0]))
    cuts = {dim: {0, size} for dim, size in enumerate(row.shape)}
    found = _sides(report, row)
    if fused:
        for dim in (0, 1):
            labels: list[frozenset[Any]] = [frozenset()] * row.shape[dim]
            for (at, side), indices in found.items():
                for index in indices if at == dim else ():
                    labels[index] |= {side}
            cuts[dim] |= {i for i in range(1, len(labels)) if labels[i] != labels[i - 1]}
    if heads and row.role.heads:
        dim, length = _head(row, row.role.heads, found)
        for start, stop in _runs(cuts[dim]):
            if (stop - start) % length == 0:
                cuts[dim] |= set(range(start, stop, length))
    along = [dim for dim in (0, 1) if len(cuts[dim]) > 2]
    if not along:
        return ()
    if len(along) == 2:
        raise ValueError(
            f"{row.name} is fused along its rows and along its columns; give fused='whole' and "
            "heads='whole'"
        )
    return tuple(Block(None, along[0], a, b - a) for a, b in _runs(cuts[along[0]]))


def _without_names(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "param_names"}


def _runs(cuts: Iterable[int]) -> list[tuple[int, int]]:
    order = sorted(cuts)
    return list(itertools.pairwise(order))


def _sides(report: AnalysisReport, row: ReportRow) -> dict[tuple[int, Any], list[int]]:
    """The indices of a weight by dimension and by what their scale is traded against.

    Families that trade the same parameters in the same direction are of one part: a partial rotary
    embedding makes two of the queries and keys. Families with the gain of a norm say what reads the
    norm, and nothing of heads or parts.
    """
    found: dict[tuple[int, Any], list[int]] = {}
    for symmetry in report.symmetries:
        roles = {report[term.parameter].role.kind for term in symmetry.terms}
        if symmetry.is_view or roles & {"gain", "embedding", "tied"}:
            continue
        traded = frozenset(
            (term.parameter, term.exponent > 0)
            for term in symmetry.terms
            if not report[term.parameter].is_vector  # a bias goes with its matrix, where it can
        )
        for term in symmetry.terms:
            if term.parameter == row.name and len(term.slices.dims) == 1:
                key = term.slices.dims[0], (traded, term.exponent > 0)
                found.setdefault(key, []).extend(term.slices.indices().flatten().tolist())
    return found


def _head(
    row: ReportRow, heads: int, sides: Mapping[tuple[int, Any], Sequence[int]]
) -> tuple[int, int]:
    """Along which dimension a weight's heads lie, and how many indices each has."""
    view = row.view
    if view is not None and view.kind == "blocks" and heads == view.count:
        return view.dim, row.shape[view.dim] // view.count
    for (dim, _), indices in sides.items():
        if len(indices) % heads == 0:
            return dim, len(indices) // heads
    return 0, row.shape[0] // heads


def _order(p: Tensor) -> tuple[int, ...]:
    """The dimensions after the first in the order of memory, so that flattening needs no copy.

    Orthogonalization does not care about the order of columns.
    """
    return tuple(sorted(range(1, p.ndim), key=lambda d: (-p.stride()[d], d)))
