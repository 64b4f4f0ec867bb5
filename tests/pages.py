"""Pages in Markdown as the tests see them: their Python, the commands, files and names that they mention.

The Python of a page is run section by section: what stands above the first ``##`` heading, and then the section's own
pieces, in one namespace. A piece is a fenced block marked ``python``, run as it is, or as a doctest if it has prompts;
or an HTML comment that begins with ``python``, for preparations that readers need not see. ``python needs=cuda`` marks
what a machine may lack.
"""

from __future__ import annotations

import doctest
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]
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

    def titles(self) -> list[str]:
        """Of the sections that have Python."""
        return [section.title for section, _ in self.programs()]

    def programs(self) -> Iterator[tuple[Section, list[tuple[int, str, str]]]]:
        """Each section that has Python, with the pieces to run before and in it."""
        preamble = self.sections[0].pieces
        if preamble:
            yield self.sections[0], preamble
        for section in self.sections[1:]:
            if section.pieces:
                yield section, preamble + section.pieces


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
    elif language in SHELL:
        page.commands += [line.removeprefix("$ ").strip() for line in token.content.splitlines() if line.strip()]


def run(page: Page, have: frozenset[str] = frozenset()) -> list[str]:
    """Run a page's Python in this process; the titles of the sections that ran.

    A traceback shows the page and its line. Pieces that need what is not in ``have`` are left out, with the rest of
    their section.
    """
    done = []
    for section, pieces in page.programs():
        namespace: dict[str, Any] = {"__name__": "__main__"}
        for line, code, needs in pieces:
            if needs and needs not in have:
                break
            if code.lstrip().startswith(">>> "):
                test = doctest.DocTestParser().get_doctest(code, namespace, page.path.name, str(page.path), line - 1)
                lines: list[str] = []
                runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
                failed = runner.run(test, out=lines.append, clear_globs=False).failed
                assert not failed, "".join(lines)
                namespace.update(test.globs)
            else:
                exec(compile("\n" * (line - 1) + code, str(page.path), "exec"), namespace)
        else:
            done.append(section.title)
    return done
