"""The probe of loss stabilization."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normwise.perturb import loss_stabilization


def network():
    return nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3)
    )


def snapshot(model, optimizer):
    state = [
        *model.state_dict().values(),
        *(p.grad for p in model.parameters()),
        *(v for s in optimizer.state.values() for v in s.values() if v is not None),
        torch.get_rng_state(),
    ]
    return (
        [t.detach().clone() for t in state],
        random.getstate(),
        [m.training for m in model.modules()],
    )


def test_the_run_is_untouched_bit_for_bit_and_goes_on_as_if_nothing_had_been():
    batches = [(torch.randn(16, 4), torch.randint(3, (16,))) for _ in range(6)]
    ends = []
    for probing in (False, True):
        torch.manual_seed(0)
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)

        def loss(m, batch):
            return F.cross_entropy(m(batch[0]), batch[1])

        def evaluate(m):
            m.eval()
            return loss(m, batches[0])

        for batch in batches:
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
            if probing:
                before = snapshot(model, optimizer)
                found = loss_stabilization(model, loss, batches, evaluate)
                after = snapshot(model, optimizer)
                assert all(map(torch.equal, before[0], after[0]))
                assert before[1:] == after[1:]
                assert all(p.grad is None for p in found.model.parameters())
        ends.append(snapshot(model, optimizer))
    assert all(map(torch.equal, ends[0][0], ends[1][0]))


def test_on_a_noisy_quadratic_the_copy_settles_below_the_running_loss():
    """L = ½‖w‖² with gradient noise: at a large rate the run stays up, the copy goes to 0."""
    torch.manual_seed(0)
    model = nn.Linear(10, 1, bias=False).double()
    noise = torch.Generator().manual_seed(1)

    def loss(m, batch):
        return m.weight.square().sum() / 2 + (batch * m.weight).sum()

    def draws(n):
        return (torch.randn(1, 10, generator=noise, dtype=torch.float64) for _ in range(n))

    def evaluate(m):
        return float(m.weight.detach().square().sum() / 2)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.9)
    running, settled = [], []
    for _ in range(3):
        for batch in draws(20):
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
        found = loss_stabilization(model, loss, draws(300), evaluate, lr=0.02)
        running.append(found.running)
        settled.append(found.settled)
        assert found.gap == found.running - found.settled
    # SGD settles at ηnσ²/(2(2 − η)) with n = 10, σ = 1: 4.1 at η = 0.9 and 0.05 at 0.02.
    assert sum(running) / 3 == pytest.approx(4.1, rel=0.5)
    assert max(settled) < 0.2 < min(running)


def test_without_batches_it_is_an_error():
    with pytest.raises(ValueError, match="got no batches"):
        loss_stabilization(network(), lambda m, b: m(b).sum(), [], lambda m: 0.0)
