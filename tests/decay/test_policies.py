"""Each policy is its formula, written out, on every optimizer; and it costs what it says."""

import copy
import gc
import itertools
import math
import warnings
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import normwise as nw
from normwise.decay import L2, Cautious, Corrected, Decoupled

LR, DECAY, BETA1, BETA2, EPS, MU = 0.1, 0.3, 0.9, 0.999, 1e-8, 0.9
SCHEDULE = [1.0, 0.5, 0.25, 0.75, 0.1]

OPTIMIZERS = {
    "SGD": lambda p, lr=LR, **k: torch.optim.SGD(p, lr=lr, momentum=MU, **k),
    "SGDW": lambda p, lr=LR, **k: nw.SGDW(p, lr=lr, momentum=MU, **k),
    "AdamW": lambda p, lr=LR, **k: torch.optim.AdamW(p, lr=lr, **{"weight_decay": 0, **k}),
    "AdamP": lambda p, lr=LR, **k: nw.AdamP(p, lr=lr, view="channel", wd_ratio=1, **k),
    "NAdam": lambda p, lr=LR, **k: torch.optim.NAdam(p, lr=lr, **k),
}
RULES = {
    "L2": L2(DECAY),
    "per lr": Decoupled(DECAY),
    "per schedule": Decoupled(DECAY, per="schedule"),
    "per step": Decoupled(DECAY, per="step"),
    "cautious": Cautious(DECAY),
    "corrected": Corrected(DECAY),
}


def taken(kind, state, t, w, g, lr):
    """What one step of an optimizer without decay takes from w: the papers' algorithms."""
    m, v = state.get("m", torch.zeros_like(w)), state.get("v", torch.zeros_like(w))
    if kind == "SGD":
        state["m"] = MU * m + g
        return lr * state["m"]
    if kind == "SGDW":
        state["m"] = MU * m + lr * g
        return state["m"]
    m = state["m"] = BETA1 * m + (1 - BETA1) * g
    v = state["v"] = BETA2 * v + (1 - BETA2) * g * g
    below = (v / (1 - BETA2**t)).sqrt() + EPS
    if kind == "NAdam":
        mus = [BETA1 * (1 - 0.5 * 0.96 ** (i * 4e-3)) for i in range(1, t + 2)]
        now, after = math.prod(mus[:-1]), math.prod(mus)
        return lr * ((1 - mus[-2]) / (1 - now) * g + mus[-1] / (1 - after) * m) / below
    u = m / (1 - BETA1**t) / below
    if kind == "AdamP":
        direction = w / w.norm(dim=1, keepdim=True)
        u = u - (u * direction).sum(1, keepdim=True) * direction
    return lr * u


def written_out(kind, rule, w, grads, schedule=SCHEDULE, lr=LR, decay=DECAY):
    """The formulas of the rules around the step of the optimizer."""
    state = {}
    if rule == "corrected":  # in the optimizer's own coupling
        rule = "corrected L2" if kind in ("SGD", "NAdam") else "corrected decoupled"
    for t, (g, s) in enumerate(zip(grads, schedule, strict=True), 1):
        eta = s * lr
        if rule == "L2":
            g = g + decay * w
        elif rule == "corrected L2":
            g = g + decay * s * w
        u = taken(kind, state, t, w, g, eta)
        part = {
            "per lr": eta * decay,
            "per schedule": s * decay,
            "per step": decay,
            "cautious": eta * decay,
            "corrected decoupled": eta * decay * s,
        }.get(rule, 0.0)
        mask = (u * w >= 0).double() if rule == "cautious" else 1.0
        w = w - u - part * mask * w
    return w


def gradients(steps, *shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=dtype) for _ in range(steps)]


def run(optimizer, p, grads, schedule=SCHEDULE):
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: schedule[min(t, len(schedule) - 1)]
    )
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
        scheduler.step()
    return p.detach()


@pytest.fixture
def float64():
    """NAdam keeps its product of momenta in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def weight(dtype=torch.float64, seed=9):
    return torch.nn.Parameter(gradients(1, 3, 4, seed=seed, dtype=dtype)[0])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(("kind", "rule"), list(itertools.product(OPTIMIZERS, RULES)))
def test_every_rule_is_its_formula_on_every_optimizer(kind, rule, foreach):
    p, grads = weight(), gradients(5, 3, 4)
    expected = written_out(kind, rule, p.detach(), grads)
    optimizer = OPTIMIZERS[kind]([p], foreach=foreach)
    RULES[rule].attach(optimizer, on=[p])
    torch.testing.assert_close(run(optimizer, p, grads), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("kind", "rule"), list(itertools.product(["SGD", "AdamW"], RULES)))
def test_every_rule_is_its_formula_with_a_tensor_for_the_learning_rate(kind, rule):
    p, grads = weight(), gradients(5, 3, 4)
    expected = written_out(kind, rule, p.detach(), grads)
    # torch's multi-tensor step takes tensors where it may be captured, which a CPU is not.
    lr = torch.tensor(LR, dtype=torch.float64)
    optimizer = OPTIMIZERS[kind]([p], lr=lr, foreach=False)
    RULES[rule].attach(optimizer, on=[p])
    torch.testing.assert_close(run(optimizer, p, grads), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_a_learning_rate_of_zero_is_no_obstacle(rule):
    p, grads, schedule = weight(), gradients(3, 3, 4), [1.0, 0.0, 0.5]
    expected = written_out("AdamW", rule, p.detach(), grads, schedule)
    optimizer = OPTIMIZERS["AdamW"]([p])
    RULES[rule].attach(optimizer, on=[p])
    torch.testing.assert_close(run(optimizer, p, grads, schedule), expected)


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_l2_equals_decoupled_decay_for_sgd_and_not_for_adam(kind):
    """With λ' = ηλ, the paper's proposition 1, for SGD without momentum."""
    ends = []
    for policy in (L2(DECAY), Decoupled(LR * DECAY, per="schedule")):
        p = weight()
        optimizer = getattr(torch.optim, kind)([p], lr=LR)
        policy.attach(optimizer)
        ends.append(run(optimizer, p, gradients(5, 3, 4)))
    if kind == "SGD":
        torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)
    else:
        assert (ends[0] - ends[1]).norm() > 0.01 * ends[0].norm()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("per", ["lr", "schedule", "step"])
def test_independent_decay_does_not_change_when_the_learning_rate_is_scaled(kind, per):
    """Without a gradient nothing but decay moves a weight."""
    kept = []
    for lr in (0.01, 0.1):
        p = weight()
        start = p.detach().clone()
        optimizer = OPTIMIZERS[kind]([p], lr=lr)
        Decoupled(0.02, per=per).attach(optimizer)
        kept.append(run(optimizer, p, [torch.zeros_like(start)] * 5) / start)
    parts = {"schedule": SCHEDULE, "step": [1] * 5}
    if per == "lr":
        for lr, ratio in zip((0.01, 0.1), kept, strict=True):
            expected = math.prod(1 - 0.02 * lr * s for s in SCHEDULE)
            torch.testing.assert_close(ratio, torch.full_like(ratio, expected))
        assert (kept[0] - kept[1]).abs().min() > 1e-3
    else:
        expected = math.prod(1 - 0.02 * s for s in parts[per])
        for ratio in kept:
            torch.testing.assert_close(ratio, torch.full_like(ratio, expected))


def test_the_decay_of_adamp_and_sgdp_keeps_its_ratio_where_they_project():
    p = weight()
    start = p.detach().clone()
    optimizer = nw.SGDP([p], lr=LR, momentum=MU, view="channel", wd_ratio=0.1)
    Decoupled(DECAY).attach(optimizer)
    run(optimizer, p, [torch.zeros_like(start)] * 5)
    expected = start * math.prod(1 - 0.1 * DECAY * LR * s for s in SCHEDULE)
    torch.testing.assert_close(p.detach(), expected)


def test_the_peak_of_one_cycle_is_the_reference():
    """OneCycleLR starts far below its peak, where s = 1."""
    p = weight()
    optimizer = OPTIMIZERS["AdamW"]([p])
    attached = Decoupled(DECAY, per="schedule").attach(optimizer)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=10)
    group = optimizer.param_groups[0]
    assert group["lr"] == pytest.approx(0.04)
    assert attached.effect(group).shrink == pytest.approx(0.04 * DECAY)


def test_a_peak_of_zero_is_an_error():
    p = weight()
    optimizer = OPTIMIZERS["AdamW"]([p], lr=0.0)
    Decoupled(DECAY, per="schedule").attach(optimizer)
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="learning rate was 0 when the policy was attached"):
        optimizer.step()
    optimizer.param_groups[0]["initial_lr"] = LR
    optimizer.step()


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


def operations(optimizer, params):
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()  # the first makes the state
    with Operations() as seen:
        optimizer.step()
    return seen.names


FUSED = {
    "SGD": lambda p: torch.optim.SGD(p, lr=LR, momentum=MU, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=LR, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0, fused=True),
}
ADDED = {
    ("SGD", "per lr"): ["aten._foreach_mul_"],
    ("SGD", "per schedule"): ["aten._foreach_mul_"],
    ("SGD", "per step"): ["aten._foreach_mul_"],
}
# Before it had this switch, torch's Adam took L2 alone and its AdamW decoupled decay alone.
HAS_SWITCH = "decoupled_weight_decay" in torch.optim.Adam([torch.zeros(1)]).defaults
if not HAS_SWITCH:
    ADDED |= {("Adam", rule): ["aten._foreach_mul_"] for rule in RULES if rule.startswith("per ")}
    ADDED |= {("AdamW", "L2"): ["aten._foreach_add_"]}


@pytest.mark.parametrize(
    ("kind", "rule"), list(itertools.product(FUSED, [r for r in RULES if r != "cautious"]))
)
def test_fused_optimizers_stay_fused_and_run_no_more_than_one_operation(kind, rule):
    params = [weight(torch.float32, seed=i) for i in range(3)]
    plain = operations(FUSED[kind](params), params)
    optimizer = FUSED[kind](params)
    RULES[rule].attach(optimizer, on=params)
    names = operations(optimizer, params)
    assert len(names) == len(plain) + len(ADDED.get((kind, rule), []))
    step = "aten._fused_sgd_" if kind == "SGD" else "aten._fused_adamw_"
    is_l2 = rule == "L2" or (rule == "corrected" and kind == "Adam")
    if kind != "SGD" and (is_l2 if HAS_SWITCH else kind == "Adam"):
        step = "aten._fused_adam_"  # the same kernel with L2
    assert step in names
    assert set(ADDED.get((kind, rule), [])) <= set(names)


def test_cautious_decay_takes_seven_operations_whatever_the_number_of_weights():
    counts = []
    for n in (1, 5):
        params = [weight(torch.float32, seed=i) for i in range(n)]
        optimizer = FUSED["AdamW"](params)
        plain = operations(optimizer, params)
        Cautious(DECAY).attach(optimizer)
        counts.append(len(operations(optimizer, params)) - len(plain))
    assert counts == [1 + 7, 1 + 7]  # the copy, and the seven


@pytest.mark.parametrize("rule", RULES)
def test_a_tensor_for_the_learning_rate_is_not_waited_for(rule):
    """normwise's steps read none, so that any would be the policy's."""
    p = weight()
    optimizer = nw.SGDW([p], lr=torch.tensor(LR), momentum=MU, foreach=True, fused=False)
    RULES[rule].attach(optimizer, on=[p])
    assert "aten._local_scalar_dense" not in operations(optimizer, [p])


@pytest.mark.parametrize("rule", RULES)
def test_the_groups_keep_their_decay_between_steps_and_after_one_that_raises(rule):
    p = weight()
    optimizer = OPTIMIZERS["NAdam"]([p])
    before = dict(optimizer.param_groups[0], weight_decay=DECAY)
    RULES[rule].attach(optimizer, on=[p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.param_groups[0] == before
    p.grad = torch.ones_like(p).to_sparse()
    with pytest.raises((RuntimeError, NotImplementedError)):
        optimizer.step()
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.param_groups[0] == before


@pytest.mark.parametrize("rule", RULES)
def test_a_run_goes_on_from_a_checkpoint(rule):
    p, grads = weight(), gradients(4, 3, 4)
    q = torch.nn.Parameter(p.detach().clone())
    optimizer = OPTIMIZERS["AdamW"]([p])
    RULES[rule].attach(optimizer, on=[p])
    resumed = OPTIMIZERS["AdamW"]([q])
    RULES[rule].attach(resumed, on=[q])
    for i, g in enumerate(grads):
        if i == 2:
            q.data.copy_(p.data)
            resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        p.grad = g.clone()
        optimizer.step()
        if i >= 2:
            q.grad = g.clone()
            resumed.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_a_step_that_a_scaler_skips_does_not_decay(kind, rule):
    """GradScaler hands these two to a fused optimizer."""
    p = weight(torch.float32)
    start = p.detach().clone()
    optimizer = FUSED[kind]([p])
    RULES[rule].attach(optimizer, on=[p])
    p.grad = torch.full_like(p, math.inf)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(p, start)


def test_l2_beside_the_step_counts_the_scale_of_the_gradients():
    """AdamP has no L2 of its own, and leaves unscaling to its step."""
    ends = []
    for scale in (1.0, 8.0):
        p = weight(torch.float32)
        optimizer = nw.AdamP([p], lr=LR, view=None)
        L2(DECAY).attach(optimizer)
        p.grad = scale * gradients(1, 3, 4, dtype=torch.float32)[0]
        if scale != 1:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
        optimizer.step()
        ends.append(p.detach())
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("kind", ["SGD", "AdamP"])
@pytest.mark.parametrize("rule", ["L2", "per lr"])
def test_a_weight_decays_under_maximize_too(kind, rule):
    """Going up along −g is going down along g."""
    ends = []
    for sign in (1, -1):
        p = weight()
        optimizer = OPTIMIZERS[kind]([p], maximize=sign < 0)
        RULES[rule].attach(optimizer)
        ends.append(run(optimizer, p, [sign * g for g in gradients(5, 3, 4)]))
    torch.testing.assert_close(*ends)


def test_cautious_decay_looks_at_each_part_of_a_complex_weight():
    real = weight()
    p = torch.nn.Parameter(torch.view_as_complex(real.detach().view(3, 2, 2).clone()))
    grads = gradients(5, 3, 2, 2)
    expected = written_out("SGD", "cautious", torch.view_as_real(p.detach()), grads)
    optimizer = OPTIMIZERS["SGD"]([p])
    Cautious(DECAY).attach(optimizer)
    end = run(optimizer, p, [torch.view_as_complex(g) for g in grads])
    torch.testing.assert_close(torch.view_as_real(end), expected)


def test_weights_without_a_gradient_do_not_decay():
    p, q = weight(), weight()
    start = q.detach().clone()
    optimizer = torch.optim.SGD([p, q], lr=LR)
    for policy in (Decoupled(DECAY), Cautious(DECAY)):
        attached = policy.attach(optimizer)
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert torch.equal(q, start)
        attached.remove()


def test_an_optimizer_that_is_not_known_is_given_no_decay_of_its_own():
    class Foreign(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": LR, "weight_decay": 0.0})

        def step(self, closure=None):
            for group in self.param_groups:
                assert group["weight_decay"] == 0
                for p in group["params"]:
                    p.data.sub_(p.grad, alpha=group["lr"])

    for rule in ("L2", "per schedule"):
        p = weight()
        start, g = p.detach().clone(), gradients(1, 3, 4)[0]
        optimizer = Foreign([p])
        RULES[rule].attach(optimizer)
        p.grad = g.clone()
        optimizer.step()
        expected = start - LR * g - (LR * DECAY if rule == "L2" else DECAY) * start
        torch.testing.assert_close(p.detach(), expected)


def network():
    return torch.nn.Sequential(
        torch.nn.Linear(4, 6, bias=False), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 2)
    )


def test_corrected_decay_is_for_the_weights_that_feed_a_norm_and_not_for_its_gain():
    model = network()
    report = nw.analyze(model, torch.randn(8, 4))
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=LR, weight_decay=DECAY)
    attached = Corrected().attach(optimizer, on=report)
    assert attached.params == {model[0].weight}
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 1]
    assert optimizer.param_groups[1]["param_names"] == ["0.weight"]
    assert "Corrected" in str(attached)
    assert "λ = 0.3" in str(attached)


def test_weights_are_chosen_by_group_name_number_or_pattern():
    model = network()
    groups = [
        {"params": list(model[0].named_parameters(prefix="0")), "name": "first"},
        {"params": list(model[1:].named_parameters(prefix="rest"))},
    ]
    first, rest = set(model[0].parameters()), set(model[1:].parameters())
    for on, expected in (("first", first), (1, rest), ("rest.2.w*", {model[2].weight})):
        optimizer = torch.optim.SGD([dict(g) for g in groups], lr=LR)
        assert Decoupled(DECAY).attach(optimizer, on=on).params == expected


def test_removal_gives_the_optimizer_its_own_decay_back():
    p, q = weight(), weight()
    optimizer = torch.optim.AdamW([p], lr=LR, weight_decay=DECAY)
    Decoupled(per="step").attach(optimizer).remove()
    plain = torch.optim.AdamW([q], lr=LR, weight_decay=DECAY)
    grads = gradients(5, 3, 4)
    assert torch.equal(run(optimizer, p, grads), run(plain, q, grads))
    Decoupled(per="step").attach(optimizer)


@pytest.mark.parametrize("policy", [L2, Decoupled, Cautious, Corrected])
@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan])
def test_a_decay_must_be_finite_and_not_negative(policy, value):
    with pytest.raises(ValueError, match=f"Invalid weight_decay value: {value}"):
        policy(value)


def test_options_out_of_range_are_errors():
    with pytest.raises(ValueError, match="Invalid per: 'epoch'"):
        Decoupled(0.1, per="epoch")
    with pytest.raises(ValueError, match="must be below 1"):
        Decoupled(1.5, per="step")
    with pytest.raises(ValueError, match="Invalid max_lr: 0"):
        Corrected(0.1, max_lr=0)


def test_what_conflicts_is_an_error():
    p = weight()
    optimizer = torch.optim.AdamW([p], lr=LR)  # torch's default is 0.01
    with pytest.raises(ValueError, match=r"group 0 has weight_decay 0.01, which Decoupled\(0.3\)"):
        Decoupled(DECAY).attach(optimizer)
    Decoupled().attach(optimizer)
    with pytest.raises(ValueError, match="no weights are left for L2: they have Decoupled"):
        L2().attach(optimizer)
    with pytest.raises(ValueError, match=r"Decoupled is attached to a parameter of shape \(3, 4\)"):
        L2().attach(optimizer, on=0)
    with pytest.raises(ValueError, match="those of the groups are 0; give one"):
        L2().attach(torch.optim.SGD([p], lr=LR))
    with pytest.raises(ValueError, match="which weights feed a normalization"):
        Corrected(DECAY).attach(torch.optim.SGD([p], lr=LR))


def test_what_the_optimizer_does_not_have_is_an_error():
    p = weight()
    optimizer = torch.optim.SGD([{"params": [p], "name": "body"}], lr=LR)
    with pytest.raises(ValueError, match="unknown group 'head'; the optimizer has the groups 'bod"):
        Decoupled(DECAY).attach(optimizer, on="head")
    with pytest.raises(ValueError, match="unknown group 3"):
        Decoupled(DECAY).attach(optimizer, on=[3])
    with pytest.raises(ValueError, match=r"shape \(3, 4\) is not one of the optimizer's"):
        Decoupled(DECAY).attach(optimizer, on=[weight()])
    with pytest.raises(TypeError, match="Linear is not an Optimizer"):
        Decoupled(DECAY).attach(torch.nn.Linear(1, 1))


def test_a_closure_is_an_error_only_where_the_policy_acts_before_the_step():
    p = weight()
    p.grad = torch.ones_like(p)
    optimizer = torch.optim.SGD([p], lr=LR)
    attached = Decoupled(DECAY).attach(optimizer)
    with pytest.raises(RuntimeError, match="stepped with a closure"):
        optimizer.step(lambda: 1.0)
    attached.remove()
    for rule in ("L2", "cautious"):
        start = p.detach().clone()
        optimizer = torch.optim.SGD([p], lr=LR)
        RULES[rule].attach(optimizer)
        assert optimizer.step(lambda: 1.0) == 1.0
        assert not torch.equal(p, start)


def test_the_shifted_regularizer_and_a_policy_do_not_decay_the_same_weights():
    model = network()
    nw.weight_normalize(model)
    reg = nw.EpsilonShiftedL2(model, weight_decay=1e-4, eps=1e-3)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, weight_decay=DECAY)
    attached = reg.attach(optimizer)
    policy = Decoupled().attach(optimizer)
    assert policy.params.isdisjoint(attached.params)
    assert policy.params
    policy.remove()
    attached.remove()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, weight_decay=DECAY)
    Decoupled().attach(optimizer)
    with pytest.raises(ValueError, match=r"Decoupled is attached to .* already"):
        reg.attach(optimizer)


# A step that raises.


class Failing(torch.optim.AdamW):
    """AdamW that raises in the middle of its step."""

    @torch.no_grad()
    def step(self, closure=None):
        self.seen = self.param_groups[0]["weight_decay"]
        raise FloatingPointError


@pytest.mark.parametrize("with_scheduler", ["none", "before", "after"])
def test_a_step_that_raises_leaves_the_groups_their_own_decay(with_scheduler):
    optimizer = Failing([weight()], lr=0.1, weight_decay=0)

    def schedule():
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0)

    scheduler = schedule() if with_scheduler == "before" else None
    Decoupled(0.02, per="step").attach(optimizer)
    scheduler = schedule() if with_scheduler == "after" else scheduler
    with pytest.raises(FloatingPointError):
        optimizer.step()
    assert optimizer.seen == pytest.approx(0.2)
    assert optimizer.param_groups[0]["weight_decay"] == 0.02
    assert optimizer.state_dict()["param_groups"][0]["weight_decay"] == 0.02
    if scheduler is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scheduler._step_count = 1
            optimizer._opt_called = True
            scheduler.step()


def test_a_state_dict_in_the_middle_of_a_step_has_the_groups_own_decay():
    p = weight()
    optimizer = torch.optim.AdamW([p], lr=0.1, weight_decay=0)
    Decoupled(0.02, per="step").attach(optimizer)
    saved = []

    def closure():
        saved.append(optimizer.state_dict()["param_groups"][0]["weight_decay"])
        saved.append(optimizer.param_groups[0]["weight_decay"])

    optimizer.step(closure)
    assert saved == [0.02, pytest.approx(0.2)]


def test_a_policy_that_is_removed_after_a_failed_step_gives_the_decay_back():
    """The class's own step, which a wrapper may call past the optimizer's method."""
    optimizer = Failing([weight()], lr=0.1, weight_decay=0)
    attached = Decoupled(0.02, per="step").attach(optimizer)
    with pytest.raises(FloatingPointError):
        Failing.step(optimizer)
    assert optimizer.state_dict()["param_groups"][0]["weight_decay"] == 0.02
    attached.remove()
    assert optimizer.param_groups[0]["weight_decay"] == 0.02


def test_a_policy_keeps_no_optimizer_alive():
    gc.disable()
    try:
        optimizer = torch.optim.AdamW([weight()], lr=0.1, weight_decay=0.1)
        Decoupled().attach(optimizer)
        gone = weakref.ref(optimizer)
        del optimizer
        assert gone() is None
    finally:
        gc.enable()


def test_two_policies_and_a_scheduler_in_any_order_warn_of_nothing():
    """torch's schedulers look for marks of theirs on ``optimizer.step``."""
    for order in itertools.permutations(("schedule", "first", "second")):
        one, two = weight(), weight(seed=4)
        optimizer = torch.optim.AdamW([{"params": [one]}, {"params": [two]}], weight_decay=0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for what in order:
                if what == "schedule":
                    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0)
                else:
                    Decoupled(DECAY).attach(optimizer, on=0 if what == "first" else 1)
            one.grad, two.grad = torch.ones_like(one), torch.ones_like(two)
            optimizer.step()
            scheduler.step()


FIXING = {
    "AdamP": lambda p: nw.AdamP(p, view="channel", norm="fixed"),
    "tangential": lambda p: nw.tangential(torch.optim.SGD(p, lr=LR), "channel", norm="fixed"),
    "sphere": lambda p: nw.sphere(torch.optim.SGD(p, lr=LR), "channel"),
}


@pytest.mark.parametrize("kind", FIXING)
@pytest.mark.parametrize("rule", RULES)
def test_a_norm_that_is_fixed_cannot_decay(kind, rule):
    """Beside the step it would leave its sphere, inside of it nothing would come of it."""
    p, other = weight(), weight()
    optimizer = FIXING[kind]([{"params": [p]}, {"params": [other], "name": "free"}])
    with pytest.raises(ValueError, match=r"would decay a weight of shape \(3, 4\) in group 0"):
        RULES[rule].attach(optimizer, on=[p])


def test_l2_that_a_projection_takes_out_is_told_of():
    p = weight()
    optimizer = nw.SGDP([p], lr=LR, momentum=0.0, view="channel")
    with pytest.warns(UserWarning, match="L2 adds λw to the gradient of 1 weights"):
        L2(0.5).attach(optimizer, on=[p])
    norms = p.detach().norm(dim=1)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(p.detach().norm(dim=1), norms, rtol=1e-15, atol=0)


def test_tangential_sets_decay_apart_and_so_refuses_a_policy_inside_of_it():
    p = weight()
    inner = torch.optim.SGD([p], lr=LR)
    Decoupled(DECAY).attach(inner)
    with pytest.raises(ValueError, match="attach it to the optimizer that tangential returns"):
        nw.tangential(inner, "channel")
