"""Command line: generate, compare, inspect, pack, demo, serve, train, evaluate, lm-eval.

Results go to stdout, progress to stderr.
"""

import argparse
import json
import math
import signal
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from spectr_demo.arguments import parser
from spectr_demo.config import (
    IS_INSTALLED,
    WORKPLACE,
    GenerationSettings,
    base_from_environment,
    experts_from_environment,
)

_out = Console()
_progress = Console(stderr=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns 0; or 2, with one clear message on stderr, where the input is at fault. `--debug` writes
    the traceback before that message. Returns 130 where a person stopped the command.
    """
    arguments = parser(COMMANDS, description=__doc__).parse_args(argv)
    if threading.current_thread() is threading.main_thread():
        # The first process of a container is ended by no signal that it does not handle.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        result = COMMANDS[arguments.command](arguments)
        if arguments.json:
            print(json.dumps(_finite(result), ensure_ascii=False, indent=2, allow_nan=False))
    except (ValueError, OSError, RuntimeError, ImportError, MemoryError) as error:
        if arguments.debug:
            traceback.print_exc()
        print(f"spectr-demo {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("spectr-demo: stopped", file=sys.stderr)
        return 130
    return 0


def _finite(value: Any) -> Any:
    """Plain values, with null in the place of NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value


def generate(arguments: argparse.Namespace) -> dict[str, Any]:
    """One router's answer, written as it comes."""
    if arguments.json:
        return _run(arguments, [arguments.router])["columns"][0]
    model = _load(arguments)
    routers, settings = _columns(arguments, [arguments.router], model.library.names)
    written = 0
    for step in model.stream(arguments.prompt, routers, settings, record=bool(arguments.trace)):
        column = step.columns[0]
        print(column.text[written : column.num_settled], end="", flush=True)
        written = column.num_settled
    print()
    if step.trace is not None:
        step.trace.save(arguments.trace)
    if column.error:
        raise ValueError(column.error)
    return {}


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Several routers side by side, in one batch."""
    result = _run(arguments, arguments.columns)
    if not arguments.json:
        for column in result["columns"]:
            share = column.get("error") or ", ".join(
                f"{name} {value:.0%}" for name, value in column["expert_share"].items() if value
            )
            speed = f"{column['num_tokens']} tokens, {column['tokens_per_second']:.1f} tokens/s"
            footer = f"{speed}, {column['mean_logprob']:.2f} nats/token, {share or 'no expert'}"
            title = Text(column["router"], style="bold")
            _out.print(Panel(Text(column["text"]), title=title, subtitle=footer))
    return result


def _run(arguments: argparse.Namespace, columns: Sequence[str]) -> dict[str, Any]:
    from spectr_demo.trace import mean_logprob

    model = _load(arguments)
    routers, settings = _columns(arguments, columns, model.library.names)
    with _progress.status("Generating ...") as status:
        for step in model.stream(arguments.prompt, routers, settings, record=True):
            status.update(f"Generating: {max(c.num_tokens for c in step.columns)} tokens")
    trace = step.trace
    assert trace is not None
    if arguments.trace:
        trace.save(arguments.trace)
    return {
        "prompt": arguments.prompt,
        "base": model.base.source,
        "quantization": model.base.quantization,
        "experts": list(model.library.names),
        "settings": settings.to_json(),
        "columns": [
            {
                "router": column.label,
                "text": column.text,
                "num_tokens": column.num_tokens,
                "tokens_per_second": round(column.tokens_per_second, 3),
                "mean_logprob": round(mean_logprob(trace, column.label), 5),
                "expert_share": {
                    name: round(float(share), 5)
                    for name, share in zip(
                        trace.expert_names, trace.share(column.label, "answer"), strict=True
                    )
                },
                "settings": trace.column(column.label).router,
                **({"error": column.error} if column.error else {}),
            }
            for column in step.columns
        ],
    }


def _columns(
    arguments: argparse.Namespace, columns: Sequence[str], expert_names: Sequence[str]
) -> tuple[list[Any], GenerationSettings]:
    from spectr_demo.routing.routers import parse_router

    routers = [
        parse_router(
            column,
            expert_names,
            top_k=arguments.top_k,
            weighting=arguments.weighting,
            temperature=arguments.router_temperature,
            composition=arguments.composition,
        )
        for column in columns
    ]
    given = {
        name: getattr(arguments, name)
        for name in ("max_new_tokens", "temperature", "top_p", "seed")
    }
    return routers, replace(
        GenerationSettings(), **{name: value for name, value in given.items() if value is not None}
    )


def inspect(arguments: argparse.Namespace) -> dict[str, Any]:
    """The library: ranks, layers, spectra, the overlap of every two experts' subspaces; advice."""
    from spectr_demo.experts import inspection

    model = _load(arguments)
    result = {
        "base": model.base.source,
        "quantization": model.base.quantization,
        "device": str(model.base.device),
        **inspection.to_json(model.library),
    }
    if arguments.advise:
        from spectr_demo.evaluation import advice

        result["advice"] = advice.to_json(advice.advise(model))
    if not arguments.json:
        _out.print(f"Base: {result['base']}, {result['quantization']}, on {result['device']}")
        _print_library(result)
        if result.get("advice"):
            _print_advice(result["advice"])
    return result


def _print_advice(experts: list[dict[str, Any]]) -> None:
    table = Table("expert", "strength", "found", "others'", "ordinary", "cost")
    pairs = Table("expert", "nearest", "apart", "shared")
    for expert in experts:
        taken = (_percent(expert[key]) for key in ("strength", "found", "others", "ordinary"))
        table.add_row(expert["name"], *taken, f"{expert['cost']:.1f} nats")
        if expert["nearest"]:
            alike = (_percent(expert[key]) for key in ("apart", "shared"))
            pairs.add_row(expert["name"], expert["nearest"], *alike)
    _out.print(table)
    if pairs.row_count:
        _out.print(pairs)
    for expert in experts:
        for verdict in expert["verdicts"]:
            text = f"Advice: expert {expert['name']!r} is {verdict}"
            _out.print(text, style="yellow", markup=False)
    if not any(expert["verdicts"] for expert in experts):
        _out.print("Advice: each of them is worth having.")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _print_library(result: dict[str, Any]) -> None:
    table = Table("expert", "rank", "effective", "first direction", "layers", "projections", "MB")
    for expert in result["experts"]:
        low, high = expert["rank"]
        table.add_row(
            expert["name"],
            str(high) if low == high else f"{low}-{high}",
            f"{expert['effective_rank']:.1f}",
            f"{expert['spectrum'][0]:.0%} of energy",
            str(expert["num_layers"]),
            ", ".join(expert["projections"]),
            f"{expert['num_bytes'] / 1e6:.1f}",
        )
    _out.print(table)
    for warning in result["warnings"]:
        _out.print(f"Warning: {warning}", style="yellow", markup=False)
    overlap = result["subspace_overlap"]
    table = Table("subspace overlap", *overlap)
    for name, row in overlap.items():
        values = ["-" if value is None else f"{value:.3f}" for value in row.values()]
        table.add_row(name, *values)
    _out.print(table)


def pack(arguments: argparse.Namespace) -> dict[str, Any]:
    """A library on disk, made once: it opens at once, and takes the memory of what is used."""
    if arguments.verify:
        from spectr_demo.experts.packed import verify

        index = verify(arguments.folder)
    else:
        from spectr_demo.engine.packing import pack as pack_experts

        sources = arguments.experts or experts_from_environment()
        with _progress.status("Reading the experts ...") as status:
            index = pack_experts(arguments.base, sources, arguments.folder, tell=status.update)
    names = [expert.name for expert in index.experts]
    num_bytes = sum(file.num_bytes for file in index.files.values())
    if not arguments.json:
        does = "is whole" if arguments.verify else "is made"
        size = f"{len(names)} experts, {num_bytes / 1e6:,.0f} MB"
        _out.print(f"{arguments.folder} {does}: {size}", highlight=False)
    return {"folder": str(arguments.folder), "experts": names, "num_bytes": num_bytes}


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train experts of tasks, or of files of your own, then show how they sit among the others."""
    from spectr_demo.evaluation.tasks import TASKS
    from spectr_demo.experts import inspection
    from spectr_demo.training.expert import check, expert_folder, expert_name, is_finished
    from spectr_demo.training.expert import train as train_expert

    if arguments.all == bool(arguments.names):
        raise ValueError("name at least one task, or pass --all and no name")
    base = arguments.base or base_from_environment()
    parent = arguments.output
    tasks = {expert_name(task): task for task in (TASKS if arguments.all else arguments.names)}
    if len(tasks) < len(arguments.names):
        raise ValueError(
            f"{', '.join(arguments.names)}: some of these give experts of one name; rename a file"
        )
    folders = {
        name: parent / name if parent else expert_folder(task, base) for name, task in tasks.items()
    }
    is_kept = {
        name: arguments.all and is_finished(folder) and not arguments.overwrite
        for name, folder in folders.items()
    }
    for name, folder in folders.items():  # all of them before the first is trained
        if not is_kept[name]:
            check(tasks[name], folder, arguments.overwrite)
    recipe = _recipe(arguments)
    given: dict[str, dict[str, Any]] = {}
    for name, folder in folders.items():
        if is_kept[name]:
            print(f"{name}: {folder} is finished; --overwrite trains it again", file=sys.stderr)
            continue
        given[name] = {
            "name": tasks[name],
            "base": base,
            "output_dir": folder,
            "recipe": recipe,
            "num_eval": arguments.num_eval,
            "overwrite": arguments.overwrite,
        }
    if arguments.workers > 1 and given:
        from spectr_demo.workers import each_finished

        for name in each_finished(train_expert, given, arguments.workers):
            print(f"{name}: {folders[name]} is trained", file=sys.stderr)
    else:
        for each in given.values():
            with redirect_stdout(sys.stderr):  # transformers' Trainer prints its losses
                train_expert(**each)
    records = {name: folder / "scores.json" for name, folder in folders.items()}
    scores = {name: json.loads(file.read_text()) for name, file in records.items() if file.exists()}
    # The shipped experts fit the default base only.
    others = arguments.experts or ([] if base else experts_from_environment())
    sources = [f"{name}={folder}" for name, folder in folders.items()]
    sources += [source for source in others if Path(source).name not in folders]
    library = inspection.to_json(_load(arguments, sources).library)
    if not arguments.json:
        for name, folder in folders.items():
            _out.print(f"{name}: {folder}")
            _out.print_json(data=scores.get(name, {}).get("scores"))
        _print_library(library)
    return {
        "folders": {name: str(folder) for name, folder in folders.items()},
        "scores": scores,
        **library,
    }


def _recipe(arguments: argparse.Namespace) -> Any:
    """The preset, with what the options change; a number of steps replaces its epochs."""
    from spectr_demo.training.recipe import RECIPES

    recipe = RECIPES[arguments.recipe]
    if arguments.steps is not None:
        recipe = replace(recipe, epochs=None)
    given = {key: getattr(arguments, key) for key in ("steps", "batch_size", "seed")}
    return replace(recipe, **{key: value for key, value in given.items() if value is not None})


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every router on held-out prompts of every domain; writes a JSON file and its report."""
    from spectr_demo.evaluation.evaluate import Evaluation, Settings
    from spectr_demo.evaluation.report import (
        load_results,
        overview_table,
        places_table,
        to_markdown,
    )

    settings = Settings.quick() if arguments.quick else Settings()
    for name in ("num_examples", "num_pairs", "num_triples"):
        if (num := getattr(arguments, name)) is not None:
            settings = replace(settings, **{name: num})
    if arguments.routers:
        settings = replace(settings, labels=tuple(arguments.routers))
    if arguments.retrained:
        settings = replace(settings, retrained=tuple(arguments.retrained))
    evaluation = Evaluation(_load(arguments), settings)
    if arguments.workers > 1:
        from spectr_demo.engine.model import load
        from spectr_demo.workers import measure_in_workers

        measure_in_workers(
            evaluation,
            partial(load, arguments.base, arguments.experts),
            arguments.workers,
            only_composition=bool(arguments.only),
        )
    # The shipped results are the full run's; a quick one leaves them alone.
    shipped = WORKPLACE / "assets" / "results" / "evaluation.json"
    output = arguments.output or (Path("quick.json") if arguments.quick else shipped)
    if arguments.only:
        results = evaluation.with_composition(load_results(output))
    else:
        results = evaluation.run()
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    report = output.with_suffix(".md")
    if output == shipped and not IS_INSTALLED:
        report = WORKPLACE / "docs" / "results.md"
    report.write_text(to_markdown(results), encoding="utf-8")
    if not arguments.json:
        composed = arguments.only and places_table(results["composition"]["rows"])
        _out.print(Markdown(composed or overview_table(results)))
        _out.print(f"Wrote {output} and {report}", highlight=False)
    return results


def demo(arguments: argparse.Namespace) -> None:
    """The page, in a browser."""
    from spectr_demo import ui

    ui.build(_load(arguments)).launch(**ui.launch_options())


def serve(arguments: argparse.Namespace) -> None:
    """OpenAI's chat API: each router is a model, for any chat client."""
    from spectr_demo import serving

    with serving.bound(arguments.host, arguments.port) as listener:
        app = serving.build(_load(arguments))
        host, port = listener.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
        _progress.print(f"OpenAI's API is at {address}", highlight=False)
        serving.run(app, listener)


def lm_eval(arguments: argparse.Namespace) -> None:
    """lm-evaluation-harness, with `--model spectr`; all arguments are its own."""
    from spectr_demo.evaluation import harness

    harness.run(arguments.arguments)


def _load(arguments: argparse.Namespace, sources: list[str] | None = None) -> Any:
    from spectr_demo.engine.model import load

    with _progress.status("Loading the base model and its experts ..."):
        return load(arguments.base, sources or arguments.experts)


COMMANDS = {
    "generate": generate,
    "compare": compare,
    "inspect": inspect,
    "pack": pack,
    "demo": demo,
    "serve": serve,
    "evaluate": evaluate,
    "train": train,
    "lm-eval": lm_eval,
}

if __name__ == "__main__":
    sys.exit(main())
