"""Fails if two files outside the tests share ten or more successive lines; comments, docstrings and imports do not count.

The comparison is pylint's (`duplicate-code`), called directly: pylint itself infers the types of the whole tree first,
which takes minutes and changes nothing here.

Usage: scripts/duplicates.py [FOLDER ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

from pylint.checkers.symilar import Symilar

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("platform", "bench", "scripts", "train_apps", "serve_apps", "examples", "docs")
MIN_LINES = 10


def duplicates(folders: list[Path]) -> list[str]:
    """A description of each run of `MIN_LINES` or more lines that stands in several places below `folders`."""
    # Symilar reports what has more lines than its limit.
    comparison = Symilar(min_lines=MIN_LINES - 1, ignore_comments=True, ignore_docstrings=True, ignore_imports=True)
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        with path.open(encoding="utf-8") as file:
            comparison.append_stream(str(path), file)
    found = []
    for count, places in comparison._compute_sims():
        # Each place is a file and the first and last line of the run in it.
        where = sorted(f"{lines.name}:{first + 1}-{last}" for lines, first, last in places)
        found.append(f"{count} like lines: {', '.join(where)}")
    return found


if __name__ == "__main__":
    found = duplicates([Path(name) for name in sys.argv[1:]] or [ROOT / name for name in FOLDERS])
    if found:
        sys.exit("\n".join([*found, "Make one of them."]))
