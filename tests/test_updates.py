"""``describe`` says what a step does: each rule against the step itself, taken in float64."""

import math

import pytest
import torch
from torch import nn

import normwise as nw
from normwise.decay import L2, Cautious, Corrected, Decoupled
from normwise.monitor import Monitor
from normwise.updates import Coupling, Update, UpdateRule, describe, register, rule_of

LR, DECAY, MU = 0.1, 0.02, 0.8


class Lion(torch.optim.Optimizer):
    """A third-party optimizer that is known by its name (arXiv 2302.06675, Algorithm 2)."""

    def __init__(self, params, lr, weight_decay, betas=(0.9, 0.99)):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            (b1, b2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.mul_(1 - lr * group["weight_decay"])
                p.sub_(lr * (b1 * m + (1 - b1) * p.grad).sign())
                m.mul_(b2).add_(p.grad, alpha=1 - b2)


class Novel(Lion):
    """One that nobody has told of; its name is its own, and its parent's counts."""


class Stranger(torch.optim.Optimizer):
    def __init__(self, params, **options):
        super().__init__(params, options)

    def step(self, closure=None):
        pass


optim = torch.optim
needs_muon = pytest.mark.skipif(not hasattr(optim, "Muon"), reason="Muon came with torch 2.9")
# Every optimizer with decoupled decay, or with L2 that a gradient-sized update takes.
KNOWN_DECAY = {
    "SGD": lambda p: optim.SGD(p, lr=LR, momentum=MU, weight_decay=DECAY),
    "SGD, dampened": lambda p: optim.SGD(p, lr=LR, momentum=MU, dampening=0.5, weight_decay=DECAY),
    "SGD, Nesterov": lambda p: optim.SGD(p, lr=LR, momentum=MU, nesterov=True, weight_decay=DECAY),
    "AdamW": lambda p: optim.AdamW(p, lr=LR, weight_decay=DECAY),
    "Adam, decoupled": lambda p: optim.Adam(
        p, lr=LR, weight_decay=DECAY, decoupled_weight_decay=True
    ),
    "NAdam": lambda p: optim.NAdam(p, lr=LR, weight_decay=DECAY, decoupled_weight_decay=True),
    "RAdam": lambda p: optim.RAdam(p, lr=LR, weight_decay=DECAY, decoupled_weight_decay=True),
    "Muon": lambda p: optim.Muon(p, lr=LR, weight_decay=DECAY),
    "SGDW": lambda p: nw.SGDW(p, lr=LR, momentum=MU, weight_decay=DECAY),
    "SGDP": lambda p: nw.SGDP(p, lr=LR, momentum=MU, weight_decay=DECAY, view=None),
    "SGDP, a view": lambda p: nw.SGDP(p, lr=LR, momentum=MU, weight_decay=DECAY, view="channel"),
    "AdamP": lambda p: nw.AdamP(p, lr=LR, weight_decay=DECAY, view=None),
    "AdamP, a view": lambda p: nw.AdamP(p, lr=LR, weight_decay=DECAY, view="channel"),
    "AdamP, fixed": lambda p: nw.AdamP(p, lr=LR, weight_decay=DECAY, view="channel", norm="fixed"),
    "tangential SGD": lambda p: nw.tangential(
        optim.SGD(p, lr=LR, momentum=MU, weight_decay=DECAY), "layer", wd_ratio=0.5
    ),
    "tangential AdamW": lambda p: nw.tangential(optim.AdamW(p, lr=LR, weight_decay=DECAY), "layer"),
    "Lion": lambda p: Lion(p, LR, DECAY),
    "a policy, through AdamW": lambda p: attached(
        optim.AdamW(p, lr=LR, weight_decay=0), Decoupled(DECAY, per="step")
    ),
    "a policy, through AdamP": lambda p: attached(
        nw.AdamP(p, lr=LR, view="channel"), Decoupled(DECAY, per="schedule")
    ),
    "a policy beside SGD": lambda p: attached(optim.SGD(p, lr=LR, momentum=MU), Decoupled(DECAY)),
    "a policy beside RMSprop": lambda p: attached(optim.RMSprop(p, lr=LR), Decoupled(DECAY)),
    "L2 in SGDW": lambda p: attached(nw.SGDW(p, lr=LR, momentum=MU), L2(DECAY)),
    "corrected SGDP": lambda p: attached(
        nw.SGDP(p, lr=LR, momentum=MU, view="channel"), Corrected(DECAY, max_lr=0.3), on=0
    ),
    "a policy on tangential SGD": lambda p: attached(
        nw.tangential(optim.SGD(p, lr=LR, momentum=MU), "layer", wd_ratio=0.5), Decoupled(DECAY)
    ),
}
for name, version in (("Muon", "2.9"), ("Adam, decoupled", "2.7")):
    if torch.__version__ < version:
        del KNOWN_DECAY[name]


def attached(optimizer, policy, **on):
    policy.attach(optimizer, **on)
    return optimizer


@pytest.mark.parametrize("kind", KNOWN_DECAY)
def test_a_weight_without_a_gradient_shrinks_by_the_share_that_its_rule_gives(kind):
    """Once buffers have filled; to first order, since L2 in a buffer answers a step late."""
    p = nn.Parameter(torch.ones(2, 3, dtype=torch.float64))
    optimizer = KNOWN_DECAY[kind]([p])
    (rule,) = describe(optimizer)
    norms = []
    for _ in range(80):
        norms.append(float(p.detach().norm()))
        p.grad = torch.zeros_like(p)
        optimizer.step()
    shrink = 1 - norms[-1] / norms[-2]
    if rule.coupling is Coupling.L2:  # α of α² − (1 + μ − ηλ(1 − τ))α + μ = 0, to second order
        assert shrink == pytest.approx(rule.shrink, rel=3 * rule.shrink / (1 - MU))
    else:
        assert shrink == pytest.approx(rule.shrink, rel=1e-9, abs=1e-15)
    assert rule.shrink_per_lr * rule.lr == pytest.approx(rule.shrink)


@pytest.mark.parametrize(
    ("make", "update"),
    [
        (lambda p: optim.SGD(p, lr=LR), Update.GRADIENT),
        (lambda p: nw.SGDP(p, lr=LR), Update.GRADIENT),
        (lambda p: nw.SGDW(p, lr=LR), Update.GRADIENT),
        (lambda p: optim.ASGD(p, lr=LR), Update.GRADIENT),
        (lambda p: optim.Adam(p, lr=LR), Update.NORMALIZED),
        (lambda p: optim.RMSprop(p, lr=LR), Update.NORMALIZED),
        (lambda p: optim.Adafactor(p, lr=LR), Update.NORMALIZED),
        (lambda p: nw.AdamP(p, lr=LR), Update.NORMALIZED),
        (lambda p: optim.Rprop(p, lr=LR), Update.SIGN),
        (lambda p: Lion(p, LR, 0), Update.SIGN),
        pytest.param(lambda p: optim.Muon(p, lr=LR), Update.ORTHOGONALIZED, marks=needs_muon),
    ],
)
def test_the_first_update_is_as_long_as_the_rule_says(make, update):
    """A gradient ten times as large: an update ten times as large, or the same."""
    lengths = []
    for scale in (1.0, 10.0):
        p = nn.Parameter(torch.eye(4, dtype=torch.float64))
        optimizer = make([p])
        assert describe(optimizer)[0].update is update
        optimizer.param_groups[0]["weight_decay"] = 0.0
        before = p.detach().clone()
        p.grad = scale * torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).double()
        optimizer.step()
        lengths.append(float((p.detach() - before).norm()))
    ratio = 10 if update is Update.GRADIENT else 1
    # Muon computes in bfloat16.
    assert lengths[1] / lengths[0] == pytest.approx(ratio, rel=0.02)


@needs_muon
@pytest.mark.parametrize(("shape", "adjustment"), [((6, 3), None), ((3, 6), "match_rms_adamw")])
def test_muon_lengthens_its_step_by_the_shape(shape, adjustment):
    p = nn.Parameter(torch.zeros(shape))
    optimizer = optim.Muon([p], lr=LR, weight_decay=0, adjust_lr_fn=adjustment)
    rule = rule_of(optimizer, optimizer.param_groups[0], p)
    p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    # Newton and Schulz leave singular values from 0.7 to 1.2.
    singular = torch.linalg.svdvals(p.detach()) / (LR * rule.scale)
    assert 0.6 < float(singular.min()) <= float(singular.max()) < 1.3


def test_every_optimizer_of_torch_is_in_the_table():
    p = [nn.Parameter(torch.eye(2))]
    for name in torch.optim.__all__:
        kind = getattr(torch.optim, name)
        if isinstance(kind, type) and issubclass(kind, optim.Optimizer) and name != "Optimizer":
            (rule,) = describe(kind(p))
            assert rule.name == name
            assert (rule.update is Update.UNKNOWN) == (name == "LBFGS")
            assert rule.coupling is not Coupling.UNKNOWN


def test_options_are_those_of_the_group():
    p = [nn.Parameter(torch.eye(2))]
    options = {"lr": 0.3, "betas": (0.7, 0.8), "nesterov": True, "wd_ratio": 0.4, "delta": 0.2}
    (rule,) = describe(nw.AdamP(p, weight_decay=0.5, **options))
    assert (rule.lr, rule.betas, rule.momentum) == (0.3, (0.7, 0.8), 0.7)
    assert (rule.nesterov, rule.wd_ratio, rule.delta, rule.view) == (True, 0.4, 0.2, "auto")
    assert rule.is_projected is None
    assert rule.with_gate(True).shrink == pytest.approx(0.3 * 0.5 * 0.4)
    assert rule.with_gate(False).shrink == pytest.approx(0.3 * 0.5)
    assert math.isnan(rule.shrink)
    (rule,) = describe(optim.SGD(p, lr=0.3, momentum=0.9, dampening=0.1))
    assert (rule.momentum, rule.dampening, rule.nesterov, rule.view) == (0.9, 0.1, False, None)


def test_each_group_has_a_rule_and_vectors_are_not_projected():
    w, b = nn.Parameter(torch.eye(2)), nn.Parameter(torch.zeros(2))
    optimizer = nw.AdamP([{"params": [w, b], "view": "channel"}, {"params": [], "lr": 0.2}])
    assert [rule.lr for rule in describe(optimizer)] == [1e-3, 0.2]
    group = optimizer.param_groups[0]
    assert rule_of(optimizer, group, w).is_projected
    assert not rule_of(optimizer, group, b).is_projected


def test_tangential_tells_weights_with_a_view_from_others():
    w, b = nn.Parameter(torch.eye(2)), nn.Parameter(torch.zeros(2))
    inner = optim.SGD([w, b], lr=LR, momentum=MU, weight_decay=DECAY)
    wrapped = nw.tangential(inner, "layer", wd_ratio=0.5)
    of_matrix, of_vector = (rule_of(wrapped, wrapped.param_groups[0], p) for p in (w, b))
    assert (of_matrix.coupling, of_matrix.changed_by) == (Coupling.DECOUPLED, ("tangential",))
    assert of_matrix.shrink == pytest.approx(LR * DECAY * 0.5 / (1 - MU))
    assert (of_vector.coupling, of_vector.is_projected) == (Coupling.L2, False)


def test_a_policy_that_a_wrapper_would_split_acts_beside_the_step():
    """L2 cannot be had of the weights that tangential decays, nor decoupled decay of the others."""
    for policy, expected in ((L2(DECAY), 0.0), (Decoupled(DECAY), LR * DECAY)):
        w = nn.Parameter(torch.ones(2, 3, dtype=torch.float64))
        b = nn.Parameter(torch.ones(2, dtype=torch.float64))
        wrapped = attached(nw.tangential(optim.SGD([w, b], lr=LR, momentum=MU), "layer"), policy)
        (rule,) = describe(wrapped)
        assert rule.shrink == pytest.approx(expected)
        w.grad, b.grad = torch.zeros_like(w), torch.zeros_like(b)
        wrapped.step()
        assert float(w.detach().norm()) / math.sqrt(6) == pytest.approx(1 - expected, rel=1e-12)
        assert float(b.detach()[0]) == pytest.approx(1 - LR * DECAY)


class Wrapper(optim.Optimizer):
    """As accelerate's: an optimizer that holds another."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups


def test_wrappers_and_schedulers_are_looked_through():
    inner = attached(optim.AdamW([nn.Parameter(torch.eye(2))], weight_decay=0), Decoupled(0.2))
    scheduler = optim.lr_scheduler.ConstantLR(inner)
    assert describe(Wrapper(inner)) == describe(scheduler) == describe(inner)
    assert describe(inner)[0].changed_by == ("Decoupled",)
    with pytest.raises(TypeError, match="int is not an Optimizer"):
        describe(3)


def test_tensors_stay_where_they_are():
    """On the meta device reading a number is an error."""
    lr, decay = (torch.tensor(0.5, device="meta") for _ in range(2))
    p = [nn.Parameter(torch.eye(2, device="meta"))]
    (rule,) = describe(nw.AdamP(p, lr=lr, weight_decay=decay, view="channel"))
    assert rule.lr is lr
    assert rule.shrink.device.type == "meta"
    optimizer = optim.AdamW(p)  # which itself would read them
    optimizer.param_groups[0].update(lr=lr, betas=(decay, decay))
    (rule,) = describe(optimizer)
    assert rule.converted(lambda t: 1.0).betas == (1.0, 1.0)


def test_cautious_decay_and_shifted_decay_have_no_share():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    nw.weight_normalize(model)
    optimizer = optim.SGD(model.parameters(), lr=LR)
    nw.EpsilonShiftedL2(model, weight_decay=1e-4, eps=1e-3).attach(optimizer)
    weight = next(p for p in model.parameters() if p.ndim == 2 and p.shape[1] == 4)
    shifted = rule_of(optimizer, optimizer.param_groups[0], weight)
    cautious = describe(attached(optim.SGD([weight], lr=LR), Cautious(DECAY)))[0]
    for rule, name in ((shifted, "EpsilonShiftedL2"), (cautious, "Cautious")):
        assert rule.changed_by == (name,)
        assert math.isnan(rule.shrink)


def test_l2_of_a_normalized_update_has_no_share():
    (rule,) = describe(optim.Adam([nn.Parameter(torch.eye(2))], weight_decay=0.1))
    assert rule.coupling is Coupling.L2
    assert math.isnan(rule.shrink)


def test_what_is_not_known_says_so_until_it_is_registered():
    p = [nn.Parameter(torch.eye(2))]
    stranger = Stranger(p, lr=0.1, weight_decay=0.2)
    (rule,) = describe(stranger)
    assert (rule.update, rule.coupling) == (Update.UNKNOWN, Coupling.UNKNOWN)
    assert math.isnan(rule.shrink)
    assert describe(Stranger(p, lr=0.1))[0].coupling is Coupling.NONE

    def describer(optimizer, group):
        return UpdateRule("Stranger", Update.SIGN, group["lr"])

    register(Stranger, describer)
    assert describe(stranger)[0].update is Update.SIGN
    register("Stranger", lambda optimizer, group: UpdateRule("by name", Update.GRADIENT, 1.0))
    assert describe(stranger)[0].update is Update.SIGN  # the class is nearer than its name
    assert describe(Novel(p, 0.1, 0.1))[0].update is Update.SIGN
    with pytest.raises(TypeError, match="Invalid kind: 3"):
        register(3, describer)


def test_a_monitor_made_before_a_policy_predicts_as_one_made_after_it():
    """0.367 against 3.67 when the monitor looked at the group alone."""

    def predicted(first):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(27, 4, bias=False), nn.BatchNorm1d(4))
        optimizer = optim.AdamW(model.parameters(), lr=0.01, weight_decay=0)
        policy = Decoupled(1e-3, per="schedule")
        if first == "policy":
            policy.attach(optimizer)
        with Monitor(model, optimizer, {"0.weight": "channel"}) as monitor:
            if first == "monitor":
                policy.attach(optimizer)
            model(torch.randn(8, 27)).square().sum().backward()
            optimizer.step()
        return monitor.history[0]["predicted_norm"]["0.weight"]

    assert predicted("policy") == predicted("monitor")
    # η²C/(2δ) with δ = 1e-3 whatever η is.
    assert predicted("policy") == pytest.approx(math.sqrt(0.01**2 * 27 / (2 * 1e-3)))
