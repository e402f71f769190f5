"""Datasets with images, written as windows of what the decoder of a multimodal model sees: a run reads these."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path

import torch

from adapruner.calibration import (
    SELF_GENERATED,
    Source,
    blend_names,
    changed_blend,
    content_hash,
    has_images,
    known_sources,
    parse_source,
    split_name,
    write_pictured,
)
from adapruner.config import FUNCTION, PruneConfig
from adapruner.errors import AdaPrunerError
from adapruner.files import being_written
from adapruner.graph import RunFolder
from adapruner.models import ModelLocation, find_model, find_wrapper, fingerprint, load_whole, resolve_devices
from adapruner.option_rules import scoring_bounds
from adapruner.progress import Reporter
from adapruner.texts import DEFAULT_REPORT_WINDOWS

# The smallest parts of a dataset have these shares of it, with some room: parts are drawn by chance.
_CALIBRATION, _OBJECTIVE, _REPORT = 0.35, 0.16, 0.35


def with_pictures(config: PruneConfig, run: RunFolder) -> PruneConfig:
    """The config of a run, in which windows in the folder of the run replace the datasets with images, if the model is
    multimodal.

    Raises:
        AdaPrunerError: images cannot be read, or do not go with other options.
    """
    texts = {"calibration": config.calibration, "objective": config.objective}
    blended = blend_names(config.recover) if config.recover else []
    named = [name for name in (*texts.values(), *blended, *config.evaluate) if name and may_have_images(name)]
    location = find_model(config.model) if named else None
    if location is None or find_wrapper(location) is None:
        return config
    objective = (scoring_bounds(config.objective_windows)[1] + config.final_windows) / _OBJECTIVE
    calibration = max(config.pool, config.compensation_windows) / _CALIBRATION
    report = (config.evaluate_windows or DEFAULT_REPORT_WINDOWS) / _REPORT
    count, device = math.ceil(max(objective, calibration, report)), resolve_devices(config.device)[0]

    def written(name: str, seq_len: int) -> str:
        return as_windows(name, location, seq_len, count, run.given, device)

    def trained(name: str) -> str:
        windows = written(name, config.recovery.seq_len)
        # A file of windows of another length is another dataset.
        return windows if windows == name or "@" in Path(windows).name else f"{windows}@calibration"

    changed = {name: text and written(text, config.seq_len) for name, text in texts.items()}
    changed["recover"] = config.recover and changed_blend(config.recover, trained)
    evaluated = tuple(written(name, config.seq_len) for name in config.evaluate)
    return config.model_copy(update={**changed, "evaluate": evaluated})


def may_have_images(name: str) -> bool:
    """True for the name of a dataset that is no known one, and no text or windows by its name."""
    if name == SELF_GENERATED or name.startswith(FUNCTION) or split_name(name)[0] in known_sources():
        return False
    try:
        source = parse_source(name)
    except AdaPrunerError:
        return False
    return source.path is None or source.path.suffix in (".parquet", ".json", ".jsonl")


def as_windows(name: str, location: ModelLocation, seq_len: int, count: int, folder: Path, device: torch.device) -> str:
    """The name of a dataset. One with images is written to a folder as windows first, unless they are there.

    Args:
        location: of a multimodal model.
        count: the largest number of windows.
    """
    if not may_have_images(name) or not has_images(source := parse_source(name)):
        return name
    content = [fingerprint(location), source.identity, source.part, content_hash(source), seq_len, count]
    key = hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()
    path = folder / f"{Path(source.dataset).stem}-{key[:12]}.safetensors"
    if not path.is_file():
        whole, processor = load_whole(location, device)
        with (
            Reporter().stage("looking at images", count) as advance,
            being_written(path, f"-{os.getpid()}") as partial,
        ):
            write_pictured(source, whole, processor, seq_len, count, int(key[:12], 16), partial, advance)
    return str(path) if source.part == "all" else f"{path}@{source.part}"


def seen_by(
    source: Source, location: ModelLocation | None, seq_len: int, count: int, folder: Path, device: torch.device
) -> Source:
    """A dataset with images as windows in a folder, where a multimodal model in files sees them; any other as it is."""
    if location is None or find_wrapper(location) is None:
        return source
    name = as_windows(str(source), location, seq_len, count, folder, device)
    return source if name == str(source) else parse_source(name)
