"""The documents are true: their code runs and prints what they say, their links resolve, every public name is there."""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import jax
import pytest
import yaml

import easydel
import easydel.assets
from easydel.infra import registry
from tests.cli.shorter import write_shorter

ROOT = Path(__file__).parents[2]
GUIDES = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*GUIDES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
SKIP_REASON = "needs the Hub"
SKIPPED_CODE = re.compile(r"push_to_hub\(|from_pretrained\(\s*\"[\w-]+/[\w.-]+\"")

FENCE = re.compile(r"^```(?P<language>[^\n`]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- not run: (.*?) -->\n\Z")
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A Python block of a page; `output` is the text block right behind it, if there is one."""

    page: Path
    line: int
    code: str
    skipped: str | None
    output: str | None

    def compiled(self):
        # Padded with empty lines, so that a traceback shows the line of the page.
        return compile("\n" * (self.line - 1) + self.code, str(self.page), "exec", dont_inherit=True)


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    fences = list(FENCE.finditer(text))
    found = []
    for fence, behind in zip(fences, [*fences[1:], None], strict=False):
        if fence["language"] != "python":
            continue
        mark = MARK.search(text[: fence.start()])
        line = text.count("\n", 0, fence.start("text")) + 1
        follows = behind is not None and behind["language"] == "text" and not text[fence.end() : behind.start()].strip()
        output = behind["text"] if follows else None
        found.append(Block(page, line, fence["text"], mark and mark[1], output))
    return found


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# Pages that print what the embedded model writes; the others run with its first layer alone.
WHOLE_MODEL = {"generation"}
RUNNABLE = [page for page in PAGES if any(not block.skipped for block in blocks(page))]


@pytest.fixture(scope="module")
def first_layer(tmp_path_factory):
    return write_shorter(tmp_path_factory.mktemp("embedded") / easydel.assets.embedded_model_path().name, 1)


@pytest.mark.parametrize("page", RUNNABLE, ids=name)
def test_blocks_run_and_print_what_the_page_says(page, tmp_path, monkeypatch, first_layer):
    """In order, in one namespace and an empty working directory."""
    monkeypatch.chdir(tmp_path)
    if page.stem not in WHOLE_MODEL:
        monkeypatch.setattr(easydel.assets, "embedded_model_path", lambda: first_layer)
    jax.config.update("jax_disable_most_optimizations", True)  # compiling is nearly all of the time
    scope = types.ModuleType(f"docs_page_{page.stem}")  # a real module: classes look up their annotations in it
    monkeypatch.setitem(sys.modules, scope.__name__, scope)
    try:
        for block in blocks(page):
            if block.skipped:
                continue
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(block.compiled(), vars(scope))
            if block.output is not None:
                got, options = printed.getvalue(), doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
                same = doctest.OutputChecker().check_output(block.output, got, options)
                assert same, f"{name(page)}:{block.line} prints\n{got}\nbut the page says\n{block.output}"
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
        forget(scope.__name__)


def forget(module: str) -> None:
    """Take what a page registered out of the registry."""
    for table in (registry._CONFIGS, registry._MODULES):
        for key in [key for key, cls in table.items() if cls.__module__ == module]:
            del table[key]


def test_only_blocks_that_need_the_hub_are_skipped():
    skipped = [block for page in PAGES for block in blocks(page) if block.skipped]
    assert skipped
    for block in skipped:
        where = f"{name(block.page)}:{block.line}"
        assert block.skipped == SKIP_REASON, where
        assert SKIPPED_CODE.search(block.code), f"{where} needs no Hub"
        block.compiled()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_block_is_overlooked(page):
    """Every fence stands at the left margin, is closed and names a language this test knows."""
    text = page.read_text(encoding="utf-8")
    assert text.count("```") == 2 * len(FENCE.findall(text))
    assert {fence["language"] for fence in FENCE.finditer(text)} <= {"", "python", "text", "bash", "json", "yaml"}
    assert text.count("```python") == len(blocks(page))
    assert text.count("<!-- not run") == sum(bool(block.skipped) for block in blocks(page))


def slugs(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_resolve(page):
    prose = re.sub(r"`[^`]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))
    for target in LINK.findall(prose):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name(page)} links to {target}"
        assert not anchor or anchor in slugs(file), f"{name(page)} links to {target}"


def test_every_guide_is_in_the_map_and_the_site():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    listed = {file for entry in yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"] for file in entry.values()}
    assert listed == {page.name for page in GUIDES}
    for page in GUIDES:
        assert page.name == "index.md" or f"]({page.name})" in index, page.name


def public_names() -> list[str]:
    """Return what `dir(easydel)` shows of our own (and not of the modules it imports)."""
    names = [n for n in dir(easydel) if not n.startswith("_")]
    return [n for n in names if getattr(getattr(easydel, n), "__module__", "").startswith("easydel.")]


@pytest.mark.parametrize("public", public_names())
def test_every_public_name_is_mentioned(public):
    assert any(re.search(rf"\b{public}\b", page.read_text(encoding="utf-8")) for page in GUIDES)


def test_public_names_are_found():
    assert set(easydel.__all__) <= set(public_names())
