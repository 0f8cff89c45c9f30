"""How much memory is free, and where layers compute."""

from pathlib import Path

import psutil
import torch
from torch import nn


def available_memory() -> int:
    """Bytes of RAM that this process can still take.

    That is the machine's free memory, or what is left of a container's limit if that is less.
    """
    free = int(psutil.virtual_memory().available)
    # psutil reports the host; a container's limit (cgroup v2) is only here.
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no such files, or the limit is "max"
        return free
    return min(free, max(limit - used, 0))


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on a device: of the GPU's memory, or `available_memory`."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_memory()


def execution_device(module: nn.Module) -> torch.device:
    """Where a layer computes.

    accelerate may keep its weights elsewhere and bring them in for each pass. Then it is the device
    of accelerate's hook, not that of the weights.
    """
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return next(module.parameters()).device if device is None else torch.device(device)
