"""The glossary says what is there: names of this code, notebooks of this course, and the page that is made from it."""

import json
import re
from pathlib import Path

from minunclip.glossary import TERMS, as_markdown

ROOT = Path(__file__).parents[1]


def test_the_page_is_made_from_the_terms():
    assert (ROOT / "notebooks" / "GLOSSARY.md").read_text() == as_markdown()


def test_every_name_stands_in_the_code_and_every_notebook_in_the_course():
    code = "\n".join(path.read_text() for path in (ROOT / "minunclip").rglob("*.py") if path.name != "glossary.py")
    notebooks = {path.name[:2] for path in (ROOT / "notebooks").glob("[0-9]*.ipynb")}
    for term in TERMS:
        for name in re.findall(r"`([\w.]+)", term.code):
            assert re.search(rf"\b{name.split('.')[-1]}\b", code), name
        assert term.notebook in notebooks, term.name
    assert len({term.name for term in TERMS}) == len(TERMS)


def symbols(words):
    r"""The formulas in a text, `$z_i,\ z_t$` as two."""
    return {part for formula in re.findall(r"\$([^$]+)\$", words) for part in formula.split(r",\ ")}


def test_every_symbol_of_the_notebooks_tables_is_in_it():
    known = symbols(" ".join(term.symbol for term in TERMS))
    for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"):
        prose = "\n".join("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "markdown")
        rows = re.findall(r"^\| (.*?) \| .* \| .* \|$", prose, re.MULTILINE)
        assert symbols(" ".join(rows)) <= known, (path.stem, symbols(" ".join(rows)) - known)
