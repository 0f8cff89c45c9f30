"""OpenAI's chat API: any chat client can use a folder of adapters as one model."""

from spectr_demo.serving.app import build
from spectr_demo.serving.server import bound, run

__all__ = ["bound", "build", "run"]
