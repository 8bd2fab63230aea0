"""What the optimizers that wrap another share: its groups and state, views, steps without decay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer

from normwise.checks import check_optimizer, check_report
from normwise.geometry import View
from normwise.optim.groups import as_view_option, check_not_flattened, names_of
from normwise.optim.joint import Family, Joint, Symmetries, families_of, with_views
from normwise.optim.step import is_nonzero
from normwise.protocols import AnalysisReport, Views

__all__ = ["Wrapper", "resolve"]


class Wrapper(Optimizer):
    """An optimizer around another one, whose groups, state and defaults it shares.

    So schedulers, gradient scalers and checkpoints see the wrapped one.

    Args:
        optimizer: the wrapped one.
        views: of the weights whose steps are changed slice by slice.
        families: of the weights whose steps are changed together.
    """

    def __init__(
        self, optimizer: Optimizer, views: Mapping[Tensor, View], families: Sequence[Family]
    ) -> None:
        # Intentionally no call of Optimizer.__init__, which would make groups of its own.
        self.optimizer = optimizer
        self._views = dict(views)
        self._families = list(families)
        # What copies and pickles are made of; the rest is found again when it is needed.
        self._own = {"optimizer", "_views", "_families", "_own"}
        self.__setstate__({})

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]  # shared, not a copy
        return self.optimizer.defaults

    @property
    def state(self) -> Any:  # type: ignore[override]  # shared, not a copy
        return self.optimizer.state

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]  # shared
        return self.optimizer.param_groups

    @property
    def _changed(self) -> dict[Tensor, View | None]:
        """The weights whose steps are changed, with their views; None for those of families."""
        if "_changed_weights" not in self.__dict__:
            joint: dict[Tensor, View | None] = {p: None for f in self._families for p in f.params}
            self.__dict__["_changed_weights"] = {**self._views, **joint}
        changed: dict[Tensor, View | None] = self.__dict__["_changed_weights"]
        return changed

    @property
    def _joint(self) -> Joint:
        """What is known of the families, found once."""
        joint: Joint = self.__dict__.setdefault("_joint_plans", Joint(self._families))
        return joint

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in self._own}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer, which alone steps it: it has no view."""
        self.optimizer.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the wrapped optimizer does it."""
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of the wrapped optimizer."""
        self.optimizer.load_state_dict(state_dict)

    @contextmanager
    def _without_decay(self) -> Iterator[None]:
        """For one step, keep the wrapped optimizer from decaying the weights that are changed.

        Its groups are split in two for that long, where they decay at all. State belongs to
        parameters and stays; what the optimizer writes into a group is carried over.
        """
        groups = self.optimizer.param_groups
        parts: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for group in groups:
            ours = [p for p in group["params"] if p in self._changed]
            if not ours or not is_nonzero(group.get("weight_decay", 0.0)):
                parts.append((group, group))
                continue
            theirs = [p for p in group["params"] if p not in self._changed]
            parts.append((group, {**group, "params": ours, "weight_decay": 0.0}))
            if theirs:
                parts.append((group, {**group, "params": theirs}))
        self.optimizer.param_groups = [part for _, part in parts]
        try:
            yield
        finally:
            self.optimizer.param_groups = groups
            for group, part in parts:
                for key in part.keys() - {"params", "weight_decay", "param_names"}:
                    group[key] = part[key]


def resolve(
    optimizer: Optimizer, views: Views | None, symmetries: Symmetries | None, wrapper: str
) -> tuple[dict[Tensor, View], list[Family]]:
    """The view of each weight that a wrapper is to treat, and families of weights.

    Args:
        optimizer: whose weights they are.
        views: as of :func:`resolve_views`; None for no views.
        symmetries: as of :func:`normwise.optim.joint.families_of`; None for no families.
        wrapper: the wrapper's name, for errors.

    Raises:
        ValueError: see these; and for an optimizer that is a wrapper itself.
    """
    if isinstance(optimizer, Wrapper):
        name, wrapped = type(optimizer).__name__, type(optimizer.optimizer).__name__
        raise ValueError(
            f"{wrapper} cannot go around {name}, which sets its own weights' norms after each "
            f"step: wrap {wrapped} once, with all views in one mapping"
        )
    if symmetries is None:
        if views is None:
            raise ValueError(f"{wrapper} needs views, or symmetries=")
        return resolve_views(optimizer, views, wrapper), []
    params = [p for group in optimizer.param_groups for p in group["params"]]
    families = families_of(symmetries, names_of(optimizer), params, wrapper)
    for p in {p for family in families for p in family.params}:
        check_not_flattened(p, f"of {wrapper}")
    resolved = {} if views is None else resolve_views(optimizer, views, wrapper, required=False)
    joint, resolved = with_views(families, resolved)
    return resolved, joint


def resolve_views(
    optimizer: Optimizer, views: Views, wrapper: str, *, required: bool = True
) -> dict[Tensor, View]:
    """The view of each weight that a wrapper is to treat.

    Args:
        optimizer: whose weights they are.
        views: one view or its spelling for all weights of two dimensions or more; a mapping from
            parameters or names; or a report, of which vectors are passed over.
        wrapper: the wrapper's name, for errors.
        required: whether there must be a weight (default: True).

    Raises:
        TypeError: for what is no optimizer, or no views and no report.
        ValueError: if a view does not fit its weight, if a weight is not one of the optimizer's or
            has fewer than two dimensions, or if no weight is left.
    """
    check_optimizer(optimizer)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p in params:
        check_not_flattened(p, f"of {wrapper}")
    if isinstance(views, View | str):
        resolved = {p: _as_view(views, wrapper) for p in params if p.ndim > 1}
    else:
        resolved = _resolved_mapping(optimizer, params, views, wrapper)
    for p, view in resolved.items():
        view.check(p.shape)
    if not resolved and required:
        raise ValueError("no weight of two dimensions or more has a view: nothing to project")
    return resolved


def _resolved_mapping(
    optimizer: Optimizer,
    params: list[Tensor],
    views: Mapping[Any, View | str] | AnalysisReport,
    wrapper: str,
) -> dict[Tensor, View]:
    mapping: Mapping[Any, View | str]
    if isinstance(views, Mapping):
        mapping = views
    else:
        check_report(views, "a view, its spelling, a mapping from parameters, or")
        mapping = {p: view for p, view in views.parameter_views().items() if p.ndim > 1}
    by_name = {name: p for p, name in names_of(optimizer).items()}
    known = set(params)
    resolved: dict[Tensor, View] = {}
    for key, view in mapping.items():
        p = by_name.get(key) if isinstance(key, str) else key
        if p is None or p not in known:
            hint = "" if by_name else "; make it from model.named_parameters() to use names"
            label = repr(key) if isinstance(key, str) else f"of shape {tuple(key.shape)}"
            raise ValueError(f"parameter {label} is not one of the optimizer's{hint}")
        if p.ndim < 2:
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} cannot be projected: it has fewer than two "
                "dimensions"
            )
        resolved[p] = _as_view(view, wrapper)
    return resolved


def _as_view(value: View | str, wrapper: str) -> View:
    view = as_view_option(value)
    if not isinstance(view, View):
        raise ValueError(f"Invalid view: {value!r}; {wrapper} needs a normwise.View")
    return view
