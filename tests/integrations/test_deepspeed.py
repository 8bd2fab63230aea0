"""DeepSpeed steps what may be stepped there as a plain loop does, and the rest is refused."""

import functools
import json
import os
import subprocess
import sys
import types

import pytest
import torch
from torch import nn

import normwise as nw
from normwise.integrations.deepspeed import configured, muon

BATCH = 16
STEPS = 3
CONFIG = {"train_micro_batch_size_per_gpu": BATCH, "gradient_clipping": 0.0}
MATRICES = {"lr": 0.02, "weight_decay": 0.1}
OTHERS = {"lr": 1e-3, "weight_decay": 0.01}


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(12, 8),
        nn.Linear(8, 8, bias=False),
        nn.LayerNorm(8),
        nn.ReLU(),
        nn.Linear(8, 12),
    )


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(12, (2, BATCH), generator=generator)


def at_stage(stage, **more):
    return CONFIG | {"zero_optimization": {"stage": stage}} | more


def by_role(model):
    return nw.groups(
        nw.analyze(model, data()[0]),
        matrices=functools.partial(torch.optim.Muon, **MATRICES),
        others=functools.partial(torch.optim.AdamW, **OTHERS),
    )


def projected(model):
    groups = nw.analyze(model, data()[0]).param_groups(weight_decay=0.1)
    return nw.AdamP(groups, lr=0.01)


def entrywise(model):
    return nw.AdamP(model.parameters(), lr=0.01, weight_decay=0.1, view=None)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(
    ("make", "why"),
    [
        (projected, "it projects in view channel"),
        (by_role, "its update is orthogonalized"),
        (lambda m: torch.optim.Adafactor(m.parameters()), "nothing shows that Adafactor"),
        (lambda m: torch.optim.LBFGS(m.parameters()), "nothing shows that LBFGS"),
        (lambda m: nw.AdamP(m.parameters()), "it projects in view auto"),
        (
            lambda m: nw.sphere(torch.optim.SGD(m.parameters(), lr=0.1), {m[1].weight: "layer"}),
            "sphere changes what is done",
        ),
    ],
)
def test_what_needs_whole_weights_is_refused_where_they_are_made_flat(make, why, stage):
    optimizer = make(net())
    with pytest.raises(ValueError, match=rf"ZeRO stage {stage} flattens.*{why}"):
        configured(optimizer, at_stage(stage))
    assert configured(optimizer, at_stage(0)) == at_stage(0)


def test_what_is_done_entry_by_entry_gets_the_keys_that_it_needs():
    for optimizer in (entrywise(net()), torch.optim.AdamW(net().parameters())):
        given = at_stage(2)
        made = configured(optimizer, given)
        assert made == at_stage(2, zero_allow_untested_optimizer=True)
        assert given == at_stage(2)
    offloaded = at_stage(3)
    offloaded["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    assert configured(entrywise(net()), offloaded)["zero_force_ds_cpu_optimizer"] is False


def corrected(model):
    """A policy of decay that acts on one weight."""
    optimizer = entrywise(model)
    nw.decay.Corrected().attach(optimizer, on=[model[1].weight])
    return optimizer


def test_a_policy_of_decay_and_symmetries_of_several_weights_need_them_whole_too():
    with pytest.raises(ValueError, match="changes what is done to them"):
        configured(corrected(net()), at_stage(1))
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    named = [{"params": list(model.named_parameters()), "view": None}]
    optimizer = nw.AdamP(named, symmetries=nw.analyze(model, torch.randn(5, 4)))
    with pytest.raises(ValueError, match="symmetries= are of whole weights"):
        configured(optimizer, at_stage(1))


def test_half_precision_is_refused_where_its_copies_would_not_be_known():
    halves = at_stage(0, bf16={"enabled": True})
    assert configured(projected(net()), halves) == halves  # its options are in its groups
    with pytest.raises(ValueError, match="float32 copies"):
        configured(corrected(net()), halves)
    with pytest.raises(ValueError, match="has a section 'optimizer'"):
        configured(projected(net()), CONFIG | {"optimizer": {"type": "Muon"}})


class MuonWithAuxAdam(torch.optim.Optimizer):
    """The interface of DeepSpeed's: groups that say ``use_muon``, and are sorted by size."""

    def __init__(self, param_groups):
        for group in param_groups:
            if group["use_muon"]:
                group["params"] = sorted(group["params"], key=lambda p: p.shape, reverse=True)
        super().__init__(param_groups, {"lr": 0.0})


@pytest.fixture
def stand_in(monkeypatch):
    path = "deepspeed.runtime.zero.muon.muon_optimizer"
    parts = path.split(".")
    for i in range(1, len(parts) + 1):
        module = types.ModuleType(".".join(parts[:i]))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    module.MuonWithAuxAdam = MuonWithAuxAdam


def test_deepspeeds_muon_is_told_roles(stand_in):
    model = net()
    optimizer = muon(nw.analyze(model, data()[0]), matrices=MATRICES, others=OTHERS)
    marks = {name: p.use_muon for name, p in model.named_parameters()}
    assert {name for name, mark in marks.items() if mark} == {"1.weight"}
    for group in optimizer.param_groups:
        assert all(p.use_muon == group["use_muon"] for p in group["params"])
        decay = 0.1 if group["use_muon"] else 0.0 if group["params"][0].ndim < 2 else 0.01
        assert (group["lr"], group["weight_decay"]) == (0.02 if group["use_muon"] else 1e-3, decay)
    for stage in range(4):  # whole matrices are gathered, from gradients that are not scattered
        made = configured(optimizer, at_stage(stage))
        assert made["zero_optimization"].get("reduce_scatter", True) == (stage != 3)


def test_kernels_that_deepspeeds_muon_takes_for_stacks_are_refused(stand_in):
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 2))
    report = nw.analyze(model, torch.randn(5, 3, 8))
    with pytest.raises(ValueError, match=r"takes 0\.weight for stacks of matrices"):
        muon(report, matrices=MATRICES, others=OTHERS)


def test_without_deepspeed_its_muon_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    report = nw.analyze(net(), data()[0])
    with pytest.raises(ImportError, match="pip install deepspeed"):
        muon(report, matrices=MATRICES, others=OTHERS)


@pytest.mark.slow  # DeepSpeed compiles an extension when it first starts on a CPU
@pytest.mark.parametrize(
    ("name", "stages"),
    [("projected", "0"), ("by_role", "0"), ("entrywise", "012"), ("muon", "0123")],
)
def test_deepspeed_steps_as_a_plain_loop_does(name, stages):
    pytest.importorskip("deepspeed", reason="the engine that is tested")
    # In a process of its own, whose process group is DeepSpeed's.
    done = subprocess.run(
        [sys.executable, __file__, name, stages],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ
        | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        | {"MASTER_PORT": "0", "DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"},
    )
    assert done.returncode == 0, done.stderr
    differences = json.loads(done.stdout.splitlines()[-1])
    # Its Muon orthogonalizes in bfloat16, each stage alike; the others are bit for bit.
    bound = 2e-3 if name == "muon" else 0.0
    assert all(difference <= bound for difference in differences.values()), differences


def main(name, stages):
    """The largest difference to the plain loop, by stage."""
    import deepspeed

    def trained(optimizer_of, stage=None):
        model = net()
        optimizer = optimizer_of(model)
        tokens, labels = data()
        if stage is None:
            for _ in range(STEPS):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(tokens), labels).backward()
                optimizer.step()
            return [p.detach().clone() for p in model.parameters()]
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=configured(optimizer, at_stage(stage))
        )
        for _ in range(STEPS):
            engine.backward(nn.functional.cross_entropy(engine(tokens), labels))
            engine.step()
        with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
            return [p.detach().clone() for p in model.parameters()]

    def theirs(model):
        report = nw.analyze(model, data()[0])
        return muon(report, matrices=MATRICES | {"ns_method": "standard"}, others=ADAM)

    ADAM = OTHERS | {"betas": (0.9, 0.999), "eps": 1e-8}
    make = theirs if name == "muon" else globals()[name]
    expected = trained(by_role if name == "muon" else make)
    found = {}
    for stage in map(int, stages):
        pairs = zip(trained(make, stage), expected, strict=True)
        found[stage] = max((a - b).abs().max().item() for a, b in pairs)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
