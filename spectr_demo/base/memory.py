"""How much memory there is, tensors that need not be in it, and where layers compute."""

from pathlib import Path

import psutil
import torch
from torch import nn


def available_memory() -> int:
    """Bytes this process can still take: the machine's free memory, less in a limited container."""
    free = int(psutil.virtual_memory().available)
    # psutil reports the host; a container's limit (cgroup v2) is only here.
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no such files, or the limit is "max"
        return free
    return min(free, max(limit - used, 0))


def execution_device(module: nn.Module) -> torch.device:
    """Where a layer computes. Of weights that accelerate keeps elsewhere and brings in for each
    pass, that is its hook's device, not theirs."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return next(module.parameters()).device if device is None else torch.device(device)
