"""Make a release: set the version everywhere, build, try the packages, commit and tag; go on.

    python tools/release.py 0.2.0
    python tools/release.py          only build and try

Nothing leaves this machine: pushing the tag makes the release workflow publish what it builds.
"""

from __future__ import annotations

import argparse
import datetime
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
VERSION = re.compile(r"\d+\.\d+\.\d+((a|b|rc)\d+)?")


def in_package(text: str, version: str) -> str:
    return replaced(r'(?m)^__version__ = ".*"$', f'__version__ = "{version}"', text)


def in_citation(text: str, version: str, today: str) -> str:
    text = re.sub(r"(?m)^date-released:.*\n", "", text)
    return replaced(r"(?m)^version: .*$", f"version: {version}\ndate-released: {today}", text)


def in_changelog(text: str, version: str, today: str) -> str:
    """What was unreleased is of this version, and a new section is open."""
    heading = f"## Unreleased\n\n## {version} ({today})\n"
    return replaced(r"(?m)^## Unreleased\n", heading, text)


def replaced(pattern: str, by: str, text: str) -> str:
    text, count = re.subn(pattern, lambda _: by, text)
    if count != 1:
        raise SystemExit(f"{pattern} is found {count} times; must be once")
    return text


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


def build(folder: Path) -> None:
    """A wheel and an sdist; each is installed into an empty environment and imported there."""
    shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", str(folder))
    for package in sorted(folder.iterdir()):
        with tempfile.TemporaryDirectory() as empty:
            venv.create(empty, with_pip=True)
            bin_ = Path(empty) / ("Scripts" if sys.platform == "win32" else "bin")
            run(str(bin_ / "pip"), "install", "--quiet", str(package))
            told = run(str(bin_ / "normwise"), "--version")
            print(f"{package.name}: {told}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("version", nargs="?", help="(default: none; only build and try)")
    version = parser.parse_args().version
    if version is not None:
        set_version(version, parser.error)
    build(ROOT / "dist")
    if version is not None:
        run("git", "commit", "--all", "--message", f"Release {version}")
        run("git", "tag", "--annotate", f"v{version}", "--message", f"normwise {version}")
        begin(after(version))
        print(f"committed and tagged; to publish: git push origin HEAD v{version}")
    return 0


def after(version: str) -> str:
    """The version in development once this one is out."""
    major, minor, patch = version.split(".")
    if patch.isdigit():
        return f"{major}.{int(minor) + 1}.0.dev0"
    kind, number = re.split(r"(?<=\D)(?=\d+$)", version)
    return f"{kind}{int(number) + 1}.dev0"


def begin(version: str) -> None:
    """From here on the code is of a version in development."""
    file = ROOT / "src/normwise/__init__.py"
    file.write_text(in_package(file.read_text("utf-8"), version), "utf-8")
    run("git", "commit", "--all", "--message", f"Begin {version}")


def set_version(version: str, refuse: Callable[[str], object]) -> None:
    """Write a version wherever it stands; ``refuse`` is told why it cannot be."""
    if not VERSION.fullmatch(version):
        refuse(f"version {version!r} is none; must be such as 0.2.0 or 1.0.0rc1")
    if run("git", "status", "--porcelain"):
        refuse("the work tree has changes; commit them first")
    if f"v{version}" in run("git", "tag").split():
        refuse(f"there is a tag v{version} already")
    today = datetime.date.today().isoformat()
    for path, change in {
        "src/normwise/__init__.py": lambda text: in_package(text, version),
        "CITATION.cff": lambda text: in_citation(text, version, today),
        "CHANGELOG.md": lambda text: in_changelog(text, version, today),
    }.items():
        file = ROOT / path
        file.write_text(change(file.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    sys.exit(main())
