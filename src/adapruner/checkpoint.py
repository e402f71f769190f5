"""Writing a pruned model as a Hugging Face folder that loads with and without this package."""

import contextlib
import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase as Tokenizer
from transformers.utils.hub import cached_file

from adapruner.base.errors import without_secrets
from adapruner.base.files import replace, staging_folder, write_text
from adapruner.base.progress import printable
from adapruner.model.layers import state_in_parts
from adapruner.model.places import ModelLocation, quiet_transformers
from adapruner.model.wrapper import wrapper_of
from adapruner.options import size_in_bytes

# Of the files of a checkpoint, at most; writing one needs as much memory.
SHARD_SIZE = "2GB"
# The origin of a checkpoint. The file also marks a folder as written by this package.
_ORIGIN = "adapruner.json"
_ORIGIN_FORMAT = 1
_LONGEST_ORIGIN = 2**20
# Of the parts of a multimodal model other than its decoder.
_OTHER_FILES = "model-others{suffix}.safetensors"


def write_model(model: PreTrainedModel, folder: Path, shard_size: str) -> None:
    """Writes weights, config, generation config and, if layers differ, the modelling code. Streamed layers are read
    file by file."""
    wrapper = wrapper_of(model)
    folder.mkdir(parents=True, exist_ok=True)
    with quiet_transformers(), tempfile.TemporaryDirectory(dir=folder) as part:
        for number, state in enumerate(state_in_parts(model, size_in_bytes(shard_size))):
            if wrapper:
                wrapper.save(model, state, Path(part), shard_size)
            else:
                model.save_pretrained(part, max_shard_size=shard_size, state_dict=state)
            for file in Path(part).iterdir():
                name = f"{number:05}-{file.name}" if file.suffix == ".safetensors" else file.name
                file.replace(folder / name)
    if wrapper:
        save_torch_state_dict(
            dict(wrapper.other_tensors()), folder, filename_pattern=_OTHER_FILES, max_shard_size=shard_size
        )
    index_files(folder)
    add_older_keys(folder / "config.json", wrapper.text if wrapper else None)


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    folder: Path,
    card: str | None = None,
    shard_size: str = SHARD_SIZE,
    record: dict[str, object] | None = None,
    write: Callable[[PreTrainedModel, Path, str], None] = write_model,
) -> None:
    """Writes weights (safetensors), config, generation config, tokenizer and model card; for a model whose layers
    differ, also the modelling code.

    `adapruner.load(folder)` reads it. So does `AutoModelForCausalLM.from_pretrained(folder)` without this package, with
    `trust_remote_code=True` if layers differ. The folder appears whole or not at all.

    Args:
        model: as returned by `surgery.prune_model`; its dtype is kept.
        card: the content of README.md.
        shard_size: larger models are split into files of at most this size; writing needs this much memory.
        record: the origin of the model, for `read_origin`: JSON values under `base_model`, `texts`, `plan`.
        write: writes weights, config, generation config and code of the model into a new folder, in files of at most
            `shard_size`.
    """
    with _valid_generation_config(model), staging_folder(folder) as made:
        write(model, made, shard_size)
        tokenizer.save_pretrained(made)
        origin = (record or {}) | {"format": _ORIGIN_FORMAT}
        (made / _ORIGIN).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
        # Fields of the files of the base model are kept, whatever they are.
        for fields in (made / _ORIGIN, *made.glob("*config.json")):
            fields.write_text(without_secrets(fields.read_text(encoding="utf-8")), encoding="utf-8")
        if card is not None:
            write_card(made, card)
        replace(made, folder)


def is_replaceable(folder: Path) -> bool:
    """True if a folder is empty or was written by this package."""
    return any((folder / name).is_file() for name in (_ORIGIN, "recovery.json")) or not any(folder.iterdir())


def read_origin(location: ModelLocation) -> dict[str, Any] | None:
    """The origin of a checkpoint: the `record` of `save_checkpoint` with its `format`; None if it has none, or one of
    unknown format. `texts` is always a list of dictionaries, whatever the file says."""
    try:
        with quiet_transformers():
            file = None if location.gguf_file else cached_file(location.path, _ORIGIN)
        if file is None:
            return None
        with open(file, encoding="utf-8") as opened:
            origin = json.loads(opened.read(_LONGEST_ORIGIN))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(origin, dict) or origin.get("format") != _ORIGIN_FORMAT:
        return None
    texts = origin.get("texts")
    return origin | {"texts": [text for text in texts if isinstance(text, dict)] if isinstance(texts, list) else []}


@contextlib.contextmanager
def _valid_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Makes the generation config of a model one that transformers writes, while this lasts. Some models have settings
    for sampling but do not sample, which transformers reads and refuses to write; here they sample. Of other settings
    that exclude each other, the last ones are left out."""
    settings = model.generation_config
    if not _is_valid(settings):
        model.generation_config = copy.deepcopy(settings)
        model.generation_config.do_sample = True
    if not _is_valid(model.generation_config):
        kept: dict[str, Any] = {}
        for name, value in settings.to_diff_dict().items():
            if _is_valid(GenerationConfig(**kept, **{name: value})):
                kept[name] = value
        model.generation_config = GenerationConfig(**kept)
    try:
        yield
    finally:
        model.generation_config = settings


def _is_valid(settings: GenerationConfig) -> bool:
    """True if transformers would write these settings."""
    try:
        settings.validate(strict=True)
    except ValueError:
        return False
    return True


def write_card(folder: Path, card: str) -> None:
    """Writes the README.md of a checkpoint."""
    write_text(folder / "README.md", printable(card))


def index_files(folder: Path) -> None:
    """Gives the files of weights in a folder the names that loaders expect, with an index if there are several."""
    files = sorted(folder.glob("*.safetensors"))
    for index in folder.glob("*.index.json"):
        index.unlink()
    if len(files) == 1:
        files[0].rename(folder / "model.safetensors")
        return
    weight_map, size = dict[str, str](), 0
    for number, file in enumerate(files, 1):
        file = file.rename(folder / f"model-{number:05}-of-{len(files):05}.safetensors")
        with safe_open(file, "pt") as opened:
            weight_map |= dict.fromkeys(opened.keys(), file.name)
            size += sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118 - it is no mapping
    content = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_text(folder / "model.safetensors.index.json", json.dumps(content, indent=2, sort_keys=True) + "\n")


def add_older_keys(path: Path, text: str | None = None) -> None:
    """Adds the older names of config fields, or of those of the decoder, `text`, in the config of a multimodal model.
    transformers 4 and mlx-lm do not read `rope_parameters`, and would silently use a theta of 10,000; nor do they read
    the new name of the number of experts."""
    content = json.loads(path.read_text(encoding="utf-8"))
    fields = content[text] if text else content
    renamed = CONFIG_MAPPING[fields["model_type"]].attribute_map.get("num_experts")
    if renamed in fields:
        fields["num_experts"] = fields[renamed]
    parameters = fields.get("rope_parameters")
    # If types of layers have their own parameters, the older keys differ from family to family.
    if isinstance(parameters, dict) and "rope_theta" in parameters:
        names = {"rope_theta": "rope_theta", "partial_rotary_factor": "partial_rotary_factor"}
        if fields["model_type"] == "gpt_neox":
            names = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
        fields |= {names[name]: value for name, value in parameters.items() if name in names}
        scaling = {name: value for name, value in parameters.items() if name not in names}
        if scaling.get("rope_type", "default") != "default":
            fields["rope_scaling"] = scaling
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
