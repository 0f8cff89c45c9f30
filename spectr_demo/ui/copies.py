"""A run of the page as code: what to type to have it again."""

import shlex
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from spectr_demo.base.embedded import EMBEDDED_ID
from spectr_demo.config import GenerationSettings, RouterConfig, shipped_experts
from spectr_demo.engine.model import SpectrModel
from spectr_demo.ui.run import Form


def python_of(
    model: SpectrModel, form: Form, routers: Sequence[RouterConfig], settings: GenerationSettings
) -> str:
    """Python that runs a form. routers: its columns, the single expert chosen."""
    base, experts = _sources(model)
    arguments = [repr(each) for each in (base, experts) if each is not None]
    if base is None and experts is not None:
        arguments = [f"experts={experts!r}"]
    columns = ", ".join(_in_python(router, form) for router in routers)
    return (
        "import spectr_demo as sd\n\n"
        f"model = sd.load({', '.join(arguments)})\n"
        "run = model.compare(\n"
        f"    {form.prompt!r},\n"
        f"    [{columns}],\n"
        f"    max_new_tokens={settings.max_new_tokens},\n"
        f"    temperature={settings.temperature!r},\n"
        f"    seed={settings.seed},\n"
        ")\n"
        "for column in run.columns:\n"
        "    print(column.label, column.text, sep=': ')\n"
    )


def command_of(
    model: SpectrModel, form: Form, routers: Sequence[RouterConfig], settings: GenerationSettings
) -> str:
    """A command line that runs it."""
    base, experts = _sources(model)
    words = ["spectr-demo", "compare", form.prompt, "--columns", *map(_spec, routers)]
    options = {
        "--base": base,
        "--top-k": form.top_k,
        "--weighting": form.weighting,
        "--composition": form.composition,
        "--router-temperature": form.router_temperature,
        "--max-new-tokens": settings.max_new_tokens,
        "--temperature": settings.temperature,
        "--seed": settings.seed,
    }
    for option, value in options.items():
        if value:
            words += [option, f"{value:g}" if isinstance(value, float) else str(value)]
    if experts is not None:
        words += ["--experts", *experts]
    return shlex.join(words)


def _sources(model: SpectrModel) -> tuple[str | None, list[str] | None]:
    """Base and experts, as `load` takes them; None for the shipped ones."""
    base = None if model.base.source.startswith(EMBEDDED_ID) else model.base.source
    sources = [adapter.source for adapter in model.library.adapters]
    is_shipped = {Path(each).resolve() for each in sources} == {
        Path(each).resolve() for each in shipped_experts()
    }
    return base, None if is_shipped else sources


def _spec(router: RouterConfig) -> str:
    return router.name if router.expert is None else f"{router.name}:{router.expert}"


def _in_python(router: RouterConfig, form: Form) -> str:
    """Its name, or all that is not its default where the form sets something."""
    if not any((form.top_k, form.weighting, form.composition, form.router_temperature)):
        return repr(_spec(router))
    chosen = [
        f"{field.name}={value!r}"
        for field in fields(router)
        if (value := getattr(router, field.name)) != field.default
    ]
    return f"sd.RouterConfig({', '.join(chosen)})"
