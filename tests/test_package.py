"""What is shipped: one version, extras that exist, packages that install and have types."""

import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import normwise

ROOT = Path(__file__).parent.parent


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(path):
    return (ROOT / path).read_text("utf-8")


def test_a_release_sets_the_version_wherever_it_stands():
    release = tool("release")
    assert '__version__ = "7.8.9"' in release.in_package(read("src/normwise/__init__.py"), "7.8.9")
    once = release.in_citation(read("CITATION.cff"), "7.8.8", "2030-01-01")
    twice = release.in_citation(once, "7.8.9", "2030-01-02")
    assert twice == once.replace("7.8.8", "7.8.9").replace("2030-01-01", "2030-01-02")
    changelog = read("CHANGELOG.md")
    changed = release.in_changelog(changelog, "7.8.9", "2030-01-01")
    assert changed.replace("\n## 7.8.9 (2030-01-01)\n", "") == changelog
    with pytest.raises(SystemExit, match="found 0 times"):
        release.in_changelog("# Changelog\n", "7.8.9", "2030-01-01")


def test_after_a_release_the_next_minor_version_is_in_development():
    release = tool("release")
    assert release.after("0.2.0") == release.after("0.2.7") == "0.3.0.dev0"
    assert release.after("1.0.0rc1") == "1.0.0rc2.dev0"


def test_the_version_that_is_cited_is_the_one_released():
    (cited,) = re.findall(r"(?m)^version: (.*)$", read("CITATION.cff"))
    assert ".dev" in normwise.__version__ or cited == normwise.__version__


def test_every_extra_that_is_recommended_exists():
    extras = set(re.findall(r"(?m)^(\w+) = \[", read("pyproject.toml")))
    sources = [*(ROOT / "src").rglob("*.py"), *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    for path in sources:
        for named in re.findall(r"normwise\[([\w,]+)\]", path.read_text("utf-8")):
            assert set(named.split(",")) <= extras, path


def test_the_list_of_dependencies_has_what_an_extra_brings():
    sbom = tool("sbom")
    pytest.importorskip("numba", reason="a list is made of what is installed")
    try:
        plain, fast = sbom.bom(""), sbom.bom("cpu")
    except sbom.metadata.PackageNotFoundError:
        pytest.skip("normwise is not installed, only imported")
    names = [{c["name"] for c in bom["components"]} for bom in (plain, fast)]
    assert "torch" in names[0]
    assert {"numba", "llvmlite", "numpy"} <= names[1] - (names[0] - {"numpy"})
    for bom in (plain, fast):
        known = {c["bom-ref"] for c in bom["components"]} | {"normwise"}
        assert {ref for d in bom["dependencies"] for ref in (d["ref"], *d["dependsOn"])} <= known


def test_the_lists_of_dependencies_are_made_where_every_extra_for_users_is_installed():
    (installed,) = re.findall(r"(?m)^EXTRAS := (.*)$", read("Makefile"))
    _, _, section = read("pyproject.toml").partition("[project.optional-dependencies]\n")
    extras = set(re.findall(r"(?m)^(\w+) = \[", section.partition("\n\n")[0]))
    assert set(installed.split(",")) == extras - tool("sbom").FOR_DEVELOPERS


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    pytest.importorskip("build", reason="builds the packages")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


@pytest.mark.slow
def test_the_packages_hold_every_file_of_the_library(packages):
    wheel, sdist = packages
    tracked = subprocess.run(
        ["git", "ls-files", "src"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    with zipfile.ZipFile(wheel) as archive:
        assert {name.removeprefix("src/") for name in tracked} <= set(archive.namelist())
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {*tracked, "LICENSE", "README.md", "pyproject.toml"} <= names


@pytest.mark.slow
def test_a_users_program_sees_the_types(packages, tmp_path):
    """In an environment of its own, to which only torch and mypy are lent."""
    venv.create(tmp_path / "env")
    python = tmp_path / "env" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MYPYPATH")}
    told = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    )
    site = Path(told.stdout.strip())
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps"]
    install += ["--no-index", str(packages[0])]
    subprocess.run(install, check=True, capture_output=True, env=environment)
    import mypy
    import torch

    for lent in {Path(m.__file__).parent.parent for m in (mypy, torch)}:
        (site / "lent.pth").write_text(f"{lent}\n", "utf-8")
    imported = subprocess.run(
        [str(python), "-c", "import normwise; print(normwise.__file__)"],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert imported.stdout.startswith(str(site))
    program = (ROOT / "tests" / "downstream.py").read_text("utf-8")
    (tmp_path / "program.py").write_text(program, "utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(python)]
    done = subprocess.run(
        [*command, "program.py"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
