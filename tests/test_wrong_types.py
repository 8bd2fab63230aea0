"""What is of a wrong type is told in one line that shows it, before anything is changed."""

import pytest
import torch
from torch import nn

import normwise as nw
from normwise import decay


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))


def optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


CASES = {
    "sphere: no optimizer": lambda m: nw.sphere("sgd", "channel"),
    "sphere: no views": lambda m: nw.sphere(optimizer(m), 3),
    "radial brake": lambda m: nw.RadialBrake("half"),
    "tangential: no optimizer": lambda m: nw.tangential("sgd", "channel"),
    "tangential: no views": lambda m: nw.tangential(optimizer(m), 3),
    "AWP: no model": lambda m: nw.AWP("net", optimizer(m)),
    "AWP: no optimizer": lambda m: nw.AWP(m, "sgd"),
    "AWP: gamma": lambda m: nw.AWP(m, optimizer(m), gamma="small"),
    "AWP: views": lambda m: nw.AWP(m, optimizer(m), views=3),
    "RWP: max_loss": lambda m: nw.RWP(m, optimizer(m), max_loss="large"),
    "RWP: steps": lambda m: nw.RWP(m, optimizer(m), steps="many"),
    "Balance: no model": lambda m: nw.Balance("net", "report"),
    "Balance: no report": lambda m: nw.Balance(m, "report"),
    "Monitor: no report": lambda m: nw.Monitor(m, optimizer(m), "report"),
    "explain: no optimizer": lambda m: decay.explain("sgd"),
    "explain: no report": lambda m: decay.explain(optimizer(m), "report"),
    "by_rules: no model": lambda m: decay.by_rules("net", 0.1),
    "by_analysis: no report": lambda m: decay.by_analysis(m, "report", invariant=0.1, plain=0.1),
    "linear: first": lambda m: decay.Linear(10, first="one"),
    "cosine: last": lambda m: decay.Cosine(10, last="none"),
    "piecewise: milestones": lambda m: decay.Piecewise(3, (1.0, 0.1)),
    "piecewise: values": lambda m: decay.Piecewise((3,), ("all", "none")),
    "analyze: no model": lambda m: nw.analyze("net", torch.ones(2, 4)),
    "analyze: draws": lambda m: nw.analyze(m, torch.ones(2, 4), draws="three"),
    "analyze: seed": lambda m: nw.analyze(m, torch.ones(2, 4), seed="zero"),
    "analyze: joint": lambda m: nw.analyze(m, torch.ones(2, 4), joint="no"),
    "analyze: factory": lambda m: nw.analyze(m, torch.ones(2, 4), factory="net"),
    "normalize: no model": lambda m: nw.weight_normalize("net"),
    "normalize: gain": lambda m: nw.weight_normalize(m, gain="no"),
    "normalize: eps": lambda m: nw.weight_normalize(m, eps="small"),
    "standardize: only": lambda m: nw.weight_standardize(m, only=3),
    "center: skip": lambda m: nw.center_weight_normalize(m, skip=3),
    "add_gains: no model": lambda m: nw.add_gains("net", {}),
    "add_gains: no report": lambda m: nw.add_gains(m, 3),
}


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_a_wrong_type_is_told_in_one_line(make):
    model = network()
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises((TypeError, ValueError), match=r"^Invalid \w.*: .+; must be ") as error:
        make(model)
    assert "\n" not in str(error.value)
    assert {name: id(module) for name, module in model.named_modules()} == before
