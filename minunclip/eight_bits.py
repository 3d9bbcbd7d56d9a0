"""Weights in eight bits: a whole number a weight and one scale a row. Half of what float16 takes, and nearly as good on the pictures (README.md)."""

from collections.abc import Collection

import torch
from torch import Tensor

SCALE = "/scale"  # after the name of the rows that it belongs to; no parameter's name has a slash


def to_rows(tensors: dict[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """The tensors called `names`, of two dimensions or more, as int8 in -127 .. 127 with a float16 scale for each of the first; others in float16."""
    packed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in names:
            rows = tensor.float().flatten(1)
            scale = (rows.abs().amax(dim=1) / 127).half().clamp(min=2**-24)  # the smallest float16: a row may be all zero
            packed[name] = (rows / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8).view(tensor.shape)
            packed[name + SCALE] = scale
        else:
            packed[name] = tensor.half() if tensor.is_floating_point() else tensor
    return packed


def from_rows(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `to_rows` has packed, as float16; other tensors as they are. ValueError where a scale has no rows, or another number of them, or rows no scale."""
    for name in (name for name in tensors if name.endswith(SCALE)):
        rows = tensors.get(name.removesuffix(SCALE))
        if rows is None or rows.dtype != torch.int8 or tensors[name].shape != rows.shape[:1]:
            raise ValueError(f"{name!r} does not belong to eight-bit rows: copy the file again")
    if bare := [name for name, tensor in tensors.items() if tensor.dtype == torch.int8 and name + SCALE not in tensors]:
        raise ValueError(f"{bare[0]!r} has eight bits, and no scale: copy the file again")
    return {
        name: (tensor.flatten(1) * tensors[name + SCALE].float()[:, None]).view(tensor.shape).half() if name + SCALE in tensors else tensor
        for name, tensor in tensors.items()
        if not name.endswith(SCALE)
    }
