import os

import hypothesis
import pytest
import torch

# Without a GPU the CUDA kernels are interpreted; Triton looks at this when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Timings on shared machines vary too much for a deadline to mean anything.
hypothesis.settings.register_profile("normwise", deadline=None)
hypothesis.settings.load_profile("normwise")

# The suite runs in as many processes as there are cores.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
