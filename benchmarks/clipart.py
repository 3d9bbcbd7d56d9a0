"""Debian's openclipart-svg (8,000 drawings in the public domain, each with a title) as a folder of captioned pictures that `minunclip train` reads.

apt-get install openclipart-svg librsvg2-bin
python benchmarks/clipart.py --out clipart --subjects animals food
minunclip data check clipart
"""

import argparse
import json
import subprocess
from pathlib import Path
from xml.etree import ElementTree

HOME = Path("/usr/share/openclipart/svg")
DC = "{http://purl.org/dc/elements/1.1/}"
LI = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}li"


def captions(drawing: Path) -> list[str]:
    """Its title, and its keywords in one line; empty where it has none or is no XML."""
    try:
        root = ElementTree.parse(drawing).getroot()
    except ElementTree.ParseError:
        return []
    title = next((note.text.strip() for note in root.iter(f"{DC}title") if note.text), "")
    words = [word.text.strip() for note in root.iter(f"{DC}subject") for word in note.iter(LI) if word.text and word.text.strip()]
    return [text for text in (title.replace("_", " "), ", ".join(dict.fromkeys(words))) if text]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--subjects", nargs="+", default=["animals"], help=f"folders of {HOME}")
    parser.add_argument("--side", type=int, default=256, help="pixels of the longer side")
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    rows = []
    for drawing in sorted(path for subject in options.subjects for path in (HOME / subject).rglob("*.svg")):
        picture = options.out / f"{drawing.relative_to(HOME).as_posix().replace('/', '-').removesuffix('.svg')}.png"
        side = str(options.side)
        command = ["rsvg-convert", "--keep-aspect-ratio", "--width", side, "--height", side, "--output", str(picture), str(drawing)]
        if (text := captions(drawing)) and subprocess.run(command, capture_output=True).returncode == 0:
            rows.append({"file_name": picture.name, "text": text, "group": text[0].casefold()})  # drawings of one title may be versions of one
    (options.out / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{options.out}: {len(rows)} pictures")


if __name__ == "__main__":
    main()
