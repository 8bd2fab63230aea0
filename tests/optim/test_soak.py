"""The short form of ``python tests/optim/soak.py``, which does a million operations."""

import pytest
from soak import soak


@pytest.mark.parametrize("seed", range(3))
def test_random_operations_on_a_live_optimizer_change_nothing_else(seed, numba):
    soak(250, seed)
