"""tangential(): the papers' remedy around any torch optimizer."""

import copy
import io

import pytest
import torch
from torch import nn

import normwise
from normwise import View
from normwise.geometry import norms

SHAPES = [(7,), (6, 4), (4, 3, 3, 3), (2, 3, 2, 2, 2)]


def parameters(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in SHAPES]


def run(optimizer, params, steps=20, start=0):
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        optimizer.step()
    return [p.detach().clone() for p in params]


def assert_same(ours, theirs, atol=1e-12):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


VIEWS = [View.channel(), View.channel(1), View.blocks(2), View.layer()]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_around_sgd_it_is_sgdp_with_the_view(weight_decay, nesterov, foreach, view):
    """With decay too, on the weights that have a view: SGD's L2 on the others stays L2."""
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": nesterov, "weight_decay": weight_decay}
    ours, theirs = parameters()[1:], parameters()[1:]
    a = normwise.tangential(torch.optim.SGD(ours, foreach=foreach, **options), view)
    b = normwise.SGDP(theirs, view=view, wd_ratio=1.0, **options)
    assert_same(run(a, ours), run(b, theirs))


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("impl", [{"foreach": False}, {"foreach": True}, {"fused": True}])
def test_around_adamw_it_is_adamp_with_a_decay_ratio_of_one(impl, view):
    options = {"lr": 0.1, "weight_decay": 0.1}
    ours, theirs = parameters(), parameters()
    a = normwise.tangential(torch.optim.AdamW(ours, **impl, **options), view)
    b = normwise.AdamP(theirs, view=view, wd_ratio=1.0, **options)
    assert_same(run(a, ours), run(b, theirs))


class Lion(torch.optim.Optimizer):
    """A third-party optimizer of the usual kind, which keeps a counter in its groups."""

    def __init__(self, params, lr=1e-2, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["calls"] = group.get("calls", 0) + 1
            for p in group["params"]:
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * torch.sign(0.9 * m + 0.1 * p.grad))
                m.lerp_(p.grad, 0.01)


OTHERS = {
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "lion": Lion,
}
if hasattr(torch.optim, "Muon"):
    OTHERS["muon"] = lambda p: torch.optim.Muon(p, lr=0.01, weight_decay=0.0)


@pytest.mark.parametrize("name", OTHERS)
def test_every_step_is_orthogonal_to_the_weight(name):
    ours = [torch.randn(6, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    optimizer = normwise.tangential(OTHERS[name](ours), View.blocks(2))
    for step in range(5):
        before = [w.detach().clone() for w in ours]
        run(optimizer, ours, steps=1, start=step)
        for w, old in zip(ours, before, strict=True):
            view = View.blocks(2)
            grown = norms(w.detach(), view).square() - norms(old, view).square()
            moved = norms(w.detach() - old, view).square()
            assert (moved > 0).all()
            torch.testing.assert_close(grown, moved, rtol=1e-10, atol=1e-13)


def test_decay_is_set_apart_and_only_from_the_weights_that_have_a_view():
    """One step with gradients of zero: all that is left is the decay of each."""
    w, other, bias = (torch.ones(s, requires_grad=True) for s in ((2, 3), (2, 3), (3,)))
    lion = Lion([w, other, bias], lr=0.1, weight_decay=0.5)
    optimizer = normwise.tangential(lion, {w: View.channel()}, wd_ratio=0.2)
    for p in (w, other, bias):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(w.detach(), torch.full((2, 3), 1 - 0.1 * 0.5 * 0.2))
    torch.testing.assert_close(other.detach(), torch.full((2, 3), 1 - 0.1 * 0.5))
    torch.testing.assert_close(bias.detach(), torch.full((3,), 1 - 0.1 * 0.5))
    (group,) = lion.param_groups
    assert group["weight_decay"] == 0.5
    assert len(group["params"]) == 3
    assert group["calls"] == 1


def test_groups_are_whole_again_when_a_step_raises():
    w = torch.ones(2, 3, requires_grad=True)
    lion = Lion([w, torch.ones(3, requires_grad=True)], weight_decay=0.5)
    w.grad = torch.ones(2, 3)
    with pytest.raises(TypeError):  # the other parameter has no gradient
        normwise.tangential(lion, "layer").step()
    assert len(lion.param_groups) == 1
    assert lion.param_groups[0]["weight_decay"] == 0.5


def test_views_by_parameter_by_name_and_from_a_report():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))

    class Report:
        def __init__(self, net):
            self.net = net

        def parameter_views(self):
            return {self.net[1].weight: View.layer(), self.net[1].bias: View.layer()}

    results = []
    for kind in ("report", "names", "parameters"):
        net = copy.deepcopy(model)
        views = {
            "report": Report(net),
            "names": {"1.weight": "layer"},
            "parameters": {net[1].weight: View.layer()},
        }[kind]
        optimizer = normwise.tangential(torch.optim.SGD(net.named_parameters(), lr=0.1), views)
        results.append(run(optimizer, list(net.parameters()), steps=3))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_the_state_dict_is_the_wrapped_optimizers_and_continues_it():
    straight = parameters()
    optimizer = normwise.tangential(torch.optim.AdamW(straight, lr=0.1), "channel")
    run(optimizer, straight, steps=5)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    resumed = [p.detach().clone().requires_grad_() for p in straight]
    inner = torch.optim.AdamW(resumed, lr=0.1)
    inner.load_state_dict(torch.load(buffer, weights_only=True))
    again = normwise.tangential(inner, "channel")
    assert_same(run(optimizer, straight, 5, 5), run(again, resumed, 5, 5), atol=0)


def test_schedulers_closures_scalers_deepcopy_and_hooks_see_one_optimizer():
    w = torch.randn(4, 3, requires_grad=True)
    inner = torch.optim.SGD([w], lr=1.0)
    optimizer = normwise.tangential(inner, View.layer())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))

    def closure():
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    before = w.detach().clone()
    loss = optimizer.step(closure)  # the gradient is radial: nothing may move
    torch.testing.assert_close(loss.detach(), before.square().sum())
    torch.testing.assert_close(w.detach(), before)
    scheduler.step()
    assert inner.param_groups[0]["lr"] == 0.5
    assert calls == [1]
    twin = copy.deepcopy(optimizer)
    (twin_w,) = twin.param_groups[0]["params"]
    assert twin_w is not w
    twin_w.grad = torch.randn(4, 3)
    twin.step()
    assert not torch.equal(twin_w, w)

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer.zero_grad()
    scaler.scale((w * torch.tensor(float("inf"))).sum()).backward()
    scaler.step(optimizer)
    torch.testing.assert_close(w.detach(), before)


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ("auto", "needs a normwise.View"),
        ("rows", "rows"),
        (View.blocks(5), r"does not fit a weight of shape \(6, 4\)"),
        ({torch.ones(2, 2): View.layer()}, r"\(2, 2\) is not one of the optimizer's"),
        ({"weight": View.layer()}, "named_parameters"),
        ({}, "nothing to project"),
    ],
)
def test_bad_views_are_one_line_errors(views, message):
    w = torch.ones(6, 4, requires_grad=True)
    with pytest.raises(ValueError, match=message):
        normwise.tangential(torch.optim.SGD([w], lr=0.1), views)


def test_a_view_of_a_bias_is_refused():
    b = torch.ones(6, requires_grad=True)
    with pytest.raises(ValueError, match=r"\(6,\) cannot be projected"):
        normwise.tangential(torch.optim.SGD([b], lr=0.1), {b: View.layer()})
