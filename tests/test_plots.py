import base64
import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from minunclip.plots import curve_figure, picture_grid, save_figure, show, slide, stages_figure, table_figure
from minunclip.safety import read_facts


@pytest.fixture
def shown(monkeypatch):
    """What a notebook would get to see."""
    found = []
    monkeypatch.setattr("IPython.display.display", lambda output: found.append(getattr(output, "data", output)))
    return found


def test_a_figure_is_shown_once_with_its_words(shown):
    figure, axes = plt.subplots(figsize=(3, 2))
    axes.plot([0, 1])
    show(figure, alt='a "line" that rises')
    (markup,) = shown
    assert 'alt="a &quot;line&quot; that rises"' in markup and not plt.fignum_exists(figure.number)
    data = base64.b64decode(markup.split("base64,")[1].split('"')[0])
    assert Image.open(io.BytesIO(data)).size == (270, 180)


def test_pictures_stand_in_rows_under_their_titles(shown):
    pictures = [np.full((4, 4, 3), 20 * i, np.uint8) for i in range(5)]
    figure = picture_grid(pictures, [f"picture ${i}" for i in range(5)], columns=3)
    assert len(figure.axes) == 6 and [len(axes.images) for axes in figure.axes] == [1, 1, 1, 1, 1, 0]
    assert figure.axes[4].get_title().endswith("4") and (figure.axes[4].images[0].get_array() == 80).all()
    wide = picture_grid([np.zeros((4, 8, 3), np.uint8)] * 4, columns=2)
    assert figure.get_size_inches()[0] == pytest.approx(6.6) and wide.get_size_inches().tolist() == pytest.approx([8.8, 4.4])  # twice as wide as high
    show(pictures, alt="five greys")
    assert len(shown) == 1


@pytest.mark.parametrize(("caption", "words"), [("two $mall stars, above a long\nline", r"two \$mall|stars, above a|long line"), ("", "(empty)")])
def test_the_strip_has_the_caption_the_scores_the_steps_and_each_size(tmp_path, monkeypatch, caption, words):
    kept = []
    monkeypatch.setattr("minunclip.plots.save_figure", lambda path, figure, facts, dpi: kept.append((figure, save_figure(path, figure, facts, dpi))))
    frames = [np.full((4, 4, 3), 20 * i, np.uint8) for i in range(10)]
    pictures = {side: np.full((side, side, 3), side, np.uint8) for side in (4, 16, 64)}
    stages_figure(tmp_path / "strip.png", caption, [0.25, 0.75], frames, pictures, {"prompt": caption, "seed": 3})
    said, scores, *places = kept[0][0].axes
    assert [text.get_text().replace("\n", "|") for text in said.texts] == [words]
    assert [bar.get_height() for bar in scores.patches] == [0.25, 0.75] and [text.get_text() for text in scores.texts] == ["0.250", "0.750"]
    assert scores.patches[0].get_facecolor() != scores.patches[1].get_facecolor()  # the better one is kept
    titles = [axes.get_title() for axes in places]
    assert titles == [f"step {step} of 10" for step in (1, 3, 5, 6, 8, 10)] + ["4 × 4", "16 × 16", "64 × 64"]
    assert [axes.images[0].get_array().max() for axes in places] == [0, 40, 80, 100, 140, 180, 4, 16, 64]
    assert read_facts(tmp_path / "strip.png").items() >= {"prompt": caption, "seed": "3"}.items()


def test_a_figure_without_words_is_refused(shown):
    with pytest.raises(ValueError, match="alt text"):
        show([np.zeros((2, 2, 3), np.uint8)], alt=" ")
    assert not shown


def test_a_table_as_bars_has_a_panel_a_column_and_shows_its_spread():
    figure = table_figure({"a": {"x": 0.5, "± x": 0.1}, "b": {"x": 1.0, "± x": 0.2, "y": 3.0}})
    first, second = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["x", "y"]
    assert [bar.get_width() for bar in first.patches] == [0.5, 1.0] and [bar.get_width() for bar in second.patches] == [3.0]
    assert len(first.collections) == 1 and not second.collections and [text.get_text() for text in first.get_yticklabels()] == ["a", "b"]


def test_a_slider_has_a_frame_for_each_value_and_a_figure_of_all(shown, monkeypatch):
    drawn, links = [], []
    monkeypatch.setattr("ipywidgets.jslink", lambda source, target: links.append((source, target)))

    def draw(axes, value):
        drawn.append(value)
        axes.imshow(np.full((4, 4), value), vmin=0, vmax=1)

    slide(draw, alt="a grey that darkens", size=(1, 1), columns=2, noise_level=[0, 0.5, 1])
    markup, widget = shown
    assert 'alt="a grey that darkens"' in markup and drawn == [0, 0.5, 1, 0, 0.5, 1]
    figure = Image.open(io.BytesIO(base64.b64decode(markup.split("base64,")[1].split('"')[0])))
    assert figure.size == (180, 180)  # two rows of two places of an inch
    handle, stack = widget.children
    assert handle.description == "noise level" and [label for label, _ in handle.options] == ["0", "0.5", "1"]
    assert ['alt="a grey that darkens Here: noise level' in frame.value for frame in stack.children] == [True] * 3
    colours = [Image.open(io.BytesIO(base64.b64decode(frame.value.split("base64,")[1].split('"')[0]))).getpixel((45, 50)) for frame in stack.children]
    assert colours[0] != colours[1] != colours[2]
    assert links == [((handle, "index"), (stack, "selected_index"))]  # in the browser: no kernel is asked


def test_a_table_is_drawn_as_curves():
    def curves(axes):
        return [bars[0].get_xydata().tolist() for bars in axes.containers]

    (axes,) = curve_figure({"a, of 2": {"y": 5.0, "± y": 0.5}, "a, of 4": {"y": 7.0, "± y": 0.1}, "b, of 3": {"y": 1.0}, "floor": {"y": 0.5}}, "of").axes
    assert curves(axes) == [[[2, 5], [4, 7]], [[3, 1]]]
    assert [0.5, 0.5] in [list(line.get_ydata()) for line in axes.lines]  # a level
    (axes,) = curve_figure({"a, of 2": {"y": 5.0}, "floor": {"z": 0.5}}, "of").axes  # of z there is nothing but a level
    assert axes.get_title() == "y"
    (axes,) = curve_figure({"one": {"t": 3.0, "y": 1.0}, "two": {"t": 9.0, "y": 2.0}}, "t").axes  # a column in the place of the names
    assert curves(axes) == [[[3, 1]], [[9, 2]]]


def test_a_slider_without_words_or_with_two_names_is_refused(shown):
    with pytest.raises(ValueError, match="alt text"):
        slide(lambda axes, value: None, alt="", t=[1])
    for sliders in ({}, {"t": []}, {"t": [1], "w": [2]}):
        with pytest.raises(ValueError, match="give one"):
            slide(lambda axes, value: None, alt="nothing at all", **sliders)
    assert not shown


def test_the_colours_of_the_course_are_told_apart_without_red_and_green():
    with plt.style.context("minunclip.course"):
        colours = [to_rgb(colour) for colour in plt.rcParams["axes.prop_cycle"].by_key()["color"]]
    linear = np.array(colours) ** 2.2
    deuteranopia = np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]])  # Machado, Oliveira and Fernandes 2009, severity 1
    for seen in (linear, linear @ deuteranopia.T):
        lightness, a, b = _lab(seen.clip(0, 1)).T
        apart = np.sqrt((lightness[:, None] - lightness) ** 2 + (a[:, None] - a) ** 2 + (b[:, None] - b) ** 2)
        assert apart[~np.eye(len(colours), dtype=bool)].min() > 20  # 2.3 is just seen


def _lab(linear: np.ndarray) -> np.ndarray:
    """Linear sRGB to CIELAB, D65."""
    xyz = linear @ np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]).T / [0.9505, 1, 1.089]
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)
