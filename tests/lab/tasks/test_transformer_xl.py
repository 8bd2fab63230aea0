"""Transformer-XL: its equations, its memory, and a text that is read without gaps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from normwise.lab.data.texts import EncodedText, encode
from normwise.lab.errors import UsageError
from normwise.lab.networks.transformer_xl import TransformerXL, relative_positions, shifted
from normwise.lab.recipes import find
from normwise.lab.running.cell import run_cell
from normwise.lab.tasks import language
from normwise.lab.tasks.language import LanguageOptions, Recurrent

WORDS, WIDTH, HEADS = 13, 8, 2
CPU = torch.device("cpu")
CELL = find("adamp-language").cells("small", 1, ["adamp"], ["transformer-xl"])[0]


def network(layers: int = 3, **given: Any) -> TransformerXL:
    torch.manual_seed(0)
    sizes = {"width": WIDTH, "heads": HEADS, "layers": layers, "hidden": 12, **given}
    model = TransformerXL(WORDS, **sizes).double().eval()
    for p in (model.u, model.v):
        torch.nn.init.normal_(p)
    return model


def text(length: int, rows: int = 2) -> Tensor:
    return torch.randint(WORDS, (rows, length + 1), generator=torch.Generator().manual_seed(1))


def read(model: TransformerXL, x: Tensor, segment: int, remember: int) -> Tensor:
    """−log p of each token but the first, segment by segment."""
    memory, parts = model.no_memory(len(x)), []
    for begin in range(0, x.shape[1] - 1, segment):
        part = x[:, begin : begin + segment + 1]
        losses, memory = model(part[:, :-1], part[:, 1:], memory, remember)
        parts.append(losses)
    return torch.cat(parts, dim=1)


def test_scores_are_the_four_terms_of_section_3_3() -> None:
    """Each pair of places one by one, of one layer that remembers two places."""
    (layer,) = network(layers=1).layers
    draw = torch.Generator().manual_seed(2)
    x, memory = (torch.randn(n, WIDTH, generator=draw, dtype=torch.float64) for n in (3, 2))
    u, v = torch.randn(2, HEADS, 1, WIDTH // HEADS, generator=draw, dtype=torch.float64)
    seen = torch.cat([memory, x])
    r = relative_positions(len(seen), WIDTH, x)
    size = WIDTH // HEADS

    def head(module: torch.nn.Module, state: Tensor, h: int) -> Tensor:
        return module(state)[h * size : (h + 1) * size]

    found = torch.zeros(3, WIDTH, dtype=torch.float64)
    for h in range(HEADS):
        for i in range(3):
            scores = []
            for j in range(2 + i + 1):
                distance = 2 + i - j
                angles = [distance / 10_000 ** (k / WIDTH) for k in range(0, WIDTH, 2)]
                sinusoids = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
                r_ij = torch.tensor(sinusoids, dtype=torch.float64)
                query = head(layer.query, x[i], h)
                key, place = head(layer.key, seen[j], h), head(layer.distance, r_ij, h)
                a, b = query @ key, query @ place
                c, d = u[h, 0] @ key, v[h, 0] @ place
                scores.append((a + b + c + d) / math.sqrt(size))
            weights = torch.stack(scores).softmax(0)
            values = torch.stack([head(layer.value, s, h) for s in seen[: len(weights)]])
            found[i, h * size : (h + 1) * size] = weights @ values
    state = layer.first_norm(x + layer.outward(found))
    expected = layer.second_norm(state + layer.narrow(F.relu(layer.wide(state))))
    out = layer(x[None], memory[None], r, u, v)[0]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_the_shift_puts_the_score_of_each_distance_at_its_key() -> None:
    queries, keys = 3, 5
    scores = (keys - 1 - torch.arange(float(keys))).expand(queries, keys)  # each its own distance
    moved = shifted(scores)
    for i in range(queries):
        for j in range(keys - queries + i + 1):
            assert moved[i, j] == keys - queries + i - j


@pytest.mark.parametrize(("segment", "remember"), [(5, 15), (5, 40), (4, 16), (20, 0), (1, 19)])
def test_segments_with_memory_are_attention_over_the_whole_text(
    segment: int, remember: int
) -> None:
    model, x = network(), text(20)
    whole = read(model, x, 20, 0)
    torch.testing.assert_close(read(model, x, segment, remember), whole, rtol=0, atol=1e-12)


def test_what_is_forgotten_makes_a_difference() -> None:
    model, x = network(), text(20)
    whole, short = read(model, x, 20, 0), read(model, x, 5, 5)
    torch.testing.assert_close(short[:, :5], whole[:, :5], rtol=0, atol=1e-12)
    assert (short[:, 15:] - whole[:, 15:]).abs().max() > 1e-6


def test_a_prediction_does_not_see_what_follows() -> None:
    model, x = network(), text(9)
    changed = x.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % WORDS
    a, b = read(model, x, 3, 3), read(model, changed, 3, 3)
    assert torch.equal(a[:, :5], b[:, :5])
    assert not torch.allclose(a[:, 5:], b[:, 5:])


def test_no_gradient_flows_into_the_memory() -> None:
    """The gradient is that of the segment's own loss with the memory held as a constant."""
    model, x = network(), text(8)
    _, memory = model(x[:, :4], x[:, 1:5], model.no_memory(2), 4)
    assert not memory.requires_grad
    leaf = memory.clone().requires_grad_()
    losses, after = model(x[:, 4:8], x[:, 5:], leaf, 4)
    losses.sum().backward()
    assert leaf.grad is None
    assert not after.requires_grad
    # Along a random direction of all weights the loss changes as the gradient says.
    draw = torch.Generator().manual_seed(3)
    slope, moves = 0.0, {}
    for p in model.parameters():
        moves[p] = torch.randn(p.shape, generator=draw, dtype=p.dtype)
        slope += float((p.grad * moves[p]).sum())

    def at(step: float) -> float:
        with torch.no_grad():
            for p, move in moves.items():
                p += step * move
            loss = float(model(x[:, 4:8], x[:, 5:], memory, 4)[0].sum())
            for p, move in moves.items():
                p -= step * move
        return loss

    assert (at(1e-6) - at(-1e-6)) / 2e-6 == pytest.approx(slope, rel=1e-6)


def test_the_adaptive_softmax_is_a_distribution_over_all_words() -> None:
    model, x = network(cutoffs=(4, 8), width=16), text(3, rows=1)
    total = torch.zeros(3, dtype=torch.float64)
    for word in range(WORDS):
        losses, _ = model(x[:, :-1], torch.full_like(x[:, 1:], word), model.no_memory(1), 0)
        total += (-losses[0]).exp()
    torch.testing.assert_close(total, torch.ones(3, dtype=torch.float64))


# The task


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> EncodedText:
    said = list("the cat sat on the mat and the rat ran at the cat again and again ")
    made = encode("t", [said * 6, said * 2])
    monkeypatch.setattr(language, "_load", lambda *_: made)
    return made


OPTIONS = LanguageOptions("t", context=6, layers=2, width=8, heads=2, network="transformer-xl")


def problem(**given: Any) -> Recurrent:
    torch.manual_seed(0)
    made = language.Language(replace(OPTIONS, **given), None, CPU)
    assert isinstance(made, Recurrent)
    return made


def test_each_row_of_a_batch_reads_on_where_it_stopped(letters: EncodedText) -> None:
    p = problem()
    batches = p.batches(4, torch.Generator())
    windows = torch.stack([p.batch(chosen, torch.Generator()) for chosen in batches])
    assert torch.equal(windows[1:, :, 0], windows[:-1, :, -1])
    steps = p.examples // 4
    for row in range(4):
        read_on = torch.cat([windows[:, row, :-1].flatten(), windows[-1, row, -1:]])
        begin = row * steps * 6
        assert torch.equal(read_on, torch.from_numpy(letters.train[begin : begin + len(read_on)]))


def test_perplexity_is_that_of_the_whole_text_read_at_once(letters: EncodedText) -> None:
    """Every token but the first is predicted once, and the last segment may be shorter."""
    p = problem(test_memory=10_000)
    assert (len(letters.test) - 1) % 6
    x = torch.from_numpy(letters.test)[None]
    p.model.eval()
    with torch.no_grad():
        losses, _ = p.model(x[:, :-1], x[:, 1:], p.model.no_memory(1), 0)
    assert losses.numel() == len(letters.test) - 1
    expected = math.exp(float(losses.double().mean()))
    assert p.evaluate().metrics["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert p.evaluate() == p.evaluate()
    assert p.model.memory.numel() == 0


def test_only_what_was_prepared_is_remembered_and_an_epoch_ends_in_forgetting(
    letters: EncodedText,
) -> None:
    p = problem(memory=9)
    first, second = (p.batch(c, torch.Generator()) for c in p.batches(4, torch.Generator())[:2])
    p.loss(first)
    assert p.model.memory.numel() == 0
    p.loss(p.prepared(first))
    assert p.model.memory.shape == (2, 4, 6, 8)
    remembered = p.model.memory
    batch = p.prepared(second)
    once, again = p.loss(batch), p.loss(batch)
    assert torch.equal(once, again), "a second loss of a step sees what the first saw"
    assert p.model.memory.shape == (2, 4, 9, 8)
    assert torch.equal(p.model.memory[0, :, :3], remembered[0, :, 3:])
    p.end_epoch()
    assert p.model.memory.numel() == 0


def test_a_cell_that_is_cut_within_an_epoch_remembers_when_it_goes_on(
    letters: EncodedText, assert_resumes: Callable[..., None]
) -> None:
    cell = replace(
        CELL,
        training=replace(CELL.training, epochs=2, batch_size=8),
        options=replace(OPTIONS, dropout=0.1),
    )
    steps = problem().examples // 8
    # One loss is that of the analysis, then two epochs.
    assert_resumes(cell, None, Recurrent, 1 + steps + steps // 2, lambda: torch.rand(3))


def test_it_cannot_be_shared_between_processes(letters: EncodedText, tmp_path: Any) -> None:
    from normwise.lab.parallel import Processes
    from normwise.lab.running.trainer import Trainer

    cell = replace(CELL, options=OPTIONS)
    with pytest.raises(UsageError, match="it remembers batches"):
        Trainer(cell, tmp_path, None, CPU, Processes("ddp", 0, 2))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"network": "transformer-xxl"}, "did you mean 'transformer-xl'"),
        ({"network": "transformer", "memory": 3}, "memory is set, but network is transformer"),
        ({"width": 9, "heads": 3}, "width 9 is not allowed: must be even"),
        ({"cutoffs": (8, 4)}, "must be numbers of words, rising"),
        ({"memory": -1}, "memory -1 is not allowed"),
        ({"cutoffs": (1, 2)}, "at least 16 for 2 cutoffs"),
    ],
)
def test_a_mistake_in_the_options_is_shown(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        replace(OPTIONS, **given)


def test_cutoffs_beyond_the_vocabulary_are_refused(letters: EncodedText) -> None:
    with pytest.raises(UsageError, match=r"cutoffs \[500\] are not allowed: must be below"):
        problem(cutoffs=(500,))


def test_it_learns_more_than_how_often_each_letter_comes(
    letters: EncodedText, tmp_path: Any
) -> None:
    row = "transformer-xl-weight-norm"
    (cell,) = find("adamp-language").cells("small", 1, ["adamp"], [row])
    training = replace(cell.training, epochs=3, batch_size=4, lr=2e-2, evaluate_every=3)
    result = run_cell(replace(cell, training=training, options=OPTIONS), tmp_path, tmp_path)
    assert result["metrics"]["perplexity"] < result["baseline"]["perplexity"] / 2
