"""Run every example in an empty environment that has what its first line says, and nothing else.

    python tools/try_examples.py build/examples
    python tools/try_examples.py build/examples small_gpt your_network

Builds the wheel, makes one environment for each different first line, and deletes it afterwards.
Notebooks get `normwise[lab]` and Jupyter's runner. What a script writes and prints is left in the
folder; the versions of packages are those of constraints.txt.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import time
import venv
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
JUPYTER = ("normwise[lab]", "nbclient", "ipykernel")
RUN_NOTEBOOK = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=600).execute()
nbformat.write(notebook, "executed.ipynb")
"""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def to_install(example: Path) -> tuple[str, ...]:
    if example.suffix == ".ipynb":
        return JUPYTER
    first = example.read_text(encoding="utf-8").splitlines()[0]
    return tuple(shlex.split(first.removeprefix("# pip install ")))


def command(example: Path) -> list[str]:
    if example.suffix == ".ipynb":
        return ["-c", RUN_NOTEBOOK, str(example)]
    return [*(TORCHRUN if "torchrun" in example.read_text("utf-8") else ()), str(example)]


def timed(*words: str | Path, **options: object) -> tuple[float, int]:
    start = time.perf_counter()
    code = subprocess.run(words, check=False, **options).returncode
    return time.perf_counter() - start, code


def main(folder: Path, names: list[str]) -> int:
    """Try the examples of these names, or all; returns how many failed."""
    groups = defaultdict(list)
    examples = [*(ROOT / "examples").glob("*.py"), *(ROOT / "examples").rglob("*.ipynb")]
    for example in sorted(examples):
        if not names or example.stem in names:
            groups[to_install(example)].append(example)
    failed = 0
    environment = {name: v for name, v in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"MPLBACKEND": "agg"}
    with tempfile.TemporaryDirectory() as empty:
        build = [sys.executable, "-m", "build", "--wheel", "--outdir", empty]
        subprocess.run([*build, str(ROOT)], check=True, stdout=subprocess.DEVNULL)
        (wheel,) = Path(empty).glob("*.whl")
        for packages, examples in groups.items():
            with tempfile.TemporaryDirectory() as place:
                venv.create(place, with_pip=True)
                python = Path(place) / ("Scripts" if sys.platform == "win32" else "bin") / "python"
                wanted = [p.replace("normwise", str(wheel), 1) for p in packages]
                pins = ["--constraint", str(ROOT / "constraints.txt")]
                took, code = timed(python, "-m", "pip", "install", "--quiet", *pins, *wanted)
                print(f"pip install {shlex.join(packages)}: {took:.0f} s, exit {code}", flush=True)
                for example in examples:
                    own = folder.resolve() / example.stem
                    own.mkdir(parents=True, exist_ok=True)
                    with (own / "output.txt").open("w", encoding="utf-8") as output:
                        told = {"stdout": output, "stderr": subprocess.STDOUT}
                        where = {"cwd": own, "env": environment}
                        took, code = timed(python, *command(example), **where, **told)
                    print(f"  {example.relative_to(ROOT)}: {took:.0f} s, exit {code}", flush=True)
                    failed += code != 0
    return failed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
