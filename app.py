"""The demo as a web page: `python app.py`, and the entry point of a Hugging Face Space."""

import argparse
import os
import signal
import sys
from contextlib import suppress

import spaces  # before torch: on a Space it replaces CUDA, elsewhere it does nothing

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr

import spectr_demo
from spectr_demo import ui
from spectr_demo.arguments import add_model_options
from spectr_demo.config import is_zero_gpu


def build(arguments: list[str]) -> gr.Blocks:
    """The page of the model that the arguments, else the environment, name."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_options(parser)
    chosen = parser.parse_args(arguments)
    try:
        model = spectr_demo.load(chosen.base, chosen.experts)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(str(error))
    return ui.build(model, gpu=spaces.GPU if is_zero_gpu() else None)


if __name__ == "__main__":
    # The first process of a container is ended by no signal that it does not handle.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt):  # while it loads; later Gradio closes its server
        build(sys.argv[1:]).launch(**ui.launch_options())
    sys.stdout.flush()
    os._exit(0)  # answers that are being written are not waited for
