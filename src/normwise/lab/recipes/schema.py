"""What a recipe is, and how its YAML is checked."""

from __future__ import annotations

import functools
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from normwise.lab.checks import later, within
from normwise.lab.correction import REFERENCES
from normwise.lab.errors import UsageError, nearest
from normwise.lab.optimizers import parse as parse_optimizer
from normwise.lab.recipes.grids import Point, Tuned, point_name, points
from normwise.lab.tasks.kinds import kind

__all__ = [
    "SCHEMA",
    "Paper",
    "Recipe",
    "RecipeCell",
    "RecipeMethod",
    "RecipeScale",
    "Training",
    "parse",
]

SCHEMA = 1
MOST_SEEDS = 10_000
SCHEDULES = ("constant", "steps", "linear", "cosine")
NORMALIZATIONS = ("none", "WN", "CWN", "WS")
COUPLINGS = ("own", "l2", "decoupled", "schedule", "translated")
CORRECTIONS = ("none", *REFERENCES)
DECAYED = ("weights", "no-depthwise", "no-biases", "invariant", "all")


@dataclass(frozen=True)
class Training:
    """How a network is trained, whatever the task.

    Args:
        epochs: passes over the training data; 0 only where a method starts from another.
        batch_size: examples per step.
        optimizer: sgd, sgdp, adam, adamw or adamp; ``torch:CLASS``; ``MODULE:FACTORY`` of the
            user's; or ``tangential(…)`` or ``sphere(…)`` around one of these.
        lr: the learning rate at its highest.
        weight_decay: L2 in sgd and adam, decoupled in the others (default: 0).
        coupling: ``own`` is the optimizer's; ``l2``; ``decoupled``, λ times the learning rate;
            ``schedule``, decoupled and λ times the share of ``lr`` that the schedule leaves, as in
            SGDW and AdamW of arXiv 1711.05101; ``translated``, no decay, but learning rates under
            which sgd takes scale-invariant weights the same way (arXiv 1911.05920, Theorem 1)
            (default: own).
        decay_window: from and to which share of the steps weights decay (default: 0 and 1).
        decay_on: ``weights`` of two or more dimensions, those ``no-depthwise`` convolution has,
            all parameters but ``no-biases``, ``invariant`` ones alone, or ``all`` (default:
            weights).
        momentum: of sgd and sgdp (default: 0.9).
        nesterov: of sgd, sgdp and adamp (default: no).
        betas: of adam, adamw and adamp (default: 0.9 and 0.999).
        eps: of adam, adamw and adamp, and sgdp's guard (default: 1e-8).
        delta: threshold of the cosine gate (default: 0.1).
        wd_ratio: factor on the decay of projected weights (default: 0.1).
        schedule: constant, steps, linear or cosine, these two down to 0 (default: steps).
        drops: after which shares of the steps ``lr`` is multiplied (default: 0.3, 0.6, 0.9).
        lr_factor: by what (default: 0.1).
        warmup: the share of the steps in which ``lr`` rises evenly from 0 (default: 0).
        cycles: how many times the schedule, warm-up included, runs through (default: 1).
        normalization: of the weights: none, WN, CWN or WS (default: none).
        normalization_skip: modules, by name or pattern, whose weights are left alone besides those
            that ``reparametrize`` leaves alone of itself (default: none).
        normalize_depthwise: whether depthwise convolutions are normalized too (default: no).
        normalization_eps: below which norm or std the division goes on as by this; 0 is the papers'
            bare division, which can overflow (default: the library's own guard).
        gain: whether normalized weights have a learnable gain (default: no).
        epsilon_shift: ε of the ε-shifted L2 that takes the place of weight decay on normalized
            weights (default: plain decay).
        clip: the largest norm of the whole gradient (default: any).
        awp_gamma: γ of the adversarial weight perturbation at which steps are taken (default: 0,
            none).
        awp_view: what is perturbed by γ times its norm: ``layer``, every tensor as a whole, or
            ``slices``, the scale-invariant ones slice by slice (default: layer).
        evaluate_every: epochs between tests; the last is always tested (default: 1).
        autocast: ``none`` or ``bfloat16`` (default: none).
        pretrained: a file of weights to begin with, below the folder of the data sets: safetensors,
            or of ``torch.save`` (default: none; weights are drawn). A method with a ``start`` takes
            that instead.
        pretrained_into: the module of the network that it is for (default: the whole network).
        pretrained_skip: tensors or modules, by name or pattern, that stay as they were drawn and
            that the file may lack or hold (default: none).
        initial_scale: the factor on all scale-invariant weights before the first step: the network
            computes the same, and its norms grow as in a run of another length (default: 1).
        norm_correction: whether steps of scale-invariant slices are multiplied by what undoes the
            growth of their norms: ``none``; ``fixed``, as if norms stayed; ``projected``, as if
            they grew by the tangential part of each step alone; ``rescaled``, as that, and what
            the optimizer remembers too (default: none).
    """

    epochs: int
    batch_size: int
    optimizer: str
    lr: float
    weight_decay: float = 0.0
    coupling: str = "own"
    decay_window: tuple[float, ...] = (0.0, 1.0)
    decay_on: str = "weights"
    momentum: float = 0.9
    nesterov: bool = False
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    delta: float = 0.1
    wd_ratio: float = 0.1
    schedule: str = "steps"
    drops: tuple[float, ...] = (0.3, 0.6, 0.9)
    lr_factor: float = 0.1
    warmup: float = 0.0
    cycles: int = 1
    normalization: str = "none"
    normalization_skip: tuple[str, ...] = ()
    normalize_depthwise: bool = False
    normalization_eps: float | None = None
    gain: bool = False
    epsilon_shift: float | None = None
    clip: float | None = None
    awp_gamma: float = 0.0
    awp_view: str = "layer"
    evaluate_every: int = 1
    autocast: str = "none"
    pretrained: str | None = later(None)
    pretrained_into: str = later("")
    pretrained_skip: tuple[str, ...] = later(())
    initial_scale: float = later(1.0)
    norm_correction: str = later("none")

    def __post_init__(self) -> None:
        parse_optimizer(self.optimizer)
        for name, allowed in (
            ("schedule", SCHEDULES),
            ("normalization", NORMALIZATIONS),
            ("coupling", COUPLINGS),
            ("decay_on", DECAYED),
            ("autocast", ("none", "bfloat16")),
            ("awp_view", ("layer", "slices")),
            ("norm_correction", CORRECTIONS),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise UsageError(f"unknown {name} {value!r}: {nearest(value, allowed)}")
        for name in ("batch_size", "evaluate_every", "cycles"):
            within(self, name, 1)
        for name in (
            "epochs",
            "awp_gamma",
            "lr",
            "weight_decay",
            "eps",
            "wd_ratio",
            "delta",
            "lr_factor",
        ):
            within(self, name, 0)
        for name in ("normalization_eps", "epsilon_shift"):
            within(self, name, 0)
        within(self, "clip", 0, above=True)
        within(self, "initial_scale", 0, above=True)
        within(self, "momentum", 0, 1, below=True)
        within(self, "warmup", 0, 1, below=True)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UsageError(
                f"betas {list(self.betas)} are not allowed: must be two numbers, 0 or more and "
                "below 1"
            )
        drops = self.drops
        if not all(0 < a < 1 for a in drops) or list(drops) != sorted(set(drops)):
            raise UsageError(
                f"drops {list(drops)} are not allowed: must be shares of the steps, rising, "
                "between 0 and 1"
            )
        if self.nesterov and self.optimizer == "sgd" and self.momentum == 0:
            raise UsageError("nesterov is set, but momentum is 0")
        self._check_decay()
        if self.pretrained is None:
            for name in ("pretrained_into", "pretrained_skip"):
                if getattr(self, name):
                    raise UsageError(f"{name} is set, but pretrained is not")
        if self.norm_correction != "none" and self.weight_decay > 0:
            raise UsageError(
                f"norm_correction {self.norm_correction} goes with no weight_decay: it would be "
                "multiplied as the step is"
            )
        if self.normalization == "none":
            for name in ("normalize_depthwise", "normalization_skip"):
                if getattr(self, name):
                    raise UsageError(f"{name} is set, but normalization is none")

    def _check_decay(self) -> None:
        if self.coupling == "schedule" and self.weight_decay >= 1:
            raise UsageError(
                f"weight_decay {self.weight_decay} is not allowed: must be below 1 where no "
                "learning rate is multiplied with it"
            )
        if self.coupling == "translated" and (
            self.optimizer != "sgd" or self.nesterov or self.decay_on != "invariant"
        ):
            raise UsageError(
                "coupling translated needs optimizer sgd without nesterov, and decay_on invariant"
            )
        window = self.decay_window
        if len(window) != 2 or not 0 <= window[0] < window[1] <= 1:
            raise UsageError(
                f"decay_window {list(window)} is not allowed: must be two shares of the steps, "
                "rising, from 0 to 1"
            )
        if self.epsilon_shift is not None and (
            self.coupling != "own" or window[0] > 0 or window[1] < 1
        ):
            raise UsageError("epsilon_shift goes with no coupling and no decay_window")
        shifts_depthwise = self.epsilon_shift is not None and self.normalize_depthwise
        if shifts_depthwise and self.decay_on == "no-depthwise":
            raise UsageError(
                "decay_on is no-depthwise, but epsilon_shift would decay the depthwise "
                "convolutions that normalize_depthwise normalizes"
            )

    def factor(self, step: int, steps: int) -> float:
        """The share of ``lr`` at a step, counted from 0, of ``steps`` in all."""
        done = step * self.cycles / steps % 1 if step < steps else 1.0
        steps = steps // self.cycles
        step = round(done * steps)
        if done < self.warmup:
            return (step + 1) / (self.warmup * steps)
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * (done - self.warmup) / (1 - self.warmup)))
        if self.schedule == "linear":
            return (1 - done) / (1 - self.warmup)
        if self.schedule == "steps":
            return self.lr_factor ** sum(done >= drop for drop in self.drops)
        return 1.0


@dataclass(frozen=True)
class Paper:
    """What the paper says.

    Args:
        source: the paper, and the table or figure.
        metric: what its numbers are.
        rows: for each row and method its number; a method that is missing is not known.
        claims: for each row and method the difference to the method's baseline that the paper
            claims, where ``rows`` does not say it (default: what follows from ``rows``).
        note: what a reader should know (default: nothing).
    """

    source: str
    metric: str
    rows: dict[str, dict[str, float]] = field(default_factory=dict)
    claims: dict[str, dict[str, float]] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class RecipeMethod:
    """One column of a table.

    Args:
        label: as a reader sees it.
        settings: what it sets.
        baseline: the method that it is compared with (default: none).
        start: the method of whose finished training, of the same row and seed, it takes the weights
            to begin with (default: none; weights are drawn).
        grid: settings that it sweeps, each with its values, at every scale (default: none).
    """

    label: str
    settings: dict[str, Any]
    baseline: str | None = None
    start: str | None = None
    grid: dict[str, tuple[Any, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class RecipeScale:
    """A size of the experiment.

    Args:
        settings: what holds for all its cells.
        rows: the rows of its table, each with what it sets.
        seeds: how many by default (default: 3).
        note: in what it differs from the paper (default: nothing).
        methods: what some methods set at this scale, which overrules what they set at all
            (default: nothing).
        grid: settings that all its methods sweep, each with its values (default: none).
        grids: the same for some methods, which overrules all other grids (default: none).
        tuned_on: the scale whose sweep, tested on data held out of the training data, decides each
            method's settings; in the row of the same name, or in its only one (default: none).
    """

    settings: dict[str, Any]
    rows: dict[str, dict[str, Any]]
    seeds: int = 3
    note: str = ""
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    grid: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    grids: dict[str, dict[str, tuple[Any, ...]]] = field(default_factory=dict)
    tuned_on: str | None = None

    def __post_init__(self) -> None:
        within(self, "seeds", 1, MOST_SEEDS)
        if not self.rows:
            raise UsageError("there are no rows; must be one or more")
        for row in self.rows:
            check_name("row", row)


@dataclass(frozen=True)
class RecipeCell:
    """One training: a row, a method and a seed of a recipe at a scale.

    Args:
        recipe, scale, row, method: names.
        seed: of initial weights, order of examples and augmentation.
        task: the kind of task.
        training: how it is trained.
        options: the task's own settings.
        start: the method of whose training it takes the weights to begin with.
        point: of the grid; empty where nothing is swept.
    """

    recipe: str
    scale: str
    row: str
    method: str
    seed: int
    task: str
    training: Training
    options: Any
    start: str | None = None
    point: Point = ()

    @property
    def folder(self) -> str:
        """Where it lies under the output folder."""
        name = point_name(self.point)
        return self._folder_of(f"{self.method}/{name}" if name else self.method)

    @property
    def start_folder(self) -> str | None:
        """Where the training lies whose weights it begins with."""
        return None if self.start is None else self._folder_of(self.start)

    def _folder_of(self, method: str) -> str:
        return f"{self.recipe}-{self.scale}/{self.row}/{method}/seed-{self.seed}"


@dataclass(frozen=True)
class Recipe:
    """A table or figure of a paper as runs.

    Args:
        id: what the user writes.
        title: what a reader sees.
        question: what it answers.
        task: the kind of task.
        paper: what the paper says.
        methods: the columns.
        scales: ``paper`` and ``small``.
        settings: what holds at every scale.
        grid: settings that all methods sweep at every scale, each with its values; a scale's, then
            a method's, overrules it.
    """

    id: str
    title: str
    question: str
    task: str
    paper: Paper
    methods: dict[str, RecipeMethod]
    scales: dict[str, RecipeScale]
    settings: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name("id", self.id)
        if not self.methods:
            raise UsageError("there are no methods; must be one or more")
        for name in self.methods:
            check_name("method", name)
        for name in self.scales:
            check_name("scale", name)

    def claimed(self, row: str, method: str) -> float | None:
        """The difference to its baseline that the paper claims; none where it is not known."""
        stated = self.paper.claims.get(row, {}).get(method)
        if stated is not None:
            return stated
        numbers, baseline = self.paper.rows.get(row, {}), self.methods[method].baseline
        if method not in numbers or baseline not in numbers:
            return None
        return numbers[method] - numbers[baseline]

    def cells(
        self,
        scale: str,
        seeds: int | None = None,
        methods: Iterable[str] = (),
        rows: Iterable[str] = (),
        tuned: Tuned | None = None,
    ) -> list[RecipeCell]:
        """The trainings, whole seeds first; later settings overrule earlier ones.

        Args:
            scale: a name in ``scales``.
            seeds: how many (default: the scale's).
            methods: which (default: all).
            rows: which (default: all of the scale).
            tuned: what a sweep has chosen, for a scale that is tuned on one (default: nothing).

        Raises:
            UsageError: for an unknown name, or where the choice of a sweep is needed and missing.
        """
        chosen = _known(self.scales, scale, "scale")
        for name in methods:
            _known(self.methods, name, "method")
        for name in rows:
            _known(chosen.rows, name, "row")
        if seeds is not None and not 1 <= seeds <= MOST_SEEDS:
            raise UsageError(f"{seeds} seeds are not allowed: must be from 1 to {MOST_SEEDS}")
        return [
            self._cell(scale, row, method, seed, point, self._tuned(chosen, row, method, tuned))
            for row in (list(rows) or chosen.rows)
            for seed in range(chosen.seeds if seeds is None else seeds)
            for method in (list(methods) or self.methods)
            for point in self.points(scale, method)
        ]

    def points(self, scale: str, method: str) -> list[Point]:
        """The points of the grid that a method sweeps at a scale, which is tuned on none."""
        size = self.scales[scale]
        if size.tuned_on is not None:
            return [()]
        own = self.methods[method].grid
        return points(self.grid, size.grid, own, size.grids.get(method, {}))

    def _tuned(
        self, size: RecipeScale, row: str, method: str, tuned: Tuned | None
    ) -> Mapping[str, float]:
        """What the sweep that a scale is tuned on has chosen."""
        if size.tuned_on is None:
            return {}
        there = self.scales[size.tuned_on].rows
        place = row if row in there else next(iter(there))
        try:
            return (tuned or {})[place][method]
        except KeyError:
            raise UsageError(
                f"recipe {self.id!r} takes settings of {method!r} from its scale "
                f"{size.tuned_on!r}, whose row {place!r} has not been trained: run `normwise paper "
                "tune` on it first"
            ) from None

    def _cell(
        self,
        scale: str,
        row: str,
        method: str,
        seed: int,
        point: Point,
        tuned: Mapping[str, float],
    ) -> RecipeCell:
        size = self.scales[scale]
        settings = {
            **self.settings,
            **size.settings,
            **self.methods[method].settings,
            **size.methods.get(method, {}),
            **size.rows[row],
            **tuned,
            **dict(point),
        }
        options = kind(self.task).options
        shared = {f.name for f in fields(Training)}
        own = {f.name for f in fields(options)}
        where = f"recipe {self.id!r}, scale {scale!r}, row {row!r}, method {method!r}"
        for key in settings:
            if key not in shared | own:
                hint = nearest(str(key), sorted(shared | own))
                raise UsageError(f"{where}: unknown key {key!r}: {hint}")
        try:
            training = _checked(Training, {k: v for k, v in settings.items() if k in shared}, where)
            rest = _checked(options, {k: v for k, v in settings.items() if k in own}, where)
            if self.methods[method].start is None:
                within(training, "epochs", 1)
        except UsageError as error:
            raise UsageError(_placed(where, str(error))) from None
        start = self.methods[method].start
        return RecipeCell(
            self.id, scale, row, method, seed, self.task, training, rest, start, point
        )


def _placed(where: str, text: str) -> str:
    return text if text.startswith(where) else f"{where}: {text}"


def check_name(what: str, name: str) -> None:
    """Refuse a name that could not be that of a folder on every system, or would leave its own.

    Raises:
        UsageError: for such a name.
    """
    if not re.fullmatch(r"\w[\w.+=,@ -]{0,99}(?<![. ])", name):
        raise UsageError(
            f"{what} {name!r} is not allowed: must be letters, digits and any of _ . + = , @ - "
            "and blanks, at most 100, begin with a letter or digit and not end with a dot or blank"
        )


def _known(names: Mapping[str, Any], name: str, what: str) -> Any:
    if name not in names:
        raise UsageError(f"unknown {what} {name!r}: {nearest(name, names)}")
    return names[name]


def parse(content: Any, where: str) -> Recipe:
    """A recipe from what its YAML holds.

    Every cell of every scale is made once, so that an error shows before anything is trained.

    Args:
        content: as a YAML reader returns it.
        where: the file, for errors.

    Raises:
        UsageError: for another version, an unknown or missing key, or a value of the wrong type.
    """
    if not isinstance(content, dict):
        raise UsageError(f"{where} is no recipe: it holds a {type(content).__name__}, not keys")
    content = dict(content)
    schema = content.pop("schema", None)
    if schema != SCHEMA:
        raise UsageError(
            f"{where} has schema {schema!r}, and this version of normwise reads {SCHEMA}: "
            + (
                "the recipe is older; see docs/papers.md for what changed"
                if isinstance(schema, int) and schema < SCHEMA
                else "it is newer, or no recipe"
            )
        )
    try:
        recipe: Recipe = _checked(Recipe, content, where)
    except UsageError as error:
        raise UsageError(_placed(where, str(error))) from None
    missing = {"paper", "small"} - set(recipe.scales)
    if missing:
        raise UsageError(f"{where} lacks scale {min(missing)!r}; must have 'paper' and 'small'")
    for name, method in recipe.methods.items():
        if method.baseline is not None:
            _known(recipe.methods, method.baseline, f"baseline of method {name!r}")
            if method.baseline == name:
                raise UsageError(f"{where}: method {name!r} is its own baseline")
        if method.start is not None:
            first = _known(recipe.methods, method.start, f"start of method {name!r}")
            if first.start is not None:
                raise UsageError(
                    f"{where}: method {name!r} starts from {method.start!r}, which starts from "
                    "another itself; must be one that draws its weights"
                )
    for row, values in recipe.paper.rows.items():
        for name in values:
            _known(recipe.methods, name, f"method in the paper's row {row!r}")
    for row, values in recipe.paper.claims.items():
        for name in values:
            method = _known(recipe.methods, name, f"method in the paper's claims of {row!r}")
            if method.baseline is None:
                raise UsageError(
                    f"{where}: method {name!r} has a claim in row {row!r}, but no baseline that it "
                    "is a difference to"
                )
    for scale, size in recipe.scales.items():
        for name in size.methods:
            _known(recipe.methods, name, f"method of scale {scale!r}")
        try:
            _check_sweeps(recipe, scale)
        except UsageError as error:
            raise UsageError(_placed(f"{where}: scale {scale!r}", str(error))) from None
        recipe.cells(scale, seeds=1, tuned=_any_choice(recipe, scale))
    return recipe


def _check_sweeps(recipe: Recipe, scale: str) -> None:
    """Refuse a grid of no method, a start that is swept, and an unfair or unknown tuning."""
    size = recipe.scales[scale]
    for name in size.grids:
        _known(recipe.methods, name, "method in grids")
    for name, method in recipe.methods.items():
        for point in recipe.points(scale, name):
            if point:
                check_name("point of a grid", point_name(point))
        if method.start is not None and recipe.points(scale, method.start) != [()]:
            raise UsageError(f"method {name!r} starts from {method.start!r}, which is swept")
    if size.tuned_on is None:
        return
    on = _known(recipe.scales, size.tuned_on, "scale in tuned_on")
    if on.tuned_on is not None:
        raise UsageError(f"tuned_on {size.tuned_on!r} is not allowed: it is tuned itself")
    counts = {name: len(recipe.points(size.tuned_on, name)) for name in recipe.methods}
    if len(set(counts.values())) > 1:
        raise UsageError(
            f"tuned_on {size.tuned_on!r} is not allowed: its methods have "
            f"{', '.join(f'{n} {count}' for n, count in counts.items())} points of a grid; must "
            "be as many for each"
        )
    if len(on.rows) > 1 and (missing := set(size.rows) - set(on.rows)):
        raise UsageError(
            f"tuned_on {size.tuned_on!r} has no row {min(missing)!r}; must have all, or one for all"
        )
    for cell in recipe.cells(size.tuned_on, 1):
        if not getattr(cell.options, "held_out", 0):
            raise UsageError(
                f"tuned_on {size.tuned_on!r} is not allowed: it is tested on the test data; set "
                "held_out, the share of the training data that is tested on instead"
            )


def _any_choice(recipe: Recipe, scale: str) -> Tuned | None:
    """The first point of each method's sweep, with which the cells of a tuned scale are checked."""
    on = recipe.scales[scale].tuned_on
    if on is None:
        return None
    first = {name: dict(recipe.points(on, name)[0]) for name in recipe.methods}
    return dict.fromkeys(recipe.scales[on].rows, first)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _checked(cls: Any, content: Any, where: str) -> Any:
    """An instance of a dataclass from a mapping; keys and types are checked."""
    if not isinstance(content, dict):
        raise UsageError(f"{where} must be a mapping of keys, not {content!r}")
    known = {f.name: f for f in fields(cls)}
    hints = _hints(cls)
    for key in content:
        if key not in known:
            raise UsageError(f"{where}: unknown key {key!r}: {nearest(str(key), known)}")
    for name, f in known.items():
        needed = f.default is MISSING and f.default_factory is MISSING
        if needed and name not in content:
            raise UsageError(f"{where}: key {name!r} is missing")
    return cls(**{key: _value(hints[key], v, f"{where}: {key}") for key, v in content.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    """``value`` as the type ``hint``, or an error that says what is allowed."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _value(next(a for a in arguments if a is not type(None)), value, where)
    if origin is dict and isinstance(value, dict):
        return {str(k): _value(arguments[1], v, f"{where}: {k}") for k, v in value.items()}
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_value(arguments[0], v, where) for v in value)
    if isinstance(hint, type) and hasattr(hint, "__dataclass_fields__"):
        return _checked(hint, value, where)
    if hint is float and not isinstance(value, bool):
        # YAML 1.1 reads 1e-3, without a point, as a string.
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
        raise UsageError(f"{where} is {value!r} and must be a finite number")
    elif origin is None and type(value) is hint:
        return value
    wanted = getattr(hint, "__name__", str(hint))
    raise UsageError(f"{where} is {value!r} and must be of type {wanted}")
