"""The report of a proof's test says what the test compared; `tests/models/families.py` reads it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.models.measure import PROPERTY, proved, recording


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Function) -> Iterator[None]:
    marks = list(item.iter_markers("proof"))
    with recording() as recorded:
        yield
    if marks:
        item.user_properties.append((PROPERTY, proved(marks, item.callspec.params, recorded)))
