"""From a model's name in the configuration to a folder on this machine."""

from __future__ import annotations

import re
from pathlib import Path

from runner import config
from runner.config import ModelConfig
from runner.errors import InputError

DESCRIPTION_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "1_Pooling/*"]
"""What a hub repository is asked for when no weights are needed. No code, no pickles."""
WEIGHT_FILES = ["*.safetensors"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def model_folder(model: ModelConfig, weights: bool = True) -> str:
    """The local folder of a model, fetched from the Hugging Face hub when the path is a hub id and no such folder.

    Raises InputError, with what to do, for a path that is neither, and when the hub has no such model or no answer.
    """
    path = config.resolve_path(model.path)
    if _exists(path):
        return path
    if path != model.path or not _HUB_ID.fullmatch(path):
        raise InputError(
            f"model.path: {model.path!r} does not exist{'' if path == model.path else f' ({path})'}; expected a folder "
            "with config.json and *.safetensors, or a hub id as 'organization/name'; check the spelling"
        )
    patterns = DESCRIPTION_FILES + (WEIGHT_FILES if weights else []) + (["*.py"] if model.trust_remote_code else [])
    return _download(path, model.revision, patterns)


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # too long for a name, a folder that may not be entered
        return False


def _download(repository: str, revision: str | None, patterns: list[str]) -> str:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=patterns)
    except errors.GatedRepoError:
        found, act = "access is gated", "accept its terms on the hub and set HF_TOKEN"
    except errors.RevisionNotFoundError:
        found, act = f"has no revision {revision!r}", "correct model.revision"
    except errors.RepositoryNotFoundError:
        found, act = "is neither a folder here nor a model on the hub", "check the spelling; private ones need HF_TOKEN"
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        found = f"is no folder here, and the hub cannot be reached ({type(error).__name__})"
        act = "download it on a machine with network and set model.path to the folder, or set HF_ENDPOINT"
    raise InputError(
        f"model.path: {repository!r} {found}; expected a folder with config.json and *.safetensors, or a hub id; {act}"
    )
