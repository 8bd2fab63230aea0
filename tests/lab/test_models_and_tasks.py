"""The lab's networks and data."""

from __future__ import annotations

import torch
from normwise.lab.models import ConvNet

from normwise.lab.tasks import TASKS


def test_the_weights_that_the_network_calls_invariant_are():
    generator = torch.Generator().manual_seed(0)
    model = ConvNet(2, 5).double()
    for norm in model.norms:
        norm.eps = 1e-300
    x = torch.randn(8, 2, 8, 8, dtype=torch.float64, generator=generator)
    before = model(x)
    with torch.no_grad():
        for w in model.invariant_weights():
            slices = w.view.slices(w.weight)
            factors = torch.rand(len(slices), dtype=torch.float64, generator=generator) * 10 + 0.1
            slices *= factors.view(-1, *(1 for _ in slices.shape[1:]))
    assert torch.allclose(model(x), before, rtol=0, atol=1e-10)


def test_every_weight_that_feeds_a_batch_norm_is_named():
    model = ConvNet(1, 10)
    named = dict(model.named_parameters())
    invariant = {w.name: w.weight for w in model.invariant_weights()}
    assert invariant.keys() == {name for name, p in named.items() if p.ndim == 4}
    assert all(named[name] is weight for name, weight in invariant.items())


def test_digits_are_split_without_overlap_and_the_same_every_time():
    task = TASKS["digits"]
    first, again = task.load(), task.load()
    assert torch.equal(first.train_inputs, again.train_inputs)
    assert torch.equal(first.test_targets, again.test_targets)
    assert len(first.train_targets) + len(first.test_targets) == 1797
    assert abs(float(first.train_inputs.mean())) < 1e-5
    assert abs(float(first.train_inputs.std()) - 1) < 1e-3
    counts = torch.stack([first.train_targets.bincount(), first.test_targets.bincount()])
    assert int((counts[0] - counts[1]).abs().max()) <= 1


def test_a_models_logits_have_one_column_a_class():
    task = TASKS["digits"]
    data = task.load()
    assert task.model(data)(data.test_inputs[:3]).shape == (3, data.classes)
