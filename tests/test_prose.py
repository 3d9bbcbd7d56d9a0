"""Every number that a notebook's prose gives is one that a reader can find: in an output or in the paper, or, if it is a whole one, in the code.

Numbers of sections, figures, exercises, minutes of an exercise, years and hints point at something and claim nothing; what stands in `code` or in a formula
is not prose, but what a formula comes to (after ≈) is. The words that stand for a figure are prose too, and no evidence. Numbers in words are not looked at.
"""

import inspect
import json
import math
import re
from pathlib import Path

import pytest

from minunclip.budget import UTILISATION
from minunclip.config import CPU, PRESETS
from minunclip.pipeline import UnCLIP

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").rglob("[0-9]*.ipynb"))
ALT = re.compile(r'alt="[^"]*"')
NUMBER = re.compile(r"(?<![\w.])(\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?)(\s?%)?")
POINTERS = re.compile(
    r"(?:sections?|notebooks?|exercises?|solutions to|Figs?\.|Tab\.|App\.|Next:\*\*) \d[\d.]*(?:(?:, | and |–)\d[\d.]*)*"  # section 2.1, notebooks 04 and 05
    r"|\(\d+ min, \w[\w ]*\)|\b(?:19|20)\d\d\b|^(?:\*\*)?\d+\. |^# \d\d |\*Hint:[^*]*\*",
    re.IGNORECASE | re.MULTILINE,
)
FACTS = {  # what no cell can show, and where it is from
    650: "million pairs for CLIP, App. C",
    32_768: "CLIP's batch, Radford et al. 2021",
    49_408: "vocabulary of the published CLIP (Radford et al. 2021)",
    319: "components of z_i that the paper keeps, section 2.2",
    17.2: "the paper's latent scale, App. C",
    3.5: "billion parameters of the paper's decoder, Tab. 3",
    700: "million parameters of its first upsampler, Tab. 3",
    300: "million parameters of its second, Tab. 3",
    0.489: "of comparisons with GLIDE for photorealism that unCLIP with its diffusion prior wins, Tab. 1",
    0.453: "for caption similarity, Tab. 1",
    0.705: "for diversity, Tab. 1",
    0.57: "of comparisons with a decoder told of z_t for photorealism that unCLIP wins, section 5.1",
    0.531: "for caption similarity, section 5.1",
    3.1: "% margin of the first, Tab. 1",
    3.0: "of the second",
    2.8: "of the third",
    28: "FID of DALL-E, Tab. 2",
    12.24: "FID of GLIDE, Tab. 2",
    10.39: "FID of unCLIP with its diffusion prior, Tab. 2",
    8_192: "codes of DALL-E, Ramesh et al. 2021",
    1.96: "standard deviations on either side hold 95 % of a Gaussian",
    14.3: 1 / 0.07,
    5.55: math.log(256),
    4.85: math.log(128),
    4.16: math.log(64),
    55: math.sqrt(3072),
    768: 3 * 16 * 16,
    320: 319 + 1,
    24: "layers of the text transformer of the paper's CLIP, App. C",
    1_024: "numbers of the paper's z_i, section 2.2, and pixels of its pictures, Tab. 3",
    0.1: "of examples lose their caption in the prior's training, section 2.2",
    0.999: "the largest beta, Nichol and Dhariwal 2021",
    32: "codes a side of DALL-E, Ramesh et al. 2021",
    250: "million pictures of the paper's prior and decoder, App. C",
    800_000: "steps of the paper's decoder, Tab. 3",
    0.95: "of intervals that hold the true share, section 5.2",
    0.9: "a share that exercises ask about",
    0.05: "of examples lose their embedding in the decoder's training, section 5.1",
    0.5: "of captions that are dropped in the decoder's training, section 2.1",
    0.4: UTILISATION,
    1.5: inspect.signature(UnCLIP.generate).parameters["prior_guidance"].default,
    25: CPU.decoder.diffusion.sampling_steps,
    128: CPU.clip.embedding_dim,
    60_000: CPU.world.training_scenes,
    6_000: CPU.world.upsampler_scenes,
    240_000: PRESETS["long"].world.training_scenes,
}


def text(value):
    return value if isinstance(value, str) else "".join(value)


def worth(number, percent):
    """20,000 as 20000, 47 % as 0.47."""
    return float(number.replace(",", "")) / (100 if percent else 1)


def numbers(words):
    """The values in a text, `20_000` as 20000; 47 % as 0.47, and as the 47 of a list of percentages."""
    found = NUMBER.findall(re.sub(r"(?<=\d)_(?=\d)", "", words))
    return {worth(number, sign) for number, percent in found for sign in {percent, ""}}


def prose(cell):
    words = re.sub(r"`[^`]*`|\]\([^)]*\)", " ", text(cell["source"]))
    words = re.sub(r"\$\$.*?\$\$|\$[^$]*\$", lambda formula: " ".join(re.findall(r"\\approx ([\d.]+)", formula[0])), words, flags=re.DOTALL)
    return POINTERS.sub(" ", words)


def printed(cell):
    for output in cell["outputs"]:
        data = output.get("data", {})
        shown = re.sub(r"base64,[^\"]*", "", ALT.sub(" ", text(data.get("text/html", ""))))
        yield text(output.get("text", "")) + text(data.get("text/plain", "")) + text(data.get("text/markdown", "")) + shown


def unfounded(words, outputs, constants):
    """The numbers of a text that are no constant, and are not an output, rounded to their last digit."""
    found = []
    for number, percent in NUMBER.findall(words):
        value, unit = worth(number, percent), worth(f"1e-{len(number.partition('.')[2].partition('e')[0])}", percent)
        constant = any(math.isclose(value, constant) for constant in constants)
        if not constant and not any(abs(value - output) <= 0.5001 * unit for output in outputs):
            found.append(number + percent)
    return found


def test_a_number_is_found_where_it_stands_and_missed_where_it_does_not():
    outputs = numbers("all right: 0.467, cosine 0.8312, 12,345 pictures in 8.5 s")
    assert not unfounded("47 %, a cosine of 0.831, 12,345 pictures, over 8 seconds", outputs, constants=())
    assert unfounded("46 %, a cosine of 0.84, 12,346 pictures, 10 seconds", outputs, constants=()) == ["46 %", "0.84", "12,346", "10"]
    assert not unfounded("256 pictures at 90 %", (), numbers("render(scenes[:256]), 0.9")) and numbers("20_000 x 1e-3 of z2") == {20_000, 1e-3}
    cell = {"source": "See section 2.1 and notebooks 04 and 05 (Ho 2020); `x[17]`; $x^{18} \\approx 19.5$.\n\n**3. Sums.** (15 min, easy) Of 16."}
    assert numbers(prose(cell)) == {19.5, 16}


def test_what_is_worked_out_is_worked_out_right():
    for value, source in FACTS.items():
        assert isinstance(source, str) or abs(value - source) < 10.0 ** -len(f"{value}".partition(".")[2]), value


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_number_in_the_prose_is_shown(path):
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    outputs = {value for cell in code for words in printed(cell) for value in numbers(words)}
    counts = {value for cell in code for value in numbers(ALT.sub(" ", text(cell["source"])))}  # that code uses: shares and decimals must come out of it
    said = [prose(cell) if cell["cell_type"] == "markdown" else " ".join(ALT.findall(text(cell["source"]))) for cell in cells]
    missing = [(number, words) for words in said for number in unfounded(words, outputs, FACTS) if re.search(r"[.%]", number) or unfounded(number, (), counts)]
    assert not missing, "\n".join(f"{number} in: {words[:300]}" for number, words in missing)
