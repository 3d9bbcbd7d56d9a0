"""Every notebook as it is committed: executed in order, no error, no path of a machine, words for every image, small."""

import importlib
import inspect
import json
import re
import site
import sys
from functools import reduce
from pathlib import Path
from xml.etree import ElementTree

import pytest
from IPython.core.inputtransformer2 import TransformerManager

import minunclip.manipulations  # noqa: F401  what notebooks show the source of
import minunclip.pipeline  # noqa: F401
from minunclip.course import CHECKS

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").rglob("[0-9]*.ipynb"))
SIZE = 1_500_000  # bytes
SVG = "{http://www.w3.org/2000/svg}"
ABSOLUTE = re.compile(r"(?<![\w.:/])/(?:home|root|work|tmp|Users|usr|opt|var|mnt)/|[A-Z]:\\\\")


def outputs(notebook):
    return [output for cell in notebook["cells"] if cell["cell_type"] == "code" for output in cell["outputs"]]


def text(value):
    return value if isinstance(value, str) else "".join(value)


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


def test_there_are_notebooks():
    assert NOTEBOOKS


def test_the_figure_leads_to_every_notebook_of_the_course():
    figure = ElementTree.parse(ROOT / "notebooks" / "figures" / "unclip.svg").getroot()
    linked = {link.get("href") for link in figure.iter(f"{SVG}a")}
    assert linked == {f"../{path.name}" for path in NOTEBOOKS if path.parent.name == "notebooks"}
    boxes = [rect for rect in figure.iter(f"{SVG}rect") if rect.get("class") in ("box", "warm")]
    assert len(boxes) > 15 and {id(rect) for rect in boxes} == {id(rect) for link in figure.iter(f"{SVG}a") for rect in link if rect in boxes}


@pytest.mark.parametrize("page", ["README.md", "notebooks/README.md"])
def test_every_notebook_of_the_course_is_in_the_map(page):
    linked = {Path(name).name for name in re.findall(r"^\| \[.*?\]\((\S+\.ipynb)\) \|", (ROOT / page).read_text(), re.MULTILINE)}
    assert linked == {path.name for path in NOTEBOOKS if path.parent.name == "notebooks"}


def test_code_of_the_package_is_shown_as_it_is_today(path):
    for module in re.findall(r"from (minunclip[\w.]*) import", path.read_text()):
        importlib.import_module(module)
    for cell in json.loads(path.read_text())["cells"]:
        for name in re.findall(r"getsource\((\w[\w.]*)\)", text(cell["source"])) if cell["cell_type"] == "code" else ():
            first, *rest = name.split(".")
            shown = "".join(text(output.get("text", "")) for output in cell["outputs"])
            owners = [module for key, module in sys.modules.items() if key.startswith("minunclip.") and hasattr(module, first)]
            assert owners and inspect.getsource(reduce(getattr, rest, getattr(owners[0], first))).strip() in shown, name


def test_it_was_run_from_top_to_bottom_without_an_error(path):
    notebook = json.loads(path.read_text())
    counts = [cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert not [output for output in outputs(notebook) if output["output_type"] == "error"]


COURSE = [path for path in NOTEBOOKS if path.parent.name == "notebooks"]


@pytest.mark.parametrize("path", COURSE, ids=lambda path: path.stem)
def test_what_every_notebook_of_the_course_has(path):
    """A folded answer behind every guess, a table of symbols, what it made or says, checks, and where to go on."""
    cells = json.loads(path.read_text())["cells"]
    prose = "\n".join(text(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    marks = re.findall(r"\*\*guess|<details>", prose.lower())
    assert "**guess" in marks and all(after == "<details>" for mark, after in zip(marks, [*marks[1:], ""]) if mark == "**guess")
    assert re.search(r"^\|---\|---\|---\|$", prose, re.MULTILINE) and all(part in prose for part in ("**The question.**", "**In short.**", "**Read on:**"))
    exercises = re.findall(r"^\*\*[1-9]\. .*?\*\* \((\d+) min, (\w[\w ]*)\)", prose, re.MULTILINE)
    checked = 4 if path.stem[:2] in ("01", "03", "12") else 3
    assert len(exercises) == checked + 1 and len(re.findall(r"^check\(\"", "\n".join(text(cell["source"]) for cell in cells), re.MULTILINE)) == checked
    solved = json.loads((path.parent / "solutions" / path.name).read_text())["cells"]
    asked, answered = (set(re.findall(r"check\(\"(\w+)\"", "\n".join(text(cell["source"]) for cell in part))) for part in (cells, solved))
    assert asked == answered and asked <= set(CHECKS)


def test_the_five_figures_that_a_hand_can_move_are_there():
    moved = {path.stem[:2] for path in COURSE if re.search(r"slide\(", path.read_text())}
    assert moved == {"03", "04", "06", "09", "10"}


def test_every_slider_comes_back_to_who_only_opens_it(path):
    notebook = json.loads(path.read_text())
    view, state = (f"application/vnd.jupyter.widget-{name}+json" for name in ("view", "state"))
    shown = {output["data"][view]["model_id"] for output in outputs(notebook) if view in output.get("data", {})}
    kept = notebook["metadata"].get("widgets", {}).get(state, {"state": {}})["state"]
    assert shown <= kept.keys()


def test_it_is_small_and_names_no_place_of_a_machine(path):
    content = path.read_text()
    assert len(content.encode()) < SIZE
    without_pictures = re.sub(r"base64,[A-Za-z0-9+/=]+", "", content)
    assert not ABSOLUTE.search(without_pictures), ABSOLUTE.search(without_pictures)


def test_every_image_has_words(path):
    notebook = json.loads(path.read_text())
    for output in outputs(notebook):
        data = output.get("data", {})
        assert not {"image/png", "image/jpeg", "image/svg+xml"} & data.keys(), "shown without alt text: use plots.show"
        for tag in re.findall(r"<img[^>]*>", text(data.get("text/html", ""))):
            assert re.search(r'alt="[^"]{10,}"', tag)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            for words in re.findall(r"!\[([^\]]*)\]\(", text(cell["source"])):
                assert len(words) >= 10


def test_it_says_what_it_needs_and_where_it_stands_in_the_paper(path):
    if path.parent.name == "solutions":
        return
    first = text(json.loads(path.read_text())["cells"][0]["source"])
    for part in ("You will", "You need", "Paper", "Runs in", "colab"):
        assert part in first, part
    whole = "".join(text(cell["source"]) for cell in json.loads(path.read_text())["cells"])
    assert whole.count("check(") >= 3 and "<details>" in whole and "What the paper did" in whole


class Shell:
    """Stands for IPython's, here or in Colab, and notes what a cell asks of it."""

    def __init__(self, name):
        self.name, self.asked = name, []

    def __str__(self):
        return self.name

    def run_line_magic(self, *words):
        self.asked.append(words)


def test_it_opens_in_colab_and_installs_the_package_only_there(path, monkeypatch):
    repository = re.search(r'^Repository = "(https://github.com/(.+))"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    cells = json.loads(path.read_text())["cells"]
    assert f"(https://colab.research.google.com/github/{repository[2]}/blob/main/{path.relative_to(ROOT).as_posix()})" in text(cells[0]["source"])
    source = next(text(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    monkeypatch.setattr(site, "main", lambda: None)  # in Colab it finds what was installed after Python began
    here, colab = Shell("<ipykernel.zmqshell.ZMQInteractiveShell object>"), Shell("<google.colab._shell.Shell object>")
    for shell in (here, colab):
        exec(TransformerManager().transform_cell(source), {"get_ipython": lambda shell=shell: shell})
    assert not here.asked and colab.asked == [("pip", f"install -q -e git+{repository[1]}#egg=minunclip")]
