"""What else meets DTensors: the ε-shifted decay, sums still to be made, half precision, FSDP1."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import normwise
from normwise import View
from normwise.decay import epsilon_shifted
from normwise.geometry import norms

CONVERTERS = {
    "WN": normwise.weight_normalize,
    "CWN": normwise.center_weight_normalize,
    "WS": normwise.weight_standardize,
}


def normalized(converter):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 7, 3), nn.ReLU(), nn.Conv2d(7, 6, 3), nn.Flatten())
    converter(model)
    return model.double()


def regularize(converter, how):
    """Steps of SGD with the regularizer, on one process and on shards; the largest difference."""
    models = [normalized(CONVERTERS[converter]) for _ in range(2)]
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    fully_shard(models[1], mesh=mesh)
    inputs = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)).double()
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        regularizer = normwise.EpsilonShiftedL2(model, weight_decay=0.1, eps=1e-3)
        if how != "penalty":
            regularizer.attach(optimizer, how)
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(inputs).square().mean()
            (loss + regularizer.penalty() if how == "penalty" else loss).backward()
            optimizer.step()
    pairs = zip(*(model.parameters() for model in models), strict=True)
    return max(float((a - b.full_tensor()).abs().max()) for a, b in pairs)


@pytest.mark.parametrize("how", ["coupled", "decoupled", "penalty"])
@pytest.mark.parametrize("converter", CONVERTERS)
def test_epsilon_shifted_decay_of_shards(converter, how, world2):
    assert max(world2(regularize, converter, how)) < 1e-10


class OneWeight(nn.Module):
    """Says of its parameter, a DTensor that is cut through its slices, that it is normalized."""

    def __init__(self, weight, scale):
        super().__init__()
        self.weight = nn.Parameter(weight)
        torch.nn.utils.parametrize.register_parametrization(
            self, "weight", _Says(scale), unsafe=True
        )


class _Says(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.divides_by, self.view = scale, View.channel()

    def forward(self, w):
        return w


def decay_of_split_slices(scale):
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    worst, counts = 0.0, []
    for number in (1, 4):
        wholes = [torch.randn(3, 5, 2, dtype=torch.float64) for _ in range(number)]
        model = nn.ModuleList(
            OneWeight(distribute_tensor(w, mesh, [Shard(1)]), scale) for w in wholes
        )
        regularizer = normwise.EpsilonShiftedL2(model, weight_decay=1.0, eps=0.1)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        regularizer.attach(optimizer)
        params = list(model.parameters())
        for p in params:
            p.grad = torch.zeros_like(p)
        with CommDebugMode() as communication:
            optimizer.step()
        counts.append(sum(communication.get_comm_counts().values()))
        for w, p in zip(wholes, params, strict=True):
            expected = w - epsilon_shifted.shifted_decay(w, View.channel(), scale, 0.1)
            worst = max(worst, float((p.full_tensor() - expected).abs().max()))
    return worst, counts


@pytest.mark.parametrize("scale", ["norm", "std"])
def test_epsilon_shifted_decay_of_split_slices(scale, world2):
    for worst, counts in world2(decay_of_split_slices, scale):
        assert worst < 1e-12
        assert counts == [1, 1]


def step_with_partial_gradients():
    """As tensor parallelism may leave them on the weights of norms, which are replicas."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    counts = []
    for number in (1, 9):
        one, many = ([torch.ones(3, 4).double() for _ in range(number)] for _ in range(2))
        many = [distribute_tensor(w, mesh, [Replicate()]).requires_grad_() for w in many]
        parts = [torch.arange(12.0).view(3, 4).double() + r for r in range(size)]
        for w, p in zip(one, many, strict=True):
            w.requires_grad_().grad = sum(parts)
            p.grad = DTensor.from_local(parts[rank], mesh, [Partial()], run_check=False)
        normwise.AdamP(one).step()
        with CommDebugMode() as communication:
            normwise.AdamP(many).step()
        counts.append(sum(communication.get_comm_counts().values()))
        for w, p in zip(one, many, strict=True):
            torch.testing.assert_close(p.to_local(), w)
    return counts


def test_gradients_that_are_sums_to_be_made(world2):
    assert world2(step_with_partial_gradients) == [[1, 1], [1, 1]]


def half_precision(dtype, view):
    """Weights in half precision after some steps, whole and in shards."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    whole = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    shard = distribute_tensor(whole, mesh, [Shard(1)]).requires_grad_()
    whole.requires_grad_()
    optimizers = [normwise.AdamP([p], lr=0.01, view=view) for p in (whole, shard)]
    for step in range(5):
        g = torch.randn(6, 5, generator=torch.Generator().manual_seed(step)).to(dtype)
        whole.grad, shard.grad = g, distribute_tensor(g, mesh, [Shard(1)])
        for optimizer in optimizers:
            optimizer.step()
    assert optimizers[1].state[shard]["exp_avg"].dtype == torch.float32
    return float((shard.full_tensor() - whole).float().abs().max())


@pytest.mark.parametrize("view", ["auto", "channel", "layer"])
def test_half_precision_is_stepped_in_float32(view, world2):
    # Sums in another order may round an entry the other way: one unit in the last place of 4.
    assert max(world2(half_precision, torch.bfloat16, view)) <= 2**-6


def extreme_norms(scale):
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    whole = scale * torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    shard = distribute_tensor(whole, mesh, [Shard(1)]).requires_grad_()
    gradient = scale * torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    shard.grad = distribute_tensor(gradient, mesh, [Shard(1)])
    before = norms(whole, View.channel())
    normwise.SGDP([shard], lr=0.1, view="channel", norm="fixed").step()
    after = shard.full_tensor().detach()
    assert not torch.equal(after, whole)
    return float((norms(after, View.channel()) / before - 1).abs().max())


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_norms_of_split_slices_neither_overflow_nor_underflow(scale, world2):
    assert max(world2(extreme_norms, scale)) < 1e-6


FSDP1_OPTIMIZERS = {
    "AdamP": normwise.AdamP,
    "SGDP": normwise.SGDP,
    "tangential": lambda p: normwise.tangential(torch.optim.SGD(p, lr=0.1), "channel"),
    "AdamP without a view": lambda p: normwise.AdamP(p, view=None),
    "SGDW": normwise.SGDW,
}


def fsdp1(name, use_orig_params, before_wrapping):
    """The error that an optimizer of a model wrapped by FSDP1 raises."""
    model = nn.Linear(4, 6)
    make = FSDP1_OPTIMIZERS[name]
    if before_wrapping:
        optimizer = make(model.parameters())
    model = FullyShardedDataParallel(
        model, use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    try:
        if not before_wrapping:
            optimizer = make(model.parameters())
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_flat_parameters_of_fsdp1_are_refused(use_orig_params, world2):
    """They have no slices any more; a step of them would be AdamW's."""
    for name in ("AdamP", "SGDP", "tangential"):
        for message in world2(fsdp1, name, use_orig_params, False):
            assert "fully_shard" in message
    if use_orig_params:  # else the optimizer has parameters that are no one's
        for message in world2(fsdp1, "AdamP", use_orig_params, True):
            assert "fully_shard" in message
    for name in ("AdamP without a view", "SGDW"):
        assert world2(fsdp1, name, use_orig_params, False) == ["no error"] * 2


def fused_shards(view, dim):
    """Whether slices take the fused kernel: no plan is made without it."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    model, expected = nn.Linear(40, 64).double(), nn.Linear(40, 64).double()
    expected.load_state_dict(model.state_dict())
    fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(min(dim, p.ndim - 1)))
    options = {"lr": 0.1, "view": view}
    many = normwise.AdamP(model.parameters(), fused=True, **options)
    one = normwise.AdamP(expected.parameters(), foreach=False, **options)
    for step in range(3):
        for p, q in zip(model.parameters(), expected.parameters(), strict=True):
            g = torch.randn(q.shape, generator=torch.Generator().manual_seed(step)).double()
            q.grad, p.grad = g, distribute_tensor(g, mesh, p.placements)
        one.step()
        many.step()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q, rtol=0, atol=1e-12)
    return [planned.plan is not None for plans in many._plans for planned in plans._planned]


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("view", ["auto", "channel", "channel(1)", "blocks(16)", "layer"])
def test_slices_take_the_fused_kernel_whether_whole_or_split(view, dim, world2):
    pytest.importorskip("numba", reason="the kernels are compiled by Numba")
    for plans in world2(fused_shards, view, dim):
        assert plans
        assert all(plans)
