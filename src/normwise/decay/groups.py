"""On what decay acts: parameter groups from rules, or from an analysis, with an account.

A group of an optimizer has one ``weight_decay``. :func:`by_rules` and :func:`by_analysis` put each
parameter of a model in one, and say why.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from normwise.checks import check_model, check_number, check_report
from normwise.protocols import AnalysisReport

__all__ = ["Groups", "Rule", "by_analysis", "by_rules"]


@dataclass(frozen=True)
class Rule:
    """The weight decay of the parameters that meet all conditions that are given.

    Args:
        weight_decay: λ.
        names: patterns of parameter names, such as ``"*.bias"``, of which one matches.
        modules: kinds of the module that holds the parameter, such as ``nn.Embedding``.
        max_ndim: the largest number of dimensions; 1 takes biases, gains and scales.

    Raises:
        TypeError: for a condition of another type.
        ValueError: for λ that is negative or not finite, or no condition at all.
    """

    weight_decay: float
    names: tuple[str, ...] | str = ()
    modules: tuple[type[nn.Module], ...] | type[nn.Module] = ()
    max_ndim: int | None = None

    def __post_init__(self) -> None:
        check_number("weight_decay value", self.weight_decay)
        for name, values, kind, wanted in (
            ("names", self.names, str, "a pattern, or a tuple of patterns"),
            ("modules", self.modules, type, "a class of modules, or a tuple of classes"),
        ):
            for value in values if isinstance(values, tuple) else (values,):
                if not isinstance(value, kind):
                    raise TypeError(f"Invalid {name}: {value!r}; must be {wanted}")
        if self.max_ndim is not None and not isinstance(self.max_ndim, int):
            raise TypeError(f"Invalid max_ndim: {self.max_ndim!r}; must be a whole number")
        if not self.names and not self.modules and self.max_ndim is None:
            raise ValueError("a rule needs a condition: names, modules or max_ndim")

    def matches(self, name: str, module: nn.Module, p: nn.Parameter) -> bool:
        """Whether the rule is for this parameter of this module.

        Args:
            name: of the parameter.
            module: that holds it.
            p: the parameter.
        """
        patterns = (self.names,) if isinstance(self.names, str) else self.names
        return (
            (not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))
            and (not self.modules or isinstance(module, self.modules))
            and (self.max_ndim is None or p.ndim <= self.max_ndim)
        )

    def __str__(self) -> str:
        conditions = []
        if self.names:
            names = (self.names,) if isinstance(self.names, str) else self.names
            conditions.append("named " + " or ".join(names))
        if self.modules:
            kinds = self.modules if isinstance(self.modules, tuple) else (self.modules,)
            conditions.append("in " + " or ".join(kind.__name__ for kind in kinds))
        if self.max_ndim is not None:
            conditions.append(f"at most {self.max_ndim}-dimensional")
        return ", ".join(conditions)


class Groups(list[dict[str, Any]]):
    """Parameter groups for any torch optimizer, with names of parameters; ``str()`` tells why."""

    def __str__(self) -> str:
        lines = []
        for group in self:
            params = [p for _, p in group["params"]]
            entries = sum(p.numel() for p in params)
            count = "1 parameter" if len(params) == 1 else f"{len(params)} parameters"
            lines.append(
                f"{group['name']}: λ = {group['weight_decay']:g}, {count}, {entries:,} entries"
            )
            lines += [
                f"    {name}  {'×'.join(map(str, p.shape)) or 'scalar'}"
                for name, p in group["params"]
            ]
        return "\n".join(lines)


# Biases, and the gains and scales of normalization, are not decayed.
NO_VECTORS = Rule(0.0, max_ndim=1)


def by_rules(
    model: nn.Module, weight_decay: float, rules: Sequence[Rule] = (NO_VECTORS,)
) -> Groups:
    """Parameter groups by the first rule that matches each parameter.

    Frozen parameters are in no group; a shared one counts by its first name.

    Args:
        model: whose parameters to take.
        weight_decay: λ of those that no rule matches.
        rules: in order of precedence (default: none for what has at most one dimension).

    Returns:
        Groups with ``params``, ``weight_decay`` and ``name``; ``print`` them for an account.

    Raises:
        ValueError: for λ that is negative or not finite, or a rule that no parameter falls to.
    """
    check_model(model)
    check_number("weight_decay value", weight_decay)
    for rule in rules:
        if not isinstance(rule, Rule):
            raise TypeError(f"Invalid rule: {rule!r}; must be a normwise.decay.Rule")
    labels = [(str(rule), rule.weight_decay) for rule in rules] + [("all others", weight_decay)]
    members: list[list[tuple[str, nn.Parameter]]] = [[] for _ in labels]
    for name, p in model.named_parameters():
        if p.requires_grad:
            module = model.get_submodule(name.rpartition(".")[0])
            matching = [i for i, rule in enumerate(rules) if rule.matches(name, module, p)]
            members[matching[0] if matching else -1].append((name, p))
    for rule, found in zip(rules, members, strict=False):
        if not found:
            raise ValueError(f"no parameter falls to the rule: {rule}")
    return _grouped(labels, members)


def by_analysis(
    model: nn.Module,
    report: AnalysisReport,
    *,
    invariant: float,
    plain: float,
    vector: float = 0.0,
) -> Groups:
    """Parameter groups by what an analysis found.

    Args:
        model: whose parameters to take.
        report: of :func:`normwise.analyze`.
        invariant: λ of scale-invariant weights, whose norm is only a learning rate.
        plain: λ of the others of two dimensions or more, whose norm is capacity.
        vector: λ of biases, gains and scales (default: 0).

    Returns:
        Groups with ``params``, ``weight_decay`` and ``name``; ``print`` them for an account.

    Raises:
        ValueError: for λ that is negative or not finite, or a parameter that the report has not.
    """
    check_model(model)
    check_report(report)
    labels = [("scale-invariant", invariant), ("plain", plain), ("vector", vector)]
    members: list[list[tuple[str, nn.Parameter]]] = [[], [], []]
    for decay in (invariant, plain, vector):
        check_number("weight_decay value", decay)
    for name, p in model.named_parameters():
        if p.requires_grad:
            try:
                row = report[name]
            except KeyError as error:
                raise ValueError(f"the report has no parameter {name!r}, the model has") from error
            members[2 if row.is_vector else 1 if row.view is None else 0].append((name, p))
    return _grouped(labels, members)


def _grouped(
    labels: list[tuple[str, float]], members: list[list[tuple[str, nn.Parameter]]]
) -> Groups:
    return Groups(
        {"params": found, "weight_decay": decay, "name": name}
        for (name, decay), found in zip(labels, members, strict=True)
        if found
    )
