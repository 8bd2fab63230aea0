"""torch's own optimizer test data (OptimizerInfo, inputs, error inputs) against our classes.

What of torch's data our optimizers cannot take, by construction:

- ``amsgrad``: not part of AdamP.
- tensor ``betas``: refused; a tensor ``lr`` or ``weight_decay`` serves schedules.
- the error for a tensor ``lr`` with ``foreach`` and without ``capturable``: ours has no such limit,
  since no step reads a tensor on the host.
- sparse gradients: refused.
"""

import copy
import itertools
import pickle

import pytest
import torch
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    _get_optim_inputs_including_global_cliquey_kwargs,
    optim_error_inputs_func_adamw,
    optim_error_inputs_func_sgd,
    optim_inputs_func_adamw,
    optim_inputs_func_sgd,
)

import normwise
from normwise import View


def projected_inputs():
    """Of our own options; made anew each time, as torch's are, since some tests write to them."""
    decay = {"weight_decay": 0.1}
    return [
        OptimizerInput(params=None, kwargs=kwargs, desc=desc)
        for desc, kwargs in {
            "channel view": {"view": View.channel()},
            "layer view": {"view": "layer"},
            "no view": {"view": None, **decay},
            "open gate": {"delta": 5.0, **decay},
            "fixed norm": {"view": "channel", "norm": "fixed"},
            "tensor lr": {"lr": torch.tensor(1e-3)},
            "tensor decay": {"weight_decay": torch.tensor(0.1)},
        }.items()
    ]


def adamp_inputs(device, dtype=None):
    ours = [i for i in optim_inputs_func_adamw(device, dtype) if "amsgrad" not in i.kwargs]
    nesterov = OptimizerInput(params=None, kwargs={"nesterov": True}, desc="nesterov")
    return [
        *ours,
        nesterov,
        OptimizerInput(None, {"capturable": True}, "capturable"),
        *projected_inputs(),
    ]


def sgdp_inputs(device, dtype=None):
    return [*optim_inputs_func_sgd(device, dtype), *projected_inputs()]


def sgdw_inputs(device, dtype=None):
    torchs = optim_inputs_func_sgd(device, dtype)
    return torchs + [
        OptimizerInput(None, {**i.kwargs, "variant": "official"}, i.desc) for i in torchs
    ]


def info(cls, inputs, errors):
    return OptimizerInfo(
        cls,
        optim_inputs_func=inputs,
        optim_error_inputs_func=errors,
        supported_impls=("foreach", "differentiable"),
        has_capturable_arg=cls is normwise.AdamP,
    )


INFOS = [
    info(normwise.AdamP, adamp_inputs, optim_error_inputs_func_adamw),
    info(normwise.SGDP, sgdp_inputs, optim_error_inputs_func_sgd),
    info(normwise.SGDW, sgdw_inputs, optim_error_inputs_func_sgd),
]
BY_NAME = {i.optim_cls.__name__: i for i in INFOS}

INPUTS = [
    pytest.param(i, optim_input, id=f"{name}-{optim_input.desc}")
    for name, i in BY_NAME.items()
    for optim_input in i.optim_inputs_func("cpu")
]
ALL_INPUTS = [
    pytest.param(i, optim_input, id=f"{name}-{optim_input.desc}")
    for name, i in BY_NAME.items()
    for optim_input in _get_optim_inputs_including_global_cliquey_kwargs("cpu", None, i)
]


def having(inputs, condition):
    return [p for p in inputs if condition(p.values[1].kwargs)]


# Without differentiable, whose parameters are no leaves after a step.
LEAF_INPUTS = having(ALL_INPUTS, lambda options: not options.get("differentiable"))
# A learning rate in float32 is below the resolution of gradcheck.
PRECISE_INPUTS = having(INPUTS, lambda options: not torch.is_tensor(options.get("lr")))
WITHOUT_DECAY = having(LEAF_INPUTS, lambda options: "weight_decay" not in options)


def make(optim_info, optim_input, params, **override):
    return optim_info.optim_cls(params, **{**copy.deepcopy(optim_input.kwargs), **override})


def parameters(dtype=torch.float64, layout="contiguous"):
    generator = torch.Generator().manual_seed(3)
    params = []
    for shape in [(5,), (), (4, 6), (6, 4), (4, 6), (3, 2, 3, 3), (0, 3)]:
        t = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        if layout == "noncontiguous" and t.ndim > 1:
            t = t.transpose(0, 1).contiguous().transpose(0, 1)
        if layout == "channels_last" and t.ndim == 4:
            t = t.contiguous(memory_format=torch.channels_last)
        params.append(t.requires_grad_())
    return params


def set_gradients(params, step, layout="contiguous"):
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        real = p.dtype.is_complex
        shape = (*p.shape, 2) if real else p.shape
        g = torch.randn(shape, generator=generator, dtype=torch.float64)
        g = torch.view_as_complex(g).to(p.dtype) if real else g.to(p.dtype)
        if layout == "noncontiguous" and g.ndim > 1:
            g = g.transpose(0, 1).contiguous().transpose(0, 1)
        p.grad = g


def run(optimizer, params, steps=7, start=0, layout="contiguous", scheduler=None):
    for step in range(start, start + steps):
        set_gradients(params, step, layout)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return [p.detach().clone() for p in params]


def assert_same(ours, theirs, atol=1e-12):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize(("optim_info", "optim_input"), INPUTS)
@pytest.mark.parametrize("layout", ["contiguous", "noncontiguous", "channels_last"])
def test_foreach_is_the_single_tensor_step(optim_info, optim_input, layout):
    results = []
    for foreach in (False, True):
        params = parameters(layout=layout)
        optimizer = make(optim_info, optim_input, params, foreach=foreach)
        results.append(run(optimizer, params, layout=layout))
    assert_same(*results)


@pytest.mark.parametrize(("optim_info", "optim_input"), INPUTS)
def test_foreach_is_the_single_tensor_step_for_mixed_dtypes(optim_info, optim_input):
    results = []
    for foreach in (False, True):
        params = [
            *parameters(torch.float32),
            *parameters(torch.float64),
            *parameters(torch.bfloat16),
            *parameters(torch.float16),
        ]
        results.append(run(make(optim_info, optim_input, params, foreach=foreach), params))
    for a, b in zip(*results, strict=True):
        eps = torch.finfo(a.dtype).eps  # of weights of size 1, after 7 steps
        torch.testing.assert_close(a, b, rtol=0, atol=7 * eps)


@pytest.mark.parametrize(("optim_info", "optim_input"), LEAF_INPUTS)
def test_a_complex_weight_is_a_real_one_with_a_last_dimension_of_two(optim_info, optim_input):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(4, 3, dtype=torch.complex128, generator=generator).requires_grad_()
    real = torch.view_as_real(w.detach()).clone().requires_grad_()
    a = make(optim_info, optim_input, [w])
    b = make(optim_info, optim_input, [real])
    for step in range(5):
        set_gradients([w], step)
        real.grad = torch.view_as_real(w.grad).clone()
        a.step()
        b.step()
    torch.testing.assert_close(torch.view_as_real(w.detach()), real.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("optim_info", "optim_input"), LEAF_INPUTS)
@pytest.mark.parametrize("schedule", [None, "StepLR", "ReduceLROnPlateau"])
def test_it_goes_downhill(optim_info, optim_input, schedule):
    """torch's own check: a linear model's loss falls, with and without a schedule."""
    if optim_input.kwargs.get("norm") == "fixed" or optim_input.kwargs.get("lr") is None:
        lr = 1e-2
    else:
        lr = optim_input.kwargs["lr"]
    weight = torch.randn(10, 5, requires_grad=True)
    bias = torch.randn(10, requires_grad=True)
    inputs = torch.randn(5)
    sign = -1 if optim_input.kwargs.get("maximize") else 1
    optimizer = make(optim_info, optim_input, [weight, bias], lr=copy.deepcopy(lr))
    schedulers = {
        "StepLR": lambda: torch.optim.lr_scheduler.StepLR(optimizer, gamma=0.9, step_size=10),
        "ReduceLROnPlateau": lambda: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
    }
    scheduler = schedulers[schedule]() if schedule else None

    def closure():
        optimizer.zero_grad()
        loss = sign * (weight.mv(inputs) + bias).square().sum()
        loss.backward()
        return loss

    first = closure().item()
    for _ in range(20):
        loss = optimizer.step(closure)
        if schedule == "ReduceLROnPlateau":
            scheduler.step(loss.detach())
        elif scheduler:
            scheduler.step()
    assert sign * closure().item() < sign * first


@pytest.mark.parametrize(("optim_info", "optim_input"), PRECISE_INPUTS)
def test_a_step_is_differentiable(optim_info, optim_input):
    """gradcheck through one step, with respect to weight and gradient."""
    w = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    g = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def step(w, g):
        p = w.clone()
        p.grad = g
        make(optim_info, optim_input, [p], differentiable=True, foreach=False).step()
        return p

    assert torch.autograd.gradcheck(step, (w, g), atol=1e-4)


@pytest.mark.parametrize(("optim_info", "optim_input"), LEAF_INPUTS)
def test_parameters_without_gradient_do_not_move(optim_info, optim_input):
    params = parameters()
    before = [p.detach().clone() for p in params]
    make(optim_info, optim_input, params).step()
    assert_same([p.detach() for p in params], before, atol=0)


@pytest.mark.parametrize(("optim_info", "optim_input"), WITHOUT_DECAY)
def test_zero_gradients_move_nothing(optim_info, optim_input):
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = make(optim_info, optim_input, params)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_same([p.detach() for p in params], before, atol=1e-15)


@pytest.mark.parametrize(("optim_info", "optim_input"), LEAF_INPUTS)
def test_a_state_dict_continues_the_run_exactly(optim_info, optim_input, tmp_path):
    straight = parameters()
    optimizer = make(optim_info, optim_input, straight)
    run(optimizer, straight, steps=3)
    torch.save(optimizer.state_dict(), tmp_path / "checkpoint.pt")
    resumed = [p.detach().clone().requires_grad_() for p in straight]
    other = make(optim_info, optim_input, resumed)
    other.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    assert_same(run(optimizer, straight, 4, 3), run(other, resumed, 4, 3), atol=0)


@pytest.mark.parametrize("name", BY_NAME)
def test_state_of_half_precision_weights_is_float32_also_after_loading(name):
    optim_info = BY_NAME[name]
    kwargs = {} if name == "AdamP" else {"momentum": 0.9}
    params = parameters(torch.bfloat16)
    optimizer = optim_info.optim_cls(params, **kwargs)
    run(optimizer, params, steps=2)
    other = optim_info.optim_cls([p.detach().clone().requires_grad_() for p in params], **kwargs)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for a, b in zip(optimizer.state.values(), other.state.values(), strict=True):
        for key in a:
            assert b[key].dtype == torch.float32
            assert torch.equal(a[key], b[key])


@pytest.mark.parametrize("name", BY_NAME)
def test_an_older_state_dict_gets_the_options_that_it_lacks(name):
    optim_info = BY_NAME[name]
    params = parameters()
    optimizer = optim_info.optim_cls(params)
    run(optimizer, params, steps=2)
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        for key in ("maximize", "foreach", "differentiable", "stochastic_rounding"):
            del group[key]
    if name == "AdamP":
        for state in old["state"].values():
            state["step"] = state["step"].item()
    optimizer.load_state_dict(old)
    run(optimizer, params, steps=1)
    assert optimizer.param_groups[0]["maximize"] is False
    if name == "AdamP":
        assert all(torch.is_tensor(state["step"]) for state in optimizer.state.values())


@pytest.mark.parametrize("name", BY_NAME)
def test_deepcopy_and_pickle_continue_the_run(name):
    optim_info = BY_NAME[name]
    params = parameters()
    optimizer = optim_info.optim_cls(params, lr=0.1)
    run(optimizer, params, steps=2)
    expected = None
    for duplicate in (copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o)), lambda o: o):
        twin = duplicate(optimizer)
        result = run(twin, twin.param_groups[0]["params"], 3, 2)
        expected = expected or result
        assert_same(result, expected, atol=0)


@pytest.mark.parametrize("name", BY_NAME)
def test_named_parameters_keep_their_names_in_the_state_dict(name):
    model = torch.nn.Linear(3, 2)
    optimizer = BY_NAME[name].optim_cls(model.named_parameters())
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


@pytest.mark.parametrize("name", BY_NAME)
def test_hooks_are_called_around_steps_and_state_dicts(name):
    params = parameters()
    optimizer = BY_NAME[name].optim_cls(params)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("saved"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("loaded"))
    run(optimizer, params, steps=1)
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["before", "after", "saved", "loaded"]


ERRORS = [
    pytest.param(i, error, id=f"{name}-{error.optimizer_error_input.desc}")
    for name, i in BY_NAME.items()
    for error in i.optim_error_inputs_func("cpu", torch.float32)
    if "Tensor is not supported" not in error.error_regex and "betas" not in error.error_regex
]


@pytest.mark.parametrize(("optim_info", "error"), ERRORS)
def test_torchs_error_inputs_are_refused_in_torchs_words(optim_info, error):
    assert error.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
    bad = error.optimizer_error_input
    params = [torch.randn(2, 2, requires_grad=True)] if bad.params is None else bad.params
    if issubclass(error.error_type, Warning):
        with pytest.warns(error.error_type, match=error.error_regex):
            optim_info.optim_cls(params, **bad.kwargs)
    else:
        with pytest.raises(error.error_type, match=error.error_regex):
            optim_info.optim_cls(params, **bad.kwargs)


def test_torchs_inputs_cover_what_we_say_they_cover():
    """Every option that changes the arithmetic appears in some input."""
    for name, optim_info in BY_NAME.items():
        used = set(itertools.chain(*(i.kwargs for i in optim_info.optim_inputs_func("cpu"))))
        options = set(optim_info.optim_cls([torch.ones(1, requires_grad=True)]).defaults)
        missing = options - used - {"foreach", "fused", "differentiable", "stochastic_rounding"}
        assert missing <= {"betas", "eps", "wd_ratio"}, name
