"""Windows of tokens: drawn from documents to calibrate on, cut from running text to evaluate on, or self-generated."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from adapruner.calibration._sources import Source, read_documents
from adapruner.errors import AdaPrunerError


def draw_windows(
    source: Source, tokenizer: Tokenizer, count: int, length: int, seed: int, at_least: int | None = None
) -> Tensor:
    """Draws windows from the beginnings of documents in random order; documents shorter than a window are dropped.

    Only if there are too few documents, those that are longer give a second window, a third, and so on.

    Args:
        at_least: fewer windows than `count` will do, but not fewer than this; by default `count`.

    Returns:
        [count, length], int64; the same for the same seed.

    Raises:
        AdaPrunerError: the source is too short, with the numbers.
    """
    documents = list(dict.fromkeys(read_documents(source)))
    random.Random(seed).shuffle(documents)
    windows: list[list[int]] = []
    rests: list[list[int]] = []
    for document in documents:
        if len(windows) == count:
            break
        tokens = tokenizer(document, verbose=False).input_ids
        if len(tokens) >= length:
            windows.append(tokens[:length])
            rests.append(tokens[length:])
    long_documents = len(windows)
    while len(windows) < count and rests:
        rests = [rest for rest in rests if len(rest) >= length]
        windows += [rest[:length] for rest in rests]
        rests = [rest[length:] for rest in rests]
    needed = count if at_least is None else at_least
    if len(windows) < needed:
        raise AdaPrunerError(
            f"the text is too short: {long_documents} of {len(documents)} documents in {source} have at least {length}"
            f" tokens and give {len(windows)} windows, {needed} are needed; give more text, or lower --seq-len or the"
            " number of windows (--pool, --objective-windows)"
        )
    return torch.tensor(windows[:count])


def text_windows(source: Source, tokenizer: Tokenizer, length: int, stride: int | None = None) -> Tensor:
    """Cuts the running text of a source into windows; the tail is dropped.

    The protocol of LLM-Pruner (arXiv 2305.11627): documents joined by an empty line, tokenized at once.

    Args:
        stride: tokens between the beginnings of windows; by default the windows do not overlap.

    Returns:
        [windows, length], int64.

    Raises:
        AdaPrunerError: the text is shorter than one window.
    """
    tokens: Tensor = tokenizer("\n\n".join(read_documents(source)), return_tensors="pt", verbose=False).input_ids[0]
    if len(tokens) < length:
        raise AdaPrunerError(f"{source} has {len(tokens)} tokens, less than one window of {length}")
    return tokens.unfold(0, length, stride or length).clone()


def evenly_spaced(windows: Tensor, limit: int | None) -> Tensor:
    """At most `limit` of the windows, from beginning to end."""
    if limit is None or limit >= len(windows):
        return windows
    return windows[torch.arange(limit) * len(windows) // limit]


def generate_windows(model: PreTrainedModel, count: int, length: int, seed: int, batch_size: int = 16) -> Tensor:
    """Lets the model write the text itself, sampling at temperature 1 from its start token (as LLM-QAT does, arXiv
    2305.17888).

    Returns:
        [count, length], int64; the same for the same seed on the same machine.
    """
    settings = model.generation_config
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    start = settings.bos_token_id if settings.bos_token_id is not None else ends[0]
    if start is None:
        raise AdaPrunerError("the model names neither a start nor an end token: it cannot generate text by itself")
    generate: Any = model.generate
    windows = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for first in range(0, count, batch_size):
            prompt = torch.full((min(batch_size, count - first), 1), start, device=model.device)
            windows.append(
                generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    repetition_penalty=1.0,
                    min_new_tokens=length - 1,
                    max_new_tokens=length - 1,
                    pad_token_id=start,
                ).cpu()
            )
    return torch.cat(windows)
