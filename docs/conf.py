"""Sphinx configuration of the guide: ``make docs`` builds it into ``docs/_build``, without a network."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

project = "syncbn"
release = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["version"]
copyright = "the syncbn authors"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"{project} {release}"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["guide.css"]

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

autodoc_typehints = "none"  # signatures are long enough without; the text names shapes and dtypes
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Collectives", "Shape"]


def _formula(*, as_block: bool) -> tuple[Callable[[Any, nodes.Element], None], None]:
    """Writes formulas as MathML, which browsers show by themselves: pages need no script from elsewhere."""

    def visit(translator: Any, node: nodes.Element) -> None:
        try:
            translator.body.append(tex2mathml(node.astext(), as_block=as_block))
        except MathError as error:  # only a part of LaTeX is known
            logging.getLogger(__name__).warning("%s in the formula %s", error, node.astext(), location=node)
        raise nodes.SkipNode

    return visit, None


def setup(app: Sphinx) -> None:
    """Registers the renderer of formulas."""
    app.add_html_math_renderer("mathml", _formula(as_block=False), _formula(as_block=True))
