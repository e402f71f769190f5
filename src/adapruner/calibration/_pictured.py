"""Records with images: read from a dataset, and made into windows as the decoder of a multimodal model sees them."""

from __future__ import annotations

import io
import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapruner.calibration._reading import TENTHS, TENTHS_OF_PARTS, WINDOWS, json_records, reading, tenth_of
from adapruner.calibration._sources import Source
from adapruner.errors import AdaPrunerError
from adapruner.models import Pictures, Seen, see, with_text_alone

_IMAGES, _TEXTS = ("images", "image"), ("messages", "text")
_ARGUMENT = "arguments."


@dataclass(frozen=True)
class Pictured:
    """A record: its text or messages, and its images of PIL in their order."""

    text: str | list[dict[str, Any]]
    images: list[Any]


def has_images(source: Source) -> bool:
    """True for a dataset with a column `image` or `images` and a column `text` or `messages`, unless the user names a
    column.

    Raises:
        AdaPrunerError: it cannot be read.
    """
    if source.named_columns or source.holds_windows or (source.path and source.path.suffix == ".txt"):
        return False
    with reading(source):
        first = next(_records(source), {})
    return all(any(name in first for name in names) for names in (_IMAGES, _TEXTS))


def write_pictured(
    source: Source,
    whole: Any,
    processor: Any,
    seq_len: int,
    count: int,
    first: int,
    path: Path,
    advance: Callable[[], Any],
) -> None:
    """Writes windows of records with images to a file that can be used as a dataset.

    A window begins with a record; shorter records are followed by others, longer ones are cut. All records of a window
    are in one part of the dataset.

    Args:
        whole, processor: the multimodal model, and what makes its inputs.
        count: the largest number of windows.
        first: see `Pictures`.
        advance: called after every window.

    Raises:
        AdaPrunerError: the dataset cannot be read, or gives no windows with text.
    """
    tenths, tokens, seen = list[int](), list[Tensor](), list[Seen]()
    plain: dict[str, Tensor] = {}
    for tenth, inputs in itertools.islice(_grouped(source, processor, seq_len), count):
        moved = {name: value.to(whole.device) for name, value in inputs.items()}
        moved |= {name: value.to(whole.dtype) for name, value in moved.items() if value.is_floating_point()}
        seen.append(see(whole, moved, seq_len))
        tokens.append(inputs["input_ids"][0, :seq_len])
        tenths.append(tenth)
        plain = plain or {
            name: value[:, :seq_len] for name, value in moved.items() if value.shape == moved["input_ids"].shape
        }
        advance()
    if not seen:
        raise AdaPrunerError(f"{source} gives no window of {seq_len} tokens: give more records, or lower `seq_len`")
    windows, is_image = torch.stack(tokens), torch.stack([window.is_image for window in seen]).cpu()
    if is_image[:, 1:].all(1).any():
        raise AdaPrunerError(
            f"an image of {source} fills a window of {seq_len} tokens, and leaves no text: raise `seq_len`"
        )
    windows[is_image] = -1 - first - torch.arange(int(is_image.sum()))
    content = {WINDOWS: windows, TENTHS: torch.tensor(tenths)}
    content["features"] = torch.cat([window.embedded[window.is_image] for window in seen])
    content["window"] = (torch.arange(len(seen)) + 1).repeat_interleave(is_image.sum(1))
    if any(window.arguments for window in seen):
        ordinary = int(windows[windows >= 0].mode().values)
        plain = {name: torch.zeros_like(value) if "type_ids" in name else value for name, value in plain.items()}
        of_text = see(whole, plain | {"input_ids": torch.full_like(plain["input_ids"], ordinary)}, seq_len)
        content |= {_ARGUMENT + name: value for name, value in with_text_alone(of_text, seen).items()}
    save_file({name: value.cpu().contiguous() for name, value in content.items()}, path)


def read_pictures(source: Source) -> Pictures | None:
    """The image features of a dataset of windows; None if it has none.

    Raises:
        AdaPrunerError: it cannot be read.
    """
    if not source.holds_windows or source.path is None:
        return None
    with reading(source):
        content = load_file(source.path)
    if TENTHS not in content:
        return None
    arguments = {name.removeprefix(_ARGUMENT): value for name, value in content.items() if name.startswith(_ARGUMENT)}
    rows = content[WINDOWS][content[WINDOWS] < 0]
    return Pictures(int(-1 - rows.max()), content["features"], content["window"], arguments)


def _grouped(source: Source, processor: Any, seq_len: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """The inputs of a model for each window of a part, of at least `seq_len` tokens, with the tenth of its records."""
    waiting: dict[int, list[Pictured]] = defaultdict(list)
    for record in _pictured(source):
        tenth = tenth_of(json.dumps(record.text))
        if tenth not in TENTHS_OF_PARTS.get(source.part, range(10)):
            continue
        group = waiting[tenth]
        group.append(record)
        inputs = _processed(group, processor)
        if inputs["input_ids"].shape[1] >= seq_len:
            yield tenth, inputs
            group.clear()


def _processed(group: list[Pictured], processor: Any) -> dict[str, Tensor]:
    is_chat = bool(getattr(processor, "chat_template", None))
    text = ("" if is_chat else "\n\n").join(_written(record, processor, is_chat) for record in group)
    images = [image for record in group for image in record.images]
    inputs = processor(text=[text], images=images or None, return_tensors="pt", add_special_tokens=not is_chat)
    return {name: value for name, value in inputs.items() if isinstance(value, Tensor)}


def _written(record: Pictured, processor: Any, is_chat: bool) -> str:
    """The text of a record, with a place for each of its images: by the chat template, where the text is the answer to
    the images, or after the tokens that stand for images."""
    messages = record.text
    if not is_chat:
        text = messages if isinstance(messages, str) else "\n".join(str(message["content"]) for message in messages)
        token = getattr(processor, "boi_token", None) or getattr(processor, "image_token", "<image>")
        return str(token) * len(record.images) + text
    if isinstance(messages, str):
        images: list[dict[str, str]] = [{"type": "image"} for _ in record.images]
        answer = [{"type": "text", "text": messages}]
        messages = [{"role": "user", "content": images}, {"role": "assistant", "content": answer}]
    return str(processor.apply_chat_template(messages, tokenize=False))


def _pictured(source: Source) -> Iterator[Pictured]:
    folder = source.path.parent if source.path else Path()
    with reading(source):
        for number, record in enumerate(_records(source), 1):
            text = next((record[name] for name in _TEXTS if record.get(name)), None)
            images: Any = next((record[name] for name in _IMAGES if record.get(name) is not None), [])
            if text is None:
                raise ValueError(f"record {number} has no text")
            images = images if isinstance(images, list) else [images]
            yield Pictured(text, [_opened(image, folder) for image in images])


def _opened(image: Any, folder: Path) -> Any:
    """An image of PIL, of which datasets hold the bytes, the path or the image itself."""
    try:
        from PIL import Image
    except ImportError:
        raise AdaPrunerError("images need Pillow: pip install pillow torchvision") from None
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        image = Image.open(io.BytesIO(image))
    elif isinstance(image, str):
        image = Image.open(folder / image)
    return image.convert("RGB")


def _records(source: Source) -> Iterator[dict[str, Any]]:
    """The records of a dataset as they are."""
    path, hub = source.path, source.hub
    if path is not None and path.suffix == ".parquet":
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from itertools.islice(
                (row for batch in file.iter_batches(64) for row in batch.to_pylist()), source.limit
            )
    elif path is not None and path.is_file():
        yield from itertools.islice(json_records(path), source.limit)
    else:
        assert hub is not None
        rows: Any = (
            datasets.load_from_disk(str(path))
            if path is not None
            else datasets.load_dataset(**hub.model_dump(exclude_none=True), split=source.split, streaming=True)
        )
        yield from itertools.islice(rows, source.limit)
