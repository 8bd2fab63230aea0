"""Slices, norms, and the split of an update into its radial and tangential parts."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from normwise import View
from normwise.geometry import cosine, global_norm, norms, radial, tangential

VIEWS = ["channel", "channel(1)", "blocks(2)", "blocks(3, 1)", "layer"]
FORMATS = ["contiguous", "channels_last", "transposed", "strided"]


def in_format(t: torch.Tensor, memory_format: str) -> torch.Tensor:
    """The values of ``t`` laid out in another way."""
    if memory_format == "channels_last" and t.ndim == 4:
        return t.contiguous(memory_format=torch.channels_last)
    if memory_format == "transposed":
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if memory_format == "strided":
        wide = torch.empty(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype)
        wide[..., ::2] = t
        return wide[..., ::2]
    return t.contiguous()


def slices_by_indexing(t: torch.Tensor, view: View) -> list[torch.Tensor]:
    """The slices as a reader of the documentation would cut them out."""
    if view.kind == "layer":
        return [t]
    size = t.shape[view.dim]
    run = 1 if view.kind == "channel" else size // view.count
    return list(t.split(run, dim=view.dim))


@st.composite
def weights_and_updates(draw):
    """A weight and an update whose slices have scales of their own, from 1e-30 to 1e30."""
    view = View.parse(draw(st.sampled_from(VIEWS)))
    ndim = draw(st.integers(2, 5))
    shape = [draw(st.integers(1, 4)) for _ in range(ndim)]
    if view.kind == "blocks":
        shape[view.dim] = view.count * draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tensors = []
    for _ in range(2):
        t = in_format(torch.randn(shape, generator=generator), draw(st.sampled_from(FORMATS)))
        for s in slices_by_indexing(t, view):
            s.mul_(10.0 ** draw(st.integers(-30, 30)))
        tensors.append(t)
    return view, *tensors


@given(weights_and_updates())
def test_slices_are_the_documented_ones_and_alias_the_weight(case):
    view, w, _ = case
    expected = slices_by_indexing(w, view)
    slices = view.slices(w)
    assert slices.shape[0] == len(expected)
    assert slices.untyped_storage().data_ptr() == w.untyped_storage().data_ptr()
    for got, want in zip(slices, expected, strict=True):
        assert sorted(got.flatten().tolist()) == sorted(want.flatten().tolist())


@given(weights_and_updates())
def test_norms_hold_from_1e_minus_30_to_1e30_in_float32(case):
    view, w, _ = case
    exact = torch.tensor([s.double().norm() for s in slices_by_indexing(w, view)])
    torch.testing.assert_close(norms(w, view).double(), exact.double(), rtol=1e-6, atol=0)


@given(weights_and_updates())
def test_a_tangential_step_changes_the_squared_norm_by_exactly_that_of_the_step(case):
    """‖w + Δ‖² = ‖w‖² + ‖Δ‖², that is ⟨w, Δ⟩ = 0, up to the rounding of Δ to float32."""
    view, w, u = case
    step = tangential(u, w, view)
    for ws, us, ds in zip(
        *(slices_by_indexing(t.double(), view) for t in (w, u, step)), strict=True
    ):
        # Each of the few roundings moves Δ by under eps·‖u‖; the sum of n terms by log2(n) more.
        bound = (4 + math.log2(ws.numel())) * torch.finfo(torch.float32).eps
        assert abs((ws * ds).sum()) <= bound * ws.norm() * us.norm()


@given(weights_and_updates())
def test_radial_and_tangential_parts_are_those_of_the_closed_form(case):
    view, w, u = case
    part = radial(u, w, view)
    for ws, us, ps in zip(
        *(slices_by_indexing(t.double(), view) for t in (w, u, part)), strict=True
    ):
        direction = ws / ws.norm()
        expected = direction * (direction * us).sum()
        torch.testing.assert_close(ps, expected, rtol=0, atol=1e-6 * us.norm().item())


@given(weights_and_updates())
def test_cosine_equals_its_definition(case):
    view, w, u = case
    expected = [
        (ws * us).sum() / (ws.norm() * us.norm())
        for ws, us in zip(*(slices_by_indexing(t.double(), view) for t in (w, u)), strict=True)
    ]
    torch.testing.assert_close(
        cosine(u, w, view).double(), torch.stack(expected), rtol=0, atol=2e-6
    )


def test_memory_formats_are_compared_entry_by_entry():
    w = torch.randn(4, 3, 5, 5)
    u = torch.randn(4, 3, 5, 5)
    plain = radial(u, w, View.channel())
    mixed = radial(u.contiguous(memory_format=torch.channels_last), w, View.channel())
    torch.testing.assert_close(mixed, plain)


@pytest.mark.parametrize("view", VIEWS)
def test_empty_tensors_have_empty_or_zero_norms(view):
    view = View.parse(view)
    w = torch.empty(0, 3, 2) if view.kind != "blocks" or view.dim else torch.empty(4, 3, 0)
    assert (norms(w, view) == 0).all()
    assert radial(w, w, view).shape == w.shape


def test_a_zero_slice_has_no_radial_direction():
    w = torch.randn(3, 4)
    w[1] = 0
    u = torch.randn(3, 4)
    assert (radial(u, w, View.channel())[1] == 0).all()
    assert torch.equal(tangential(u, w, View.channel())[1], u[1])


@pytest.mark.parametrize(("value", "norm"), [(math.inf, math.inf), (math.nan, math.nan)])
def test_a_slice_that_is_not_finite_says_so_and_leaves_the_others_alone(value, norm):
    w = torch.ones(2, 4)
    w[0, 0] = value
    torch.testing.assert_close(norms(w, View.channel()), torch.tensor([norm, 2.0]), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    w = torch.full((1, 70000), 10.0, dtype=dtype)  # the squares sum to 7e6, beyond float16
    got = norms(w, View.channel())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.tensor([math.sqrt(70000) * 10]))


def test_norms_are_differentiable():
    w = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: norms(w, View.channel()), w)
    u = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda u, w: tangential(u, w, View.blocks(3)), (u, w))


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_is_read_back_from_its_spelling(view):
    assert View.parse(str(View.parse(view))) == View.parse(view)
    assert str(View.parse(view)) == view


@pytest.mark.parametrize("text", ["rows", "channel(-1)", "blocks", "layer(2)", "channel(1, 2)", ""])
def test_an_unknown_spelling_is_an_error_that_shows_it(text):
    with pytest.raises(ValueError, match="Invalid view") as error:
        View.parse(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(
    ("view", "shape"), [(View.blocks(3), (4, 2)), (View.channel(2), (4, 2)), (View.channel(), ())]
)
def test_a_view_that_does_not_fit_is_an_error_that_shows_both(view, shape):
    with pytest.raises(ValueError, match="does not fit") as error:
        view.slices(torch.ones(shape))
    assert str(view) in str(error.value)
    assert str(shape) in str(error.value)


@pytest.mark.parametrize("make", [lambda: View.channel(-1), lambda: View.blocks(0)])
def test_impossible_views_cannot_be_made(make):
    with pytest.raises(ValueError, match="must be"):
        make()


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_the_global_norm_is_that_of_all_entries_together_from_1e_minus_30_to_1e30(size):
    tensors = [torch.randn(3, 4), torch.zeros(2), torch.randn(5).double(), torch.randn(2, 2, 2)]
    whole = torch.cat([t.double().flatten() for t in tensors]).norm()
    norm = global_norm([size * t for t in tensors])
    assert norm.shape == ()
    assert float(norm) == pytest.approx(size * float(whole), rel=1e-6)


def test_the_global_norm_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="global_norm of no tensors"):
        global_norm([])
