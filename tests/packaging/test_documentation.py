"""The documentation: links lead somewhere, files that it names exist, every command is run or says why not.

`tests/cli/test_documentation.py` runs the commands.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.documentation import BEGIN, END, MATRIX, PAGES, REPOSITORY, RUNNABLE, blocks, prose

DOCS = REPOSITORY / "docs"
OTHERS = (REPOSITORY / "ARCHITECTURE.md", REPOSITORY / "CONTRIBUTING.md")
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(r"`((?:tests|benchmarks|server|kernels)/[\w./-]*)`")
by_name = pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: page.relative_to(REPOSITORY).as_posix())


def headings(page: Path) -> list[tuple[int, str]]:
    """Level and text of each heading."""
    return [(len(level), text) for level, text in re.findall(r"^(#+) (.+)$", prose(page), re.MULTILINE)]


def anchor(heading: str) -> str:
    """What GitHub and mkdocs make of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@by_name
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        path, _, fragment = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f"{page.name} links to {link}"
        assert page.parent != DOCS or target.is_relative_to(DOCS), f"{link} is not there once docs/ is built as a site"
        assert not fragment or fragment in {anchor(text) for _, text in headings(target)}, f"no heading for {link}"


@by_name
def test_files_that_are_named_exist(page: Path) -> None:
    missing = [name for name in FILE.findall(prose(page)) if not (REPOSITORY / name).exists()]
    assert not missing, f"{page.name} names {missing}"


@by_name
def test_a_page_has_one_title_in_front(page: Path) -> None:
    titles = [text for level, text in headings(page) if level == 1]
    assert len(titles) == 1 and page.read_text().startswith(f"# {titles[0]}\n")


def test_every_page_is_found() -> None:
    for start in (DOCS / "index.md", REPOSITORY / "README.md"):
        linked = {(start.parent / link.partition("#")[0]).resolve() for link in LINK.findall(prose(start))}
        assert {*DOCS.glob("*.md")} - {DOCS / "index.md"} <= linked, start


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_commands_is_run_or_says_why_not(page: Path) -> None:
    for block in blocks(page):
        if block.language in RUNNABLE:
            assert block.mark, f"no '<!-- runs -->' or '<!-- not run: … -->' in front of:\n{block.text}"
            assert block.mark == "runs" or block.note, f"why is this not run?\n{block.text}"


def test_the_readme_names_every_method_of_the_matrix() -> None:
    matrix = MATRIX.read_text().partition(BEGIN)[2].partition(END)[0]
    methods = {line.split("|")[1].split()[0] for line in matrix.splitlines()[2:]}
    assert len(methods) > 40
    readme = re.sub(r"[^a-z0-9]", "", prose(REPOSITORY / "README.md").lower())
    missing = sorted(name for name in methods if re.sub(r"[^a-z0-9]", "", name.lower()) not in readme)
    assert not missing, f"README.md does not name {missing}"
