"""Pages in Markdown as the tests see them: their Python, the commands, files and names that they mention.

The Python of a page is run section by section: what stands above the first ``##`` heading, and then the section's own
pieces, in one namespace. A piece is a fenced block marked ``python``, run as it is, or as a doctest if it has prompts;
or an HTML comment that begins with ``python``, for preparations that readers need not see. ``python needs=cuda`` marks
what a machine may lack. A ``{literalinclude}`` is the whole file, the part that readers do not see as well.
"""

from __future__ import annotations

import doctest
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token

SHELL = ("sh", "console", "")
_HIDDEN = re.compile(r"<!-- python\n(.*?)\n-->", re.DOTALL)


@dataclass
class Section:
    """A section of a page, with its pieces of Python: line of the first statement (from 1), code, what it needs."""

    title: str
    pieces: list[tuple[int, str, str]] = field(default_factory=list)


@dataclass
class Page:
    """What a page holds that can be true or false."""

    path: Path
    sections: list[Section] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    code: list[str] = field(default_factory=list)

    def programs(self, have: Collection[str] = ()) -> Iterator[tuple[Section, list[tuple[int, str, str]]]]:
        """Each section that has Python, with the pieces to run before and in it.

        Without those of which a piece needs what is not in ``have``.
        """
        preamble = self.sections[0].pieces
        for section in self.sections:
            pieces = preamble if section is self.sections[0] else preamble + section.pieces
            if section.pieces and all(not needs or needs in have for _, _, needs in pieces):
                yield section, pieces

    def titles(self, have: Collection[str] = ()) -> list[str]:
        """Of the sections that have Python."""
        return [section.title for section, _ in self.programs(have)]


def read(path: Path) -> Page:
    """Read a page."""
    page = Page(path, [Section(path.stem)])
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(path.read_text())
    for before, token in zip([None, *tokens], tokens, strict=False):
        if token.type == "inline":
            if before is not None and before.type == "heading_open" and before.tag == "h2":
                page.sections.append(Section(token.content))
            _read_inline(page, token)
        elif token.type in ("fence", "code_block", "html_block"):
            _read_block(page, token)
    return page


def _read_inline(page: Page, token: Token) -> None:
    for child in token.children or []:
        if child.type == "code_inline":
            page.code.append(child.content)
        elif child.type in ("link_open", "image"):
            page.links.append(str(child.attrs.get("href") or child.attrs.get("src")))


def _read_block(page: Page, token: Token) -> None:
    assert token.map is not None
    language, _, options = token.info.strip().partition(" ")
    if token.type == "html_block":
        for hidden in _HIDDEN.finditer(token.content):
            line = token.map[0] + 2 + token.content[: hidden.start()].count("\n")
            page.sections[-1].pieces.append((line, hidden[1] + "\n", ""))
    elif language == "python":
        page.sections[-1].pieces.append((token.map[0] + 2, token.content, options.removeprefix("needs=")))
    elif language == "{literalinclude}":
        code = (page.path.parent / options).read_text()
        page.sections[-1].pieces.append((1, code, ""))
    elif language in SHELL:
        page.commands += [line.removeprefix("$ ").strip() for line in token.content.splitlines() if line.strip()]


def run(page: Page, have: Collection[str] = ()) -> list[str]:
    """Run a page's Python in this process; the titles of the sections that ran. A traceback shows the page's line."""
    for _, pieces in page.programs(have):
        namespace: dict[str, Any] = {"__name__": "__main__"}
        for line, code, _ in pieces:
            if code.lstrip().startswith(">>> "):
                _run_doctest(page.path, line, code, namespace)
            else:
                exec(compile("\n" * (line - 1) + code, str(page.path), "exec"), namespace)
    return page.titles(have)


def _run_doctest(path: Path, line: int, code: str, namespace: dict[str, Any]) -> None:
    test = doctest.DocTestParser().get_doctest(code, namespace, path.name, str(path), line - 1)
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    failed = runner.run(test, out=said.append, clear_globs=False).failed
    assert not failed, "".join(said)
    namespace.update(test.globs)
