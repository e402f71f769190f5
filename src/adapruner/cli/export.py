"""adapruner export"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from adapruner.cli._output import plain_console, print_json
from adapruner.config import ExportFormat, GgufType


def export(
    model: str,
    /,
    *,
    to: ExportFormat,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    gguf_type: GgufType = "f16",
    overwrite: Annotated[bool, Parameter(negative="")] = False,
    push_to_hub: str | None = None,
    hub_private: bool = True,
    hub_revision: str | None = None,
    hub_token: str | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Write a model, pruned or dense, in a form that other loaders read.

    Parameters
    ----------
    model:
        Hub id, model folder, .gguf file, or smollm2.
    to:
        gguf: one file for llama.cpp. stock: a folder for any loader of the family, short layers padded with zeros to
        the widest.
    output:
        The file or folder to write.
    gguf_type:
        How a GGUF file stores matrices.
    overwrite:
        Replace an existing GGUF file, or a folder that adapruner wrote.
    push_to_hub:
        Upload the result to this repository, owner/name.
    hub_private:
        Create the repository as private, the default, or as public.
    hub_revision:
        Branch to upload to, by default the main one.
    hub_token:
        Token of the Hub, by default the one of hf auth login.
    json:
        Print JSON on stdout.
    """
    from adapruner import verbs

    exported = verbs.export(model, to, output, gguf_type, overwrite, push_to_hub, hub_private, hub_revision, hub_token)
    if json:
        print_json({"model": model, "format": to, "path": str(exported.path), "bytes": exported.size})
        return
    plain_console().print(f"{exported.path}: {exported.size / 1e6:,.1f} MB", soft_wrap=True)
