"""The little that a run needs to know of other processes. Gradients are averaged here, not by a wrapper, so that
parameter names stay the same and the two-part backward of a step needs no special care."""

import os
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from featsharp.ops.device import find_device


class World(NamedTuple):
    """This process among all: rank of world."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start_world(device: str) -> World:
    """Join the processes that torchrun started, or stand alone.

    Args:
        device: "auto" (CUDA where there is one), or a torch device.
    """
    chosen = find_device(device, local_rank=int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" not in os.environ:
        return World(0, 1, chosen)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)  # collectives of objects use the current device
    if not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return World(dist.get_rank(), dist.get_world_size(), chosen)


def stop_world() -> None:
    """Leave the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def average_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Replace every gradient by its mean over the processes."""
    if world.size == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= world.size
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def add_over_processes(tensors: Iterable[Tensor], world: World) -> None:
    """Replace every tensor by its sum over the processes."""
    if world.size > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def copy_from_main(tensors: Iterable[Tensor], world: World) -> None:
    """Overwrite tensors with those of rank 0."""
    if world.size > 1:
        for tensor in tensors:
            dist.broadcast(tensor.data, 0)


def gather_objects(value: object, world: World) -> list[object]:
    """What every process has, in rank order, on every process."""
    if world.size == 1:
        return [value]
    gathered: list[object] = [None] * world.size
    dist.all_gather_object(gathered, value)
    return gathered
