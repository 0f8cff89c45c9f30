"""Training-free, token- and layer-wise routing between LoRA experts (SpectR).

Names are imported when first used, so that `--help` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spectr_demo import charts
    from spectr_demo.config import GenerationSettings, Intervention, RouterConfig
    from spectr_demo.engine.model import SpectrModel, load
    from spectr_demo.trace import RoutingTrace

__version__ = "0.1.0"
__all__ = [
    "GenerationSettings",
    "Intervention",
    "RouterConfig",
    "RoutingTrace",
    "SpectrModel",
    "charts",
    "load",
]

_HOMES = {
    "GenerationSettings": "config",
    "Intervention": "config",
    "RouterConfig": "config",
    "RoutingTrace": "trace",
    "SpectrModel": "engine",
    "load": "engine",
}


def __getattr__(name: str) -> Any:
    if name == "charts":
        return import_module("spectr_demo.charts")
    if name in _HOMES:
        return getattr(import_module(f"spectr_demo.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
