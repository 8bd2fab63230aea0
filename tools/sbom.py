"""What `pip install normwise[EXTRA]` brings: a CycloneDX list for the library alone and each extra.

    python tools/sbom.py build/sbom

Read from the metadata of what is installed here; an extra of which a package is missing is left
out, and said so. `make sbom` makes an environment that has them all.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PACKAGE = "normwise"
FOR_DEVELOPERS = {"dev", "docs"}


def requirements(name: str, extras: frozenset[str]) -> Iterator[Requirement]:
    """What an installed package needs here, with some of its extras."""
    for line in metadata.requires(name) or []:
        requirement = Requirement(line)
        if requirement.marker is None or any(
            requirement.marker.evaluate({"extra": extra}) for extra in extras or {""}
        ):
            yield requirement


def dependencies(extra: str) -> dict[str, list[str]]:
    """Every package that comes with an extra ("" for none), and which others each of them needs.

    Raises:
        metadata.PackageNotFoundError: for one that is not installed here.
    """
    found: dict[str, list[str]] = {}
    waiting = [(PACKAGE, frozenset({"", extra}))]
    seen = set(waiting)
    while waiting:
        name, extras = waiting.pop()
        needed = list(requirements(name, extras))
        names = [canonicalize_name(requirement.name) for requirement in needed]
        found[name] = sorted({*found.get(name, []), *names})
        for key, requirement in zip(names, needed, strict=True):
            metadata.version(key)
            entry = (key, frozenset({"", *requirement.extras}))
            if entry not in seen:
                seen.add(entry)
                waiting.append(entry)
    return found


def component(name: str) -> dict[str, Any]:
    """A package as CycloneDX describes one."""
    told = metadata.metadata(name)
    version = metadata.version(name)
    licence = told.get("License-Expression")
    known = [{"expression": licence}] if licence else []
    if not known:
        kinds = [k for k in told.get_all("Classifier") or [] if k.startswith("License :: ")]
        known = [{"license": {"name": kind.rpartition(" :: ")[2]}} for kind in kinds]
    purl = f"pkg:pypi/{name}@{version.replace('+', '%2B')}"
    return {
        "type": "library",
        "bom-ref": name,
        "name": name,
        "version": version,
        "purl": purl,
        **({"licenses": known} if known else {}),
    }


def bom(extra: str) -> dict[str, Any]:
    """The list for an extra."""
    found = dependencies(extra)
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {**component(PACKAGE), "name": PACKAGE + f"[{extra}]" * bool(extra)}
        },
        "components": [component(name) for name in sorted(found) if name != PACKAGE],
        "dependencies": [{"ref": name, "dependsOn": found[name]} for name in sorted(found)],
    }


def main(folder: Path) -> int:
    """Write a list for each extra; 1 if one had to be left out."""
    folder.mkdir(parents=True, exist_ok=True)
    extras = set(metadata.metadata(PACKAGE).get_all("Provides-Extra") or []) - FOR_DEVELOPERS
    missing = 0
    for extra in ["", *sorted(extras)]:
        try:
            content = bom(extra)
        except metadata.PackageNotFoundError as error:
            print(f"{extra or PACKAGE}: left out, {error.name} is not installed here")
            missing = 1
            continue
        path = folder / f"{PACKAGE}{'-' * bool(extra)}{extra}.cdx.json"
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"{path}: {len(content['components'])} packages")
    return missing


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
