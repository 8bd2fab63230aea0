"""Weight normalization inside of an optimizer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normwise as nw
from normwise.reparam import WeightNormalized

OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
    "for-loop": lambda params: torch.optim.RAdam(params, lr=0.01, foreach=False),
}


def network():
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).double()


def batch():
    return torch.randn(6, 2, 6, 6, dtype=torch.float64), torch.randint(3, (6,))


def train(model, optimizer, batches):
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_its_trajectory_is_that_of_the_parametrization(name):
    """With directions that start as the weights themselves; 1e-12 after ten steps."""
    plain = network()
    converted = copy.deepcopy(plain)
    nw.weight_normalize(converted, only=["*"])
    batches = [batch() for _ in range(10)]
    train(converted, OPTIMIZERS[name](converted.parameters()), batches)
    train(plain, WeightNormalized(OPTIMIZERS[name](plain.parameters())), batches)
    for i in (0, 3):
        torch.testing.assert_close(plain[i].weight, converted[i].weight, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(plain[i].bias, converted[i].bias, rtol=1e-12, atol=1e-14)
    assert type(plain[0]) is nn.Conv2d
    assert "0.weight" in plain.state_dict()


def test_the_gradients_are_equations_2_and_3():
    """∇g = ⟨∇W, V⟩/‖V‖ and ∇V = (g/‖V‖)(∇W − ∇g·V/‖V‖), with ⟨∇V, V⟩ = 0."""
    model = nn.Linear(5, 3).double()
    optimizer = WeightNormalized(torch.optim.SGD(model.parameters(), lr=0.2))
    x = torch.randn(4, 5, dtype=torch.float64)
    train(model, optimizer, [(x, torch.randint(3, (4,)))])
    gain, v = (t.clone() for t in optimizer.state_dict()["weight_norm"][0])
    optimizer.zero_grad()
    F.cross_entropy(model(x), torch.randint(3, (4,))).backward()
    grad = model.weight.grad.clone()
    optimizer.step()
    lengths = v.norm(dim=1, keepdim=True)
    grad_g = (grad * v).sum(1, keepdim=True) / lengths
    grad_v = gain / lengths * (grad - grad_g * v / lengths)
    stepped_gain, stepped_v = optimizer.state_dict()["weight_norm"][0]
    torch.testing.assert_close(stepped_v, v - 0.2 * grad_v)
    assert float((grad_v * v).sum(1).abs().max()) < 1e-15
    torch.testing.assert_close(stepped_gain, gain - 0.2 * grad_g)
    torch.testing.assert_close(
        model.weight, stepped_gain * stepped_v / stepped_v.norm(dim=1, keepdim=True)
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_that_is_saved_and_loaded_goes_on_to_the_same_bits(name, tmp_path):
    batches = [batch() for _ in range(6)]
    model = network()
    optimizer = WeightNormalized(OPTIMIZERS[name](model.parameters()))
    train(model, optimizer, batches[:3])
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "run.pt")
    train(model, optimizer, batches[3:])
    other = network()
    again = WeightNormalized(OPTIMIZERS[name](other.parameters()))
    weights, state = torch.load(tmp_path / "run.pt", weights_only=True)
    other.load_state_dict(weights)
    again.load_state_dict(state)
    train(other, again, batches[3:])
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_schedulers_closures_and_named_parameters_work():
    model = network()
    optimizer = WeightNormalized(torch.optim.SGD(model.named_parameters(), lr=0.1))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    x, y = batch()

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    losses = []
    for _ in range(3):
        losses.append(float(optimizer.step(closure).detach()))
        schedule.step()
    assert losses[2] < losses[0]
    assert optimizer.param_groups[0]["lr"] == 0.0125
    assert optimizer.param_groups[0]["params"] == list(model.parameters())
    assert optimizer.param_groups[0]["param_names"][0] == "0.weight"


def test_a_weight_that_was_written_starts_anew_and_one_without_a_gradient_stays():
    model = network()
    optimizer = WeightNormalized(torch.optim.SGD(model.parameters(), lr=0.1))
    train(model, optimizer, [batch()])
    with torch.no_grad():
        model[0].weight.mul_(3)
    model[3].weight.requires_grad_(False)
    before = [model[i].weight.detach().clone() for i in (0, 3)]
    optimizer.zero_grad()
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    g = model[0].weight.grad.clone()
    optimizer.step()
    assert torch.equal(model[3].weight, before[1])
    # From V = W, g = ‖W‖, one step of SGD by the equations of the paper.
    v = before[0].flatten(1)
    length = v.norm(dim=1, keepdim=True)
    grad_g = (g.flatten(1) * v).sum(1, keepdim=True) / length
    new_v = v - 0.1 * (g.flatten(1) - grad_g * v / length)
    expected = (length - 0.1 * grad_g) * new_v / new_v.norm(dim=1, keepdim=True)
    torch.testing.assert_close(model[0].weight.flatten(1), expected)


def test_what_it_cannot_do_is_told():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, [batch()])
    with pytest.raises(ValueError, match="has stepped already"):
        WeightNormalized(optimizer)
    with pytest.raises(ValueError, match="no weight of two dimensions or more"):
        WeightNormalized(torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1))
    fresh = WeightNormalized(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    with pytest.raises(ValueError, match="has no gains and directions of these weights"):
        fresh.load_state_dict(optimizer.state_dict())


def test_it_does_not_claim_to_know_what_a_step_does_to_a_weight_that_it_normalizes():
    model = nn.Linear(4, 3)
    optimizer = WeightNormalized(torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01))
    group = optimizer.param_groups[0]
    assert nw.describe(optimizer)[0].update is nw.updates.Update.UNKNOWN
    assert nw.updates.rule_of(optimizer, group, model.weight).coupling.value == "not known"
    assert nw.updates.rule_of(optimizer, group, model.bias).weight_decay == 0.01
