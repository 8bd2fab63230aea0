"""What an analysis found, and what follows from it for an optimizer."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from normwise.figures.tables import Column, Table, paragraph
from normwise.geometry import View
from normwise.invariance.advice import advice
from normwise.invariance.freedom import Freedom, ledger
from normwise.invariance.roles import Role
from normwise.invariance.row import KINDS, Kind, ParameterReport
from normwise.invariance.scale_maps import ScaleMap, scale_maps
from normwise.invariance.symmetry import Slices, Symmetry, Term

if TYPE_CHECKING:
    from normwise.figures import Figure

__all__ = ["ParameterReport", "Report"]

_FORMAT = 3

_COLUMNS = ("parameter", "shape", "verdict", "role", Column("residual"), "why")


@dataclass(frozen=True)
class Report:
    """The scale invariances of a model. ``str(report)`` is a table.

    Args:
        rows: one for each parameter, in the model's order.
        symmetries: families of slices that can be scaled together, from the views, which are
            families of one weight, to whole parameters; independent of one another.
        shifted: the families in which a number is added to a parameter before it is multiplied
            (a gain ``1 + weight``), so that what is scaled is the sum.
        draws: the number of random points and upstream gradients behind the verdicts.
        mode: whether the model was analyzed as in training or in evaluation.
        notes: what a reader must know beside the rows.
    """

    rows: tuple[ParameterReport, ...]
    symmetries: tuple[Symmetry, ...]
    draws: int
    mode: str
    notes: tuple[str, ...] = ()
    shifted: tuple[Symmetry, ...] = ()
    _parameters: dict[str, nn.Parameter] = field(default_factory=dict, repr=False, compare=False)

    def __iter__(self) -> Iterator[ParameterReport]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> ParameterReport:
        """The row of a parameter, by its name or one of its aliases.

        Raises:
            KeyError: if the report has no such parameter.
        """
        for row in self.rows:
            if name == row.name or name in row.aliases:
                return row
        raise KeyError(f"no parameter {name!r} in this report")

    def views(self) -> dict[str, View]:
        """The view of each parameter that is scale-invariant by itself, by name."""
        return {row.name: row.view for row in self.rows if row.view is not None}

    def invariances(self) -> tuple[Symmetry, ...]:
        """Each parameter that is scale-invariant by itself, as the symmetry of one term.

        Those of whole weights that follow from other families are here too; they are not in
        ``symmetries``, which are independent.
        """
        return tuple(
            Symmetry.of_view(row.name, row.shape, row.view)
            for row in self.rows
            if row.view is not None
        )

    def parameter_views(self, model: nn.Module | None = None) -> dict[nn.Parameter, View]:
        """As :meth:`views`, by parameter of ``model`` (default: of the model analyzed).

        Args:
            model: whose parameters to take (default: those of the model analyzed).

        Raises:
            ValueError: see :meth:`param_groups`.
        """
        params = self._bound(model)
        return {params[name]: view for name, view in self.views().items()}

    def rescale_(self, model: nn.Module | None = None, *, seed: int = 0) -> dict[str, Tensor]:
        """Rescale a model in place, at random along all symmetries: other weights, one function.

        Shifted ones are among them: of a gain ``1 + weight`` the sum is multiplied.

        Every unit of every family is scaled by a factor of its own from [1/2, 2]. What the model
        computes stays the same up to rounding and the epsilons of its normalizations.

        Args:
            model: the model to rescale (default: the model analyzed).
            seed: of the factors (default: 0).

        Returns:
            What each parameter, with its shift, was multiplied by, by name, as a tensor that
            broadcasts against it.

        Raises:
            ValueError: see :meth:`param_groups`.
        """
        params = self._bound(model)
        generator = torch.Generator().manual_seed(seed)
        factors: dict[str, Tensor] = {}
        families = (*self.symmetries, *self.shifted)
        for symmetry in families:
            exponents = 2 * torch.rand(symmetry.units, generator=generator, dtype=torch.float64) - 1
            for name, factor in symmetry.factors(exponents.exp2()).items():
                factors[name] = factors[name] * factor if name in factors else factor
        shifts = {term.parameter: term.shift for family in families for term in family.terms}
        with torch.no_grad():
            for name, factor in factors.items():
                p, shift = params[name], shifts[name]
                p.copy_((p + shift) * factor.to(p.device) - shift)
        return factors

    def freedom(self, fixed: Mapping[str, View | str] | Iterable[str] | None = None) -> Freedom:
        """What it costs to fix norms: the freedom lost, and where a gain gives it back.

        Args:
            fixed: the view in which each parameter's norms are fixed, by name, or names of
                parameters that are fixed as a whole (default: every matrix with a gradient, in the
                view in which it is invariant, else as a whole).

        Raises:
            KeyError: for a parameter that the report does not have.
            ValueError: for a view that does not fit its parameter.
        """
        if fixed is None:
            fixed = {
                row.name: row.view or View.layer()
                for row in self.rows
                if not row.is_vector and row.kind not in ("unused", "no effect")
            }
        elif not isinstance(fixed, Mapping):
            fixed = {name: View.layer() for name in fixed}
        views = {
            self[name].name: View.parse(view) if isinstance(view, str) else view
            for name, view in fixed.items()
        }
        for name, view in views.items():
            view.check(self[name].shape)
        families = (*self.symmetries, *self.shifted)
        shapes = {row.name: row.shape for row in self.rows}
        return ledger(families, shapes, views, self.views())

    def scale_maps(self) -> tuple[ScaleMap, ...]:
        """Which layers can be smoothed against which others, for a quantizer's configuration."""
        return scale_maps((*self.symmetries, *self.shifted))

    def share(self, kind: Kind) -> float:
        """The share of the entries of all parameters that are of this kind, from 0 to 1.

        Args:
            kind: as :attr:`ParameterReport.kind`.
        """
        total = sum(row.entries for row in self.rows)
        return sum(row.entries for row in self.rows if row.kind == kind) / max(total, 1)

    def param_groups(
        self,
        *,
        weight_decay: float,
        lr: float | Tensor | None = None,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        model: nn.Module | None = None,
    ) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer of normwise or of torch.

        The rule: a parameter that the network uses as a gain or a bias, of whatever shape, or with
        at most one dimension larger than 1, is a *vector* and is not decayed. Any other is decayed;
        if it is scale-invariant by itself it is in a group named after its view, which normwise's
        optimizers then project in, else in the group *plain*, where they do not project. Frozen
        parameters are in no group.

        Args:
            weight_decay: of all groups but *vector*.
            lr: of all groups (default: left to the optimizer).
            overrides: options by group name (``"channel"``, ``"layer"``, ``"plain"``,
                ``"vector"``, …), by role (``"embedding"``, ``"readout"``, ``"router"``, …), or by a
                pattern of parameter names (``"*.embed.weight"``). The parameters of a role or a
                pattern make a group of their own, named after it, for each view; where several
                keys hold, the pattern's options count most, then the role's.
            model: whose parameters to take (default: those of the model analyzed).

        Returns:
            Groups with ``params``, ``name``, ``view`` (a spelling, or None), ``weight_decay``, and
            ``lr`` if given. torch's optimizers keep the keys that they do not know.

        Raises:
            ValueError: if the report was read from a file and no model is given, if the model's
                parameters are others than the report's, or if an override matches nothing.
        """
        params = self._bound(model)
        overrides = overrides or {}
        groups: dict[tuple[str, str | None], dict[str, Any]] = {}
        used = set()
        for row in self.rows:
            if not params[row.name].requires_grad:
                continue
            view = None if row.view is None or row.is_vector else str(row.view)
            name = "vector" if row.is_vector else view or "plain"
            options: dict[str, Any] = {"weight_decay": 0.0 if row.is_vector else weight_decay}
            if lr is not None:
                options["lr"] = lr
            for key, values in overrides.items():
                if key == name:
                    options |= values
                    used.add(key)
            if row.role.kind in overrides:
                name = _group_name(row.role.kind, view)
                options |= overrides[row.role.kind]
                used.add(row.role.kind)
            for key, values in overrides.items():
                if any(fnmatch.fnmatchcase(n, key) for n in (row.name, *row.aliases)):
                    name = _group_name(key, view)
                    options |= values
                    used.add(key)
                    break
            group = groups.setdefault(
                (name, view), {"params": [], "name": name, "view": view, **options}
            )
            group["params"].append(params[row.name])
        if unknown := overrides.keys() - used:
            names = sorted({name for name, _ in groups})
            raise ValueError(
                f"Invalid overrides: {sorted(unknown)} match no group ({', '.join(names)}), no "
                "role and no parameter"
            )
        return list(groups.values())

    def advice(self, weight_decay: float, lr: float) -> str:
        """What decoupled decay of all parameters does, and what to do instead, in a few lines.

        It says what decay acts on and where it has no effect, what to group, which norms can be
        fixed, and what the gate of plain AdamP would project wrongly.

        Args:
            weight_decay: λ.
            lr: the learning rate η.
        """
        families = (*self.symmetries, *self.shifted)
        freedom = self.freedom() if self.rows and self.looked_for else None
        return advice(self.rows, families, freedom, weight_decay, lr)

    @property
    def looked_for(self) -> bool:
        """Whether symmetries between weights were looked for (``joint=True``)."""
        return all(row.kind != "not looked for" for row in self.rows)

    def to_json(self, **options: Any) -> str:
        """The report as JSON, without the model; ``options`` go to ``json.dumps``.

        Args:
            **options: of ``json.dumps``.
        """
        rows = [
            {**asdict(row), "view": None if row.view is None else str(row.view)}
            for row in self.rows
        ]
        content = {
            "format": _FORMAT,
            "mode": self.mode,
            "draws": self.draws,
            "notes": self.notes,
            "rows": [
                {key: None if value != value else value for key, value in row.items()}
                for row in rows
            ],
            "symmetries": [asdict(symmetry) for symmetry in self.symmetries],
            "shifted": [asdict(symmetry) for symmetry in self.shifted],
        }
        return json.dumps(content, **options)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what :meth:`to_json` wrote.

        Args:
            text: that :meth:`to_json` returned.

        Returns:
            The report, without a model.

        Raises:
            ValueError: if ``text`` is not such a report.
        """
        try:
            content = json.loads(text)
            if content["format"] != _FORMAT:
                raise ValueError(f"format {content['format']}; must be {_FORMAT}")
            rows = tuple(_row_from_json(row) for row in content["rows"])
            symmetries, shifted = (
                tuple(_symmetry_from_json(item) for item in content[key])
                for key in ("symmetries", "shifted")
            )
            notes = tuple(content["notes"])
            return cls(rows, symmetries, content["draws"], content["mode"], notes, shifted)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"Invalid report: {error}") from error

    def plot(self, path: str | Path) -> None:
        """Draw :meth:`figure` into a file whose suffix says the format.

        Args:
            path: of the file.

        Raises:
            ImportError: without matplotlib.
        """
        from normwise.figures import save

        save(self.figure(), path)

    def figure(self) -> Figure:
        """The share of each kind, and the parameters with the families that link them.

        Returns:
            A description to draw into a file or a page; see :mod:`normwise.figures`.
        """
        from normwise.invariance.figure import figure

        rows = [(row.name, row.entries, row.kind, row.verdict) for row in self.rows]
        return figure(rows, (*self.symmetries, *self.shifted), KINDS)

    def __str__(self) -> str:
        def cells(row: ParameterReport) -> tuple[str, ...]:
            shape = "×".join(map(str, row.shape)) or "scalar"
            residual = "" if row.kind == "unused" else f"{row.residual:.0e}"
            why = row.why + (" (frozen)" if row.frozen else "")
            if row.aliases:
                why = f"{why}; tied to {', '.join(row.aliases)}".lstrip("; ")
            head = f", {row.role.heads} heads" if row.role.heads else ""
            return row.name, shape, row.verdict, row.role.kind + head, residual, why

        lines = [str(Table.of(_COLUMNS, map(cells, self.rows)))]
        shared = [s for s in self.symmetries if not (s.is_view and s.terms[0].view)]
        shared += self.shifted
        if shared:
            lines += [
                "",
                "symmetries (in each unit, scale what is on the left by c, on the right by 1/c, or",
                "by the power of c that is written; the function stays the same)",
            ]
            for symmetry in shared:
                why = f"; {symmetry.why}" if symmetry.why else ""
                lines.append(paragraph(f"  {symmetry}{why}", indent=6))
        lines += ["", paragraph(self.summary())]
        lines += [paragraph(f"note: {note}") for note in self.notes]
        return "\n".join(lines)

    def summary(self) -> str:
        """One line: how much of the model is of which kind."""
        parts = [
            f"{kind} {self.share(kind):.1%} ({count})"
            for kind in KINDS
            if (count := sum(row.kind == kind for row in self.rows))
        ]
        total = sum(row.entries for row in self.rows)
        return f"{len(self.rows)} parameters, {total:,} entries: " + ", ".join(parts)

    def parameters(self, model: nn.Module | None = None) -> dict[str, nn.Parameter]:
        """The parameters that the rows speak of, by name.

        Args:
            model: whose parameters to take (default: those of the model analyzed).

        Raises:
            ValueError: see :meth:`param_groups`.
        """
        return self._bound(model)

    def _bound(self, model: nn.Module | None) -> dict[str, nn.Parameter]:
        params = self._parameters if model is None else dict(model.named_parameters())
        if not params:
            raise ValueError("this report has no model; give `model=`")
        for row in self.rows:
            if row.name not in params:
                raise ValueError(f"the model has no parameter {row.name!r}, the report has")
            if row.view is not None:
                row.view.check(params[row.name].shape)
        families = (*self.symmetries, *self.shifted)
        for term in (term for family in families for term in family.terms):
            shape = tuple(params[term.parameter].shape)
            if shape != term.shape:
                raise ValueError(
                    f"the model's {term.parameter!r} has shape {shape}, the report's {term.shape}"
                )
        if model is not None:
            known = {row.name for row in self.rows}
            for name, p in params.items():
                if name not in known and p.requires_grad:
                    raise ValueError(f"the report has no parameter {name!r}, the model has")
        return params


def _group_name(key: str, view: str | None) -> str:
    return key if view is None or key == view else f"{key} {view}"


def _row_from_json(row: dict[str, Any]) -> ParameterReport:
    values: dict[str, Any] = {
        key: float("nan") if value is None else value for key, value in row.items()
    }
    values["view"] = None if row["view"] is None else View.parse(row["view"])
    role = row["role"]
    values["role"] = Role(**{**role, "parts": tuple(role["parts"])})
    values["shape"], values["aliases"] = tuple(row["shape"]), tuple(row["aliases"])
    return ParameterReport(**values)


def _symmetry_from_json(item: dict[str, Any]) -> Symmetry:
    terms = []
    for term in item["terms"]:
        slices = term["slices"]
        digits = {key: tuple(map(tuple, slices[key])) for key in ("units", "within")}
        made = Slices(tuple(slices["dims"]), slices["start"], **digits)
        values = {**term, "shape": tuple(term["shape"]), "slices": made}
        terms.append(Term(**values))
    return Symmetry(tuple(terms), item["units"], item["unseen"], item["why"])
