"""Models at a hub, the Hugging Face Hub or another that HF_ENDPOINT names: fetched by name, and pushed.

Weights, JSON and the card go there and come back, nothing else. What a model folder says of its training scans
(experiment.json) stays behind, and files of strangers that could run code are never fetched.
"""

import os
import re
from pathlib import Path
from typing import Any

from ldm3d.errors import InputError

NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
PARTS = ("autoencoder", "unet", "start", "segmenter")
FILES = ("pipeline.json", "README.md", *(f"{part}/{file}" for part in PARTS for file in ("config.json", "model.safetensors")))


def is_name(text: Path | str) -> bool:
    """Whether this can be the name of a model at a hub, "user/name", and not a path of this machine."""
    return NAME.fullmatch(str(text)) is not None and not Path(str(text).partition("/")[0]).exists()


def fetch(name: str, revision: str | None = None) -> Path:
    """The folder of a model at a hub; what was fetched before is taken from the cache.

    Args:
        name: "user/name".
        revision: a branch, a tag or a commit; None for the newest.

    Raises:
        InputError: no such model or revision, or the hub cannot be reached and the cache does not have it.
    """
    from huggingface_hub import snapshot_download

    return Path(_told(name, snapshot_download, name, revision=revision, allow_patterns=list(FILES), endpoint=_endpoint()))


def push(folder: Path | str, name: str, private: bool = False, message: str = "Model by ldm3d") -> str:
    """Push the model in a folder, which `ldm3d.export` wrote; returns the address of the commit.

    Args:
        folder: the model; only `FILES` of it are pushed.
        name: "user/name"; made if it is not there.
        private: whether a new one is for its owner alone.
        message: of the commit.

    Raises:
        InputError: no such name, or the hub does not take it: no token (`hf auth login`, or HF_TOKEN), not yours, no network.
    """
    from huggingface_hub import HfApi

    if not NAME.fullmatch(name):
        raise InputError(f"{name!r} is no name of a model at a hub; write user/name")
    api = HfApi(endpoint=_endpoint(), library_name="ldm3d")
    _told(name, api.create_repo, name, private=private, exist_ok=True)
    files = {"repo_id": name, "folder_path": str(folder), "allow_patterns": list(FILES), "commit_message": message}
    return str(_told(name, api.upload_folder, **files).commit_url)


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _told(name: str, call: Any, *arguments: Any, **options: Any) -> Any:
    """Call the hub's library; what goes wrong there is one clear message."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub = _endpoint() or "the Hugging Face Hub"
    try:
        return call(*arguments, **options)
    except RevisionNotFoundError:
        raise InputError(f"{name}: {hub} has no such revision of it") from None
    except RepositoryNotFoundError:
        raise InputError(f"{name}: no such model at {hub}, or a private one that the token (HF_TOKEN) may not read") from None
    except (LocalTokenNotFoundError, HFValidationError) as error:
        raise InputError(f"{name}: {_first_line(error)}; `hf auth login` or HF_TOKEN gives a token") from None
    except HfHubHTTPError as error:
        raise InputError(f"{name}: {hub} refuses: {_first_line(error)}") from None
    except (LocalEntryNotFoundError, HTTPError) as error:  # a HTTPError without an answer
        reason = f"{hub} cannot be reached ({_first_line(error)})"
        raise InputError(f"{name}: neither a folder nor in the cache, and {reason}") from None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
