"""What a comparison on the user's own problem says: the answer in words, as code, and as a page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from normwise.figures import Axis, Line, Lines, Spacing, marks
from normwise.figures.tables import Cell, Column, Row, Table
from normwise.lab.methods import Inspected, Method, Setting
from normwise.lab.report.code import code
from normwise.lab.report.curves import QUANTITIES
from normwise.lab.report.pages import page
from normwise.lab.report.runs import chart, quantities
from normwise.lab.running.results import Done, Entry, ResultTable, finished, paired
from normwise.lab.summary import listed
from normwise.updates import Coupling, UpdateRule

__all__ = ["Answer", "render"]


@dataclass(frozen=True)
class Answer:
    """What the trainings say.

    Args:
        name: of the problem, as a reader sees it.
        task: its name.
        inspected: what was found before any training.
        methods: what took part, by name.
        chosen: the settings that each was trained with in the end.
        swept: the trainings by which they were chosen; empty where there was no choice.
        tables: of the final trainings, one for each metric, the first above all.
    """

    name: str
    task: str
    inspected: Inspected
    methods: Mapping[str, Method]
    chosen: Mapping[str, Setting]
    swept: Sequence[Done]
    tables: Sequence[ResultTable]

    @cached_property
    def ranked(self) -> list[Entry]:
        """The methods of which a seed has finished, the best first."""
        first = self.tables[0]
        sign = -1 if first.metric.higher_is_better else 1
        found = [entry for entry in first.entries if entry.spread is not None]
        return sorted(found, key=lambda entry: sign * (entry.spread.mean if entry.spread else 0.0))

    def behind(self, entry: Entry) -> tuple[float, float | None] | None:
        """The best method minus this one, and half of the interval, over common seeds."""
        first = self.tables[0]
        best = finished(first.cells, self.ranked[0].method)
        return paired(best, finished(first.cells, entry.method), first.metric, True)

    def apart(self, entry: Entry) -> bool:
        """Whether chance does not explain that the best method is ahead of this one.

        An interval of no width, where all seeds differ by the same, says nothing of chance.
        """
        found = self.behind(entry)
        return found is not None and bool(found[1]) and abs(found[0]) > (found[1] or 0.0)

    def shown(self, value: float) -> str:
        """A value of the first metric with its unit."""
        metric = self.tables[0].metric
        unit = "%" if metric.unit == "%" else f" {metric.unit}" if metric.unit else ""
        return f"{value:.{metric.digits}f}{unit}"

    def at_end(self, key: str) -> dict[str, float]:
        """A quantity after the last epoch, the mean over finished seeds, by method."""
        found: dict[str, list[float]] = {}
        for cell in self.tables[0].cells:
            if cell.result is None or cell.result["status"] != "ok" or not cell.records:
                continue
            value = cell.records[-1].get(key)
            if value is not None:
                found.setdefault(cell.config["method"], []).append(value)
        return {name: fmean(values) for name, values in found.items()}

    @property
    def headline(self) -> str:
        """The answer in one sentence."""
        return f"{self._norms()}; {self._best()}"

    def _norms(self) -> str:
        where = self.inspected
        if where.not_analyzed is not None:
            return f"Which weights of {self.name} are scale-invariant could not be found out"
        if not where.invariant:
            return (
                f"No weight of {self.name} is scale-invariant by itself, so norms do nothing to "
                "its learning rate that a projection could undo"
            )
        names = list(where.invariant)
        which = listed(names) if len(names) <= 3 else f"{len(names)} of {where.tensors} tensors"
        text = (
            f"{_percent(where.share)} of the weights of {self.name} are scale-invariant ({which})"
        )
        did = self.at_end("relative_effective_lr")
        if not did:
            return text
        low, high = min(did, key=lambda k: did[k]), max(did, key=lambda k: did[k])
        range_ = f"{did[low]:.2f} ({self.methods[low].label})"
        if low != high:
            range_ += f" to {did[high]:.2f} ({self.methods[high].label})"
        return f"{text}, and their norms alone multiplied the learning rate by {range_}"

    def _best(self) -> str:
        if not self.ranked:
            return "no training came to its end"
        best = self.ranked[0]
        value = self.shown(best.spread.mean if best.spread else math.nan)
        title = self.tables[0].metric.title
        if len(self.ranked) == 1:
            return f"{best.label} reached a {title} of {value}"
        equal = [e.label for e in self.ranked if e.spread and e.spread == best.spread]
        if len(equal) > 1:
            return f"{listed(equal)} ended equal, with a {title} of {value}"
        if len(best.values) == 1:
            return (
                f"{best.label} came out first with a {title} of {value}, but one seed cannot tell "
                "that from chance"
            )
        second = self.ranked[1]
        if self.apart(second):
            return (
                f"{best.label} was best with a {title} of {value}, ahead of {second.label} by more "
                "than chance explains"
            )
        return (
            f"{best.label} came out first with a {title} of {value}, but chance can explain its "
            f"lead over {second.label}"
        )

    @property
    def paragraphs(self) -> list[str]:
        """What to do, and what it rests on."""
        return [p for p in (self._advice(), self._expectation(), self._sweep()) if p]

    def _advice(self) -> str:
        if not self.ranked:
            return "What to do now: every training diverged; give smaller learning rates."
        best = self.ranked[0]
        setting = self.chosen[best.method]
        take = (
            f"{best.label} at learning rate {setting.lr:g} and weight decay "
            f"{setting.weight_decay:g}"
        )
        rest = [entry for entry in self.ranked[1:] if not self.apart(entry)]
        if len(best.values) == 1:
            return f"What to do now: repeat it with --seeds 5; until then take {take}."
        if not rest:
            others = "every other method is worse beyond chance"
            return f"What to do now: take {take}" + (f"; {others}." if self.ranked[1:] else ".")
        return (
            f"What to do now: take {take}. Chance cannot tell it from "
            f"{listed([entry.label for entry in rest])}: there is no need to leave what you use "
            "already if it is one of these; more seeds may tell them apart."
        )

    def _expectation(self) -> str:
        where = self.inspected
        if where.not_analyzed is not None:
            return f"The network could not be analyzed: {where.not_analyzed}."
        if where.invariant:
            return ""
        if where.normalizations:
            return (
                "The network normalizes, but no normalization absorbs the scale of one weight "
                "alone, as where a bias goes with the weight or blocks add to a stream. Expect "
                "SGDP and AdamP to do as SGD and AdamW do, up to how they decay. `normwise "
                "inspect` shows which weights share a scale; normwise.balance balances them."
            )
        return (
            "Without a normalization behind them, weights are not scale-invariant: their norm is "
            "part of what the network computes. Expect SGDP and AdamP to do what SGD and AdamW do, "
            "up to how they decay, and look for other remedies than these."
        )

    def _sweep(self) -> str:
        if not self.swept:
            return ""
        chosen, edges = [], []
        for name, setting in self.chosen.items():
            method = self.methods[name]
            chosen.append(f"{method.label} at {setting.lr:g} (decay {setting.weight_decay:g})")
            lrs = sorted({s.lr for s in method.settings})
            if len(lrs) > 1 and setting.lr in (lrs[0], lrs[-1]):
                edges.append(f"{method.label} ({'lowest' if setting.lr == lrs[0] else 'highest'})")
        text = (
            "Learning rate and weight decay were chosen for each method on held-out data that no "
            f"final number rests on, with one seed: {listed(chosen)}."
        )
        if edges:
            text += (
                f" The best learning rate lies at the end of its list for {listed(edges)}: a "
                "wider list may find a better one."
            )
        ranges = [
            f"{line.label} from {self.shown(min(line.y))} to {self.shown(max(line.y))}"
            for line in self.sweep_chart().lines
            if len(line.y) > 1
        ]
        if ranges:
            metric = self.tables[0].metric.title.replace("test ", "")
            text += f" Over the list of learning rates, {metric} ranged under {listed(ranges)}."
        diverged = [
            f"{self.methods[c.config['method']].label} at {c.config['training']['lr']:g}"
            for c in self.swept
            if c.result is not None and c.result["status"] == "failed"
        ]
        return text + (f" Diverged: {listed(diverged)}." if diverged else "")

    @property
    def code(self) -> str:
        """What to copy: the best method, as it was trained, on groups of one's own model."""
        if not self.ranked:
            return ""
        name = self.ranked[0].method
        method, setting = self.methods[name], self.chosen[name]
        return code(method, setting, self.inspected)

    def summary(self) -> dict[str, Any]:
        """What ``summary.json`` holds."""
        did, grew = self.at_end("relative_effective_lr"), self.at_end("norm_growth")
        return {
            "schema": 1,
            "headline": self.headline,
            "paragraphs": self.paragraphs,
            "task": self.task,
            "network": self.inspected.network,
            "weights": self.inspected.weights,
            "invariant_share": self.inspected.share,
            "invariant": {name: view for name, (view, _) in self.inspected.invariant.items()},
            "methods": [self._of(name, did, grew) for name in self.methods],
            "best": self.ranked[0].method if self.ranked else None,
            "code": self.code,
        }

    def _of(self, name: str, did: Mapping[str, float], grew: Mapping[str, float]) -> dict[str, Any]:
        values = {
            table.metric.name: entry.values
            for table in self.tables
            for entry in table.entries
            if entry.method == name
        }
        return {
            "name": name,
            "label": self.methods[name].label,
            "does": _does(self.methods[name]),
            "lr": self.chosen[name].lr,
            "weight_decay": self.chosen[name].weight_decay,
            "values": values,
            "norm_growth": grew.get(name),
            "relative_effective_lr": did.get(name),
        }

    def table(self) -> Table:
        """One row for each method, the best first."""
        first = self.tables[0].metric
        columns = (
            Column("method", words=True),
            Column(first.title, first.unit),
            Column("verdict", words=True),
            Column("to the best"),
            Column("learning rate"),
            Column("weight decay"),
            Column("norm growth", "end ÷ start"),
            Column("norms’ share", "of lr"),
            *(Column(t.metric.title, t.metric.unit) for t in self.tables[1:]),
            Column("seeds", "finished"),
        )
        order = [entry.method for entry in self.ranked]
        order += [name for name in self.methods if name not in order]
        return Table(columns, tuple(self._row(name) for name in order), self.name)

    def _row(self, name: str) -> Row:
        entries = {t.metric.name: e for t in self.tables for e in t.entries if e.method == name}
        entry = entries[self.tables[0].metric.name]
        colour, dash = self.marks[name]
        difference, verdict = Cell("–"), "failed" if entry.spread is None else ""
        if entry.spread is not None and entry is self.ranked[0]:
            verdict = "first"
        elif entry.spread is not None:
            found = self.behind(entry)
            if found is not None:
                half = found[1]
                digits = self.tables[0].metric.digits
                text = f"{-found[0] or 0.0:+.{digits}f}".replace("-", "−")
                difference = Cell(text, "" if half is None else f"± {half:.{digits}f}")
                verdict = "one seed" if half is None else "within chance"
                verdict = "worse" if self.apart(entry) else verdict
        grew, did = (self.at_end(k).get(name) for k in ("norm_growth", "relative_effective_lr"))
        setting = self.chosen[name]
        cells: tuple[Cell | str, ...] = (
            self.methods[name].label,
            _spread(entry, self.tables[0]),
            verdict,
            difference,
            f"{setting.lr:g}",
            f"{setting.weight_decay:g}",
            "–" if grew is None else f"×{grew:.2f}",
            "–" if did is None else f"×{did:.2f}",
            *(_spread(entries[t.metric.name], t) for t in self.tables[1:]),
            Cell(
                str(len(entry.values)),
                f"{len(entry.failed)} failed" if entry.failed else "",
            ),
        )
        return Row(cells, name, colour, bool(dash))

    @cached_property
    def marks(self) -> dict[str, tuple[str, tuple[float, ...]]]:
        """Colour and dashes of each method."""
        recipe = self.tables[0].recipe
        baselines = {m.baseline for m in recipe.methods.values() if m.baseline is not None}
        return marks(self.methods, baselines)

    def sweep_chart(self) -> Lines:
        """The first metric on held-out data over the learning rate, at each one's best decay."""
        metric = self.tables[0].metric
        best = max if metric.higher_is_better else min
        lines = []
        for name, method in self.methods.items():
            at: dict[float, list[float]] = {}
            for cell in self.swept:
                result = cell.result
                if cell.config["method"] == name and result and result["status"] == "ok":
                    value = metric.factor * result["metrics"][metric.name]
                    at.setdefault(cell.config["training"]["lr"], []).append(value)
            colour, dash = self.marks[name]
            lrs = tuple(sorted(at))
            lines.append(
                Line(
                    name,
                    method.label,
                    lrs,
                    tuple(best(at[lr]) for lr in lrs),
                    colour=colour,
                    dash=dash,
                )
            )
        title = metric.title.replace("test ", "")
        unit = f", {metric.unit}" if metric.unit else ""
        return Lines(
            f"{title[0].upper()}{title[1:]} over the learning rate",
            "On held-out training data, with one seed. A flat line forgives a wrong choice.",
            Axis("learning rate, log scale", Spacing.LOG),
            Axis(f"{title} on held-out data{unit}"),
            tuple(lines),
        )


def _spread(entry: Entry, table: ResultTable) -> Cell:
    spread, digits = entry.spread, table.metric.digits
    if spread is None:
        return Cell("–")
    sd = "" if spread.sd is None else f"± {spread.sd:.{digits}f}"
    return Cell(f"{spread.mean:.{digits}f}", sd)


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%" if 0.01 <= share <= 0.99 or share == 1 else f"{100 * share:.2g}%"


def _does(method: Method) -> str:
    """What a method does to each kind of weights that it steps otherwise."""
    said = list(dict.fromkeys(f"{rule.name}: {_rule(rule)}" for rule in method.rules))
    decays = "+".join(map(str, method.spec.decays))
    return " | ".join(said) + (f" | when and how weights decay: {decays}" if decays else "")


def _rule(rule: UpdateRule) -> str:
    """What :func:`normwise.describe` says of an optimizer, in words."""
    parts = [f"update {rule.update.value}"]
    if rule.betas:
        parts.append(f"betas {', '.join(f'{float(b):g}' for b in rule.betas)}")
    elif float(rule.momentum):
        parts.append(f"momentum {float(rule.momentum):g}{' (Nesterov)' if rule.nesterov else ''}")
    if rule.view is not None:
        parts.append(
            "radial part removed where the gate holds"
            if rule.view == "auto"
            else f"radial part removed ({rule.view})"
        )
    if rule.norm == "fixed":
        parts.append("norms fixed")
    said = "no decay" if rule.coupling is Coupling.NONE else f"decay {rule.coupling.value}"
    parts.append(said)
    return "; ".join(parts)


def render(answer: Answer, identity: Mapping[str, Any]) -> str:
    """The report as one HTML document that loads nothing.

    Args:
        answer: what it says.
        identity: what was asked for, as ``run.json`` holds it.
    """
    first = answer.tables[0]
    drawn = [*quantities(first.metric), QUANTITIES["relative_effective_lr"]]
    charts = [chart(first, quantity, answer.marks) for quantity in drawn]
    facts = answer.inspected.facts
    settings = identity["settings"]
    failures = [
        f"{answer.methods[c.config['method']].label}, seed {c.config['seed']}: failed, "
        f"{c.result['error']}. It counts in no mean."
        for c in first.cells
        if c.result is not None and c.result["status"] == "failed"
    ]
    return page(
        "own.html",
        brand="normwise compare",
        title=answer.headline,
        page_title=f"{answer.name}: {answer.headline}",
        subtitle=(
            f"{listed([m.label for m in answer.methods.values()])} on {answer.name}: "
            f"{facts.get('train_examples', '?')} examples to learn from, "
            f"{facts.get('test_examples', '?')} to test on, {settings['epochs']} epochs, "
            f"{settings['seeds']} seeds"
        ),
        notices=failures,
        findings=answer.paragraphs,
        code=answer.code,
        numbers=answer.table(),
        sweep=answer.sweep_chart() if answer.swept else None,
        methods=[
            {
                "name": name,
                "label": m.label,
                "colour": answer.marks[name][0],
                "dashed": bool(answer.marks[name][1]),
            }
            for name, m in answer.methods.items()
        ],
        charts=[c for c in charts if not c.empty],
        rules=[(m.label, _does(m)) for m in answer.methods.values()],
        invariant=[
            (name, f"{view}, {size} numbers")
            for name, (view, size) in answer.inspected.invariant.items()
        ],
        settings=[(k.replace("_", " "), str(v)) for k, v in settings.items()],
    )
