"""Training-free, token- and layer-wise routing between LoRA experts (SpectR)."""

from spectr_demo import charts
from spectr_demo.config import GenerationSettings, RouterConfig
from spectr_demo.engine import SpectrModel, load
from spectr_demo.trace import RoutingTrace

__version__ = "0.1.0"
__all__ = [
    "GenerationSettings",
    "RouterConfig",
    "RoutingTrace",
    "SpectrModel",
    "charts",
    "load",
]
