"""The Gradio page. What it shows is drawn by `cards` and `charts`; what it runs is `run`."""

from spectr_demo.ui.page import build, launch_options

__all__ = ["build", "launch_options"]
