"""Weights that are sharded cannot be balanced, and are left as they are."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import normwise as nw


def refusals():
    """What balancing and equalizing say of a sharded model, and whether it has changed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    report = nw.analyze(model, torch.randn(8, 4))
    fully_shard(model)
    before = [p.full_tensor().clone() for p in model.parameters()]
    said = []
    for act in (nw.balance, nw.equalize):
        with pytest.raises(ValueError, match="DTensor") as error:
            act(model, report)
        said.append(str(error.value))
    after = [p.full_tensor() for p in model.parameters()]
    return said, all(map(torch.equal, before, after))


def test_a_sharded_parameter_is_refused_by_name_and_nothing_has_changed(world2):
    for said, unchanged in world2(refusals):
        assert len(said) == 2
        assert all("is sharded (DTensor); balance the whole model before" in text for text in said)
        assert unchanged
