"""What a run was made with."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import normwise

__all__ = ["environment"]


def environment(device: str = "cpu") -> dict[str, Any]:
    """Versions and hardware, as far as they bear on the numbers; nothing that names a person.

    Args:
        device: the type of device that computes (default: ``"cpu"``).
    """
    packages = ("torch", "numpy", "scikit-learn", "matplotlib")
    accelerator = torch.cuda.get_device_name() if device == "cuda" else None
    return {
        "versions": {
            "normwise": normwise.__version__,
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
        },
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "device": device,
        **({"accelerator": accelerator} if accelerator else {}),
        "threads": 1,
    }


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "not known"
