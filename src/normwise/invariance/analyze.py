"""Find the scale-invariant weights of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normwise.checks import check_at_least_one, check_model, check_switch
from normwise.geometry import View
from normwise.invariance.euler import Evidence, Finding, chance_of_error, index_sets
from normwise.invariance.explain import Explainer
from normwise.invariance.families import find_families
from normwise.invariance.replica import TOLERANCE, Replica, built
from normwise.invariance.report import Report
from normwise.invariance.roles import find_roles
from normwise.invariance.row import Kind, ParameterReport
from normwise.invariance.symmetry import Slices, Symmetry

__all__ = ["analyze"]


def analyze(
    model: nn.Module,
    batch_or_forward: Any,
    *,
    draws: int = 3,
    seed: int = 0,
    mode: Literal["train", "eval"] = "train",
    joint: bool = True,
    factory: Callable[[], nn.Module] | None = None,
) -> Report:
    r"""Find which parameters of a model are scale-invariant, along which slices, and why.

    If f(c·w) = f(w) for a slice w and all c > 0, then by Euler's theorem ⟨w, g⟩ = 0 for every
    upstream gradient. The loss is taken as the inner product of all differentiable outputs with
    random cotangents, so none need be given. Everything is computed in float64, at random points
    near the model's weights, in the limit of large weights, where a normalization's epsilon does
    not matter; a slice counts as invariant if its product cancels to half of float64's digits in
    every draw. What was found is then confirmed by scaling: all slices at once, by random factors,
    must leave the outputs as they were.

    The analysis runs on a copy: the model, its buffers, gradients, hooks and mode, and the state of
    the random number generators are not touched. (Hooks of the model run on the copy too.)

    Args:
        model: the model. On ``meta`` or sharded it needs a ``factory``.
        batch_or_forward: a tensor, a tuple or list of arguments, or a mapping of keyword arguments
            for the model, or a function of the model that returns a tensor or nested lists,
            tuples, mappings and dataclasses of them. Use a batch as in training, of two samples
            or more where there is batch normalization.
        draws: the number of points and upstream gradients (default: 3).
        seed: of all that is random (default: 0).
        mode: ``"train"``: as in training; a model in evaluation mode is switched as a whole, one
            in training mode is taken as it is. ``"eval"``: batch normalization uses its running
            statistics and makes nothing invariant (default: ``"train"``).
        joint: look for joint symmetries too, at the cost of about one backward for each parameter
            that is not invariant by itself (default: True).
        factory: builds the network to analyze in place of ``model``, at small width: same
            parameter names, same numbers of heads and groups (default: a copy of ``model``).

    Returns:
        A :class:`Report`, with a row for each floating-point parameter of ``model``.

    Raises:
        ValueError: for a model without parameters, or one that cannot be copied; for outputs that
            are not differentiable, NaN, or differ from one run to the next.
        RuntimeError: if the forward raises.
    """
    check_model(model)
    check_at_least_one("number of draws", draws)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"Invalid seed: {seed!r}; must be a whole number")
    check_switch("joint", joint)
    if factory is not None and not callable(factory):
        raise TypeError(f"Invalid factory: {factory!r}; must be a function without arguments")
    if mode not in ("train", "eval"):
        raise ValueError(f"Invalid mode: {mode!r}; must be 'train' or 'eval'")
    with torch.inference_mode(False), torch.enable_grad():
        subject = model if factory is None else built(factory, seed)
        replica = Replica(subject, batch_or_forward, seed=seed, mode=mode)
        _check_repeatable(replica)
        rows, families, notes = _examined(replica, draws, joint=joint)
    plain, shifted = (
        tuple(family for family in families if family.is_shifted == shifted)
        for shifted in (False, True)
    )
    parameters = dict(model.named_parameters())
    report = Report(rows, plain, draws, mode, notes, shifted, parameters)
    return report if factory is None else _carried_over(report, model)


def _examined(
    replica: Replica, draws: int, *, joint: bool
) -> tuple[tuple[ParameterReport, ...], tuple[Symmetry, ...], tuple[str, ...]]:
    """The rows, symmetries and notes of a report."""
    with_eps = _evidence_as_is(replica)
    evidence = _gather(replica, draws)
    findings = {name: evidence[name].find() for name in replica.params}
    families = find_families(replica, evidence, findings) if joint else []
    views = {name: finding.view for name, finding in findings.items() if finding.view}
    claims = [
        *(
            Symmetry.of_view(name, tuple(replica.params[name].shape), view)
            for name, view in views.items()
        ),
        *families,
    ]

    claims, notes = _confirmed(replica, claims)
    views = {s.terms[0].parameter: v for s in claims if s.is_view and (v := s.terms[0].view)}
    claims = _independent(claims)
    explainer = Explainer(replica)
    symmetries = _explained(explainer, claims)
    kinds = {
        name: _kind(name, finding, views, symmetries, evidence[name], joint=joint)
        for name, finding in findings.items()
    }
    if all(kind in ("no effect", "unused") for kind in kinds.values()):
        raise ValueError(
            "no parameter changes the outputs at this batch: all gradients are zero; give a batch "
            "with samples that reach the parameters"
        )
    notes += _near_misses(kinds, evidence)
    absorbers = _absorbers(explainer, views, kinds)
    aliases = replica.aliases()
    roles = find_roles(replica, claims, absorbers)
    rows = []
    for name, finding in findings.items():
        view = views.get(name)
        rows.append(
            ParameterReport(
                name=name,
                shape=tuple(replica.params[name].shape),
                kind=kinds[name],
                view=view,
                residual=finding.residual,
                residual_with_eps=with_eps[name].residual_in(view) if view else math.nan,
                chance=chance_of_error(finding.entries, draws) if view else 1.0,
                why=_why(explainer, name, finding, view, kinds[name], absorbers.get(name)),
                frozen=not replica.source[name].requires_grad,
                aliases=aliases.get(name, ()),
                role=roles[name],
            )
        )
    return tuple(rows), symmetries, tuple(notes)


def _check_repeatable(replica: Replica) -> None:
    """Two forwards with the same random numbers must return the same."""
    replica.move(None)
    first, second = replica.run(shrink=1), replica.run(shrink=1)
    difference = _difference(first, second)
    if difference > TOLERANCE:
        raise ValueError(
            "the forward is not deterministic: two runs with the same random numbers differ by "
            f"{difference:.1e} of the output's norm"
        )


def _difference(first: list[Tensor], second: list[Tensor]) -> float:
    """The largest relative difference of two lists of outputs; infinite if shapes differ."""
    if [a.shape for a in first] != [b.shape for b in second]:
        return math.inf
    worst = 0.0
    for a, b in zip(first, second, strict=True):
        finite = a.isfinite()
        if not torch.equal(finite, b.isfinite()):
            return math.inf
        norm = float(torch.linalg.vector_norm(a[finite]))
        change = float(torch.linalg.vector_norm(a[finite] - b[finite]))
        worst = max(worst, change / norm if norm else change)
    return worst


def _evidence_as_is(replica: Replica) -> dict[str, Evidence]:
    """One draw at the model's own weights and epsilons."""
    replica.move(None)
    names = list(replica.params)
    outputs = replica.run(shrink=1, graph=True)
    grads = replica.gradients(outputs, replica.cotangents(outputs, -1), names, shrink=1)
    evidence = {}
    for name, g in zip(names, grads, strict=True):
        evidence[name] = _no_evidence(replica, name)
        if g is not None:
            evidence[name].add(replica.products(name, g))
    return evidence


def _no_evidence(replica: Replica, name: str) -> Evidence:
    shape = replica.params[name].shape
    return Evidence(shape, index_sets(shape, replica.groups(name)), replica.shift(name))


def _gather(replica: Replica, draws: int) -> dict[str, Evidence]:
    """The Euler products of all parameters, each draw at a point of its own."""
    names = list(replica.params)
    evidence = {name: _no_evidence(replica, name) for name in names}
    for draw in range(draws):
        replica.move(draw)
        outputs = replica.run(graph=True)
        cotangents = replica.cotangents(outputs, draw)
        grads = replica.gradients(outputs, cotangents, names, retain=draw == 0)
        for name, g in zip(names, grads, strict=True):
            if g is not None:
                evidence[name].add(replica.products(name, g))
        if draw == 0:
            # Linear in the cotangents: all that differs is rounding.
            other = replica.gradients(outputs, [c * math.pi for c in cotangents], names)
            for name, g, h in zip(names, grads, other, strict=True):
                if g is not None and h is not None:
                    evidence[name].add_noise(replica.products(name, g - h / math.pi))
        del outputs, grads
    return evidence


def _confirmed(replica: Replica, claims: list[Symmetry]) -> tuple[list[Symmetry], list[str]]:
    """What survives finite scaling, and a note for each claim that does not."""
    generator = torch.Generator().manual_seed(replica.seed + 1)
    replica.move(0)
    before = replica.run()
    factors = [symmetry.factors(_factors(symmetry.units, generator)) for symmetry in claims]

    def change(scaled: list[dict[str, Tensor]]) -> float:
        with replica.scaled(_product(scaled)):
            try:
                return _difference(before, replica.run())
            except ValueError:  # NaN
                return math.inf

    if change(factors) <= TOLERANCE:
        return claims, []
    kept, notes = [], []
    for symmetry, factor in zip(claims, factors, strict=True):
        if (by := change([factor])) > TOLERANCE:
            text = str(symmetry)
            notes.append(f"{text} passed for small changes of scale, but not for large ({by:.0e})")
        else:
            kept.append(symmetry)
    return kept, notes


def _independent(claims: list[Symmetry]) -> list[Symmetry]:
    """Without the whole weights whose own invariance follows from the other families.

    Where both of two weights are invariant and the rows of one are traded for the columns of the
    other, all trades together and one of the weights' scales make the other's.
    """
    names = list(dict.fromkeys(name for s in claims for name in s.parameters))
    whole = {i: relation for i, s in enumerate(claims) if (relation := _of_wholes(s)) is not None}

    def rank(numbers: Iterable[int]) -> int:
        rows = [[whole[i].get(name, 0.0) for name in names] for i in numbers]
        return int(torch.linalg.matrix_rank(torch.tensor(rows, dtype=torch.float64)))

    kept = set(whole)
    for i in sorted(whole, reverse=True):
        symmetry = claims[i]
        (name, *others) = symmetry.parameters
        shared = any(name in whole[j] for j in kept - {i})
        if symmetry.units == 1 and not others and shared and rank(kept) == rank(kept - {i}):
            kept.remove(i)
    return [s for i, s in enumerate(claims) if i in kept or i not in whole]


def _of_wholes(symmetry: Symmetry) -> dict[str, float] | None:
    """The exponents of the parameters where all units change alike; None if they are in parts."""
    exponents: dict[str, float] = {}
    for term in symmetry.terms:
        total = math.prod(term.shape[d] for d in term.slices.dims) if term.shape else 1
        if term.parameter in exponents or term.slices.count * term.slices.per_unit < total:
            return None
        exponents[term.parameter] = term.exponent
    return exponents


def _product(claims: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What all claims together multiply each parameter by."""
    factors: dict[str, Tensor] = {}
    for claim in claims:
        for name, factor in claim.items():
            factors[name] = factors[name] * factor if name in factors else factor
    return factors


def _factors(count: int, generator: torch.Generator) -> Tensor:
    """Factors from [1/8, 8], wide enough to leave the linear part of a hard activation."""
    return (6 * torch.rand(count, generator=generator, dtype=torch.float64) - 3).exp2()


def _kind(
    name: str,
    finding: Finding,
    views: Mapping[str, View],
    symmetries: Sequence[Symmetry],
    evidence: Evidence,
    *,
    joint: bool,
) -> Kind:
    if name in views:
        return "invariant"
    if not finding.has_gradient:
        return "no effect" if evidence.sums else "unused"
    if not joint:
        return "not looked for"
    mine = [symmetry for symmetry in symmetries if name in symmetry.parameters]
    if any(_is_scale(symmetry, views) for symmetry in mine):
        return "joint"
    return "balanced" if mine else "none"


def _near_misses(kinds: Mapping[str, Kind], evidence: Mapping[str, Evidence]) -> list[str]:
    """Notes on weights that would be scale-invariant but for something small."""
    notes = []
    for name, kind in kinds.items():
        if kind in ("none", "balanced", "not looked for") and len(evidence[name].shape) > 1:
            found = evidence[name].near_miss()
            if found is not None:
                view, residual = found
                notes.append(
                    f"{name} is nearly scale-invariant ({view}, residual {residual:.0e}): an "
                    "epsilon that the analysis cannot reach may stand in the way"
                )
    return notes


def _is_scale(symmetry: Symmetry, views: Mapping[str, View]) -> bool:
    """Whether all grow together, but for weights whose own invariance takes what they lose."""
    rest = {term.exponent > 0 for term in symmetry.terms if term.parameter not in views}
    return len(rest) == 1 and len(symmetry.parameters) > 1


def _absorbers(
    explainer: Explainer, views: dict[str, View], kinds: dict[str, Kind]
) -> dict[str, str | None]:
    """A module that absorbs the scale of each invariant or ineffective parameter."""
    replica = explainer.replica
    generator = torch.Generator().manual_seed(replica.seed + 2)
    scaled: dict[str, Tensor] = {}
    for name, view in views.items():
        symmetry = Symmetry.of_view(name, tuple(replica.params[name].shape), view)
        scaled |= symmetry.factors(_factors(symmetry.units, generator))
    without_effect = {name: 1.5 for name, kind in kinds.items() if kind == "no effect"}
    absorbers: dict[str, str | None] = {}
    # Apart, since a weight and the bias beside it reach the same modules.
    for family in (scaled, without_effect):
        claims = [{name: factor} for name, factor in family.items()]
        absorbers |= zip(family, explainer.one_absorber(claims), strict=True)
    return absorbers


def _why(
    explainer: Explainer,
    name: str,
    finding: Finding,
    view: View | None,
    kind: Kind,
    absorber: str | None,
) -> str:
    shape = explainer.replica.params[name].shape
    words = []
    if view is not None and absorber is not None:
        sentence = explainer.sentence(name, absorber)
        if view.kind == "blocks":
            sentence = f"each block of {shape[view.dim] // view.count} {_rows(view.dim)} {sentence}"
        words.append(sentence)
    elif kind == "no effect":
        words.append("zero gradient")
        if absorber is not None:
            # What does not come out of the module that owns it need not have been removed: it
            # may have been multiplied by zero, as the weights of a cell whose state is zero are.
            removed = not explainer.contains(absorber, [name])
            words.append(
                f"its change is removed by {explainer.described(absorber)}"
                if removed
                else f"its change does not leave {explainer.described(absorber)}"
            )
    elif kind == "unused":
        words.append("not used by the forward")
    elif finding.part is not None:
        dim, size, channels = finding.part
        words.append(f"only {_rows(dim)} {_ranges(channels)} are invariant, in blocks of {size}")
    if finding.dead and finding.has_gradient:
        words.append(f"{finding.dead} of {shape[0]} rows have zero gradient")
    return "; ".join(words)


def _rows(dim: int) -> str:
    return "rows" if dim == 0 else "columns" if dim == 1 else f"channels of dimension {dim}"


def _explained(explainer: Explainer, symmetries: list[Symmetry]) -> tuple[Symmetry, ...]:
    """The symmetries in which all grow together, with the modules that absorb the change.

    Where one weight is traded against another the terms say all there is to say.
    """
    scales = [s for s in symmetries if s.is_scale and len(s.terms) > 1]
    claims = [s.factors(torch.full((s.units,), 1.5, dtype=torch.float64)) for s in scales]
    # A gain and its bias are absorbed at one place, other sets at many.
    pairs = [i for i, s in enumerate(scales) if len(s.terms) == 2]
    found = dict(zip(pairs, explainer.one_absorber([claims[i] for i in pairs]), strict=True))
    words = {}
    for i, symmetry in enumerate(scales):
        one = found.get(i)
        modules = explainer.absorbers(claims[i]) if one is None else [one]
        # A module that owns some of a set gives back what it took.
        outside = [m for m in modules if not explainer.contains(m, symmetry.parameters)]
        if outside:
            words[symmetry] = f"absorbed by {_listed(outside)}"
    return tuple(replace(s, why=words[s]) if s in words else s for s in symmetries)


def _listed(modules: list[str]) -> str:
    text = ", ".join(f"`{name or 'the model'}`" for name in modules[:4])
    return text + (f" and {len(modules) - 4} more" if len(modules) > 4 else "")


def _ranges(channels: list[int]) -> str:
    """Sorted indices as ranges, such as ``0–3, 8–11``."""
    ranges: list[list[int]] = []
    for channel in channels:
        if ranges and channel == ranges[-1][1] + 1:
            ranges[-1][1] = channel
        else:
            ranges.append([channel, channel])
    return ", ".join(f"{a}–{b}" if a != b else str(a) for a, b in ranges)


def _carried_over(report: Report, model: nn.Module) -> Report:
    """The report of a small network, for the parameters of ``model``, which has the same names."""
    params = dict(model.named_parameters())
    rows = []
    for row in report.rows:
        if row.name not in params:
            raise ValueError(f"the factory's parameter {row.name!r} is not in the model")
        shape = params[row.name].shape
        if len(shape) != len(row.shape):
            raise ValueError(
                f"the factory's {row.name!r} has shape {row.shape}, the model's {tuple(shape)}"
            )
        if row.view is not None:
            row.view.check(shape)
        rows.append(replace(row, shape=tuple(shape), frozen=not params[row.name].requires_grad))
    if missing := params.keys() - {row.name for row in rows}:
        raise ValueError(f"the factory's network has no parameter {min(missing)!r}")
    note = "found on the factory's network; its blocks are taken to be as many in the model"
    notes = [*report.notes, note]
    carried: dict[str, list[Symmetry]] = {"symmetries": [], "shifted": []}
    for key, families in carried.items():
        for symmetry in getattr(report, key):
            larger = _widened(symmetry, {name: tuple(p.shape) for name, p in params.items()})
            if larger is None:
                notes.append(f"{symmetry} has no counterpart in the model's shapes")
            else:
                families.append(larger)
    symmetries, shifted = (tuple(families) for families in carried.values())
    return replace(
        report, rows=tuple(rows), notes=tuple(notes), symmetries=symmetries, shifted=shifted
    )


def _widened(symmetry: Symmetry, shapes: Mapping[str, tuple[int, ...]]) -> Symmetry | None:
    """The family for parameters of other shapes, if one number of units fits all its terms."""
    sizes: list[dict[int, Slices]] = []
    for term in symmetry.terms:
        sizes.append({})
        for slices in term.slices.resized(term.shape, shapes[term.parameter]):
            sizes[-1].setdefault(slices.count, slices)
    common = set.intersection(*map(set, sizes))
    if not common:
        return None
    units = min(common, key=lambda count: sum(list(size).index(count) for size in sizes))
    terms = tuple(
        replace(term, shape=shapes[term.parameter], slices=size[units])
        for term, size in zip(symmetry.terms, sizes, strict=True)
    )
    return replace(symmetry, terms=terms, units=units)
