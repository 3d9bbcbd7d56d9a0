from pathlib import Path

import pytest
import torch
from hypothesis import settings

from minunclip.config import BASELINES, STAGES, TINY
from minunclip.packing import pack
from minunclip.runs import Run
from minunclip.stages import train

settings.register_profile("minunclip", deadline=None)  # the first example of a test may wait for an import
settings.load_profile("minunclip")


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole chain and the baselines, trained with the tiny preset: a few seconds, and pictures of noise."""
    folder = tmp_path_factory.mktemp("tiny")
    run = Run(TINY, folder, torch.device("cpu"))
    for stage in STAGES + BASELINES:
        train(stage, run)
    return folder


@pytest.fixture(scope="session")
def tiny_weights(tiny_run: Path) -> Path:
    pack(tiny_run, tiny_run / "weights")
    return tiny_run / "weights"
