"""Weights from and to other projects.

`clip.py`: CLIP of OpenAI, open_clip and Hugging Face. `karlo.py`: diffusers' unCLIP, and so Karlo, which `to_diffusers.py` leads back to. That one
imports the pipeline, and is imported from where it stands.
"""

from minunclip.interop.clip import IMAGE_MEAN, IMAGE_STD, clip_from_folder, clip_from_state_dict
from minunclip.interop.karlo import say_nothing_by_an_empty_caption

__all__ = ["IMAGE_MEAN", "IMAGE_STD", "clip_from_folder", "clip_from_state_dict", "say_nothing_by_an_empty_caption"]
