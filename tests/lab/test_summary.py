"""From metrics made by hand to what is reported of them."""

from __future__ import annotations

import math
import random
from statistics import fmean

import pytest
from scipy import stats

from normwise.lab.summary import (
    Spread,
    Verdict,
    example_half_width,
    findings,
    headline,
    power,
    rows,
    seed_half_width,
    seeds_needed,
    summarize,
)

SGD = {"name": "sgd", "label": "SGD", "baseline": None}
SGDP = {"name": "sgdp", "label": "SGDP", "baseline": "sgd"}
PAIR = (SGD, SGDP)


def test_the_spread_is_the_sample_standard_deviation():
    assert Spread.of([1.0, 2.0, 6.0]) == Spread(3.0, math.sqrt(7), (1.0, 2.0, 6.0))
    assert Spread.of([4.0]).sd is None


@pytest.mark.parametrize("n", [2, 3, 10, 31])
def test_the_interval_over_seeds_is_students(n):
    values = [0.3 * k**1.5 for k in range(n)]
    low, high = stats.t.interval(0.95, n - 1, loc=fmean(values), scale=stats.sem(values))
    assert math.isclose(seed_half_width(values), (high - low) / 2, rel_tol=1e-3)


def test_one_seed_has_no_interval():
    assert seed_half_width([0.5]) is None


@pytest.mark.parametrize(
    ("effect", "seeds"),
    # Published for two-sided paired t tests at 5% and power 80% (Cohen, 1988, and G*Power).
    [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10)],
)
def test_the_seeds_that_see_an_effect_are_those_of_the_published_tables(effect, seeds):
    assert seeds_needed(effect, 1.0) == seeds_needed(-3 * effect, 3.0) == seeds
    assert power(effect, seeds - 1) < 0.8 <= power(effect, seeds)


def test_power_is_the_share_of_experiments_that_see_the_difference():
    draw = random.Random(0)
    seen = [
        abs(fmean(values)) > seed_half_width(values)
        for values in ([draw.gauss(1.2, 1.0) for _ in range(5)] for _ in range(1000))
    ]
    assert power(1.2, 5) == pytest.approx(fmean(seen), abs=4 * math.sqrt(0.25 / 1000))
    assert power(0.0, 5) == pytest.approx(0.05)


def test_no_number_of_seeds_sees_nothing_and_two_see_what_never_varies():
    assert seeds_needed(0.0, 1.0) is None
    assert seeds_needed(1e-6, 1.0) is None
    assert seeds_needed(1e-6, 0.0) == 2


@pytest.mark.parametrize(
    ("difference", "half_width", "claimed", "verdict"),
    [
        (0.1, 0.3, 0.5, Verdict.NO_DIFFERENCE),
        (-0.1, 0.3, 0.5, Verdict.NO_DIFFERENCE),
        (0.1, 0.3, -0.5, Verdict.NO_DIFFERENCE),
        (0.25, 0.3, 0.5, Verdict.CANNOT_TELL),
        (0.0, 0.6, 0.5, Verdict.CANNOT_TELL),
        (0.1, 0.3, None, Verdict.WITHIN_CHANCE),
        (0.1, 0.3, 0.0, Verdict.WITHIN_CHANCE),
        (0.4, 0.3, 0.5, Verdict.BETTER),
        (-0.4, 0.3, 0.5, Verdict.WORSE),
        (0.1, None, 0.5, Verdict.ONE_SEED),
    ],
)
def test_no_difference_is_said_only_where_the_claimed_one_is_out_of_reach(
    difference, half_width, claimed, verdict
):
    assert Verdict.of(difference, half_width, claimed=claimed) is verdict


def test_the_interval_over_examples_is_that_of_paired_differences():
    # Five examples, two seeds: wrong with the projection, wrong without.
    errors, baseline = [[0, 1], [0]], [[1, 2, 3], [2]]
    differences = [-1.0, 0.0, 1.0, 0.5, 0.0]
    expected = 1.96 * stats.sem(differences)
    assert math.isclose(example_half_width(errors, baseline, 5), expected, rel_tol=1e-12)


def test_the_same_errors_leave_nothing_to_chance():
    assert example_half_width([[3, 4], [3]], [[3, 4], [3]], 100) == 0


def test_a_row_is_the_end_of_the_finished_seeds(record):
    records = [
        record("sgd", 0, 1, test_accuracy=0.1),
        record("sgd", 0, 2, test_accuracy=0.8, train_loss=0.2, step_ms=4.0),
        record("sgd", 1, 1, test_accuracy=0.2),
        record("sgd", 1, 2, test_accuracy=0.9, train_loss=0.4, step_ms=8.0),
        record("sgd", 2, 1, test_accuracy=0.0),  # was interrupted
    ]
    (row,) = rows(records, [SGD], epochs=2)
    assert row.numbers["test_accuracy"].values == (0.8, 0.9)
    assert math.isclose(row.numbers["train_loss"].mean, 0.3)
    assert (row.finished, row.unfinished, row.failed) == ((0, 1), (2,), {})
    assert row.epoch == 2
    assert row.step_ms == 2.0  # the median of 2, 4, 2, 8, 2


def test_an_interrupted_first_seed_is_shown_as_far_as_it_came(record):
    records = [record("sgd", 0, e, test_accuracy=0.1 * e) for e in range(4)]
    (row,) = rows(records, [SGD], epochs=9)
    assert row.epoch == 3
    assert row.finished == ()
    assert row.unfinished == (0,)
    assert math.isclose(row.numbers["test_accuracy"].mean, 0.3)


def test_a_failed_seed_counts_in_no_mean(record, failure):
    records = [
        record("sgd", 0, 1, test_accuracy=0.8),
        record("sgd", 1, 0, test_accuracy=0.1),
        failure("sgd", 1),
    ]
    (row,) = rows(records, [SGD], epochs=1)
    assert row.numbers["test_accuracy"].values == (0.8,)
    assert row.failed == {1: "the training loss became nan"}


def test_nothing_but_failures_is_nothing_to_show(record, failure):
    records = [record("sgd", 0, 0), failure("sgd", 0)]
    (row,) = rows(records, [SGD], epochs=1)
    assert row.numbers == {}
    assert row.unfinished == ()
    assert headline([], [row]) == "No run came far enough to say anything"


def test_an_optimizer_that_was_not_reached_is_an_empty_row(record):
    row = rows([record("sgd")], PAIR, epochs=1)[1]
    assert (row.label, row.numbers, row.step_ms) == ("SGDP", {}, None)


def pair(record, with_projection, without, growth=(1.1, 2.0)):
    return [
        record(name, seed, 1, test_accuracy=accuracy, norm_growth=g)
        for name, accuracies, g in (
            ("sgdp", with_projection, growth[0]),
            ("sgd", without, growth[1]),
        )
        for seed, accuracy in enumerate(accuracies)
    ]


@pytest.mark.parametrize(
    ("with_projection", "without", "verdict", "words"),
    [
        ((0.95, 0.96, 0.95), (0.90, 0.91, 0.90), Verdict.BETTER, "SGDP ended more accurate"),
        ((0.90, 0.91, 0.90), (0.95, 0.96, 0.95), Verdict.WORSE, "SGDP ended less accurate"),
        ((0.90, 0.96, 0.93), (0.93, 0.90, 0.94), Verdict.WITHIN_CHANCE, "no more than chance"),
        ((0.90, 0.90, 0.90), (0.90, 0.90, 0.90), Verdict.WITHIN_CHANCE, "no more than chance"),
        ((0.95,), (0.90,), Verdict.ONE_SEED, "one seed is too few"),
    ],
)
def test_the_headline_says_what_the_data_allow(record, with_projection, without, verdict, words):
    records = pair(record, with_projection, without)
    (found,) = findings(records, PAIR, 1, 100)
    assert found.verdict is verdict
    text = headline([found], rows(records, PAIR, 1))
    assert words in text
    assert ("more accurate" in text) == (verdict is Verdict.BETTER)
    assert "better" not in found.sentences() or verdict is Verdict.BETTER


@pytest.mark.parametrize(
    ("growth", "kept", "words"),
    [
        ((1.1, 2.0), True, "SGDP kept the norms smaller than SGD"),
        ((2.0, 1.1), False, "SGDP left larger norms than SGD"),
        ((1.50, 1.51), None, "Norms ended about equal under SGDP and SGD"),
        ((0.4, 0.8), True, "SGDP kept the norms smaller than SGD"),
    ],
)
def test_the_headline_says_which_norms_are_smaller(record, growth, kept, words):
    records = pair(record, (0.9, 0.9), (0.9, 0.9), growth)
    (found,) = findings(records, PAIR, 1, 100)
    assert found.norms_kept_smaller is kept
    assert headline([found], []).startswith(words)


def test_differences_are_paired_by_seed_over_common_seeds_only(record):
    # The seeds differ by much and the optimizers, seed by seed, by exactly one point.
    records = pair(record, (0.51, 0.71, 0.91), (0.50, 0.70, 0.90))
    records += [record("sgdp", 7, 1, test_accuracy=0.0)]
    (found,) = findings(records, PAIR, 1, 100)
    assert found.seeds == 3
    assert math.isclose(found.difference, 0.01)
    assert found.verdict is Verdict.BETTER


def test_unfinished_runs_and_lone_optimizers_make_no_finding(record):
    half_done = pair(record, (0.9, 0.9), (0.9, 0.9))
    assert findings(half_done, PAIR, 2, 100) == []
    assert findings(half_done, (SGDP,), 1, 100) == []
    lone = headline([], rows(half_done, (SGDP,), 1))
    assert lone == "The norm of the scale-invariant weights changed by ×1.10 under SGDP"


def test_the_numbers_in_the_words_are_those_of_the_data(record):
    records = pair(record, (0.95, 0.97), (0.90, 0.91), growth=(1.25, 2.0))
    text = findings(records, PAIR, 1, 100)[0].sentences()
    assert "multiplied by 2.00 under SGD and by 1.25 under SGDP" in text
    assert "effective learning rate by 0.25 under SGD and by 0.64 under SGDP" in text
    assert "SGDP 96.00%, SGD 90.50%, a difference of +5.50 percentage points" in text


def test_the_summary_is_plain_data(record, failure):
    import json

    records = [*pair(record, (0.9, 0.8), (0.7, 0.6)), failure("sgd", 2)]
    summary = json.loads(json.dumps(summarize(records, PAIR, 1, 100), allow_nan=False))
    sgd = summary["optimizers"][0]
    assert sgd["failed"] == [{"seed": 2, "error": "the training loss became nan"}]
    assert sgd["numbers"]["test_accuracy"]["values"] == [0.7, 0.6]
    assert summary["findings"][0]["verdict"] in {v.value for v in Verdict}


def test_a_difference_of_a_few_images_is_not_called_better_though_every_seed_agrees(record):
    # Without the projection the same three of 899 images are wrong under every seed.
    n = 899
    records = [
        record(name, seed, 1, test_accuracy=1 - len(errors) / n, test_errors=errors)
        for name, errors in (("sgd", [1, 2, 3]), ("sgdp", []))
        for seed in range(3)
    ]
    (found,) = findings(records, PAIR, 1, n)
    assert math.isclose(found.difference, 3 / n)
    assert found.verdict is Verdict.WITHIN_CHANCE
    # With ten times as many such images it is.
    many = [
        {**r, "test_errors": list(range(30)) if r["optimizer"] == "sgd" else []}
        | ({"test_accuracy": 1 - 30 / n} if r["optimizer"] == "sgd" else {})
        for r in records
    ]
    assert findings(many, PAIR, 1, n)[0].verdict is Verdict.BETTER
