"""Devices and autocast types by name."""

import torch

from featsharp.errors import ConfigError


def find_device(name: str, local_rank: int = 0) -> torch.device:
    """Return a device by name.

    Args:
        name: A name that ``torch.device`` takes, or "auto" for CUDA where it is available, else the CPU.
        local_rank: Index of the CUDA device for "auto" and "cuda".

    Raises:
        ConfigError: When the device is not available.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used here ({reason}); use auto or cpu") from error
    return device


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
        else torch.cpu._is_avx512_bf16_supported()
    )
    return torch.bfloat16 if fast else None
