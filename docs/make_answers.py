"""From the committed results to what the pages show of them: tables, and one figure a question.

    python docs/make_answers.py

brings ``docs/results/*.json`` up to date with the recipes' claims, then the tables and counts of
the pages, then ``docs/images/answers``. A test says that it has nothing left to do.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path

from normwise.figures import Axis, Dots, Figure, Line, Lines, Series, Spacing, document
from normwise.lab.recipes import ids
from normwise.lab.running.export import as_json, as_markdown, read_json

DOCS = Path(__file__).parent
RESULTS = DOCS / "results"
PAGES = (
    DOCS / "results.md",
    DOCS / "answers" / "projection.md",
    DOCS / "answers" / "claims.md",
)
PICTURES = DOCS / "images" / "answers"

PROJECTED = {"adamp": "AdamP", "sgdp": "SGDP"}
# One question of ours at many growths of norms, with a section and a figure of its own.
SWEEP = "growth-gain"
INSERTED = re.compile(r"(<!-- tables: (?P<recipe>[\w-]+) -->\n)(?:(?!\n## ).)*", re.DOTALL)
TABLE = re.compile(r"^\*\*(?P<title>[^\n]+)\*\*\n\n(?P<table>(?:\|[^\n]*\n)+)", re.MULTILINE)
PAIRS = re.compile(r"^\| recipe, row \|[^\n]*\n(?:\|[^\n]*\n)+", re.MULTILINE)
COUNTS = re.compile(r"^Of \d+ pairs\b[^\n]*$", re.MULTILINE)
NARROW = "\u00a0"  # a space at which no line is broken
VERDICTS = {
    "better": "better",
    "worse": "worse",
    "no difference": "no difference of the claimed size",
    "cannot tell at this size": "too wide an interval to tell",
    "within chance": "within chance, and no claim known",
}
BY_DECAY = re.compile(r"(<!-- by decay -->\n)(?:\|[^\n]*\n)+")
CLAIMS = re.compile(r"(<!-- claims -->\n)(?:\|[^\n]*\n)+")
CLAIMS_HEAD = (
    *("claim of", "difference", "claimed", "here (95%)", "says", "seeds", "steps"),
    "reached, of the paper's",
)
# Of each small training whose settings do not say how many examples it has: those of its data.
STEPS = {
    "adamp-audio: dcase": 150,
    "adamp-audio: speech-commands": 504,
    "adamp-detection": 200,
    "adamp-language": 292,
    "adamp-retrieval: omniglot-proxy-anchor": 350,
    "adamp-retrieval: omniglot-triplet": 400,
    "epsilon-table-2-3": 6250,
    "long-tail": 1680,
}
PAIRS_HEAD = (
    *("recipe, row", "metric", "pair", "seeds", "difference (95%)"),
    *("verdict", "claimed", "seeds to see it"),
)


def tables():
    """Those of every recipe that has results and sweeps nothing, by its name."""
    found = {}
    for name in ids():
        path = RESULTS / f"{name}.json"
        # A benchmark's own results may have the name of a recipe.
        if path.exists() and path.read_text(encoding="utf-8").startswith("["):
            found[name] = read_json(path)
    return {
        name: of_recipe
        for name, of_recipe in found.items()
        if all(table.fixed == table.entries for table in of_recipe)
    }


def page(text, held):
    """The page with its tables as ``normwise report`` prints them."""
    made = {}
    for of_recipe in held.values():
        made |= {m["title"]: m["table"] for m in TABLE.finditer(as_markdown(of_recipe))}
    text = COUNTS.sub(counts(held), text)
    text = INSERTED.sub(lambda m: m[1] + inserted(held.get(m["recipe"])), text)
    text = CLAIMS.sub(lambda m: m[1] + "\n".join(claim_lines(held)) + "\n", text)
    if "epsilon-table-2-3" in held:
        text = BY_DECAY.sub(lambda m: m[1] + "\n".join(by_decay(held)) + "\n", text)
    text = PAIRS.sub("\n".join(pair_lines(held)) + "\n", text)
    return TABLE.sub(
        lambda m: f"**{m['title']}**\n\n{made.get(m['title'], m['table'])}",
        text,
    )


def inserted(of_recipe):
    """What stands below a marker, to the end of its section."""
    if of_recipe is None:
        return "\nThere are no results yet.\n"
    return "\n" + as_markdown(of_recipe)


def pairs(held):
    """Every projected optimizer beside its own: the table and the entry, by the first metric."""
    for name, of_recipe in held.items():
        if name == SWEEP:
            continue
        firsts = {}
        for table in of_recipe:
            firsts.setdefault(table.row, table)
        for table in firsts.values():
            for entry in table.fixed:
                if entry.method in PROJECTED and entry.difference is not None:
                    yield table, entry


def named(table):
    """A recipe and its row; with the scale, where that is not the small one."""
    scale = "" if table.scale == "small" else f" ({table.scale})"
    return f"{table.recipe.id}: {table.row}{scale}"


def pair_lines(held):
    """The table of all pairs."""
    yield f"| {' | '.join(PAIRS_HEAD)} |"
    yield "|---" * len(PAIRS_HEAD) + "|"
    for table, e in pairs(held):
        metric = table.metric.name.replace("_", " ").replace("ap", "AP")
        width = "" if e.half_width is None else f" ± {e.half_width:.2f}"
        cells = (
            named(table),
            metric,
            f"{PROJECTED[e.method]} to {e.compared_with}",
            str(len(e.values)),
            signed(e.difference) + width,
            e.verdict(table.metric),
            "not known" if e.claimed is None else signed(e.claimed),
            "" if e.claimed is None else many(e.seeds_needed),
        )
        yield f"| {' | '.join(cells)} |"


def claim_lines(held):
    """Every difference that a paper states beside ours, and what that says of it."""
    yield f"| {' | '.join(CLAIMS_HEAD)} |"
    yield "|---" * len(CLAIMS_HEAD) + "|"
    for name, of_recipe in held.items():
        if name == SWEEP:
            continue
        firsts = {}
        for table in of_recipe:
            firsts.setdefault((table.scale, table.row), table)
        for table in firsts.values():
            for e in table.fixed:
                if e.claimed is None or e.difference is None or e.spread is None:
                    continue
                width = "" if e.half_width is None else f"{NARROW}±{NARROW}{e.half_width:.2f}"
                steps = steps_of(table)
                paper = table.recipe.paper.rows.get(table.row, {}).get(e.method)
                reached = f"{e.spread.mean:.1f}" + ("" if paper is None else f" of {paper:g}")
                cells = (
                    named(table),
                    f"{e.label} to {e.compared_with}",
                    signed(e.claimed),
                    signed(e.difference) + width,
                    said(e, table.metric),
                    str(len(e.values)),
                    f"{steps:,}",
                    reached,
                )
                yield f"| {' | '.join(cells)} |"


def steps_of(table):
    """How many steps each training of a table has: by its records, its settings or its data."""
    name = table.recipe.id
    if known := STEPS.get(f"{name}: {table.row}", STEPS.get(name)):
        return known
    if ends := [c.records[-1]["step"] for c in table.cells if c.records]:
        return max(ends)
    (cell, *_) = table.recipe.cells(table.scale, 1, rows=[table.row])
    return cell.options.train_examples // cell.training.batch_size * cell.training.epochs


def by_decay(held):
    """Tables II and III of the ε-shift's paper: methods by λ, ours and the paper's."""
    tables_of = {t.row.removeprefix("decay-"): t for t in held["epsilon-table-2-3"]}
    rows = [row for row in ("1e-2", "1e-3", "1e-4", "1e-5", "0") if row in tables_of]
    yield f"| method | λ = {' | '.join(rows)} |"
    yield "|---" * (len(rows) + 1) + "|"
    for method, settings in next(iter(tables_of.values())).recipe.methods.items():
        cells = [settings.label]
        for row in rows:
            table = tables_of[row]
            (e,) = (e for e in table.fixed if e.method == method)
            ours = "failed"
            if e.spread is not None:
                ours = f"{e.spread.mean:.2f}"
                ours += "" if e.spread.sd is None else f" ± {e.spread.sd:.2f}"
            paper = table.recipe.paper.rows[table.row].get(method)
            # Plain decay of normalized weights without a number failed.
            failed = row != "0" and "-" in method and "epsilon" not in method
            cells.append(
                f"{ours} / {'failed' if failed else '–'}"
                if paper is None
                else f"{ours} / {paper:g}"
            )
        yield f"| {' | '.join(cells)} |"


def said(entry, metric):
    """What a difference says of the claim; one seed has no interval."""
    if entry.half_width is None:
        return "one seed"
    verdict = entry.verdict(metric)
    if verdict in ("better", "worse"):
        if entry.difference * entry.claimed < 0:
            return "**contradicted**"
        reaches = abs(entry.difference) + entry.half_width >= abs(entry.claimed)
        return "**supported**" if reaches else "supported, but smaller"
    return {"no difference": "not at this size"}.get(verdict, "not answerable here")


def counts(held):
    """How many pairs have which verdict, in a sentence."""
    found = Counter(entry.verdict(table.metric) for table, entry in pairs(held))
    parts = [f"{found[verdict]} {words}" for verdict, words in VERDICTS.items()]
    if found.keys() - VERDICTS.keys():
        raise ValueError(f"verdicts without words: {found.keys() - VERDICTS.keys()}")
    pairs_of_one = f"Of {found.total()} pairs of one optimizer with and without projection"
    return f"{pairs_of_one}: {'; '.join(parts)}."


def signed(value):
    """Two digits, no −0."""
    return f"{round(value, 2) + 0.0:+.2f}".replace("-", "−")


def many(seeds):
    """A number of seeds."""
    return "over 10,000" if seeds is None else f"{seeds:,}"


def projection(held):
    """What each pair shows, in units of what is claimed: 0 is no difference, 1 is the claim."""
    found = [
        (table, entry)
        for table, entry in pairs(held)
        if entry.claimed and entry.half_width is not None
    ]
    found.sort(key=lambda pair: pair[1].half_width / abs(pair[1].claimed))
    cut = 5.0
    values = [e.difference / e.claimed for _, e in found]
    widths = [e.half_width / abs(e.claimed) for _, e in found]

    def within(value):
        return min(max(value, -cut), cut)

    return Dots(
        "What the projection gains, in units of what the paper claims",
        f"95% intervals, cut at ±{cut:.0f}. An interval that holds both 0 and 1 cannot tell.",
        Axis("0: no difference; 1: as claimed", holds=(-cut, cut)),
        tuple(
            f"{t.recipe.id}: {t.row}, {PROJECTED[e.method]}".removeprefix("adamp-").replace(
                "resnet18-", ""
            )
            for t, e in found
        ),
        (
            Series(
                "",
                tuple(v if abs(v) < cut else math.nan for v in values),
                tuple(within(v - w) for v, w in zip(values, widths, strict=True)),
                tuple(within(v + w) for v, w in zip(values, widths, strict=True)),
            ),
        ),
        reference=0.0,
        band=(0.0, 1.0),
    )


def without_decay(held):
    """How norms and the training loss go at medium scale without decay, seeds averaged."""
    (table,) = (t for t in held["adamp-imagenet"] if t.scale == "medium" and "no-decay" in t.row)
    looks = {
        "sgd": ("SGD", "blue", ()),
        "sgdp": ("SGDP", "blue", (4.0, 2.0)),
        "adamw": ("AdamW", "orange", ()),
        "adamp": ("AdamP", "orange", (4.0, 2.0)),
    }

    def drawn(quantity):
        lines = []
        for method, (label, colour, dash) in looks.items():
            cells = [c.records for c in table.cells if c.config["method"] == method]
            steps = [at for at in zip(*cells, strict=True) if at[0][quantity] is not None]
            x = tuple(float(at[0]["epoch"]) for at in steps)
            y = tuple(sum(r[quantity] for r in at) / len(at) for at in steps)
            lines.append(Line(method, label, x, y, colour=colour, dash=dash))
        return tuple(lines)

    return (
        Lines(
            "Without weight decay norms grow, less under the projection",
            "ResNet-20, CIFAR-100, each at its own best learning rate; means of four seeds.",
            Axis("epoch"),
            Axis("norm over that at the start", holds=(1.0,)),
            drawn("norm_growth"),
        ),
        Lines(
            "and the projected ones learn for longer",
            "The same runs. SGDP and AdamP begin slower, at larger learning rates.",
            Axis("epoch"),
            Axis("training loss, nats"),
            drawn("train_loss"),
        ),
    )


def plain_decay(held):
    """Accuracy by λ of plain and of shifted decay on normalized weights; failed runs at 0."""
    rows = {"decay-1e-2": 1e-2, "decay-1e-3": 1e-3, "decay-1e-4": 1e-4, "decay-1e-5": 1e-5}
    lines = {
        "ws-sgd": ("plain, WS", "blue", ()),
        "ws-sgd-epsilon": ("shifted, WS", "blue", (4.0, 2.0)),
        "wn-sgd": ("plain, WN", "orange", ()),
        "wn-sgd-epsilon": ("shifted, WN", "orange", (4.0, 2.0)),
    }
    values = {
        (table.row, e.method): 0.0 if e.spread is None else e.spread.mean
        for table in held["epsilon-table-2-3"]
        for e in table.fixed
    }
    drawn = []
    for method, (label, colour, dash) in lines.items():
        y = tuple(values[row, method] for row in rows)
        drawn.append(Line(method, label, tuple(rows.values()), y, colour=colour, dash=dash))
    return Lines(
        "Plain and ε-shifted decay of normalized weights, SGD",
        "ResNet of 8 layers, CIFAR-100 at 16×16, one seed. At 0 the run failed.",
        Axis("weight decay λ", Spacing.LOG),
        Axis("test accuracy, %", holds=(0.0,)),
        tuple(drawn),
    )


def when_decay(held):
    """What decay throughout gains over none, and what is left of it early and late."""
    rows, values, low, high = [], [], [], []
    for table in held["early-decay"]:
        of = {e.method: e for e in table.fixed}
        for method in ("always", "early", "late"):
            e = of[method]
            rows.append(f"{table.row.split('-')[1]}: {method} − {e.compared_with}")
            values.append(e.difference)
            low.append(e.difference - e.half_width)
            high.append(e.difference + e.half_width)
    return Dots(
        "What decay is worth: always, early, or late",
        "Test accuracy, percentage points, 95% intervals of three seeds. Early: the first third.",
        Axis("difference, better to the right"),
        tuple(rows),
        (Series("", tuple(values), tuple(low), tuple(high)),),
        reference=0.0,
    )


def only_a_rate():
    """A run with decay, and one whose learning rates stand for it."""
    (table,) = read_json(RESULTS / "curves" / "decay-as-schedule.json")
    looks = {
        "decay": ("weight decay", "blue", ()),
        "translated": ("none, rates translated", "orange", (4.0, 2.0)),
        "none": ("none", "green", ()),
    }
    lines, ends = [], {}
    for cell in table.cells:
        method = cell.config["method"]
        ends[method] = cell.records[-1]["norm"]
        label, colour, dash = looks[method]
        records = [r for r in cell.records if r["train_loss"] is not None]
        x = tuple(float(r["epoch"]) for r in records)
        y = tuple(r["train_loss"] for r in records)
        lines.append(Line(method, label, x, y, colour=colour, dash=dash))
    return Lines(
        "Weight decay, and the learning rates that stand for it",
        "One run but for rounding, which grows; norms end a factor of "
        f"{power_of_ten(ends['translated'] / ends['decay'])} apart.",
        Axis("epoch"),
        Axis("training loss"),
        tuple(lines),
    )


def power_of_ten(value):
    """The nearest one."""
    digits = str(round(math.log10(value))).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{digits}"


def growth_gain(held):
    """What the projection gains, against how much norms grow without it."""
    lines = []
    for method, baseline, label, colour in (
        ("sgdp", "sgd", "SGDP − SGD", "blue"),
        ("adamp", "adamw", "AdamP − AdamW", "orange"),
    ):
        points = sorted(
            (growth(table, baseline), e.difference, e.half_width)
            for table in held[SWEEP]
            for e in table.fixed
            if e.method == method and e.difference is not None
        )
        if not points:
            continue
        x, y, w = zip(*points, strict=True)
        low = high = ()
        if None not in w:
            low, high = (tuple(v + s * h for v, h in zip(y, w, strict=True)) for s in (-1, 1))
        lines.append(Line(method, label, x, y, low, high, colour))
    return Lines(
        "Gain of the projection against the growth of norms without it",
        "Test accuracy, points, with 95% intervals; a point for each initial scale.",
        Axis("growth of norms without the projection, ×", Spacing.LOG),
        Axis("gain of the projection", holds=(0.0,)),
        tuple(lines),
    )


def hidden_schedule(held):
    """What is left of the projection's effect when learning rates undo the growth of norms."""
    charts = []
    for baseline, projected, title in (
        ("sgd", "sgdp", "SGDP beside SGD at corrected rates"),
        ("adamw", "adamp", "AdamP beside AdamW at corrected rates"),
    ):
        lines = []
        for method, label, colour, sign in (
            (projected, "as it is", "grey", -1),
            (f"{baseline}-corrected", "rate corrected", "orange", 1),
            (
                f"{baseline}-rescaled",
                "moments too" if baseline == "adamw" else "buffer too",
                "blue",
                1,
            ),
        ):
            points = sorted(
                (growth(table, baseline), sign * e.difference, e.half_width)
                for table in held[SWEEP]
                for e in table.fixed
                if e.method == method and e.difference is not None
            )
            x, y, w = zip(*points, strict=True)
            low, high = (tuple(v + s * h for v, h in zip(y, w, strict=True)) for s in (-1, 1))
            lines.append(Line(method, label, x, y, low, high, colour))
        charts.append(
            Lines(
                title,
                f"Test accuracy of {'SGD' if baseline == 'sgd' else 'AdamW'} less that of "
                f"{'SGDP' if baseline == 'sgd' else 'AdamP'}, points, with 95% intervals.",
                Axis("growth of norms without correction, ×", Spacing.LOG),
                Axis("difference", holds=(0.0,)),
                tuple(lines),
            )
        )
    return tuple(charts)


def growth(table, method):
    """The mean over seeds of a method's growth of norms at the end."""
    ends = [
        c.records[-1]["norm_growth"]
        for c in table.cells
        if c.config["method"] == method and c.records
    ]
    return sum(ends) / len(ends)


def figures(held):
    """The figures, by the names of their files."""
    made = {
        "projection": (projection(held),),
        "without-decay": without_decay(held),
        "plain-decay": (plain_decay(held),),
        "when-decay": (when_decay(held),),
        "only-a-rate": (only_a_rate(),),
    }
    if SWEEP in held:
        made[SWEEP] = (growth_gain(held),)
        made["hidden-schedule"] = hidden_schedule(held)
    return {f"{name}.svg": document(Figure("", charts)) for name, charts in made.items()}


def main():
    """Bring all that is made of the results up to date."""
    for name, of_recipe in tables().items():
        (RESULTS / f"{name}.json").write_text(as_json(of_recipe), encoding="utf-8")
    held = tables()
    for path in PAGES:
        path.write_text(page(path.read_text(encoding="utf-8"), held), encoding="utf-8")
    PICTURES.mkdir(parents=True, exist_ok=True)
    for name, text in figures(held).items():
        (PICTURES / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
