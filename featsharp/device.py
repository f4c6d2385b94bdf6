"""Devices and autocast types by name, torch's defaults for both, and threads after a fork."""

import functools
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor

from featsharp.errors import ConfigError, InputError, first_line


def find_device(name: str, local_rank: int = 0) -> torch.device:
    """Return a device by name.

    Args:
        name: A name that ``torch.device`` takes, or "auto" for :func:`best_device`.
        local_rank: Number of this process on its machine: with "auto" and "cuda" they take the CUDA devices that each
            sees in turn, so that one that sees its own alone (Slurm's --gpus-per-task) takes that.

    Raises:
        ConfigError: When the device is not available.
    """
    if name == "auto":
        name = best_device(torch.cuda.is_available(), has_mps())
    if name == "cuda":
        name = f"cuda:{local_rank % max(1, torch.cuda.device_count())}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise ConfigError(f"device {name!r} cannot be used here ({first_line(error)}); use auto or cpu") from error
    return device


def best_device(cuda: bool, mps: bool) -> str:
    """Name the device that "auto" means: CUDA where it is available, else MPS (Apple's GPUs), else the CPU."""
    return "cuda" if cuda else "mps" if mps else "cpu"


def has_mps() -> bool:
    """Tell whether Apple's GPU can be used; before torch 2.5 it has no autocast, on which types depend."""
    return torch.backends.mps.is_available() and torch.amp.is_autocast_available("mps")


def to_double(x: Tensor) -> Tensor:
    """Convert to float64, on the CPU where the device has no such type (MPS)."""
    return x.to("cpu" if x.device.type == "mps" else x.device, torch.float64)


@contextmanager
def usual_defaults() -> Iterator[torch.device]:
    """Make what this context creates float32 and on the CPU, whatever default type and device of torch are set.

    Models are built in it, so that the same name gives the same numbers; also a decorator. Types are a setting of the
    process, so threads that rely on another default type should not run beside it.

    Yields:
        The default device that was set, to which what was built can be moved.
    """
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    with ExitStack() as stack:
        if device.type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if dtype != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        yield device


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Make torch take algorithms that give the same bits each time; what is set before comes back afterwards.

    They are a setting of the process. On CUDA cuBLAS reads its own when it is first used: enter this before.

    Raises:
        ConfigError: For an operation that has no such algorithm on its device, when it is reached.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        reason = str(error).partition(", but you set")[0]
        raise ConfigError(f"deterministic=true: {reason}; use another device, or deterministic=false") from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark


def without_autocast(like: Tensor) -> AbstractContextManager[object]:
    """Make a context in which a caller's autocast does not apply, on the device of a tensor."""
    # torch has none for tensors without values.
    return nullcontext() if like.is_meta else torch.autocast(like.device.type, enabled=False)


def check_weights(dtype: torch.dtype, name: str) -> None:
    """Raise InputError for weights of a type that torch can store but not compute with, such as float8_e4m3fn.

    Args:
        dtype: Of the weights.
        name: Of the part with them, for the message.
    """
    if dtype.itemsize < 2:
        raise InputError(
            f"{name} has weights of {str(dtype).removeprefix('torch.')}, which torch stores but has no convolutions "
            "for; cast it with .to(torch.bfloat16), or float16, float32, float64"
        )


def check_autocast(weights: torch.dtype, like: Tensor, name: str) -> None:
    """Raise InputError for weights that cannot be computed with, as such or under the caller's autocast.

    That is one to a half type where they have the other, which torch cannot mix, see also :func:`check_weights`.

    Args:
        weights: Their type.
        like: A tensor on the device where is computed.
        name: Of the part with the weights, for the message.
    """
    check_weights(weights, name)
    kind = like.device.type
    if weights not in (torch.float16, torch.bfloat16) or like.is_meta or not torch.is_autocast_enabled(kind):
        return
    wish = torch.get_autocast_dtype(kind)
    if wish != weights:
        has, got = (str(dtype).removeprefix("torch.") for dtype in (weights, wish))
        raise InputError(
            f"{name} has {has} weights, which an autocast to {got} cannot take; use an autocast to {has}, none, or "
            "float32 weights"
        )


def autocast_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast type of matrix products; "auto" is bfloat16 where the hardware multiplies it natively."""
    names = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name in names:
        return names[name]
    if name != "auto":
        raise ConfigError(f"unknown dtype {name!r}; use auto, {', '.join(names)}")
    fast = (
        torch.cuda.is_bf16_supported(including_emulation=False)
        if device.type == "cuda"
        else device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()  # unknown to torch 2.4
    )
    return torch.bfloat16 if fast else None


@functools.cache
def use_one_thread_after_forks() -> None:
    """Let processes that are forked from this one compute with one thread, as those of a ``DataLoader`` do.

    OpenMP's threads do not survive a fork: a child of a process that has computed with several would wait for them for
    ever. Spawned processes are not concerned, and ``torch.set_num_threads`` in the child changes the number.
    """
    if hasattr(os, "register_at_fork"):  # there are no forks on Windows
        os.register_at_fork(after_in_child=functools.partial(torch.set_num_threads, 1))
