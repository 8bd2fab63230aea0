import importlib.util
from pathlib import Path

import pytest

from normwise import analyze

spec = importlib.util.spec_from_file_location(
    "balancing_networks", Path(__file__).with_name("networks.py")
)
networks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(networks)


@pytest.fixture(scope="session")
def network():
    """By name: a fresh network, its batch and its report; the analysis is made once."""
    reports = {}

    def get(name):
        model, x = networks.built(name)
        if name not in reports:
            reports[name] = analyze(model, x)
        return model, x, reports[name]

    return get
