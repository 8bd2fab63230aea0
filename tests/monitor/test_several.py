"""One monitor of several optimizers."""

import pytest
import torch
from torch import nn

from normwise import Monitor


def trained(watch, order=(0, 1), every=2, steps=6, skip=lambda t, i: False):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6, dtype=torch.float64), nn.Linear(6, 3, dtype=torch.float64)
    )
    pair = [
        torch.optim.AdamW(model[0].parameters(), lr=0.01, weight_decay=0.1),
        torch.optim.SGD(model[1].parameters(), lr=0.1),
    ]
    monitors = watch(model, pair, every)
    for t in range(steps):
        x = torch.randn(5, 4, dtype=torch.float64)
        model.zero_grad()
        model(x).square().mean().backward()
        for i in order:
            if not skip(t, i):
                pair[i].step()
    for monitor in monitors:
        monitor.close()
    return monitors, [p.detach() for p in model.parameters()]


def together(model, pair, every):
    return [Monitor(model, pair, every=every, fetch_every=2)]


def apart(model, pair, every):
    return [Monitor(model, optimizer, every=every) for optimizer in pair]


def test_one_monitor_of_two_optimizers_measures_what_two_monitors_do():
    (both,), weights = trained(together)
    (first, second), same = trained(apart)
    _, alone = trained(lambda *_: [])
    for a, b, c in zip(weights, same, alone, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert both.layers == ("0.weight", "1.weight")
    assert [m.step for m in both.history] == [1, 2, 4, 6]
    for m, a, b in zip(both.history, first.history, second.history, strict=True):
        assert m["angular_update"] == a["angular_update"] | b["angular_update"]
        assert m["norm"] == a["norm"] | b["norm"]
        assert m.lrs == (0.01, 0.1)


def test_what_steps_before_the_first_is_measured_one_step_later():
    (both,), _ = trained(together, order=(1, 0))
    (first, _), _ = trained(apart, order=(1, 0))
    assert [m.step for m in both.history] == [1, 2, 4]  # that of step 6 is never complete
    for m, a in zip(both.history, first.history, strict=False):
        assert m["norm"]["0.weight"] == a["norm"]["0.weight"]


def test_an_optimizer_that_steps_more_rarely_is_waited_for():
    (both,), _ = trained(together, every=1, skip=lambda t, i: i == 1 and t % 3 < 2)
    assert [m.step for m in both.history] == [1, 4]  # completed at the third and the sixth step
    for m in both.history:
        assert m.values[:3].isfinite().all()
    assert not both.raised


def test_no_optimizer_or_something_else_is_a_type_error():
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="must be a torch optimizer or a list"):
        Monitor(model, [])
    with pytest.raises(TypeError, match="must be a torch optimizer"):
        Monitor(model, [model])


def test_an_optimizer_that_is_there_twice_is_refused():
    with pytest.raises(ValueError, match="each may be there once"):
        trained(lambda model, pair, every: [Monitor(model, [pair[0], pair[0]])])
