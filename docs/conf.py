"""The site: README.md, the course as it is committed (nothing is run), and the API. `make site` builds it into out/site."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]

project = "minunclip"
author = project_copyright = "the authors of minunclip"
root_doc = "docs/index"
include_patterns = ["README.md", "CONTRIBUTING.md", "docs/**", "notebooks/**"]
exclude_patterns = [".venv", "out", "runs", "docs/templates", "**/.ipynb_checkpoints", "notebooks/artefacts"]
templates_path = [str(ROOT / "docs" / "templates")]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.viewcode", "sphinx-mathjax-offline"]
nb_execution_mode = "off"
nb_render_markdown_format = "myst"  # tables that a cell shows as Markdown
nb_ipywidgets_js = {}  # no scripts from elsewhere: the frames side by side stand for a slider
myst_enable_extensions = ["dollarmath", "substitution"]
myst_heading_anchors = 3
svg = (ROOT / "notebooks" / "figures" / "unclip.svg").read_text(encoding="utf-8")
diagram = f'<div class="wide">\n{svg.replace(".ipynb", ".html")}</div>'  # each box leads to its notebook's page
myst_substitutions = {"diagram": diagram.replace('href="../', 'href="../notebooks/')}
default_role = "code"  # docstrings write `name`, as Markdown does
autodoc_default_options = {"members": True, "member-order": "bysource"}
autosummary_ignore_module_all = False

html_theme = "furo"
html_title = "minunclip"
pygments_dark_style = "github-dark"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_extra_path = ["redirect"]
html_copy_source = False


def plain_words(app, what, name, obj, options, lines):
    """A star or a bar in a docstring is itself, but for **bold** and what stands in `code`."""
    lines[:] = [re.sub(r"`[^`]*`|\*\*(?=\w)[^*]+\*\*|([*|])", lambda found: rf"\{found[1]}" if found[1] else found[0], line) for line in lines]


def with_boxes(app, page, source):
    """The diagram of the instructor's page as the diagram itself: boxes in a picture lead nowhere."""
    if page == "notebooks/README":
        source[0], found = re.subn(r"\[!\[[^\]]*\]\(figures/unclip.svg\)\]\(figures/unclip.svg\)", lambda _: diagram.replace('href="../', 'href="'), source[0])
        assert found == 1


def setup(app):
    """A named tuple's fields stand in its signature: "Alias for field number 0" says no more."""
    app.connect("autodoc-skip-member", lambda app, what, name, obj, skip, options: skip or str(obj.__doc__).startswith("Alias for field number"))
    app.connect("autodoc-process-docstring", plain_words)
    app.connect("source-read", with_boxes)
