import hypothesis
import pytest
import torch

# Timings on shared machines vary too much for a deadline to mean anything.
hypothesis.settings.register_profile("normwise", deadline=None)
hypothesis.settings.load_profile("normwise")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
