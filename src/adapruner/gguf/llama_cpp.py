"""llama.cpp through the package cyllama, which is optional: quantizes GGUF files, and runs them on the CPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from gguf import LlamaFileType
from torch import Tensor

from adapruner.config import GgufType
from adapruner.errors import AdaPrunerError


def check_installed() -> None:
    """Raises AdaPrunerError if llama.cpp is not installed."""
    if find_spec("cyllama") is None:
        raise AdaPrunerError("this needs llama.cpp: pip install '.[gguf]' in a checkout, which is the package cyllama")


def quantize(exact: Path, output: Path, gguf_type: GgufType) -> None:
    """Quantizes the matrices of a GGUF file; llama.cpp chooses the type of each.

    Args:
        exact: the file of the model, not quantized.

    Raises:
        AdaPrunerError: llama.cpp is not installed, or refuses.
    """
    library = _library()
    parameters = library.LlamaModelQuantizeParams()
    parameters.ftype = int(LlamaFileType[f"MOSTLY_{gguf_type.upper()}"])
    parameters.nthread = torch.get_num_threads()
    try:
        library.model_quantize(str(exact), str(output), parameters)
    except RuntimeError:
        raise AdaPrunerError(f"llama.cpp could not write the model as {gguf_type}: choose another type") from None


class LlamaCpp:
    """A GGUF file run by llama.cpp on the CPU, with PyTorch's number of threads.

    Args:
        length: the largest number of tokens that are read and generated.

    Raises:
        AdaPrunerError: llama.cpp is not installed, or cannot load the file.
    """

    def __init__(self, path: Path, length: int) -> None:
        self._library = _library()
        parameters = self._library.LlamaContextParams()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = length
        parameters.n_threads = parameters.n_threads_batch = torch.get_num_threads()
        try:
            model = _model_class(self._library)(str(path), self._library.LlamaModelParams(), verbose=False)
            self._context = self._library.LlamaContext(model, parameters, verbose=False)
        except (RuntimeError, ValueError) as error:
            raise AdaPrunerError(f"llama.cpp cannot load {path}: {error}") from None

    def window_losses(self, windows: Tensor, context: int = 1) -> Iterator[float]:
        """The mean negative log-likelihood in nats of the predicted tokens of each window, one after the other.

        Args:
            windows: [windows, tokens], int64.
            context: tokens at the beginning of a window that are not predicted, at least 1.
        """
        for window in windows.tolist():
            self._read(window, every_prediction=True)
            yield float(
                np.mean([self._loss(position - 1, window[position]) for position in range(context, len(window))])
            )

    def seconds(self, prompt: int, new_tokens: int) -> tuple[float, float]:
        """Seconds for reading a prompt, and for generating after it, one token after the other.

        The generated tokens are arbitrary: they do not change the time, and choosing them is not part of it.
        """
        started = time.perf_counter()
        self._read([0] * prompt)
        read = time.perf_counter()
        for position in range(prompt, prompt + new_tokens):
            self._decode([0], position, every_prediction=False)
        return read - started, time.perf_counter() - read

    def _loss(self, position: int, token: int) -> float:
        logits = np.array(self._context.get_logits_ith(position))
        largest = logits.max()
        return float(largest + np.log(np.exp(logits - largest).sum()) - logits[token])

    def _read(self, tokens: list[int], every_prediction: bool = False) -> None:
        """Reads tokens as the beginning of a text."""
        self._context.kv_cache_clear()
        self._decode(tokens, 0, every_prediction)

    def _decode(self, tokens: list[int], position: int, every_prediction: bool) -> None:
        with self._library.LlamaBatch(n_tokens=len(tokens), embd=0, n_seq_max=1, verbose=False) as batch:
            batch.set_batch(tokens, position, every_prediction)
            self._context.decode(batch)


def _library() -> ModuleType:
    check_installed()
    from cyllama.llama import llama_cpp

    llama_cpp.disable_logging()
    library: ModuleType = llama_cpp
    return library


def _model_class(library: ModuleType) -> Any:
    """The class of a model, with the number of tokens that cyllama 0.2 reads before it gives logits, but never sets."""
    if hasattr(library.LlamaModel, "n_vocab"):
        return library.LlamaModel
    return type("_Model", (library.LlamaModel,), {"n_vocab": property(lambda model: model.get_vocab().n_vocab)})
