"""What the command line takes: the options of each command, their defaults and their help."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, get_args

from spectr_demo.config import DEFAULT_COLUMNS, DEFAULT_ROUTER, Composition, Weighting

Command = Callable[[argparse.Namespace], Any]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def parser(commands: Mapping[str, Command], description: str | None) -> argparse.ArgumentParser:
    """The parser of the whole command line.

    commands: by their names here; their docstrings are the help. A parsed line has `command`, a
    name of these, `json` and `debug`, and what the command takes.
    """
    top = _Parser(prog="spectr-demo", description=description)
    subparsers = top.add_subparsers(dest="command", required=True, parser_class=_Parser)

    def add(name: str, **settings: Any) -> argparse.ArgumentParser:
        return subparsers.add_parser(name, help=commands[name].__doc__, **settings)

    model, run = _model(), _run()
    common = _Parser(add_help=False, parents=[model])
    common.add_argument("--json", action="store_true", help="print one JSON document on stdout")

    command = add("generate", parents=[run, common])
    command.add_argument("--router", default=DEFAULT_ROUTER, help="spectr, single:NAME, ...")
    command = add("compare", parents=[run, common])
    command.add_argument("--columns", nargs="+", default=DEFAULT_COLUMNS, metavar="ROUTER")
    command = add("inspect", parents=[common])
    command.add_argument(
        "--advise",
        action="store_true",
        help="have each expert write, and say which are weak, alike, never chosen, always chosen "
        "or harmful; some minutes",
    )
    command = add("pack", parents=[common])
    command.add_argument("folder", type=Path, metavar="FOLDER", help="where --experts reads it")
    command.add_argument(
        "--verify", action="store_true", help="compare its files with their SHA-256; make nothing"
    )
    add("demo", parents=[model]).set_defaults(json=False)
    command = add("serve", parents=[model])
    command.add_argument("--host", default="127.0.0.1", help="0.0.0.0: all of this machine's")
    command.add_argument("--port", type=int, default=8000, help="0: a free one (default: 8000)")
    command.set_defaults(json=False)
    _evaluate(add("evaluate", parents=[common]))
    _train(add("train", parents=[common]))
    # No prefix marks an option here, so that every argument is handed on as it is.
    command = add("lm-eval", prefix_chars="\0", add_help=False)
    command.add_argument("arguments", nargs="*")
    command.set_defaults(json=False, debug=False)
    return top


def add_model_options(model: argparse.ArgumentParser) -> None:
    """What `load` takes."""
    model.add_argument("--base", help="Hub id or folder of the base (default: SPECTR_BASE_MODEL)")
    model.add_argument(
        "--experts",
        nargs="+",
        metavar="SOURCE",
        help="LoRA adapters: Hub ids, folders, folders of several, or of `pack`; NAME=SOURCE "
        "renames one (default: SPECTR_EXPERTS)",
    )


def _model() -> argparse.ArgumentParser:
    """Options of the commands that load a model."""
    model = _Parser(add_help=False)
    add_model_options(model)
    model.add_argument(
        "--debug", action="store_true", help="where it fails, show the traceback as well"
    )
    return model


def _run() -> argparse.ArgumentParser:
    """Options of the commands that answer a prompt."""
    run = _Parser(add_help=False)
    run.add_argument("prompt", help="the user's message")
    run.add_argument("--max-new-tokens", type=int, help="per column (default: 128)")
    run.add_argument("--temperature", type=float, help="of sampling; 0, the default, is greedy")
    run.add_argument("--top-p", type=float, help="nucleus of sampling (default: 1, all)")
    run.add_argument("--seed", type=int, help="of sampling, the same noise for all columns")
    run.add_argument(
        "--top-k",
        type=int,
        help="experts per token and layer, or per request (default: the preset's)",
    )
    run.add_argument("--weighting", choices=get_args(Weighting), help="of the selected experts")
    run.add_argument("--router-temperature", type=float, help="of the softmax weighting")
    run.add_argument("--composition", choices=get_args(Composition), help="what is mixed")
    run.add_argument("--trace", metavar="FILE", help="save the routing trace as .npz")
    return run


def _evaluate(command: argparse.ArgumentParser) -> None:
    command.add_argument("--quick", action="store_true", help="about five minutes on two cores")
    command.add_argument(
        "--only",
        choices=["composition"],
        help="messages with several requests alone, put into the JSON file that is there",
    )
    command.add_argument("--num-examples", type=int, help="held-out prompts a domain (default: 16)")
    command.add_argument("--num-pairs", type=int, help="messages of two requests (default: 90)")
    command.add_argument("--num-triples", type=int, help="messages of three (default: 60)")
    command.add_argument("--routers", nargs="+", metavar="ROW", help="rows of the tables, by label")
    command.add_argument(
        "--retrained",
        nargs="+",
        metavar="NAME=FOLDER",
        help="experts of these domains that were trained again, to be tested against the first",
    )
    command.add_argument("--output", type=Path, help="JSON file (default: the shipped results)")
    _workers(command)


def _train(command: argparse.ArgumentParser) -> None:
    command.add_argument("names", nargs="*", metavar="NAME", help="tasks, such as sql, or files")
    command.add_argument("--all", action="store_true", help="all tasks; finished ones are kept")
    command.add_argument(
        "--output",
        type=Path,
        help="where NAME goes (default: assets/experts, or experts/BASE with --base or a file)",
    )
    command.add_argument(
        "--recipe",
        choices=["default", "paper"],
        default="default",
        help="paper: SpectR's, one epoch at a learning rate of 1e-4",
    )
    command.add_argument("--steps", type=int, help="optimiser steps (default: the recipe's)")
    command.add_argument("--batch-size", type=int, help="rows of a step (default: the recipe's)")
    command.add_argument(
        "--seed", type=int, help="of initialisation and order (default: from NAME)"
    )
    command.add_argument("--num-eval", type=int, default=200, help="held-out examples to answer")
    command.add_argument("--overwrite", action="store_true", help="replace a finished expert")
    _workers(command)


def _workers(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--workers",
        type=_count,
        default=1,
        metavar="N",
        help="processes that share the work; more than one need Ray (default: 1)",
    )


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}; at least 1 was needed")
    return number
