"""η and λ for another batch size, horizon or width: named rules, each with its paper.

A rule says what it may change. :func:`carry` applies one and refuses what it does not speak of, so
rules are combined only by calling it again, and a :class:`Run` keeps the names of all that made it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

__all__ = ["TRANSFERS", "Run", "Transfer", "carry"]

# Bergsma et al., arXiv 2505.13738: the fitted power of tokens per parameter in the best τ, for
# GPT2-like networks of 111M to 3.3B parameters under µP and a decay of η to zero.
POWER_LINES_EXPONENT = -0.527

# Ren et al., arXiv 2603.28743: the power of the number of tokens in the best η.
HYPERSPHERE_EXPONENT = -0.32


@dataclass(frozen=True)
class Run:
    """The settings of a run that transfer speaks of.

    Args:
        lr: η of hidden matrices, at its highest.
        weight_decay: λ, decoupled: a step multiplies weights by 1 − ηλ.
        batch: tokens, or samples, of a step.
        tokens: of the run, in the same unit.
        width: of the network (default: not known).
        parameters: how many the network has (default: not known).
        rules: the rules by which it was carried over, in order.

    Raises:
        ValueError: for a number that is not finite or not positive; λ may be 0.
    """

    lr: float
    weight_decay: float
    batch: float
    tokens: float
    width: int | None = None
    parameters: float | None = None
    rules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("lr", "batch", "tokens", "width", "parameters"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"Invalid {name}: {value}; must be positive and finite")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"Invalid weight_decay: {self.weight_decay}; must be 0 or more")

    @property
    def steps(self) -> float:
        """Of the run."""
        return self.tokens / self.batch

    @property
    def timescale(self) -> float:
        """τ = B/(ηλD), the share of the run that weights remember; infinite without decay."""
        product = self.lr * self.weight_decay * self.steps
        return math.inf if product == 0 else 1 / product


@dataclass(frozen=True)
class Transfer:
    """A rule by which settings are carried over.

    Attributes:
        name: of the rule.
        source: its paper.
        words: what it does.
        changes: the attributes of a :class:`Run` that may differ.
        settings: a function of the run and the run to come, with η and λ of the old, that gives
            η and λ.
    """

    name: str
    source: str
    words: str
    changes: frozenset[str]
    settings: Callable[[Run, Run], tuple[float, float]]


def _keep(old: Run, new: Run) -> tuple[float, float]:
    return old.lr, old.weight_decay


def _constant_timescale(old: Run, new: Run) -> tuple[float, float]:
    return old.lr, old.weight_decay * old.steps / new.steps


def _power_lines(old: Run, new: Run) -> tuple[float, float]:
    if old.parameters is None or new.parameters is None:
        raise ValueError("the rule 'power lines' needs parameters= of both runs")
    per_parameter = (new.tokens / new.parameters) / (old.tokens / old.parameters)
    tau = per_parameter**POWER_LINES_EXPONENT
    return old.lr, old.weight_decay * old.steps / new.steps / tau


def _widths(old: Run, new: Run) -> float:
    if old.width is None or new.width is None:
        raise ValueError("a rule for another width needs width= of both runs")
    return new.width / old.width


def _sqrt_decay(old: Run, new: Run) -> tuple[float, float]:
    ratio = _widths(old, new)
    return old.lr / ratio, old.weight_decay * math.sqrt(ratio)


def _independent_decay(old: Run, new: Run) -> tuple[float, float]:
    ratio = _widths(old, new)
    return old.lr / ratio, old.weight_decay * ratio


def _mup(old: Run, new: Run) -> tuple[float, float]:
    return old.lr / _widths(old, new), old.weight_decay


def _hypersphere(old: Run, new: Run) -> tuple[float, float]:
    if old.weight_decay:
        raise ValueError(
            f"the rule 'hypersphere' is for fixed norms, which decay does not change, but "
            f"weight_decay is {old.weight_decay}; give 0"
        )
    return old.lr * (new.tokens / old.tokens) ** HYPERSPHERE_EXPONENT, 0.0


_WIDTH = frozenset({"width", "parameters"})

TRANSFERS: dict[str, Transfer] = {
    t.name: t
    for t in (
        Transfer(
            "keep",
            "none: what one does without a rule",
            "η and λ stay",
            frozenset({"batch", "tokens", "width", "parameters"}),
            _keep,
        ),
        Transfer(
            "constant timescale",
            "Wang and Aitchison, arXiv 2405.13698",
            "η stays; λ keeps τ = B/(ηλD): λ ∝ B/D",
            frozenset({"batch", "tokens"}),
            _constant_timescale,
        ),
        Transfer(
            "power lines",
            "Bergsma et al., arXiv 2505.13738",
            "η stays; λ makes τ = B/(ηλD) follow (tokens per parameter)^−0.527",
            frozenset({"batch", "tokens", "parameters"}),
            _power_lines,
        ),
        Transfer(
            "muP",
            "Yang et al., arXiv 2203.03466",
            "η ∝ 1/width; λ stays, so ηλ falls with the width",
            _WIDTH,
            _mup,
        ),
        Transfer(
            "square-root decay",
            "arXiv 2510.15262",
            "η ∝ 1/width and λ ∝ √width",
            _WIDTH,
            _sqrt_decay,
        ),
        Transfer(
            "independent decay",
            "Kosson et al., arXiv 2510.19093",
            "η ∝ 1/width and λ ∝ width, so ηλ stays",
            _WIDTH,
            _independent_decay,
        ),
        Transfer(
            "hypersphere",
            "Ren et al., arXiv 2603.28743",
            "fixed norms: η is a relative step, the same at every width, ∝ tokens^−0.32; no decay",
            frozenset({"tokens", "width", "parameters"}),
            _hypersphere,
        ),
    )
}


def carry(
    run: Run,
    rule: str,
    *,
    batch: float | None = None,
    tokens: float | None = None,
    width: int | None = None,
    parameters: float | None = None,
) -> Run:
    """The settings of another run, by one rule.

    Args:
        run: whose η and λ are good.
        rule: one of :data:`TRANSFERS`, by name.
        batch: of the other run (default: the same, as of all that follow).
        tokens: of the other run.
        width: of the other network.
        parameters: of the other network.

    Returns:
        The other run, with the rule's name added to its ``rules``.

    Raises:
        ValueError: for an unknown rule, a change that the rule does not speak of, or a number that
            it needs and that is not given.
    """
    if rule not in TRANSFERS:
        raise ValueError(f"Invalid rule: {rule!r}; must be one of {', '.join(TRANSFERS)}")
    given = {"batch": batch, "tokens": tokens, "width": width, "parameters": parameters}
    changes = {
        name: value
        for name, value in given.items()
        if value is not None and value != getattr(run, name)
    }
    transfer = TRANSFERS[rule]
    if beyond := changes.keys() - transfer.changes:
        able = [t.name for t in TRANSFERS.values() if t.changes >= beyond and t.name != "keep"]
        others = f"; carry that over by {' or '.join(able)} in a call of its own" if able else ""
        raise ValueError(
            f"the rule {rule!r} ({transfer.source}) says nothing of another "
            f"{' and '.join(sorted(beyond))}{others}"
        )
    new = replace(run, **changes)  # type: ignore[arg-type]  # names and types are those of a Run
    lr, weight_decay = transfer.settings(run, new)
    return replace(new, lr=lr, weight_decay=weight_decay, rules=(*run.rules, rule))
