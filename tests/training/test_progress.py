"""Counts and means of a run."""

from __future__ import annotations

import math

import pytest

from easydel.training.progress import Means, Progress


@pytest.mark.parametrize(
    ("lowest", "threshold", "values", "better"),
    [
        (True, 0.0, [3.0, 2.0, 2.0, 2.5, 1.9], [True, True, False, False, True]),
        (False, 0.0, [0.1, 0.2, 0.15, 0.3], [True, True, False, True]),
        (True, 0.5, [3.0, 2.6, 2.4, 2.0], [True, False, True, False]),
        (True, 0.0, [math.nan, 3.0, math.nan, 2.0], [False, True, False, True]),
    ],
)
def test_what_counts_as_better(lowest, threshold, values, better):
    progress, without = Progress(), 0
    for value, expected in zip(values, better, strict=True):
        assert progress.note_metric(value, lowest=lowest, threshold=threshold) is expected
        without = 0 if expected else without + 1
        assert progress.evaluations_without_better == without


def test_skipped_steps_are_counted_in_a_row_and_in_all():
    progress = Progress(iteration=5)
    for finite in (True, False, False, True, False):
        progress.note_step(finite)
    assert (progress.skipped, progress.skipped_in_a_row, progress.updates) == (3, 1, 2)
    assert Progress(**progress.to_dict()) == progress


def test_means_weigh_by_tokens_what_is_a_mean_over_tokens():
    means = Means()
    means.add({"loss": 1.0, "grad_norm": 1.0, "learning_rate": 0.1, "num_tokens": 10, "is_finite": 1})
    means.add({"loss": 4.0, "grad_norm": 3.0, "learning_rate": 0.2, "num_tokens": 30, "is_finite": 1})
    assert means.take() == {"loss": 3.25, "grad_norm": 2.0, "learning_rate": 0.2}
    assert means.take() == {}
