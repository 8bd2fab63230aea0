"""Other projects' optimizer tests, run against our optimizers in the place of theirs.

    python tests/upstream/run.py torch CHECKOUT      pytorch/pytorch: test/test_optim.py
    python tests/upstream/run.py jettify CHECKOUT    jettify/pytorch-optimizer
    python tests/upstream/run.py kozistr CHECKOUT    kozistr/pytorch_optimizer
    python tests/upstream/run.py timm CHECKOUT       huggingface/pytorch-image-models

Nothing is fetched: CHECKOUT is the folder of a checkout, of the version of torch that is installed
for the first. What cannot pass is in cannot_pass.py with a reason, and a test of it that does pass
is a failure. Further arguments go to pytest.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
FILES = {
    "torch": ["test/test_optim.py"],
    "jettify": ["tests"],
    "kozistr": [
        "tests/test_optimizers.py",
        "tests/test_optimizer_parameters.py",
        "tests/test_general_optimizer_parameters.py",
    ],
    "timm": ["tests/test_optim.py"],
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", choices=FILES)
    parser.add_argument("checkout", type=Path)
    options, further = parser.parse_known_args()
    paths = [options.checkout / name for name in FILES[options.suite]]
    for path in paths:
        if not path.exists():
            parser.error(f"there is no {path}: is this a checkout that {options.suite!r} has?")
    search = [options.checkout, options.checkout / "test", HERE, *sys.path]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(p.resolve()) for p in map(Path, search)),
        "NORMWISE_UPSTREAM": options.suite,
        "NORMWISE_CHECKOUT": str(options.checkout.resolve()),
        "TORCH_DEVICE": os.environ.get("TORCH_DEVICE", "cpu"),
    }
    command = [
        *(sys.executable, "-m", "pytest", "-p", "plugin", "--import-mode=prepend", "-q", "-rx"),
        *("-c", os.devnull, "--rootdir", str(options.checkout), "-p", "no:cacheprovider"),
        *map(str, paths),
        *further,
    ]
    return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
