"""The loss of models on windows and continuations, batch by batch or layer by layer; perplexity with its protocol."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as functional
from pydantic import BaseModel, computed_field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from adapruner.base.errors import AdaPrunerError
from adapruner.model.layers import LayerCall, decoder_layers, enter_layers, is_streamed, loaded_layer, skipping_layers

# The largest absolute value of a weight with which no sum of a trained model overflows in float32 or bfloat16.
_LARGEST_WEIGHT = 1e6
# Enough for the caches of a processor, and enough to keep a GPU busy.
_TOKENS_PER_BATCH_ON_CPU, _TOKENS_PER_BATCH = 512, 4096
# Hidden states held while all layers of a streamed model are read once: 256 MiB for LLaMA-7B in bfloat16.
_TOKENS_PER_READING = 32768
# Predictions in float32 at once, of the vocabulary each.
_ROWS_AT_ONCE = 256


# By token of another model, the tokens of this one that spell it.
Spelling = Mapping[int, Sequence[int]]


@dataclass(frozen=True)
class Prefix:
    """The hidden states of the first layers of a model for every batch of some windows.

    Attributes:
        states: for each batch, the hidden state [windows, tokens, hidden] before the first layer, after it, after the
            second, and so on.
        calls: for each batch, the arguments of every layer.
    """

    states: list[list[Tensor]]
    calls: list[list[LayerCall]]


def compute_prefix(model: PreTrainedModel, windows: Tensor, layers: int) -> Prefix:
    """Runs the first layers of a model over windows, in the batches of `losses_by_batch`."""
    with torch.inference_mode():
        entered = enter_layers(model, _batches(windows, model))
        states = [[state] for state, _ in entered]
        for index in range(layers):
            with loaded_layer(model, index) as layer:
                for batch_states, (_, calls) in zip(states, entered, strict=True):
                    batch_states.append(calls[index].run(layer, batch_states[-1]))
    return Prefix(states, [calls for _, calls in entered])


def token_losses(model: PreTrainedModel, windows: Tensor) -> Iterator[Tensor]:
    """[windows of one batch, tokens - 1], float32, on the CPU, batch after batch: the negative log-likelihood in nats
    of every token but the first. Many batches pass through the layers of a streamed model together, so that a layer is
    read once for all of them."""
    batches = _batches(windows, model)
    if is_streamed(model):
        at_once = max(1, _TOKENS_PER_READING // batches[0].numel())
        for first in range(0, len(batches), at_once):
            together = torch.cat(list(batches[first : first + at_once]))
            yield from _losses_layer_by_layer(model, together)
        return
    for batch in batches:
        with torch.inference_mode():
            losses = _losses_of_batch(model, batch)
        yield losses


def token_losses_spelt(model: PreTrainedModel, windows: Tensor, spelling: Spelling) -> Iterator[Tensor]:
    """The losses of `token_losses` for a model that spells some of the tokens by others: of every token, the sum over
    those that spell it."""
    rows, places = list[Tensor](), list[Tensor]()
    for window in windows.tolist():
        spelt = [(place, piece) for place, token in enumerate(window) for piece in spelling.get(token, ())]
        place_of_piece, row = torch.tensor(spelt).unbind(1)
        rows.append(row)
        places.append(place_of_piece)
    tokens = windows.shape[1]
    # Nothing that is read sees the padding behind it.
    place_of = iter(pad_sequence(places, batch_first=True, padding_value=tokens)[:, 1:].split(1))
    for losses in token_losses(model, pad_sequence(rows, batch_first=True)):
        of_batch = torch.cat([next(place_of) for _ in losses])
        yield losses.new_zeros(len(losses), tokens + 1).scatter_add_(1, of_batch, losses)[:, 1:tokens]


def losses_by_batch(model: PreTrainedModel, windows: Tensor) -> Iterator[Tensor]:
    """[windows of one batch], float64, batch after batch: the mean over the predicted tokens of each window."""
    return (losses.double().mean(1) for losses in token_losses(model, windows))


def window_losses(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """[windows], float64: the mean negative log-likelihood in nats of the predicted tokens of each window."""
    return torch.cat([*losses_by_batch(model, windows)])


def finite_windows(
    model: PreTrainedModel, windows: Mapping[str, Tensor], at_least: Mapping[str, int]
) -> tuple[dict[str, list[int]], str]:
    """The places of the windows on which the loss of a model is finite, and a note to the user on the others.

    Text is only tried where numbers may overflow (see `may_overflow`): that costs a forward pass over all of it.

    Args:
        model: the dense model, in the dtype in which it is measured.
        windows: [windows, tokens], int64, by use.
        at_least: the least number of windows of each use that must be left.

    Returns:
        The places of the remaining windows, by use, and a line for each use that lost some; empty if none did.
    """
    if not may_overflow(model):
        return {use: [*range(len(drawn))] for use, drawn in windows.items()}, ""
    kept, notes = {}, []
    for use, drawn in windows.items():
        finite = window_losses(model, drawn).isfinite()
        lost = (~finite).nonzero().flatten().tolist()
        if 2 * len(lost) > len(drawn) or len(drawn) - len(lost) < at_least[use]:
            raise AdaPrunerError(
                f"the loss of the model is not finite on {len(lost)} of the {len(drawn)} windows of the {use}: its"
                " weights are broken or its dtype is too narrow: try `dtype` float32"
            )
        if lost:
            notes.append(f"left out, because the loss of the model on them is not finite: windows {lost} of the {use}")
        kept[use] = finite.nonzero().flatten().tolist()
    return kept, "\n".join(notes)


def may_overflow(model: PreTrainedModel) -> bool:
    """True if the loss of a model may be infinite on some text: it computes in float16, or a weight is not finite or
    far larger than those of trained models, whose sums stay far within the range of float32 and bfloat16."""

    def has_ordinary_weights(module: torch.nn.Module) -> bool:
        weights = [weight for weight in module.parameters() if not weight.is_meta and weight.numel()]
        # A weight that is no number is not below the limit.
        return all(bool(weight.abs().max() < _LARGEST_WEIGHT) for weight in weights)

    if model.dtype == torch.float16 or not has_ordinary_weights(model):
        return True
    for layer in range(len(decoder_layers(model))) if is_streamed(model) else ():
        with loaded_layer(model, layer) as module:
            if not has_ordinary_weights(module):
                return True
    return False


def _losses_layer_by_layer(model: PreTrainedModel, windows: Tensor) -> list[Tensor]:
    """The losses of `token_losses` for a streamed model, of which each layer is read once for all windows, but the
    first, which is also run to see what layers are called with."""
    batches, losses = _batches(windows, model), []
    with torch.inference_mode():
        with loaded_layer(model, 0):
            entered = enter_layers(model, batches)
        states = [state for state, _ in entered]
        for layer in range(len(decoder_layers(model))):
            with loaded_layer(model, layer) as module:
                states = [calls[layer].run(module, state) for state, (_, calls) in zip(states, entered, strict=True)]
        for batch, state, (_, calls) in zip(batches, states, entered, strict=True):
            with skipping_layers(model, len(decoder_layers(model)), state, calls[0]):
                losses.append(_losses_of_batch(model, batch))
    return losses


def _losses_of_batch(model: PreTrainedModel, batch: Tensor) -> Tensor:
    """See `token_losses`."""
    batch = batch.to(model.device)
    losses = []
    # Some rows at a time: float32 logits of a batch are the largest thing in memory.
    for window, logits in enumerate(model(batch, use_cache=False).logits[:, :-1]):
        rows = zip(logits.split(_ROWS_AT_ONCE), batch[window, 1:].split(_ROWS_AT_ONCE), strict=True)
        losses.append(torch.cat([functional.cross_entropy(of.float(), at, reduction="none") for of, at in rows]))
    return torch.stack(losses).cpu()


@torch.inference_mode()
def log_probabilities(model: PreTrainedModel, state: Tensor, call: LayerCall) -> Tensor:
    """[windows, tokens, vocabulary], float32: the predictions of a model with this hidden state after its last layer,
    [windows, tokens, hidden].

    Args:
        call: of any layer.
    """
    tokens = torch.zeros(state.shape[:2], dtype=torch.int64, device=model.device)  # no layer reads them
    with skipping_layers(model, len(decoder_layers(model)), state, call):
        predictions: Tensor = model(tokens, use_cache=False).logits.float().log_softmax(-1)
    return predictions


def tokens_per_batch(device: torch.device) -> int:
    """The number of tokens that are evaluated at once."""
    return _TOKENS_PER_BATCH_ON_CPU if device.type == "cpu" else _TOKENS_PER_BATCH


def _batches(windows: Tensor, model: PreTrainedModel) -> Sequence[Tensor]:
    batches: Sequence[Tensor] = windows.split(max(1, tokens_per_batch(model.device) // windows.shape[1]))
    return batches


class Text(NamedTuple):
    """The tokens of a prompt and of its continuation."""

    prompt: list[int]
    continuation: list[int]


@torch.inference_mode()
def read(model: PreTrainedModel, texts: Sequence[Text]) -> list[tuple[Tensor, Tensor]]:
    """For every token of each continuation, given all tokens before: the negative log-likelihood in nats, float32, and
    the token that the model predicts, int64.

    Rows are padded on the right, which needs no mask, and cut on the left where the model has few positions. Texts that
    differ in their last token alone are one row.
    """
    room = getattr(model.config, "max_position_embeddings", None) or 0
    texts_of_row: dict[tuple[int, ...], list[int]] = {}
    for number, (prompt, continuation) in enumerate(texts):
        texts_of_row.setdefault((*prompt, *continuation[:-1])[-room:], []).append(number)
    rows = sorted(texts_of_row, key=len, reverse=True)
    readings: dict[int, tuple[Tensor, Tensor]] = {}
    while rows:
        at_once = max(1, tokens_per_batch(model.device) // len(rows[0]))
        batch, rows = rows[:at_once], rows[at_once:]
        tokens = torch.tensor([(*row, *[0] * (len(batch[0]) - len(row))) for row in batch], device=model.device)
        numbers = [number for row in batch for number in texts_of_row[row]]
        written = [torch.tensor(texts[number].continuation, dtype=torch.long) for number in numbers]
        lengths = [len(continuation) for continuation in written]
        predicted = model(input_ids=tokens, use_cache=False).logits
        targets = iter(torch.cat(written).to(predicted.device).split(lengths))
        losses, chosen = [], []
        # Text by text: float32 logits of a batch are the largest thing in memory.
        for row, logits in zip(batch, predicted, strict=True):
            for _ in texts_of_row[row]:
                target = next(targets)
                predictions = logits[len(row) - len(target) : len(row)].float()
                losses.append(functional.cross_entropy(predictions, target, reduction="none"))
                chosen.append(predictions.argmax(-1))
        both = (torch.cat(parts).cpu().split(lengths) for parts in (losses, chosen))
        readings |= dict(zip(numbers, zip(*both, strict=True), strict=True))
    return [readings[number] for number in range(len(texts))]


# Datasets and tokens per window of LLM-Pruner (arXiv 2305.11627) and the paper; of SparseGPT, Wanda, FLAP, SliceGPT.
PROTOCOLS = {"llm-pruner": (("wikitext2:test", "ptb:validation"), 128), "2048": (("wikitext2:test",), 2048)}


# Where the loss of long windows is told apart.
_POSITIONS = (0, 128, 256, 512, 1024)


class Perplexity(BaseModel, frozen=True, ser_json_inf_nan="constants"):
    """A perplexity and how it was measured.

    Attributes:
        perplexity: exp of the mean negative log-likelihood over all predicted tokens.
        text: the source and its part.
        seq_len: tokens per window; the first token of a window is not predicted.
        windows: the number of windows.
        stride: tokens of the text from the beginning of a window to the beginning of the next. If windows overlap, all
            but the last `stride` tokens of a window are context only, except in the first window.
        provenance: the dataset and its tokenization (`calibration.provenance`): `data_set`, `split`, `revision`,
            `tokenizer`, and `every_window_after` if windows begin with a special token.
        predicted_bytes: UTF-8 bytes of the text of all predicted tokens; None if the tokenizer does not know the text
            of a token.
        special_tokens: the number of special tokens at the beginning of every window; they are not predicted.
        losses: the mean negative log-likelihood of the predicted tokens of each window, by which two models that read
            the same windows are compared; none if windows overlap.
        by_position: the mean negative log-likelihood of the tokens of long windows from a position on, up to the next
            position that is named; none if windows overlap.
    """

    perplexity: float
    text: str
    seq_len: int
    windows: int
    stride: int
    provenance: dict[str, str] = {}
    predicted_bytes: int | None = None
    special_tokens: int = 0
    losses: tuple[float, ...] = ()
    by_position: dict[int, float] = {}

    @computed_field
    @property
    def bits_per_byte(self) -> float | None:
        """The negative log-likelihood of the predicted text in bits, divided by its bytes. Unlike the perplexity, it
        compares models with different tokenizers."""
        return None if self.bits_per_nat is None else math.log(self.perplexity) * self.bits_per_nat

    @property
    def bits_per_nat(self) -> float | None:
        """Bits per byte of one nat per token; None if the bytes are not known."""
        return self.predicted_tokens / self.predicted_bytes / math.log(2) if self.predicted_bytes else None

    @computed_field
    @property
    def predicted_tokens(self) -> int:
        """The number of tokens in the mean."""
        per_window = self.seq_len - max(1, self.special_tokens)
        return per_window + (self.windows - 1) * min(self.stride, per_window)

    @computed_field
    @property
    def protocol(self) -> str:
        """How the number was measured, on one line."""
        overlaps = self.stride < self.seq_len - self.special_tokens
        overlap = f"every {self.stride} tokens" if overlaps else "without overlap"
        counted = f" of {self.predicted_bytes:,} bytes" if self.predicted_bytes else ""
        origin = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in self.provenance.items())
        return (
            f"{self.text}: {self.windows} windows of {self.seq_len} tokens {overlap}, mean over"
            f" {self.predicted_tokens:,} predicted tokens{counted}{f' ({origin})' if origin else ''}"
        )


def measure_perplexity(
    model: PreTrainedModel,
    windows: Tensor,
    text: str,
    progress: Callable[[int], None] | None = None,
    stride: int | None = None,
    provenance: dict[str, str] | None = None,
    predicted_bytes: int | None = None,
    special_tokens: int = 0,
    spelling: Spelling | None = None,
) -> Perplexity:
    """The perplexity over windows.

    Args:
        windows: [windows, tokens], int64 (see `text.windows.evaluation_text`).
        text: the name of their text, for the protocol.
        progress: called with the number of windows done after each batch.
        stride: tokens between the beginnings of windows; by default they do not overlap.
        provenance, predicted_bytes, special_tokens: see `Perplexity`.
        spelling: of a model with fewer tokens, whose perplexity is that of the tokens of the windows all the same.
    """
    seq_len, first = windows.shape[1], max(1, special_tokens)
    stride = stride or seq_len
    read = list[Tensor]()
    for batch in token_losses(model, windows) if spelling is None else token_losses_spelt(model, windows, spelling):
        read.append(batch.double()[:, first - 1 :])
        if progress:
            progress(len(batch))
    losses = torch.cat(read)
    of_windows, by_position = losses.mean(1), dict[int, float]()
    if stride < seq_len - special_tokens:
        stride = min(stride, losses.shape[1])
        of_windows, total = of_windows[:0], losses[0].sum() + losses[1:, -stride:].sum()
        mean = total / (losses.shape[1] + (len(windows) - 1) * stride)
    else:
        mean = of_windows.mean()
        ends = [*(end for end in _POSITIONS if end < seq_len), seq_len]
        parts = losses.split([end - max(begin, first) for begin, end in pairwise(ends)], 1)
        by_position = {begin: float(part.mean()) for begin, part in zip(ends, parts, strict=False)}
    return Perplexity(
        perplexity=float(mean.exp()),
        text=text,
        seq_len=seq_len,
        windows=len(windows),
        stride=stride,
        provenance=provenance or {},
        predicted_bytes=predicted_bytes,
        special_tokens=special_tokens,
        losses=tuple(of_windows.tolist()),
        by_position=by_position if len(by_position) > 1 else {},
    )
