"""Find the scale-invariant weights of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normwise.geometry import View
from normwise.invariance.euler import Evidence, Finding, chance_of_error, euler_products
from normwise.invariance.explain import Explainer
from normwise.invariance.joint import RowSpace, null_space, sparse_basis, unit_pairs
from normwise.invariance.report import JointSet, Kind, ParameterReport, Report
from normwise.invariance.specimen import TOLERANCE, Specimen, built

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
    if draws < 1:
        raise ValueError(f"Invalid number of draws: {draws}; must be 1 or more")
    if mode not in ("train", "eval"):
        raise ValueError(f"Invalid mode: {mode!r}; must be 'train' or 'eval'")
    with torch.inference_mode(False), torch.enable_grad():
        subject = model if factory is None else built(factory, seed)
        specimen = Specimen(subject, batch_or_forward, seed=seed, mode=mode)
        _check_repeatable(specimen)
        rows, sets, notes = _examined(specimen, draws, joint=joint)
    report = Report(rows, sets, draws, mode, notes, dict(model.named_parameters()))
    return report if factory is None else _carried_over(report, model)


def _examined(
    specimen: Specimen, draws: int, *, joint: bool
) -> tuple[tuple[ParameterReport, ...], tuple[JointSet, ...], tuple[str, ...]]:
    """The rows, joint symmetries and notes of a report."""
    with_eps = _evidence_as_is(specimen)
    evidence = _gather(specimen, draws)
    findings = {name: evidence[name].find() for name in specimen.params}
    candidates = [n for n, finding in findings.items() if not finding.view and finding.has_gradient]
    relations: list[dict[str, float]] = []
    if joint and len(candidates) > 1:
        relations = _relations(specimen, candidates, evidence, draws)

    views, relations, notes = _confirmed(specimen, findings, relations)
    explainer = Explainer(specimen)
    sets = _explained_sets(explainer, relations)
    kinds = {
        name: _kind(name, finding, views.get(name), sets, evidence[name])
        for name, finding in findings.items()
    }
    absorbers = _absorbers(explainer, views, kinds)
    aliases = specimen.aliases()
    rows = []
    for name, finding in findings.items():
        view = views.get(name)
        rows.append(
            ParameterReport(
                name=name,
                shape=tuple(specimen.params[name].shape),
                kind=kinds[name],
                view=view,
                residual=finding.residual,
                residual_with_eps=with_eps[name].residual_in(view) if view else math.nan,
                chance=chance_of_error(finding.entries, draws) if view else 1.0,
                why=_why(explainer, name, finding, view, kinds[name], absorbers.get(name)),
                frozen=not specimen.source[name].requires_grad,
                aliases=aliases.get(name, ()),
            )
        )
    return tuple(rows), sets, tuple(notes)


def _check_repeatable(specimen: Specimen) -> None:
    """Two forwards with the same random numbers must return the same."""
    specimen.move(None)
    first, second = specimen.run(shrink=1), specimen.run(shrink=1)
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


def _evidence_as_is(specimen: Specimen) -> dict[str, Evidence]:
    """One draw at the model's own weights and epsilons."""
    specimen.move(None)
    names = list(specimen.params)
    outputs = specimen.run(shrink=1, graph=True)
    grads = specimen.gradients(outputs, specimen.cotangents(outputs, -1), names, shrink=1)
    evidence = {}
    for name, g in zip(names, grads, strict=True):
        evidence[name] = Evidence(specimen.params[name].shape)
        if g is not None:
            evidence[name].add(specimen.params[name], g)
    return evidence


def _gather(specimen: Specimen, draws: int) -> dict[str, Evidence]:
    """The Euler products of all parameters, each draw at a point of its own."""
    names = list(specimen.params)
    evidence = {name: Evidence(specimen.params[name].shape) for name in names}
    for draw in range(draws):
        specimen.move(draw)
        outputs = specimen.run(graph=True)
        cotangents = specimen.cotangents(outputs, draw)
        grads = specimen.gradients(outputs, cotangents, names, retain=draw == 0)
        for name, g in zip(names, grads, strict=True):
            if g is not None:
                evidence[name].add(specimen.params[name], g)
        if draw == 0:
            # Linear in the cotangents: all that differs is rounding.
            other = specimen.gradients(outputs, [c * math.pi for c in cotangents], names)
            for name, g, h in zip(names, grads, other, strict=True):
                if g is not None and h is not None:
                    evidence[name].add_noise(specimen.params[name], g - h / math.pi)
        del outputs, grads
    return evidence


def _relations(
    specimen: Specimen, names: list[str], evidence: dict[str, Evidence], draws: int
) -> list[dict[str, float]]:
    """The joint symmetries of these parameters."""
    names = specimen.in_order_of_use(names)
    base = torch.tensor([evidence[name].totals for name in names], dtype=torch.float64).T
    known = unit_pairs(base) if draws > 1 else []
    # A pair leaves one of its two tensors to look for, in the rest of the symmetries.
    left = [t for t in range(len(names)) if t not in {int(a.nonzero()[-1]) for a in known}]
    space = RowSpace(base[:, left])
    rows, point, news = list(base), draws, True
    # A draw that is a combination of those before tells that its point has shown all it can; the
    # first draw of a point, that no point would show more.
    while news:
        news = False
        for row in _products(specimen, names, point):
            if not space.add(row[left]):
                break
            rows.append(row)
            news = True
        point += 1
    products = torch.stack(rows)
    found = null_space(products[:, left])
    null = torch.zeros(len(names), found.shape[1], dtype=torch.float64)
    null[left] = found
    generator = torch.Generator().manual_seed(specimen.seed)
    basis = sparse_basis(products, null, known, generator)
    return [
        {name: float(a) for name, a in zip(names, relation, strict=True) if a} for relation in basis
    ]


def _products(specimen: Specimen, names: list[str], point: int) -> Iterator[Tensor]:
    """Draw after draw at one point, without end."""
    specimen.move(point)
    outputs = specimen.run(graph=True)
    for draw in count():
        cotangents = specimen.cotangents(outputs, 100_000 * point + draw)
        grads = specimen.gradients(outputs, cotangents, names, retain=True)
        products = [
            0.0 if g is None else float(euler_products(specimen.params[name], g).sum())
            for name, g in zip(names, grads, strict=True)
        ]
        yield torch.tensor(products, dtype=torch.float64)


def _confirmed(
    specimen: Specimen, findings: dict[str, Finding], relations: list[dict[str, float]]
) -> tuple[dict[str, View], list[dict[str, float]], list[str]]:
    """What survives finite scaling, and a note for each claim that does not."""
    generator = torch.Generator().manual_seed(specimen.seed + 1)
    specimen.move(0)
    before = specimen.run()
    views = {name: finding.view for name, finding in findings.items() if finding.view}

    def change(claims: list[dict[str, Tensor | float]]) -> float:
        factors: dict[str, Tensor | float] = {}
        for claim in claims:
            for name, factor in claim.items():
                factors[name] = factors.get(name, 1.0) * factor
        with specimen.scaled(factors):
            return _difference(before, specimen.run())

    alone: list[dict[str, Tensor | float]] = [
        {name: random_factors(specimen.params[name], view, generator)}
        for name, view in views.items()
    ]
    together: list[dict[str, Tensor | float]] = [
        {name: c**a for name, a in exponents.items()}
        for exponents, c in zip(relations, _factors(len(relations), generator), strict=True)
    ]
    notes: list[str] = []
    if change([*alone, *together]) <= TOLERANCE:
        return views, relations, notes
    for name, claim in zip(list(views), alone, strict=True):
        if (by := change([claim])) > TOLERANCE:
            del views[name]
            notes.append(f"{name} passed for small changes of scale, but not for large ({by:.0e})")
    kept = []
    for exponents, claim in zip(relations, together, strict=True):
        if (by := change([claim])) > TOLERANCE:
            text = str(JointSet(exponents))
            notes.append(f"{text} passed for small changes of scale, but not for large ({by:.0e})")
        else:
            kept.append(exponents)
    return views, kept, notes


def random_factors(w: Tensor, view: View, generator: torch.Generator) -> Tensor:
    """A tensor like ``w`` that holds one factor from [½, 2] for each slice of ``view``."""
    factors = torch.empty_like(w.detach(), dtype=torch.float64)
    slices = view.slices(factors)
    values = torch.tensor(_factors(len(slices), generator), dtype=torch.float64).to(w.device)
    slices.copy_(values.view(-1, *(1 for _ in slices.shape[1:])).expand_as(slices))
    return factors


def _factors(count: int, generator: torch.Generator) -> list[float]:
    exponents = 2 * torch.rand(count, generator=generator, dtype=torch.float64) - 1
    values: list[float] = exponents.exp2().tolist()
    return values


def _kind(
    name: str,
    finding: Finding,
    view: View | None,
    sets: tuple[JointSet, ...],
    evidence: Evidence,
) -> Kind:
    if view is not None:
        return "invariant"
    if not finding.has_gradient:
        return "no effect" if evidence.sums else "unused"
    mine = [joint for joint in sets if name in joint.exponents]
    if any(joint.is_scale for joint in mine):
        return "joint"
    return "balanced" if mine else "none"


def _absorbers(
    explainer: Explainer, views: dict[str, View], kinds: dict[str, Kind]
) -> dict[str, str | None]:
    """A module that absorbs the scale of each invariant or ineffective parameter."""
    specimen = explainer.specimen
    generator = torch.Generator().manual_seed(specimen.seed + 2)
    scaled = {
        name: random_factors(specimen.params[name], view, generator) for name, view in views.items()
    }
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
    shape = explainer.specimen.params[name].shape
    words = []
    if view is not None and absorber is not None:
        sentence = explainer.sentence(name, absorber)
        if view.kind == "blocks":
            sentence = f"each block of {shape[view.dim] // view.count} {_rows(view.dim)} {sentence}"
        words.append(sentence)
    elif kind == "no effect":
        words.append("zero gradient")
        if absorber is not None:
            words.append(f"its change is removed by {explainer.described(absorber)}")
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


def _explained_sets(
    explainer: Explainer, relations: list[dict[str, float]]
) -> tuple[JointSet, ...]:
    claims = [{name: 1.5**a for name, a in exponents.items()} for exponents in relations]
    # A gain and its bias are absorbed at one place, other sets at many.
    pairs = [i for i, a in enumerate(relations) if len(a) == 2 and JointSet(a).is_scale]
    found = dict(zip(pairs, explainer.one_absorber([claims[i] for i in pairs]), strict=True))
    sets = []
    for i, exponents in enumerate(relations):
        one = found.get(i)
        modules = explainer.absorbers(claims[i]) if one is None else [one]
        # A module that owns some of a set gives back what it took: there the factors cancel. A
        # module around it does so too, but says less.
        owners = [module for module in modules if explainer.contains(module, exponents)]
        inner = [m for m in owners if not any(_is_inside(other, m) for other in owners)]
        outside = [module for module in modules if module not in owners]
        words = [f"absorbed by {_listed(outside)}"] if outside else []
        if inner and not JointSet(exponents).is_scale:
            words.append(f"cancels inside {_listed(inner)}")
        sets.append(JointSet(exponents, "; ".join(words)))
    return tuple(sets)


def _is_inside(module: str, outer: str) -> bool:
    return module != outer and (not outer or module.startswith(outer + "."))


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
    return replace(report, rows=tuple(rows), notes=(*report.notes, note))
