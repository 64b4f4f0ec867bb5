"""Sphinx configuration of the guide: ``make docs`` builds it into ``docs/_build``, without a network."""

from __future__ import annotations

import json
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

from docutils import nodes
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.application import Sphinx

project = "syncbn"
release = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["version"]
copyright = "the syncbn authors"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"{project} {release}"
html_css_files = ["guide.css"]
# Formulas are drawn by a script that travels with the site, as paths: it needs neither a network nor a font.
mathjax_path = "tex-svg.js"
html_static_path = ["_static", str(files("sphinx-mathjax-offline") / "static" / "mathjax" / mathjax_path)]
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

autodoc_typehints = "description"  # beside each argument; signatures are long enough without
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Collectives", "Shape"]


class NotebookParser(MystParser):
    """Shows a notebook as a page: its text, its code, and the output that is stored in it; nothing is run."""

    supported = ("notebook",)

    def parse(self, inputstring: str, document: nodes.document) -> None:
        """Parse the Markdown that the cells of a notebook (a JSON text) amount to."""
        pieces: list[str] = []
        for cell in json.loads(inputstring)["cells"]:
            text = "".join(cell["source"])
            pieces.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
            pieces += [_shown(output) for output in cell.get("outputs", ())]
        super().parse("\n\n".join(pieces), document)


def _shown(output: dict[str, Any]) -> str:
    if "text" in output:
        return f"```text\n{''.join(output['text']).rstrip()}\n```"
    return f"![output of the cell above](data:image/png;base64,{''.join(output['data']['image/png']).strip()})"


def setup(app: Sphinx) -> None:
    """Registers notebooks as sources."""
    app.add_source_suffix(".ipynb", "notebook")
    app.add_source_parser(NotebookParser)
