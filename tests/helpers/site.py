"""A built site as the tests see it: the links and the anchors of its pages."""

from __future__ import annotations

from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src", "data") and value:
                self.links.append(value)
            elif name in ("id", "name") and value:
                self.anchors.add(value)


def broken_links(site: Path) -> Iterator[str]:
    """Each link of a page to a page, an anchor, a picture or a script of the site that is not there."""
    pages = {path: _Page(path.read_text()) for path in site.rglob("*.html")}
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                yield f"{path.relative_to(site)}: {link}"
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                yield f"{path.relative_to(site)}: {link} (no such anchor)"


def loaded_from_elsewhere(site: Path) -> Iterator[str]:
    """Each script, style or picture that a page would load from another place."""
    for path in site.rglob("*.html"):
        for name in ("src", "data"):
            for part in path.read_text().split(f'{name}="')[1:]:
                value = part.partition('"')[0]
                if urlsplit(value).netloc:
                    yield f"{path.relative_to(site)}: {value}"
