"""The example goes on with half of its processes, and its losses are those of a run that lost none."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "elastic.py"


@pytest.mark.slow
def test_losing_half_changes_no_loss(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(SCRIPT), "--processes", "4", "--steps", "24", "--output", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert re.search(r"easydel: process [23] of 4 \(host .+\) has ended without a word", done.stdout)
    rows = re.findall(r"^ *(\d+) +(\d) +(\d+\.\d+) +(\d+\.\d+)$", done.stdout, flags=re.MULTILINE)
    assert [int(row[0]) for row in rows] == [*range(1, 25)]
    assert {row[1] for row in rows} == {"4", "2"}
    assert float(rows[-1][2]) < 0.8 * float(rows[0][2])
    # Both have the same sums in the same order, but for those of gloo, whose order is that in which parts arrive.
    assert float(done.stdout.split()[-1]) < 1e-5
