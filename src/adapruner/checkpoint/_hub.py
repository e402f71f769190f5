"""Uploading to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, but not in __all__

from adapruner.errors import AdaPrunerError, reason


def check_push(repository: str, token: str | None = None) -> None:
    """Refuses an upload that would fail, before long work.

    Args:
        token: Hub token; by default the one that `hf auth login` stored.

    Raises:
        AdaPrunerError: the name is invalid, or nobody is logged in.
    """
    try:
        validate_repo_id(repository)
        HfApi(token=token).whoami()
    except HFValidationError as error:
        raise AdaPrunerError(f"`push_to_hub` {repository}: {reason(error)}") from None
    except (HfHubHTTPError, OSError) as error:
        raise AdaPrunerError(
            f"`push_to_hub` {repository}: cannot log in to the Hub ({reason(error)}); run hf auth login, or give a"
            " valid `hub_token`"
        ) from None


def push(
    path: Path, repository: str, private: bool = True, revision: str | None = None, token: str | None = None
) -> str:
    """Uploads a folder or a file to a model repository; returns its address.

    Args:
        private: make the repository private, if it does not exist yet.
        revision: branch to upload to, created if it does not exist; by default the main branch.
        token: Hub token; by default the one that `hf auth login` stored.

    Raises:
        AdaPrunerError: the Hub refuses it.
    """
    api = HfApi(token=token)
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        if revision:
            api.create_branch(repository, branch=revision, exist_ok=True)
        if path.is_dir():
            api.upload_folder(repo_id=repository, folder_path=path, revision=revision)
        else:
            api.upload_file(repo_id=repository, path_or_fileobj=path, path_in_repo=path.name, revision=revision)
    except (HfHubHTTPError, OSError) as error:
        raise AdaPrunerError(f"{path} is written, but uploading it to {repository} failed: {reason(error)}") from None
    return str(address)
