"""Balance while training: the state moves with the weights, and the function stays."""

import copy

import pytest
import torch
from torch.nn import functional as F

import normwise as nw


def trained(network, make, steps=3):
    model, x, report = network("mlp")
    optimizer = make(model.parameters())
    y = torch.arange(len(x)) % 3
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, x, y, report, optimizer


def gradients(model, x, y):
    return torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))


def test_the_state_is_what_all_past_gradients_at_the_balanced_weights_had_made(network):
    """With a learning rate of 0 the past is the same in both; only the representative differs."""
    for make in (
        lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.0, amsgrad=True),
        lambda p: torch.optim.Adagrad(p, lr=0.0),
        lambda p: torch.optim.RMSprop(p, lr=0.0, centered=True, momentum=0.9, eps=1e-30),
        lambda p: torch.optim.Adamax(p, lr=0.0, eps=1e-30),
    ):
        model, x, y, report, optimizer = trained(network, make)
        nw.Balance(model, report, sweeps=5).apply_(optimizer)
        other = make(model.parameters())
        for _ in range(3):
            for p, g in zip(model.parameters(), gradients(model, x, y), strict=True):
                p.grad = g
            other.step()
        for p in model.parameters():
            for key, value in other.state[p].items():
                torch.testing.assert_close(
                    optimizer.state[p][key],
                    value,
                    rtol=1e-9,
                    atol=1e-14,
                    msg=lambda text, key=key: f"{key}: {text}",
                )


def test_gradient_descent_with_rates_that_follow_computes_what_it_had_computed(network):
    """A weight times λ needs a rate times λ²; then momentum SGD takes the same path."""
    lr, mu = 0.1, 0.9
    model, x, y, report, optimizer = trained(
        network, lambda p: torch.optim.SGD(p, lr=lr, momentum=mu)
    )
    plain, plain_state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    run = torch.optim.SGD(plain.parameters(), lr=lr, momentum=mu)
    run.load_state_dict(plain_state)
    factors = nw.Balance(model, report, sweeps=20).apply_(optimizer)
    assert max(float((f - 1).abs().max()) for f in factors.values()) > 0.05
    for _ in range(10):
        run.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        run.step()
        grads = gradients(model, x, y)
        with torch.no_grad():
            for (name, p), g in zip(model.named_parameters(), grads, strict=True):
                buffer = optimizer.state[p]["momentum_buffer"].mul_(mu).add_(g)
                p.sub_(lr * factors.get(name, 1.0) ** 2 * buffer)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-11, atol=1e-12)


def test_with_one_rate_the_paths_part_and_that_is_what_balancing_is_for(network):
    model, x, y, report, optimizer = trained(
        network, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)
    )
    plain = copy.deepcopy(model)
    run = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    run.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    nw.Balance(model, report).attach(optimizer)
    for _ in range(3):
        for m, o in ((model, optimizer), (plain, run)):
            o.zero_grad()
            F.cross_entropy(m(x), y).backward()
            o.step()
    assert not torch.allclose(model(x), plain(x), rtol=1e-6)


def test_attached_it_balances_every_so_many_steps_and_never_changes_the_function(network):
    model, x, report = network("mlp")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    shadow = copy.deepcopy(model)

    def unbalance():
        return (model[0].weight.norm(dim=1).square() + model[0].bias.square()).sub(
            model[2].weight.norm(dim=0).square()
        )

    handle = nw.Balance(model, report, sweeps=60).attach(optimizer, every=2)
    for step in range(1, 5):
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(len(x)) % 3).backward()
        optimizer.step()
        assert (unbalance().abs().max().item() < 1e-9) == (step % 2 == 0)
    handle.remove()
    shadow.load_state_dict(model.state_dict())
    report.rescale_(model)
    nw.Balance(model, report).apply_(optimizer)
    torch.testing.assert_close(model(x), shadow(x), rtol=1e-11, atol=1e-12)


def test_an_unknown_state_tensor_is_named_and_nothing_has_changed(network):
    model, _, _, report, optimizer = trained(network, lambda p: torch.optim.SGD(p, lr=0.1))
    for p in model.parameters():
        optimizer.state[p]["slow"] = torch.ones_like(p)
    saved = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"state 'slow' of '0\.weight'.*powers"):
        nw.Balance(model, report).apply_(optimizer)
    assert all(torch.equal(v, saved[k]) for k, v in model.state_dict().items())
    factors = nw.Balance(model, report, powers={"slow": 1}).apply_(optimizer)
    expected = factors["0.weight"].expand_as(model[0].weight)
    torch.testing.assert_close(optimizer.state[model[0].weight]["slow"], expected)


def test_adafactors_rows_and_columns_are_no_tensors_of_the_weights_shape(network):
    model, _, _, report, optimizer = trained(network, lambda p: torch.optim.Adafactor(p))
    with pytest.raises(ValueError, match="row_var"):
        nw.Balance(model, report).apply_(optimizer)


def test_bad_arguments_are_refused(network):
    model, _, report = network("mlp")
    with pytest.raises(ValueError, match="Invalid sweeps"):
        nw.Balance(model, report, sweeps=0)
    with pytest.raises(ValueError, match="Invalid every"):
        nw.Balance(model, report).attach(torch.optim.SGD(model.parameters(), lr=0.1), every=0)


def test_an_optimizer_of_a_part_of_the_weights_is_refused_by_name(network):
    """The state of the others, in another optimizer, could not move along."""
    model, _, report = network("mlp")
    with_the_first = torch.optim.SGD(list(model.parameters())[:2], lr=0.1)
    with pytest.raises(ValueError, match="SGD does not step it"):
        nw.Balance(model, report).attach(with_the_first)
    for p in list(model.parameters())[2:]:
        p.requires_grad_(False)
    nw.Balance(model, report).attach(with_the_first)
