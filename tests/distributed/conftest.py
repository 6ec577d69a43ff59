"""One forking process for all tests of this folder that start workers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.forks import Server


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()
