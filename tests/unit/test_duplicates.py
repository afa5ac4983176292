"""scripts/duplicates.py, which `make check` runs, finds ten like lines in two files and passes nine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "duplicates.py"


@pytest.mark.parametrize(("alike", "status"), [(9, 0), (10, 1)])
def test_ten_like_lines_in_two_files_are_named_and_nine_are_not(tmp_path: Path, alike: int, status: int) -> None:
    shared = "".join(f"value_{n} = compute({n})\n" for n in range(alike))
    (tmp_path / "first.py").write_text(f'"""First."""\n\n{shared}\nfirst = 1\n')
    (tmp_path / "second.py").write_text(f'"""Second."""\n\nsecond = 2\n# a comment\n{shared}')
    done = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    if status:
        assert f"10 like lines: {tmp_path}/first.py:3-" in done.stderr
        assert f"{tmp_path}/second.py:5-14" in done.stderr
