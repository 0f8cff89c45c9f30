"""Adapters on the Hub: only their two files, and those only as large as they may be."""

from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError

from spectr_demo.base.memory import available_memory
from spectr_demo.experts.messages import AdapterError, shown
from spectr_demo.experts.weights import MEMORY_SHARE

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
MOST_CONFIG_BYTES = 4_000_000
_TIMEOUT = 10.0  # seconds, for the list of files


def fetched(source: str) -> Path:
    """The local folder of `owner/repo` or `owner/repo/folder`; what the Hub's cache has is not
    fetched again.

    The Hub tells the sizes first, and then gives the files of that very commit. Where it cannot be
    reached only the cache is looked at. Raises AdapterError.
    """
    owner, _, rest = source.partition("/")
    name, _, subfolder = rest.partition("/")
    repo = f"{owner}/{name}"
    wanted = [f"{subfolder}/{file}" if subfolder else file for file in (CONFIG_FILE, WEIGHTS_FILE)]
    try:
        revision = _sound_revision(source, repo, wanted)
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=wanted, local_files_only=revision is None
        )
    except AdapterError:
        raise
    except (OSError, ValueError) as error:  # offline, no such repository, no access
        reason = str(error).strip().partition("\n")[0]
        raise AdapterError(
            [
                f"{shown(source)} is no folder here, and the Hub did not give it "
                f"({shown(reason)}); check the name and the network, or download it and give its "
                "folder"
            ]
        ) from None
    return Path(folder) / subfolder


def _sound_revision(source: str, repo: str, wanted: list[str]) -> str | None:
    """The commit whose files may be fetched; None where the Hub cannot be reached."""
    try:
        found = HfApi().model_info(repo, files_metadata=True, timeout=_TIMEOUT)
    except (RepositoryNotFoundError, ValueError):  # also one without access; a name that is none
        raise
    except Exception:  # whatever its HTTP client raises without a network
        return None
    sizes = {each.rfilename: each.size for each in found.siblings or ()}
    bounds = (MOST_CONFIG_BYTES, int(MEMORY_SHARE * available_memory()))
    for file, most in zip(wanted, bounds, strict=True):
        size = sizes.get(file, 0)
        if size is None or size > most:
            told = "an unknown number of" if size is None else f"{size:,}"
            raise AdapterError(
                [
                    f"{shown(source)}: {shown(file)} has {told} bytes, at most {most:,} are "
                    "fetched; save it with a lower rank, or use a machine with more memory"
                ]
            )
    return found.sha
