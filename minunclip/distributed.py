"""Training on several processes, one a device, started by torchrun or accelerate: data parallel, with the same numbers as on one.

A global batch falls into equal parts. One process does them one after the other (gradient accumulation); several share them out and add up their
gradients. Each part has random numbers of its own, so that N processes with A parts each do what one process with N * A parts does, up to the
order of summation (but for the running averages of the checker's batch norm, which are those of the first process's parts alone). CLIP's loss
compares all pairs of the global batch: its embeddings are gathered, with their gradients.

A model that is too large for every device to keep whole is sharded (FSDP2, after ZeRO, Rajbhandari et al. 2020): each process keeps a share of every
parameter, gradient, moment and average, and a layer is put together when its turn comes. Files are those of a model that is whole.
"""

import atexit
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed.nn.functional as collective
from torch import Tensor, distributed, nn
from torch.utils._pytree import tree_map


def start(device: torch.device) -> torch.device:
    """Joins the processes that torchrun has started, if it has, and returns this one's device. Call it once, before anything is trained."""
    if "RANK" not in os.environ or distributed.is_initialized():
        return device
    if device.type == "cuda":
        here, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if here >= there:
            raise ValueError(f"torchrun has started more processes than there are GPUs: use --nproc_per_node {there}")
        device = torch.device("cuda", here)
        torch.cuda.set_device(device)
    patience = timedelta(days=1)  # the first process may read, and embed, millions of pictures, while the others wait for it
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
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
    if is_share(gradients[0]):  # added up already, when each layer's turn was over; but as a mean
        torch._foreach_mul_(gradients, ranks())
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(part.view_as(gradient))


def is_share(value: Any) -> bool:
    """Whether it is a process's share of a tensor: a DTensor, whose module takes a while to import, and waits until something is sharded."""
    return hasattr(value, "full_tensor")


def clip_gradients(model: nn.Module, longest: float) -> Tensor:
    """Shortens the gradient to that length at most; returns the length that it had."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    shares = [local(gradient) for gradient in gradients]
    norm = nn.utils.get_total_norm(shares)
    if is_share(gradients[0]):
        norm = total(norm.square()).sqrt()
    torch._foreach_mul_(shares, (longest / (norm + 1e-6)).clamp(max=1))
    return norm


def layers(model: nn.Module) -> list[nn.Module]:
    """The entries of every nn.ModuleList: a transformer's blocks, a U-Net's stages."""
    return [layer for stack in model.modules() if isinstance(stack, nn.ModuleList) for layer in stack]


def shard(model: nn.Module) -> None:
    """Leaves each process its share of every parameter, in place. From then on only `forward` may be called, by all processes at once."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # keys and values, which nobody changes in place
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # channels-last is not understood
    mesh = init_device_mesh(next(model.parameters()).device.type, (ranks(),))
    for module in (*layers(model), model):
        fully_shard(module, mesh=mesh)


def together(value: Any) -> Tensor:
    """The whole of a tensor of which each process keeps a share; any other as it is. All processes must call it.

    DTensor.full_tensor does the same, by collectives of another kind (functional ones), in which a process crashes now and then on CPUs
    (torch 2.13, gloo). Nothing here relies on those.
    """
    if not is_share(value):
        return value
    share, length = value.to_local(), -(-len(value) // ranks())  # shares are equally long, but for the last ones, which may be shorter
    padded = share.new_zeros(length, *share.shape[1:])
    padded[: len(share)] = share
    parts = share.new_empty(ranks() * length, *share.shape[1:])
    distributed.all_gather_into_tensor(parts, padded)
    return parts[: len(value)]


def whole(values: Any) -> Any:
    """Any nest of lists and dicts with the tensors in it put together, on the CPU. All processes must call it; only the first keeps what it gets."""

    def gathered(value: Any) -> Any:
        if is_share(value):
            full = together(value)
            return full.cpu() if rank() == 0 else None
        return value

    return tree_map(gathered, values)


def share(value: Any, like: Any) -> Any:
    """Of a whole tensor in the shape of a parameter what this process needs beside that: its share, or all, laid out in memory alike."""
    if not isinstance(value, Tensor) or value.ndim == 0 or value.shape != like.shape:
        return value
    if is_share(like):
        return shared_out(value, like)
    return torch.empty_like(like, dtype=value.dtype).copy_(value)  # a fused optimiser walks through both by address


def shared_out(value: Tensor, like: Any) -> Tensor:
    """This process's share of a whole tensor that all of them have, cut as `like` is."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device).contiguous(), like.device_mesh, like.placements, src_data_rank=None)


def local(tensor: Any) -> Tensor:
    """What this process keeps of a tensor: its share of a sharded one, all of any other."""
    return tensor.to_local() if is_share(tensor) else tensor


@torch.no_grad()
def put_together(sharded: nn.Module, model: nn.Module) -> None:
    """Copies a sharded model into a whole one. All processes must call it."""
    for kept, current in zip(model.state_dict().values(), sharded.state_dict().values()):
        kept.copy_(together(current))


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
