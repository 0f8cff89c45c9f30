"""What ordinary text told about a library, kept for the next start: reading it takes a CPU 15 s."""

import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spectr_demo.base.files import keeping, kept, named_for
from spectr_demo.base.loading import LoadedBase
from spectr_demo.config import cache_dir
from spectr_demo.engine.ordinary import Heard, Ordinary, OrdinaryText, identity
from spectr_demo.experts.library import ExpertLibrary
from spectr_demo.experts.packed import FORMAT

logger = logging.getLogger(__name__)


def kept_heard(
    base: LoadedBase, library: ExpertLibrary, prompts: Sequence[str]
) -> list[Heard] | None:
    """What `keep_heard` kept of all experts of a library; None where there is nothing."""
    file = kept(_file(base, library, prompts))
    if file is None:
        return None
    by_bank: dict[int, dict[str, Tensor]] = defaultdict(dict)
    with safe_open(file, "pt") as found:
        for key in found.keys():  # noqa: SIM118
            number, _, name = key.partition(".")
            by_bank[int(number)][name] = found.get_tensor(key)
    return [
        Heard.from_tensors(library.banks[number], tensors, len(prompts))
        for number, tensors in by_bank.items()
    ]


def keep_heard(
    base: LoadedBase, library: ExpertLibrary, known: OrdinaryText, ordinary: Ordinary
) -> None:
    """Keep what is known, where all of the experts last. ordinary: of this library."""
    if not all(adapter.is_lasting for adapter in library.adapters):
        return
    assert known.prompts is not None
    tensors = {
        f"{number}.{name}": tensor.cpu().contiguous()
        for number, bank in enumerate(library.banks)
        if bank in ordinary.detectors  # the others never run
        for name, tensor in known.to_tensors(library, bank, ordinary.detectors[bank]).items()
    }
    file = _file(base, library, known.prompts)
    try:
        with keeping(file) as unfinished:
            save_file(tensors, unfinished)
    except (OSError, SafetensorError) as error:
        logger.warning(
            "what ordinary text tells could not be cached in %s (%s); it is read again at each "
            "start. Set SPECTR_CACHE to a writable folder",
            file.parent,
            error,
        )


def _file(base: LoadedBase, library: ExpertLibrary, prompts: Sequence[str]) -> Path:
    """Its name covers all that decides what is measured."""
    facts = [
        FORMAT,
        identity(base),
        str(base.compute_dtype),
        base.device.type,
        list(prompts),
        [adapter.sha256 for adapter in library.adapters],
    ]
    return named_for(facts, cache_dir() / "ordinary", ".safetensors")
