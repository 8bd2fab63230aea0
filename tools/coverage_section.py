"""Write what the tests do not reach into a page: a table of rooms, and the files with large gaps.

    python tools/coverage_section.py build/coverage.json docs/tested.md "make coverage"

The section stands between two marks in the page and is replaced.
"""

from __future__ import annotations

import json
import platform
import sys
from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- coverage: begin -->\n", "<!-- coverage: end -->\n"
SHOWN_BELOW = 90.0
PACKAGE = "src/normwise/"


def share(files: Iterable[dict[str, Any]], kind: str) -> str:
    """Covered of all lines or branches, in percent."""
    total = "num_statements" if kind == "lines" else "num_branches"
    known = [file["summary"] for file in files]
    count = sum(s[total] for s in known)
    return f"{100 * sum(s[f'covered_{kind}'] for s in known) / count:.1f}%" if count else "–"


def ranges(lines: list[int]) -> str:
    """Numbers as runs: 3–5, 9."""
    breaks = [b for a, b in pairwise(lines) if b != a + 1]
    firsts, lasts = [*lines[:1], *breaks], [a for a, b in pairwise(lines) if b != a + 1]
    lasts += lines[-1:]
    return ", ".join(f"{a}–{b}" if a != b else str(a) for a, b in zip(firsts, lasts, strict=True))


def gaps(file: dict[str, Any]) -> str:
    """Lines not reached, and branches not taken from lines that are."""
    missing = set(file["missing_lines"])
    jumps = sorted({a for a, _ in file["missing_branches"] if a not in missing})
    told = [ranges(sorted(missing))] if missing else []
    return "; ".join([*told, *([f"branches from {ranges(jumps)}"] if jumps else [])])


def section(report: dict[str, Any], command: str) -> str:
    files = {path.removeprefix(PACKAGE): file for path, file in report["files"].items()}
    files = {p: f for p, f in files.items() if f["summary"]["num_statements"]}
    rooms = defaultdict(list)
    for path, file in files.items():
        rooms[path.split("/")[0]].append(file)
    when, version = report["meta"]["timestamp"][:10], platform.python_version()
    rows = [
        f"`{command}` on {when}, Python {version}, coverage.py {report['meta']['version']}.",
        "",
        "| room | files | lines | branches |",
        "|---|---|---|---|",
    ]
    for room, own in [*sorted(rooms.items()), ("**all**", list(files.values()))]:
        name = room if room.startswith("*") else f"`{room}`"
        rows.append(f"| {name} | {len(own)} | {share(own, 'lines')} | {share(own, 'branches')} |")
    low = {p: f for p, f in files.items() if f["summary"]["percent_covered"] < SHOWN_BELOW}
    rows += [
        "",
        f"Files below {SHOWN_BELOW:.0f}%, lines and branches together:",
    ]
    rows += ["", "| file | reached | lines not reached |", "|---|---|---|"]
    for path, file in sorted(low.items(), key=lambda item: item[1]["summary"]["percent_covered"]):
        rows.append(f"| `{path}` | {file['summary']['percent_covered']:.0f}% | {gaps(file)} |")
    return "\n".join(rows) + "\n"


def main(report: Path, page: Path, command: str) -> None:
    text = page.read_text(encoding="utf-8")
    before, found, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise SystemExit(f"{page} lacks the marks {BEGIN.strip()} and {END.strip()}")
    told = section(json.loads(report.read_text(encoding="utf-8")), command.strip())
    page.write_text(before + BEGIN + "\n" + told + "\n" + END + after, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
