"""Weights from and to other projects: CLIP's of OpenAI, open_clip and Hugging Face (`clip.py`), and diffusers' unCLIP, which is Karlo (`karlo.py`)."""

from minunclip.interop.clip import IMAGE_MEAN, IMAGE_STD, clip_from_folder, clip_from_state_dict

__all__ = ["IMAGE_MEAN", "IMAGE_STD", "clip_from_folder", "clip_from_state_dict"]
