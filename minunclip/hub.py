"""Weights on the Hugging Face Hub: from a name to a folder, and from a folder to a name, with a card that says what they are."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

FILES = ("*.json", "*.safetensors", "*.md", "*.png")  # what is up- and downloaded: no pickle, no program


def _hub(name: str) -> Any:
    if find_spec("huggingface_hub") is None:
        raise ValueError(f"{name} is no folder; to look for it on the Hub: pip install -e '.[hub]'")
    import huggingface_hub

    return huggingface_hub


def local_folder(weights: str | Path) -> Path:
    """The folder of that name, or if there is none, and the name reads owner/name, that repository of the Hub: downloaded, or as it is in the cache.

    ValueError where it cannot be had. What is no name of a repository is returned as it is.
    """
    path = Path(weights)
    if path.parent.is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(weights)):
        return path
    hub = _hub(str(weights))
    try:
        return Path(hub.snapshot_download(str(weights), allow_patterns=list(FILES)))
    except (OSError, ValueError, hub.errors.HTTPError) as error:
        raise ValueError(f"{weights} is no folder, and the Hub does not give it ({str(error).strip().splitlines()[0]}): check name and connection") from None


def model_card(folder: Path, name: str, figures: str = "") -> str:
    """README.md for a folder of packed weights: licence, data, limits, figures, and how each stage was trained, from the stages' own cards.

    `figures`: tables of an evaluation, in Markdown.
    """
    stages: list[str] = []
    common: dict[str, None] = {}  # paragraphs, each once
    for path in sorted(folder.glob("*/card.md")):
        title, _, text = path.read_text(encoding="utf-8").strip().partition("\n\n")
        what, *rest = text.split("\n\n")
        common |= dict.fromkeys(text for text in rest if not text.startswith(("|", "!")))
        tables = [text.replace("](", f"]({path.parent.name}/") for text in rest if text.startswith(("|", "!"))]
        stages.append("\n\n".join([f"#{title}", what, *tables]))
    if strange := [path.parent.name for path in sorted(folder.glob("*/model.safetensors")) if not (path.parent / "card.md").exists()]:
        common |= {f"Of {', '.join(strange)} it is not recorded where the weights come from: their own licence, data and limits hold.": None}
    licence = "other" if strange or any("whose licence holds" in text for text in common) else "mit"
    head = f"---\nlicense: {licence}\nlibrary_name: minunclip\npipeline_tag: text-to-image\ntags:\n- unclip\n- dall-e-2\n---\n\n# {name.split('/')[-1]}"
    use = f'```python\nfrom minunclip.pipeline import UnCLIP\n\npictures = UnCLIP.from_pretrained("{name}").generate(["a red circle"], seed=7).pictures\n```'
    what = "unCLIP, or DALL-E 2 ([arXiv 2204.06125](https://arxiv.org/abs/2204.06125)), trained with minunclip: from a caption to a picture."
    figures = f"## Figures\n\n{figures.strip()}" if figures else "## Figures\n\nNot measured."
    return "\n\n".join([head, what, use, "## Data, licence, limits", *common, figures, *stages]) + "\n"


def push(folder: Path, name: str, private: bool = False, figures: str = "") -> str:
    """Uploads a folder of weights as the repository owner/name, with its card as README.md, and returns the address. ValueError where it cannot."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"{name!r} is no name of a repository: write owner/name")
    hub, card = _hub(name), model_card(folder, name, figures)
    try:
        address = hub.create_repo(name, private=private, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder, allow_patterns=list(FILES))
        hub.upload_file(repo_id=name, path_or_fileobj=card.encode(), path_in_repo="README.md")
    except (OSError, ValueError, hub.errors.HTTPError) as error:
        raise ValueError(f"the Hub did not take {name} ({str(error).strip().splitlines()[0]}): log in with `hf auth login`, check name and rights") from None
    return str(address)
