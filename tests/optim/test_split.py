"""Fused steps of slices that lie on several ranks: here two plans that exchange their sums by hand,
against the single-tensor step of the whole weight in float64. ``tests/distributed`` does the same
between processes."""

import math
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

import normwise
from normwise import View
from normwise.optim import sharded
from normwise.optim.groups import as_view_option
from normwise.optim.kernels import FusedPlans
from normwise.optim.step import AdamRule, Part, SGDRule, Step

ADAM, SGD = AdamRule(0.9, 0.999, False), SGDRule(0.9, 0.0, False)
EPS = 1e-8


@dataclass
class Rank:
    """One rank's shards and state; as an ending it keeps the plan of a step."""

    params: list
    states: list
    split: bool
    plans: FusedPlans = field(default_factory=FusedPlans)
    plan: object = None
    grads: list = field(default_factory=list)

    def may_be_fused(self, params):
        return True

    def end_plan_(self, plan, params):
        self.plan = plan

    def begin(self, grads, step):
        states = tuple(list(column) for column in zip(*self.states, strict=True))
        group = {"fused": True}
        self.grads = grads  # as .grad keeps them until the step has ended
        left = self.plans.step_([Part(self.params, grads, states, step, group, self)])
        assert left == []


def whole_weights(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 40), (4, 3, 3, 3), (3, 2600)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def gradients(whole, step, kind):
    generator = torch.Generator().manual_seed(step + 1)
    grads = []
    for w in whole:
        g = torch.randn(w.shape, generator=generator, dtype=torch.float64)
        if kind != "shut":
            view = View.channel() if kind == "channel" else View.layer()
            g = normwise.geometry.tangential(g, w.double(), view)
        grads.append(g.to(w.dtype))
    return grads


def shards(tensors, dim):
    """Two ranks' shares, the first larger."""
    cut = [math.ceil(t.shape[dim] * 0.6) for t in tensors]
    first = [t.narrow(dim, 0, n).contiguous().clone() for t, n in zip(tensors, cut, strict=True)]
    second = [
        t.narrow(dim, n, t.shape[dim] - n).contiguous().clone()
        for t, n in zip(tensors, cut, strict=True)
    ]
    return first, second


def ranks(whole, dim, rule, split):
    made = []
    for params in shards(whole, dim):
        states = [
            [torch.zeros_like(p) for _ in range(2)] + [torch.zeros(())]
            if isinstance(rule, AdamRule)
            else [torch.zeros_like(p)]
            for p in params
        ]
        made.append(Rank(params, states, split))
    return made


def exchange(pieces):
    for columns in zip(*pieces, strict=True):
        total = sum(c.clone() for c in columns)
        for c in columns:
            c.copy_(total)


def reference(whole, rule, view, norm, delta):
    params = [w.double().requires_grad_() for w in whole]
    options = {"lr": 0.01, "weight_decay": 0.1, "delta": delta, "view": view, "norm": norm}
    maker = normwise.AdamP if isinstance(rule, AdamRule) else normwise.SGDP
    if isinstance(rule, SGDRule):
        options["momentum"] = 0.9
    return params, maker(params, eps=EPS, foreach=False, **options)


def check(rule, view, norm, dim, dtype, split, end):
    """Steps whose gates are open by channel, twice, then open by layer, then shut."""
    whole = whole_weights(dtype)
    exact, optimizer = reference(whole, rule, view, norm, delta=0.3)
    both = ranks(whole, dim, rule, split)
    ratio = 0.0 if norm == "fixed" else 0.1
    scale = 1.0 if isinstance(rule, AdamRule) else 1 / (1 - rule.momentum)
    step = Step(rule, 0.01, 0.1, scale, ratio, EPS, 0.3, as_view_option(view), norm)
    kinds = ["channel", "channel", "layer", "shut"] if view == "auto" else ["shut", "shut"]
    for number, kind in enumerate(kinds):
        grads = gradients([p.detach() for p in exact], number, kind)
        for p, g in zip(exact, grads, strict=True):
            p.grad = g.double()
        optimizer.step()
        for rank, part in zip(both, shards(grads, dim), strict=True):
            rank.begin([g.to(dtype) for g in part], step)
        end([rank.plan for rank in both], whole)
        for rank in both:
            rank.plan.finish_(rank.params)
    # In float32 some roundings, in each of up to four steps, of entries up to 4.
    tolerance = 1e-12 if dtype == torch.float64 else 4e-6
    for a, b, p in zip(both[0].params, both[1].params, exact, strict=True):
        ours = torch.cat([a, b], dim).double()
        torch.testing.assert_close(ours, p.detach(), rtol=tolerance, atol=tolerance)


RULES = pytest.mark.parametrize("rule", [ADAM, SGD], ids=["adam", "sgd"])


@pytest.fixture(
    params=[
        ("numba", torch.float32),
        ("numba", torch.float64),
        ("interpreted", torch.float64),
        pytest.param(("interpreted", torch.float32), marks=pytest.mark.slow),
    ],
    ids=lambda param: f"{param[0]}-{str(param[1])[6:]}",
)
def dtype(request):
    """Of weights, whose kernels wait for an exchange."""
    compiler, dtype = request.param
    request.getfixturevalue(compiler)
    return dtype


@RULES
@pytest.mark.parametrize("norm", ["free", "fixed"])
@pytest.mark.parametrize(("view", "dim"), [("channel", 1), ("layer", 0)])
def test_pieces_of_slices_in_an_explicit_view(rule, norm, view, dim, dtype):
    def end(plans, whole):
        exchange([plan.sum_pieces() for plan in plans])

    check(rule, view, norm, dim, dtype, True, end)


@RULES
def test_pieces_of_channels_whose_gate_is_decided_elsewhere(rule, dtype):
    def end(plans, whole):
        pieces = [plan.sum_pieces() for plan in plans]
        exchange(pieces)
        for plan, sums in zip(plans, pieces, strict=True):
            layouts = [
                SimpleNamespace(
                    view=View.channel(),
                    shape=w.shape,
                    entries=w[0].numel(),
                    by_channel=lambda x: x,
                )
                for w in whole
            ]
            decided = [
                sharded._gated_coefficients(
                    SimpleNamespace(layout=layout, entries=layout.entries),
                    piece.clone()[:, None],
                    dtype,
                    *plan.gate,
                )
                for layout, piece in zip(layouts, sums, strict=True)
            ]
            coefficients = [by_channel[:, 0] for by_channel, _ in decided]
            plan.replace_gate(coefficients, torch.cat([opened for _, opened in decided]))

    check(rule, "auto", "free", 1, dtype, True, end)


@RULES
def test_layers_of_whole_channels_in_auto(rule, dtype):
    def end(plans, whole):
        totals = [plan.totals() for plan in plans]
        for plan in plans:
            plan.replace_totals(sum(totals), [w.numel() for w in whole])

    check(rule, "auto", "free", 0, dtype, False, end)
