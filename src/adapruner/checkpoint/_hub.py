"""Uploading to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, but not in __all__

from adapruner.errors import AdaPrunerError, reason


def check_push(repository: str) -> None:
    """Refuses what would fail after long work.

    Raises:
        AdaPrunerError: the name is none, or nobody is logged in.
    """
    try:
        validate_repo_id(repository)
        HfApi().whoami()
    except HFValidationError as error:
        raise AdaPrunerError(f"--push-to-hub {repository}: {reason(error)}") from None
    except (HfHubHTTPError, OSError) as error:
        raise AdaPrunerError(
            f"--push-to-hub {repository}: cannot log in to the hub ({reason(error)}); run hf auth login"
        ) from None


def push(path: Path, repository: str) -> str:
    """Uploads a folder or a file to a model repository, which is made if it is not there; returns its address.

    Raises:
        AdaPrunerError: the hub refuses it.
    """
    api = HfApi()
    try:
        address = api.create_repo(repository, exist_ok=True)
        if path.is_dir():
            api.upload_folder(repo_id=repository, folder_path=path)
        else:
            api.upload_file(repo_id=repository, path_or_fileobj=path, path_in_repo=path.name)
    except (HfHubHTTPError, OSError) as error:
        raise AdaPrunerError(f"{path} is written, but uploading it to {repository} failed: {reason(error)}") from None
    return str(address)
