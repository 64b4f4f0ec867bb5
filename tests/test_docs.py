"""What the guide shows runs, and what it names exists. (The site that is built of it: test_site.py.)"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import torch

pytest.importorskip("markdown_it", reason="markdown-it-py is not installed (dependency group: docs)")

import syncbn
from helpers import pages
from helpers.commands import ROOT, mpiexec, must, needs_mpi4py, needs_mpiexec
from helpers.floors import FLOOR
from helpers.processes import run_processes

DOCS = ROOT / "docs"
# Pages of the site too.
SHOWN = [ROOT / name / "README.md" for name in ("benchmarks", "examples", "examples/results", "launch")]
COMMANDS = (
    "cp",
    "make",
    "python",
    "pip",
    "mpiexec",
    "kubectl",
    "sbatch",
    "syncbn",
    "syncbn-launch",
    "torchrun",
    "compute-sanitizer",
)
PAGES = {
    str(path.relative_to(ROOT)): pages.read(path)
    for path in [ROOT / "README.md", *SHOWN, *sorted(DOCS.rglob("*.md"))]
    if "_build" not in path.parts
}
UNDER_MPI = "docs/mpi.md"  # its Python starts torch.distributed by itself
ELSEWHERE = {"docs/integrations.md": "test_integrations.py"}  # run there, recipe by recipe, on models of several kinds
HAVE = ["cuda"] if torch.cuda.is_available() else []
every_page = pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)


def run_pages(rank: int, size: int, paths: list[Path]) -> list[list[str]]:
    done = []
    for path in paths:
        done.append(pages.run(pages.read(path), HAVE))
        gc.collect()  # DistributedDataParallel must go before its group
    return done


def test_python_runs_on_two_ranks(tmp_path: Path) -> None:
    """In processes with a default group over gloo, as scripts under a launcher have it; the same ones for all pages."""
    some = [page for name, page in PAGES.items() if page.titles(HAVE) and name not in (UNDER_MPI, *ELSEWHERE)]
    assert all(name in (Path(__file__).parent / test).read_text() for name, test in ELSEWHERE.items())
    results = run_processes(2, run_pages, tmp_path, [page.path for page in some])
    assert results == [[page.titles(HAVE) for page in some]] * 2


@pytest.mark.mpi
@needs_mpi4py
@needs_mpiexec
def test_python_runs_under_mpi() -> None:
    must(mpiexec(2, "docs_page.py", str(ROOT / UNDER_MPI)))


@every_page
def test_every_block_says_what_it_is(page: pages.Page) -> None:
    """No Python hides from the tests in a block of another name, or among the commands."""
    fences = re.findall(r"^\s*```(\S*)", page.path.read_text(), flags=re.MULTILINE)
    known = {"python", "sh", "console", "text", "{toctree}", "{eval-rst}", "{include}", "{literalinclude}", ""}
    assert set(fences) <= known, set(fences) - known
    for line in page.commands:
        assert not re.search(r"^(import|from|def|class|for|with|assert) |^\w+ = |^\w+(\.\w+)*\(", line), line


@every_page
def test_commands_exist(page: pages.Page) -> None:
    inline = [
        text for text in page.code if re.match(r"(make|python|mpiexec|syncbn|syncbn-launch|torchrun|sbatch) \S", text)
    ]
    for command in page.commands + inline:
        check_command(shlex.split(command, comments=True))


def check_command(words: list[str]) -> None:
    """Fails unless what a command line names is there: make's target, scripts, modules of ours, our own programs."""
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if not words:
        return
    program, *rest = words
    assert program in COMMANDS or (ROOT / program).is_file(), words
    if program == "syncbn":
        assert rest[0] in ("launch", "doctor", "noise", "recipes", "version"), words
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        targets = [word for word in rest if "=" not in word]
        assert all(re.search(rf"^{re.escape(target)}:", makefile, flags=re.MULTILINE) for target in targets), words
    for script in (word for word in rest if re.fullmatch(r"(examples|benchmarks|launch|tests)/\S+\.(py|sh)", word)):
        assert (ROOT / script).is_file(), words
    if "-m" in rest:
        module = rest[rest.index("-m") + 1]
        if module.startswith("syncbn"):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), words


@every_page
def test_links_and_files_exist(page: pages.Page) -> None:
    for link in page.links:
        target, _, anchor = link.partition("#")
        if re.match(r"\w+:", link):
            continue
        where = (page.path.parent / target).resolve() if target else page.path
        assert where.exists(), f"{page.path.name}: {link}"
        inside = page.path.is_relative_to(DOCS) and where.suffix not in (".png", ".svg")  # pictures are copied
        assert where.is_relative_to(DOCS if inside else ROOT), f"{link}: not part of the site"
        if anchor:
            text = where.read_text()
            if shown := re.match(r"```\{include\} (\S+)", text):  # the page is another file
                text = (where.parent / shown[1]).read_text()
            titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
            assert anchor in {slug(title) for title in titles}, f"{page.path.name}: {link}"
    for text in page.code:
        found = re.match(r"(?:examples|launch|docs|tests|benchmarks|syncbn)/[\w./*-]+", text)
        if found:
            assert list(ROOT.glob(found[0].rstrip("/."))), f"{page.path.name}: {text}"


def slug(title: str) -> str:
    """The anchor that GitHub and the site give a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


@every_page
def test_names_exist(page: pages.Page) -> None:
    for text in page.code:
        found = re.match(r"syncbn\.(\w+(?:\.\w+)*)(?![\w/.])", text)
        if found and not (ROOT / "syncbn" / (found[1].replace(".", "/") + ".py")).exists():
            module, *rest = found[1].split(".")
            if module == "mpi":
                continue  # (importing it would start MPI here)
            is_module = any((ROOT / "syncbn" / name).exists() for name in (f"{module}.py", f"{module}/__init__.py"))
            thing = importlib.import_module(f"syncbn.{module}") if is_module else getattr(syncbn, module)
            for part in rest:
                thing = getattr(thing, part)


def test_the_pictures_are_those_of_the_code() -> None:
    """The committed pictures are what the script draws today, out of the floors that ``test_layers.py`` enforces."""
    specification = importlib.util.spec_from_file_location("draw", DOCS / "pictures" / "draw.py")
    assert specification is not None and specification.loader is not None
    draw = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(draw)
    for name, picture in draw.PICTURES.items():
        assert (DOCS / "pictures" / name).read_text() == picture(), "run: python docs/pictures/draw.py"
    assert set(draw.BATCH) <= set(FLOOR)


def test_a_wrong_piece_fails(tmp_path: Path) -> None:
    """The machinery of this file can fail: in code, in a doctest, and it leaves out only what it is told to."""
    path = tmp_path / "page.md"
    path.write_text("# T\n\n```python\nx = 1\n```\n\n## A\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError):
        pages.run(pages.read(path))
    path.write_text("# T\n\n<!-- python\nx = 1\n-->\n\n```python\n>>> x\n2\n```\n")
    with pytest.raises(AssertionError, match="Expected"):
        pages.run(pages.read(path))
    path.write_text("# T\n\n## A\n\n```python needs=cuda\n1 / 0\n```\n\n## B\n\n```python\nx = 1\n```\n")
    assert pages.run(pages.read(path)) == ["B"]
