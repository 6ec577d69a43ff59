"""Tests that ask what is left in memory collect garbage often; what earlier tests left is not walked each time."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def only_new_objects_are_collected() -> Iterator[None]:
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
