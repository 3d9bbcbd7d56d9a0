"""TensorBoard beside the JSONL log, for who wants to watch several runs at once: scalars, sample grids and the loss curve.

It reads them with `tensorboard --logdir runs`. Needs the extra [track].
"""

from pathlib import Path
from typing import Any


def require_tensorboard() -> Any:
    """The class that writes event files; ValueError where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("TensorBoard is not installed: pip install -e '.[track]', or leave --track out") from None
    return SummaryWriter


def open_board(folder: Path, step: int) -> Any:
    """A writer into `folder`. What a lost run has written past `step`, from which this one goes on, is hidden."""
    return require_tensorboard()(folder, purge_step=step + 1)


def show_line(board: Any, line: dict[str, float]) -> None:
    """A line of the log as scalars, one curve a figure."""
    for name, value in line.items():
        if name != "step":
            board.add_scalar(name, value, line["step"])
    board.flush()
