"""A user's program, for mypy --strict: it reads the types of the library as it is installed.

Where a call is wrong, mypy has to say so: an ignore that nothing needs is an error.
"""

import torch
from typing_extensions import assert_type

import normwise as nw
from normwise.updates import UpdateRule

model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
report = nw.analyze(model, torch.randn(2, 4))
assert_type(report, nw.Report)
assert_type(report["0.weight"], nw.ParameterReport)

optimizer = nw.AdamP(report.param_groups(weight_decay=1e-2), lr=1e-3)
assert_type(optimizer, nw.AdamP)
assert_type(nw.describe(optimizer), list[UpdateRule])
nw.EpsilonShiftedL2(model, weight_decay=1e-4, eps=1e-3).attach(optimizer)
nw.decay.Decoupled(0.1).attach(optimizer)
with nw.Monitor(model, optimizer, report, every=50) as monitor:
    assert_type(monitor, nw.Monitor)

nw.View.channel("0")  # type: ignore[arg-type]  # a word for a number
nw.AdamP(model.parameters(), learning_rate=1e-3)  # type: ignore[call-arg]  # it is called lr
nw.analyze(model)  # type: ignore[call-arg]  # without a batch
