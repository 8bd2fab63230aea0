"""η and λ for another batch size, horizon or width: named rules, each with its paper.

A rule says what it may change. :func:`carry` applies one and refuses what it does not speak of, so
rules are combined only by calling it again, and a :class:`Run` keeps the names of all that made it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

__all__ = ["TRANSFERS", "Run", "Transfer", "carry", "carry_by", "carry_by_each"]

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
        where: what its paper found it for.
        changes: the attributes of a :class:`Run` that may differ.
        roles: of the weights whose η and λ it changes; those of all others stay.
        needs: the attribute of both runs without which it cannot say anything; empty for none.
        norms: whether it is for weights whose norms are ``"free"``, ``"fixed"``, or for both.
        settings: a function of the run and the run to come, with η and λ of the old, that gives
            η and λ.
    """

    name: str
    source: str
    words: str
    where: str
    changes: frozenset[str]
    settings: Callable[[Run, Run], tuple[float, float]]
    roles: frozenset[str]
    needs: str = ""
    norms: Literal["free", "fixed", "any"] = "free"


def _keep(old: Run, new: Run) -> tuple[float, float]:
    return old.lr, old.weight_decay


def _constant_timescale(old: Run, new: Run) -> tuple[float, float]:
    return old.lr, old.weight_decay * old.steps / new.steps


def _power_lines(old: Run, new: Run) -> tuple[float, float]:
    per_parameter = (new.tokens / _known(new.parameters)) / (old.tokens / _known(old.parameters))
    tau = per_parameter**POWER_LINES_EXPONENT
    return old.lr, old.weight_decay * old.steps / new.steps / tau


def _widths(old: Run, new: Run) -> float:
    return _known(new.width) / _known(old.width)


def _known(value: float | None) -> float:
    """A number that :attr:`Transfer.needs` has made sure of."""
    assert value is not None
    return value


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
_HIDDEN = frozenset({"hidden"})
_DECAYED = frozenset({"hidden", "embedding", "tied", "readout", "router", "other"})

TRANSFERS: dict[str, Transfer] = {
    t.name: t
    for t in (
        Transfer(
            "keep",
            "none: what one does without a rule",
            "η and λ stay",
            "µP too says this of another batch or horizon, where no width changes.",
            frozenset({"batch", "tokens", "width", "parameters"}),
            _keep,
            _DECAYED,
            norms="any",
        ),
        Transfer(
            "constant timescale",
            "Wang and Aitchison, arXiv 2405.13698",
            "η stays; λ keeps τ = B/(ηλD): λ ∝ B/D",
            "AdamW; ResNet-18, ViT, NanoGPT. D is one pass over the data: τ is kept in passes, so "
            "that their number does not change λ.",
            frozenset({"batch", "tokens"}),
            _constant_timescale,
            _DECAYED,
        ),
        Transfer(
            "power lines",
            "Bergsma et al., arXiv 2505.13738",
            "η stays; λ makes τ = B/(ηλD) follow (tokens per parameter)^−0.527",
            "AdamW; GPT2-like networks of 111M to 3.3B parameters under µP, one pass over the "
            "data, η decayed to zero.",
            frozenset({"batch", "tokens", "parameters"}),
            _power_lines,
            _DECAYED,
            needs="parameters",
        ),
        Transfer(
            "muP",
            "Yang et al., arXiv 2203.03466",
            "η ∝ 1/width; λ stays, so ηλ falls with the width",
            "Adam; hidden matrices that start with a variance ∝ 1/width. Tables, vectors and "
            "readouts keep η, and a readout's output is divided by the width.",
            _WIDTH,
            _mup,
            _HIDDEN,
            needs="width",
        ),
        Transfer(
            "square-root decay",
            "Fan et al., arXiv 2510.15262",
            "η ∝ 1/width and λ ∝ √width",
            "AdamW; hidden matrices of LLaMA-style networks. Vectors keep η and do not decay.",
            _WIDTH,
            _sqrt_decay,
            _HIDDEN,
            needs="width",
        ),
        Transfer(
            "independent decay",
            "Kosson et al., arXiv 2510.19093",
            "η ∝ 1/width and λ ∝ width, so ηλ stays",
            "AdamW; hidden matrices of LLaMA-style networks and ResNets.",
            _WIDTH,
            _independent_decay,
            _HIDDEN,
            needs="width",
        ),
        Transfer(
            "hypersphere",
            "Ren et al., arXiv 2603.28743",
            "fixed norms: η is a relative step, the same at every width, ∝ tokens^−0.32; no decay",
            "Muon with matrices on spheres of fixed Frobenius norm; another depth needs Depth-µP "
            "beside it.",
            frozenset({"tokens", "width", "parameters"}),
            _hypersphere,
            _HIDDEN,
            norms="fixed",
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
    transfer = _transfer(rule)
    changes = _changes(run, batch=batch, tokens=tokens, width=width, parameters=parameters)
    if beyond := changes.keys() - transfer.changes:
        able = [t.name for t in TRANSFERS.values() if t.changes >= beyond and t.name != "keep"]
        others = f"; carry that over by {' or '.join(able)} in a call of its own" if able else ""
        raise ValueError(
            f"the rule {rule!r} ({transfer.source}) says nothing of another {named(beyond)}{others}"
        )
    return _applied(run, transfer, changes)


def carry_by(
    run: Run,
    rules: Sequence[str],
    *,
    batch: float | None = None,
    tokens: float | None = None,
    width: int | None = None,
    parameters: float | None = None,
) -> Run:
    """The settings of another run, by several rules one after the other.

    Each carries over what it speaks of and those before it have left.

    Args:
        run: whose η and λ are good.
        rules: of :data:`TRANSFERS`, by name.
        batch: of the other run (default: the same, as of all that follow).
        tokens: of the other run.
        width: of the other network.
        parameters: of the other network.

    Returns:
        The other run, with the names of the rules.

    Raises:
        ValueError: as :func:`carry`; for a rule to which nothing is left, and for a change that
            all have left.
    """
    left = _changes(run, batch=batch, tokens=tokens, width=width, parameters=parameters)
    for rule in rules:
        transfer = _transfer(rule)
        mine = {name: value for name, value in left.items() if name in transfer.changes}
        if not mine:
            raise ValueError(
                f"the rule {rule!r} has nothing to carry over that is left; it speaks of another "
                f"{named(transfer.changes)}"
            )
        run = _applied(run, transfer, mine)
        left = {name: value for name, value in left.items() if name not in mine}
    if left:
        able = [t.name for t in TRANSFERS.values() if t.changes & left.keys() and t.name != "keep"]
        raise ValueError(
            f"the rules {', '.join(map(repr, rules)) or '(none)'} say nothing of another "
            f"{named(left)}; {' or '.join(map(repr, able))} beside them would"
        )
    return run


def carry_by_each(
    run: Run,
    norms: Literal["free", "fixed"] = "free",
    *,
    batch: float | None = None,
    tokens: float | None = None,
    width: int | None = None,
    parameters: float | None = None,
) -> tuple[Run, ...]:
    """What each rule by itself says of another run.

    A rule that does not speak of all changes carries over those that it speaks of, and the others
    stay undone.

    Args:
        run: whose η and λ are good.
        norms: whether norms are ``"free"`` or ``"fixed"`` (default: ``"free"``).
        batch: of the other run (default: the same, as of all that follow).
        tokens: of the other run.
        width: of the other network.
        parameters: of the other network.

    Returns:
        One run for each rule that speaks of any change and has the numbers that it needs, in the
        order of :data:`TRANSFERS`.
    """
    changes = _changes(run, batch=batch, tokens=tokens, width=width, parameters=parameters)
    found = []
    for transfer in TRANSFERS.values():
        mine = {name: value for name, value in changes.items() if name in transfer.changes}
        lacks = transfer.needs and None in _needed(run, transfer, mine)
        if mine and not lacks and transfer.norms in (norms, "any"):
            found.append(_applied(run, transfer, mine))
    return tuple(found)


def named(changes: Iterable[str]) -> str:
    """Attributes of a :class:`Run`, in words.

    Args:
        changes: their names.
    """
    return " and ".join(sorted({"tokens": "horizon"}.get(name, name) for name in changes))


def _transfer(rule: str) -> Transfer:
    if rule not in TRANSFERS:
        raise ValueError(f"Invalid rule: {rule!r}; must be one of {', '.join(TRANSFERS)}")
    return TRANSFERS[rule]


def _changes(run: Run, **given: float | None) -> dict[str, float]:
    """What is to be other than it is."""
    return {
        name: value
        for name, value in given.items()
        if value is not None and value != getattr(run, name)
    }


def _needed(run: Run, transfer: Transfer, changes: dict[str, float]) -> tuple[float | None, ...]:
    """What a rule needs to know of both runs."""
    old = getattr(run, transfer.needs)
    return old, changes.get(transfer.needs, old)


def _applied(run: Run, transfer: Transfer, changes: dict[str, float]) -> Run:
    if transfer.needs and None in _needed(run, transfer, changes):
        raise ValueError(f"the rule {transfer.name!r} needs {transfer.needs}= of both runs")
    new = replace(run, **changes)  # type: ignore[arg-type]  # names and types are those of a Run
    lr, weight_decay = transfer.settings(run, new)
    return replace(new, lr=lr, weight_decay=weight_decay, rules=(*run.rules, transfer.name))
