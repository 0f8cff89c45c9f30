"""A library on disk, made once: its experts' factors, and what ordinary text tells of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from spectr_demo.base.files import publish, scratch_dir
from spectr_demo.base.loading import load_base
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.ordinary import identity
from spectr_demo.experts.adapters import AdapterError
from spectr_demo.experts.library import Sources, load_experts, read_adapters, storage
from spectr_demo.experts.packed import Index, MeasuredRecord, ordinary_file, save_index
from spectr_demo.experts.packing import records_of, save_part, write_library
from spectr_demo.experts.preflight import config_of
from spectr_demo.experts.tokenizers import with_template_of


def pack(
    base: str | None,
    experts: Sources,
    folder: Path,
    *,
    tell: Callable[[str], object] = lambda text: None,
) -> Index:
    """Make a library on disk, which `load(base, experts=folder)` opens.

    base, experts: as `load` takes them. folder: is made whole, or not at all. tell: called with
        what is done next.
    Raises ValueError for a folder that is there, AdapterError as `load` does, and OSError where the
    disk is full.
    """
    if folder.exists():
        raise ValueError(f"{folder} is there already; name another folder, or delete it")
    config = config_of(base)
    adapters, problems = read_adapters(experts, config)
    if not adapters and not problems:
        problems = ["there is no expert to pack; name at least one"]
    if problems:
        raise AdapterError(problems)
    folder.parent.mkdir(parents=True, exist_ok=True)
    loaded = with_template_of(load_base(base), adapters)
    with scratch_dir(folder.parent) as scratch:
        made = scratch / folder.name
        tell(f"Aligning {len(adapters)} experts ...")
        dtype, _ = storage(adapters, loaded.compute_dtype)
        index = write_library(adapters, config, made, dtype)
        model = SpectrModel(loaded, load_experts(made, loaded.model))
        tell("Measuring them over ordinary text ...")
        index = index.model_copy(update=_measured(model, made, index))
        save_index(index, made)
        model.detach()
        publish(made, folder)
    return index


def _measured(model: SpectrModel, folder: Path, index: Index) -> dict[str, Any]:
    """Saves what ordinary text tells. Gives what the index is to say of it."""
    ordinary, known = model.reader.ordinary, model.reader.known
    names = []
    for number, bank in enumerate(model.library.banks):
        if bank in ordinary.detectors:  # the others never run
            tensors = known.to_tensors(model.library, bank, ordinary.detectors[bank])
            names.append(ordinary_file(number))
            save_part(tensors, folder / names[-1])
    assert known.prompts is not None
    return {
        "measured": MeasuredRecord(base=identity(model.base), prompts=list(known.prompts)),
        "files": {**index.files, **records_of(folder, names)},
    }
