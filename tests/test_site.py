"""The site builds without a warning, needs nothing from elsewhere, and reads well in a browser, wide and narrow."""

from __future__ import annotations

import functools
import html
import http.server
import json
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import syncbn
from helpers.commands import ROOT, must, run
from helpers.site import broken_links, loaded_from_elsewhere

for module in ("sphinx", "furo", "myst_parser", "sphinx_copybutton", "sphinx-mathjax-offline"):
    pytest.importorskip(module, reason=f"{module} is not installed (dependency group: docs)")

DOCS = ROOT / "docs"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SOURCES = [path for path in [*DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb")] if "_build" not in path.parts]

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built once for all tests."""
    folder = tmp_path_factory.mktemp("site")
    must(run(sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", DOCS, folder, deadline=400))
    return folder


def page(site: Path, name: str) -> str:
    return (site / f"{name}.html").read_text()


def test_each_source_is_a_page(site: Path) -> None:
    for source in SOURCES:
        built = (site / source.relative_to(DOCS)).with_suffix(".html").read_text()
        assert not re.search(r"<!-- python|\{eval-rst\}|\{include\}", re.sub(r"<!--.*?-->", "", built, flags=re.DOTALL))


def test_no_link_is_broken(site: Path) -> None:
    assert list(broken_links(site)) == []


def test_nothing_comes_from_elsewhere(site: Path) -> None:
    assert list(loaded_from_elsewhere(site)) == []
    assert (site / "_static" / "tex-svg.js").is_file(), "formulas are drawn by a script of the site"


def test_the_reference_has_all_names_and_their_types(site: Path) -> None:
    reference = page(site, "api/index")
    for name in syncbn.__all__:
        assert f'id="syncbn.{name}"' in reference or f'id="module-syncbn.{name}"' in reference, name
    entry = reference[reference.index('id="syncbn.functional.sync_batch_norm"') :]
    text = html.unescape(re.sub(r"<[^>]*>", "", entry[: entry.index('<dl class="py', 10)]))
    assert re.search(r"input \(Tensor\)", text) and re.search(r"training \(bool\)", text), text


def test_the_search_finds_convert(site: Path) -> None:
    index = json.loads((site / "searchindex.js").read_text().removeprefix("Search.setIndex(").removesuffix(")"))
    found = index["terms"]["convert"]
    names = {index["docnames"][i] for i in ([found] if isinstance(found, int) else found)}
    assert {"five_minutes", "migration"} <= names, names
    assert "convert_sync_batchnorm" in json.dumps(index["objects"]["syncbn"])


def test_results_are_shown_where_their_numbers_are(site: Path) -> None:
    for name, picture in {
        "experiments": "small_batch.png",
        "benchmarks": "layer-rivals-gloo-1t.png",
        "transports": "latency.png",
        "how_it_works": "step.svg",
        "five_minutes": "samples.svg",
    }.items():
        assert re.search(rf'<img[^>]*src="[^"]*_images/[^"]*{re.escape(picture)}"', page(site, name)), name
    assert 'src="data:image/png;base64,' in page(site, "notebooks/noise")


@pytest.fixture
def address(site: Path, tmp_path: Path) -> Iterator[str]:
    """The site over HTTP, on the loopback interface, with the program that opens its pages."""
    shutil.copytree(site, tmp_path / "site")
    pages = [str(path.relative_to(site)) for path in sorted(site.rglob("*.html")) if "_static" not in path.parts]
    (tmp_path / "site" / "pages.json").write_text(json.dumps(pages))
    shutil.copy(Path(__file__).parent / "programs" / "site_check.html", tmp_path / "site")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=tmp_path / "site")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_in_a_browser(address: str, tmp_path: Path) -> None:
    """At 1400 and at 500 pixels no page is wider than its window; formulas and pictures show; the search finds."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    said = must(run(
        CHROMIUM, *options, "--window-size=1500,1000", "--virtual-time-budget=600000", "--dump-dom",
        f"{address}/site_check.html", deadline=400,
    ))  # fmt: skip
    found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', said, re.DOTALL)[1]))  # type: ignore[index]
    assert found["wrong"] == [] and found["pages"] >= len(SOURCES)
    assert any(link.startswith(("api/", "five_minutes")) for link in found["search"]), found["search"]
