"""Building the kernels, and a library that does not fit."""

from __future__ import annotations

import pytest

from easydel.native import build, library


@pytest.fixture(autouse=True)
def switched_on(monkeypatch):
    monkeypatch.delenv("EASYDEL_NATIVE", raising=False)


def test_a_build_that_fails_says_why_and_leaves_nothing(tmp_path, monkeypatch):
    older = tmp_path / "libkernels.so"
    older.write_bytes(b"of an older source")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in build.compile_kernels(build.SOURCES, older)
    monkeypatch.setenv("CXX", "python -c 'raise SystemExit(\"broken source\")'")
    assert "broken source" in build.compile_kernels(build.SOURCES, older)
    monkeypatch.setenv("EASYDEL_NATIVE", "0")
    assert "EASYDEL_NATIVE" in build.compile_kernels(build.SOURCES, older)
    assert not list(tmp_path.iterdir())


def test_a_library_that_does_not_fit_is_reported_once(tmp_path, monkeypatch):
    broken = tmp_path / "libkernels.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(library, "LIBRARY", broken)
    library.is_available.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"python -m easydel\.native"):
            assert not library.is_available()
        assert not library.is_available()
    finally:
        library.is_available.cache_clear()
