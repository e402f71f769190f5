"""A short value that changes when any file of a model does."""

from __future__ import annotations

import hashlib
from pathlib import Path

from transformers.utils.hub import cached_file, extract_commit_hash

from adapruner.errors import AdaPrunerError
from adapruner.models._places import ModelLocation

_READ = {".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken"}
# Records about a model: no result depends on them.
_RECORDS = {"adapruner.json", "recovery.json"}
_WHOLE_BYTES = 256 * 2**20
_BLOCKS, _BLOCK_BYTES = 64, 2**16


def fingerprint(location: ModelLocation) -> str:
    """SHA-256 over a model, in hex; for a hub id, over the commit in the cache.

    Files count by name and content, the smallest first, until 256 MiB are read. Larger weight files count by name,
    size, modification time and 64 evenly spread blocks of 64 KiB, the header included: 14 GB take less than a second.
    So a copy of a large model with other modification times has another fingerprint. A change in place outside these
    blocks is not noticed if the modification time is set back.

    Raises:
        AdaPrunerError: there is no such model, or it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        if location.is_local:
            _add_files(location, digest)
        else:
            config = cached_file(location.path, "config.json", local_files_only=True)
            digest.update(f"{location.path}@{extract_commit_hash(config, None)}".encode())
    except OSError as error:
        raise AdaPrunerError(f"the files of {str(location)!r} cannot be read: {error}") from None
    return digest.hexdigest()


def _add_files(location: ModelLocation, digest: hashlib._Hash) -> None:
    folder = Path(location.path)
    if location.gguf_file:
        files = [folder / location.gguf_file]
    else:
        candidates = (*folder.iterdir(), *folder.glob("chat_templates/*.jinja"))
        files = [file for file in candidates if file.suffix in _READ and file.name not in _RECORDS and file.is_file()]
    left = _WHOLE_BYTES
    for file in sorted(files, key=lambda file: (file.stat().st_size, file)):
        stat = file.stat()
        # The name of a GGUF file is the choice of the user.
        name = "" if location.gguf_file else file.relative_to(folder).as_posix()
        digest.update(f"{name}\0{stat.st_size}\0".encode())
        left -= stat.st_size
        with file.open("rb") as opened:
            if left >= 0:
                digest.update(opened.read())
                continue
            digest.update(str(stat.st_mtime_ns).encode())
            for block in range(_BLOCKS):
                opened.seek((stat.st_size - _BLOCK_BYTES) * block // (_BLOCKS - 1))
                digest.update(opened.read(_BLOCK_BYTES))
