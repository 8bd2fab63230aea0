"""What decay does to each kind of parameter, and what to group, to fix and to project instead."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from normwise.figures.tables import paragraph
from normwise.invariance.freedom import Freedom
from normwise.invariance.row import ParameterReport
from normwise.invariance.symmetry import Symmetry

__all__ = ["advice", "chance_of_gate"]

# AdamP's default threshold of its cosine, in units of 1/√entries.
_DELTA = 0.1
_NAMED = 4


def chance_of_gate(delta: float) -> float:
    """How often the layer gate of AdamP opens for a weight whose gradient is independent of it.

    In n dimensions the cosine of independent directions is spread as 1/√n, nearly normally, and the
    gate opens below δ/√n: 2Φ(δ) − 1.

    Args:
        delta: δ, the threshold.
    """
    return math.erf(delta / math.sqrt(2))


def advice(
    rows: Sequence[ParameterReport],
    families: Sequence[Symmetry],
    freedom: Freedom | None,
    weight_decay: float,
    lr: float,
) -> str:
    """Advice in a few lines.

    Args:
        rows: of the parameters.
        families: all that can be scaled together.
        freedom: what fixing the norm of every matrix costs; None if that is not known.
        weight_decay: λ, decoupled.
        lr: the learning rate η.
    """
    lines = [
        f"weight_decay={weight_decay:g} on everything, at lr={lr:g}, multiplies every weight "
        f"by {1 - lr * weight_decay:.8g} per step. It acts on",
        *_decay(rows, families),
        *_groups(rows),
        *_fixed(freedom),
        *_gate(rows),
    ]
    return "\n".join(map(paragraph, lines))


def _decay(rows: Sequence[ParameterReport], families: Sequence[Symmetry]) -> Iterator[str]:
    """What decay acts on, and where it has no effect on what the network computes."""

    def share(*kinds: str) -> str | None:
        chosen = [row for row in rows if row.kind in kinds and not row.is_vector]
        return _share(chosen, rows) if chosen else None

    invariant = [row for row in rows if row.kind == "invariant"]
    if invariant:
        yield (
            f"- scale-invariant weights ({_share(invariant, rows)}): not on what they compute, "
            "only on their effective learning rate, which it keeps from falling"
        )
    together = [row for row in rows if row.kind == "joint"]
    if together:
        yield (
            f"- jointly invariant parameters ({_share(together, rows)}): likewise for the norm of "
            "each set as a whole, if it decays all of a set alike"
        )
    trades = [s for s in families if not s.is_scale]
    if trades:
        units = sum(s.units for s in trades)
        yield (
            f"- {units} scales that can be traded between weights ({len(trades)} families): not on "
            "what the network computes, but on how each scale is shared; it brings both sides to "
            "equal squared norms"
        )
    rest = share("none", "balanced")
    yield f"- other weights ({rest or 'none'}): on what they compute, as a regularizer"
    unknown = [row for row in rows if row.kind == "not looked for"]
    if unknown:
        yield (
            f"- of {_share(unknown, rows)} it is not known: symmetries with others were not "
            "looked for"
        )
    vectors = [row for row in rows if row.is_vector and row.kind != "unused"]
    if vectors:
        yield (
            f"- biases, gains and scales ({_share(vectors, rows)}): on what they compute; "
            "report.param_groups() leaves them out"
        )


def _groups(rows: Sequence[ParameterReport]) -> Iterator[str]:
    apart = {
        kind: [row.name for row in rows if row.role.kind == kind and not row.is_vector]
        for kind in ("embedding", "tied", "readout", "router")
    }
    named = [f"{kind} {_listed(names)}" for kind, names in apart.items() if names]
    hidden = sum(row.role.kind == "hidden" and not row.is_vector for row in rows)
    if named and hidden:
        several = "matrices" if hidden > 1 else "matrix"
        yield (
            f"group: {hidden} hidden {several} apart from {'; '.join(named)} "
            "(normwise.groups, or overrides by role in report.param_groups)"
        )


def _fixed(freedom: Freedom | None) -> Iterator[str]:
    if freedom is None or not freedom.fixed:
        return
    names = {
        verdict: [n for n in freedom.fixed if freedom.verdicts[n] == verdict]
        for verdict in ("fix", "fix with a gain")
    }
    text = f"fix: the norms of {len(names['fix'])} of {len(freedom.fixed)} matrices, at no loss"
    if names["fix with a gain"]:
        text += f"; with a gain those of {_listed(names['fix with a gain'])}"
    yield f"{text} (report.freedom())"


def _gate(rows: Sequence[ParameterReport]) -> Iterator[str]:
    matrices = [row for row in rows if sum(size > 1 for size in row.shape) > 1]
    wrong = [row for row in matrices if row.kind in ("none", "balanced", "joint", "not looked for")]
    if wrong:
        yield (
            f"AdamP's gate (view='auto') has nothing to project in {_share(wrong, rows)}; where a "
            "gradient is independent of the weight it opens all the same, in "
            f"{chance_of_gate(_DELTA):.0%} of the steps, and takes from the step what matters: "
            f"{_listed([row.name for row in wrong])}. With report.param_groups() it is told"
        )
    parts = [row for row in matrices if row.view is not None and row.view.kind == "blocks"]
    if parts:
        yield (
            "AdamP's gate knows no blocks and projects as a whole what is invariant in parts: "
            f"{_listed([f'{row.name} ({row.view})' for row in parts])}"
        )


def _share(chosen: Sequence[ParameterReport], rows: Sequence[ParameterReport]) -> str:
    entries, total = (sum(row.entries for row in part) for part in (chosen, rows))
    plural = "" if len(chosen) == 1 else "s"
    return f"{len(chosen)} parameter{plural}, {entries / max(total, 1):.1%} of the entries"


def _listed(names: Sequence[str]) -> str:
    text = ", ".join(names[:_NAMED])
    return text + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
