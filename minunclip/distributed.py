"""Training on several processes, one a device, started by torchrun: data parallel, with the same numbers as on one.

A global batch falls into equal parts. One process does them one after the other (gradient accumulation); several share them out and add up their
gradients. Each part has random numbers of its own, so that N processes with A parts each do what one process with N * A parts does, up to the
order of summation. CLIP's loss compares all pairs of the global batch: its embeddings are gathered, with their gradients.
"""

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed.nn.functional as collective
from torch import Tensor, distributed, nn


def start(device: torch.device) -> torch.device:
    """Joins the processes that torchrun has started, if it has, and returns this one's device. Call it once, before anything is trained."""
    if "RANK" not in os.environ or distributed.is_initialized():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    atexit.register(distributed.destroy_process_group)  # its threads must end before the interpreter does, or they abort it
    return device


def rank() -> int:
    """0 for the process that writes files, which is the only one where there is one."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def ranks() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def wait_for_all() -> None:
    """Returns once every process has come here."""
    if ranks() > 1:
        distributed.barrier()


@contextmanager
def first_one_then_all() -> Iterator[None]:
    """The block runs on rank 0, then on all others, which find the files that it has written."""
    if rank() > 0:
        wait_for_all()
    yield
    if rank() == 0:
        wait_for_all()


def add_gradients(model: nn.Module) -> None:
    """Sums every parameter's gradient over all processes."""
    if ranks() == 1:
        return
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(part.view_as(gradient))


def anywhere(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any of the processes; all of them get the same answer."""
    if ranks() == 1:
        return flag
    answer = torch.tensor(float(flag), device=device)
    distributed.all_reduce(answer, distributed.ReduceOp.MAX)
    return bool(answer)


def total(value: Tensor) -> Tensor:
    """The sum over all processes, without gradients."""
    if ranks() > 1:
        distributed.all_reduce(value)
    return value


def gather(tensor: Tensor) -> Tensor:
    """(B, ...) of every process, (ranks * B, ...), in the order of the ranks; gradients flow back to where each part came from."""
    if ranks() == 1:
        return tensor
    if not tensor.requires_grad:
        parts = [torch.empty_like(tensor) for _ in range(ranks())]
        distributed.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)
    return torch.cat(collective.all_gather(tensor.contiguous()))
