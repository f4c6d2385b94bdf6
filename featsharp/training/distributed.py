"""Several processes in one run.

Gradients are averaged here, not by a wrapper, which would change parameter names and not suit the two-part backward
pass of a step.
"""

import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from featsharp.device import find_device
from featsharp.errors import DistributedError, first_line
from featsharp.normalizers import FeatureStatistics

T = TypeVar("T")


class World(NamedTuple):
    """Rank of this process among ``size``."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start_world(device: str, timeout: float = 600) -> World:
    """Join the processes that torchrun started, or make a world of one.

    Args:
        device: "auto" (CUDA where there is one), or a torch device.
        timeout: Seconds after which a process that waits for another one gives up.

    Raises:
        DistributedError: For a part of torchrun's environment variables, or another process that does not come.
    """
    chosen = find_device(device, local_rank=int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" not in os.environ and os.environ.get("WORLD_SIZE", "1") == "1":
        return World(0, 1, chosen)
    lacking = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if lacking and not dist.is_initialized():
        raise DistributedError(
            f"{', '.join(lacking)} of the environment variables of a run of several processes are not set; start it "
            "with torchrun, or alone after `unset RANK WORLD_SIZE`"
        )
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)  # collectives of objects use the current device
    if not dist.is_initialized():
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        run_together(lambda: dist.init_process_group(backend, timeout=timedelta(seconds=timeout)))
    return World(dist.get_rank(), dist.get_world_size(), chosen)


def stop_world() -> None:
    """Leave the process group, if there is one. Not after an error, when others may never leave it."""
    if dist.is_initialized():
        dist.destroy_process_group()


def name_process() -> str:
    """Prefix messages of one of several processes by "process RANK of SIZE: "; empty for a single one."""
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    return f"process {rank} of {size}: " if size != "1" else ""


def average_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Replace every gradient by its mean over the processes."""
    if world.size == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    add_over_processes([flat], world)
    flat /= world.size
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def add_over_processes(tensors: Iterable[Tensor], world: World) -> None:
    """Replace every tensor by its sum over the processes."""
    if world.size > 1:
        for tensor in tensors:
            run_together(partial(dist.all_reduce, tensor))


def merge_statistics(statistics: FeatureStatistics, world: World) -> FeatureStatistics:
    """Merge the statistics of all processes, on every process.

    Only counts, means and scatters are added up, never features: n = sum n_i; n mean = sum n_i mean_i;
    scatter = sum scatter_i + n_i (mean_i - mean) (mean_i - mean)^T.
    """
    if world.size == 1:
        return statistics
    state = {name: value.to(world.device) for name, value in statistics.state().items()}
    count, mean = state["count"].clone(), state["count"] * state["mean"]
    add_over_processes([count, mean], world)
    mean /= count.clamp(min=1)
    delta = state["mean"] - mean
    scatter = state["scatter"] + state["count"] * torch.outer(delta, delta)
    add_over_processes([scatter], world)
    return FeatureStatistics.from_state({"count": count.cpu(), "mean": mean.cpu(), "scatter": scatter.cpu()})


def any_process(flag: bool, world: World) -> bool:
    """Return whether the flag is set in any process; the same on all of them."""
    if world.size == 1:
        return flag
    flags = torch.tensor(int(flag), device=world.device)
    add_over_processes([flags], world)
    return bool(flags)


def copy_from_main(tensors: Iterable[Tensor], world: World) -> None:
    """Overwrite tensors with those of rank 0."""
    if world.size > 1:
        for tensor in tensors:
            run_together(partial(dist.broadcast, tensor.data, 0))


def object_from_main(make: Callable[[], T], world: World) -> T:
    """Call ``make`` on rank 0 alone, and return its result on every process; others need not see the same files."""
    values = [make() if world.is_main else None]
    if world.size > 1:
        run_together(lambda: dist.broadcast_object_list(values, 0, device=world.device))
    return values[0]  # type: ignore[return-value]


def gather_objects(value: T, world: World) -> list[T]:
    """Gather the ``value`` of every process, in rank order, on every process."""
    if world.size == 1:
        return [value]
    gathered: list[T] = [value] * world.size
    run_together(lambda: dist.all_gather_object(gathered, value))
    return gathered


def run_together(call: Callable[[], object]) -> None:
    """Run a call that all processes make.

    Raises:
        DistributedError: When another one has ended or does not answer. Errors of this process are raised unchanged.
    """
    try:
        call()
    except RuntimeError as error:
        if not _lost_another(error):
            raise
        raise DistributedError(
            f"lost another process of this run ({first_line(error)}); its own error is further up, or in its "
            "own log. One that only took longer needs a larger distributed_timeout"
        ) from error


def _lost_another(error: RuntimeError) -> bool:
    """Return whether the connection failed, by the text for gloo, and for device errors of NCCL."""
    text = str(error)
    if isinstance(error, dist.DistError):
        return "Cuda failure" not in text
    return any(sign in text for sign in ("gloo/transport", "pair closure", "Connection closed by peer"))
