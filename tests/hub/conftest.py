"""Tests that ask what is left in memory collect garbage often: what was there before them is not walked each time."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def thawed_in_the_end() -> Iterator[None]:
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def only_new_objects_are_collected(thawed_in_the_end: None) -> None:
    gc.freeze()
