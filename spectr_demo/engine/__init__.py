"""The routed model: one engine for every front end."""

from spectr_demo.engine.model import SpectrModel, load
from spectr_demo.engine.run import ColumnOutput, Step

__all__ = ["ColumnOutput", "SpectrModel", "Step", "load"]
