"""The cost of calibrating a multimodal model on text alone: a small LLaVA, trained on synthetic pictures and on text.

    python benchmarks/pictures.py --folder runs/pictures --seed 0

A picture has two coloured shapes in a grid of four by four, its caption names them in the order of the grid. The
decoder, of six layers, learns captions of pictures and passages of BoolQ in equal shares. Then it is pruned: channels
and heads are ranked, and the remaining weights compensated, on text, on text and captions without their pictures, or on
text and pictures with captions. Every mix has the same number of windows. Losses are in nats per token on windows that
nothing else has seen; of pictures, on the tokens of the captions. Training takes five minutes on one core.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from cyclopts import run
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import (
    AutoModelForMultimodalLM,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

from adapruner.calibration import parse_source, read_documents
from adapruner.evaluation import window_losses
from adapruner.families import open_model
from adapruner.importance import MetricPoint, score_groups
from adapruner.measurement import measure, measure_moments, removal_errors
from adapruner.models import Pictures, find_model, show_pictures
from adapruner.planning import Budget, kept_counts, make_plan
from adapruner.structure import Structure, build_structure
from adapruner.surgery import Compensation, prune_model, refit_sequentially
from machine import describe

IMAGE, VOCABULARY = 0, 1024
CELL, GRID, OBJECTS, PER_WINDOW = 8, 4, 2, 3
PATCHES = GRID * GRID
COLOURS = {
    **{"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1), "yellow": (1, 1, -1)},
    **{"purple": (1, -1, 1), "cyan": (-1, 1, 1), "white": (1, 1, 1), "grey": (0, 0, 0)},
}
ROWS, COLUMNS = ("top", "upper", "lower", "bottom"), ("left", "center", "middle", "right")
PLACES = [" ".join(place) for place in product(ROWS, COLUMNS)]
CALIBRATED, HELD_OUT, BATCH = 128, 64, 8


def _shapes() -> dict[str, Tensor]:
    """Pixels of a cell by name, bool."""
    line = torch.arange(CELL)
    radius = torch.hypot(line[:, None] - 3.5, line - 3.5)
    stripe = (line // 2) % 3 == 1
    return {
        "square": torch.ones(CELL, CELL, dtype=torch.bool),
        "cross": stripe[:, None] | stripe,
        "ring": (radius - 2.6).abs() < 1,
        "line": (line[:, None] - line).abs() < 2,
    }


SHAPES = _shapes()


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
    """Pictures, [count, 3, side, side], and their captions."""

    def below(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    side = CELL * GRID
    pictures = torch.randn(count, 3, side, side, generator=generator) * 0.1 - 1
    captions = []
    for picture in pictures:
        objects = []
        for cell in torch.randperm(PATCHES, generator=generator)[:OBJECTS].sort().values.tolist():
            colour, shape = list(COLOURS)[below(len(COLOURS))], list(SHAPES)[below(len(SHAPES))]
            top, left = cell // GRID * CELL, cell % GRID * CELL
            pixels = picture[:, top : top + CELL, left : left + CELL]
            pixels[:, SHAPES[shape]] = torch.tensor(COLOURS[colour], dtype=torch.float32)[:, None]
            objects.append(f"a {colour} {shape} {PLACES[cell]}")
        captions.append(", ".join(objects) + ".")
    return pictures, captions


def make_tokenizer(documents: list[str], captions: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    special, letters = ["<image>", "<s>", "</s>"], ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator(documents[:2000] + captions, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@dataclass(frozen=True)
class Data:
    """Text and pictures of one seed.

    Attributes:
        text: [tokens], int64, of all documents.
    """

    tokenizer: PreTrainedTokenizerFast
    text: Tensor
    generator: torch.Generator

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return PER_WINDOW * (PATCHES + len(self.tokenizer(draw(1, torch.Generator().manual_seed(0))[1][0]).input_ids))

    def pictures(self, windows: int) -> tuple[Tensor, Tensor]:
        """Pictures, and windows of [windows, tokens], int64, in which each picture comes before its caption."""
        pictures, captions = draw(PER_WINDOW * windows, self.generator)
        tokens = torch.tensor(self.tokenizer(captions).input_ids)
        images = torch.full((len(tokens), PATCHES), IMAGE)
        return pictures, torch.cat([images, tokens], 1).view(windows, -1)

    def captions(self, windows: int) -> Tensor:
        """[windows, tokens], int64: captions alone."""
        _, captions = draw(3 * PER_WINDOW * windows, self.generator)
        tokens = torch.tensor(self.tokenizer(captions).input_ids).flatten()
        return tokens[: windows * self.length].view(windows, -1)

    def passages(self, windows: int) -> Tensor:
        """[windows, tokens], int64: text at random places."""
        starts = torch.randint(len(self.text) - self.length, (windows,), generator=self.generator)
        return torch.stack([self.text[start : start + self.length] for start in starts.tolist()])


def new_model() -> LlavaForConditionalGeneration:
    vision = SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=CELL * GRID,
        patch_size=CELL,
        vision_use_head=False,
    )
    text = LlamaConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return LlavaForConditionalGeneration(config)


def train(model: Any, data: Data, steps: int, learning_rate: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=0.05)
    for step in range(steps):
        pictures, captioned = data.pictures(BATCH)
        losses = []
        for tokens, seen in ((captioned, {"pixel_values": pictures}), (data.passages(BATCH), {})):
            logits = model(input_ids=tokens, **seen).logits[:, :-1]
            losses.append(functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=IMAGE))
        torch.stack(losses).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}: captions {losses[0]:.3f}, text {losses[1]:.3f}", flush=True)


@torch.no_grad()
def seen(model: Any, pictures: Tensor, windows: Tensor) -> tuple[Tensor, Pictures]:
    """Windows with rows of features instead of image tokens."""
    features = model.get_image_features(pictures, return_dict=True).pooler_output
    rows = torch.cat(list(features))
    windows = windows.clone()
    windows[windows == IMAGE] = -1 - torch.arange(len(rows))
    window = torch.arange(1, len(windows) + 1).repeat_interleave(len(rows) // len(windows))
    return windows, Pictures(0, rows, window, {})


def pruned(
    model: PreTrainedModel, structure: Structure, ratio: float, to_rank: Tensor, to_fit: Tensor
) -> PreTrainedModel:
    """The model, ranked and compensated on windows that it can read.

    Args:
        to_rank, to_fit: [windows, tokens], int64, with negative tokens for image features.
    """
    ranking = dict(measure_moments(model, structure, to_rank))
    statistics = replace(
        measure(model, structure, to_rank, terms="vector-wise"), **removal_errors(model, structure, ranking)
    )
    scores = score_groups(statistics, structure, MetricPoint(weights={"elimination": 1.0}))
    plan = make_plan(structure, scores, kept_counts(structure, Budget(ratio, "uniform", heads=0.25, round_to=8)))
    compensation = Compensation("least-squares", dict(measure_moments(model, structure, to_fit)))
    smaller = prune_model(model, structure, plan, compensation)
    refit_sequentially(model, smaller, structure, plan, compensation, to_fit)
    return smaller


def mixes(data: Data, pictured: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Calibration windows by name, mixed, because some are held out."""
    half = CALIBRATED // 2
    text = data.passages(CALIBRATED)
    order = torch.randperm(CALIBRATED, generator=data.generator)
    yield "text", text
    yield "text, captions", torch.cat([text[:half], data.captions(half)])[order]
    yield "text, pictures", torch.cat([text[:half], pictured[:half]])[order]
    yield "pictures", pictured


def main(*, folder: Path, seed: int = 0, steps: int = 600, learning_rate: float = 2e-3, ratio: float = 0.2) -> None:
    """
    Args:
        folder: Where the trained models are kept.
        seed: Of the weights and the data.
        steps: Of the training.
        learning_rate: At its highest.
        ratio: Of the parameters of the decoder.
    """
    print(describe())
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    documents = read_documents(parse_source("boolq-passages@calibration"))
    tokenizer = make_tokenizer(documents, draw(3000, torch.Generator().manual_seed(0))[1])
    data = Data(tokenizer, torch.tensor([token for ids in tokenizer(documents).input_ids for token in ids]), generator)
    place = folder / str(seed)
    if not (place / "config.json").is_file():
        model = new_model()
        train(model, data, steps, learning_rate)
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
    data = replace(data, generator=torch.Generator().manual_seed(1000 + seed))
    model = AutoModelForMultimodalLM.from_pretrained(place).eval()
    decoder = open_model(find_model(str(place)))
    structure = build_structure(decoder)
    windows, pictures = seen(model, *data.pictures(CALIBRATED + HELD_OUT))
    show_pictures(decoder, [pictures])
    documents = read_documents(parse_source("boolq-passages@report"))[:200]
    text = torch.tensor([token for ids in tokenizer(documents).input_ids for token in ids])
    held_out = {
        "pictures": windows[CALIBRATED:],
        "text": text[: HELD_OUT * data.length].view(HELD_OUT, -1),
    }

    def report(name: str, model: PreTrainedModel) -> None:
        losses = {kind: float(window_losses(model, rows).mean()) for kind, rows in held_out.items()}
        print(f"seed {seed}, {name}: " + ", ".join(f"{kind} {loss:.4f}" for kind, loss in losses.items()), flush=True)

    report("dense", decoder)
    texts = dict(mixes(data, windows[:CALIBRATED]))
    for ranked, fitted in [*((name, name) for name in texts), ("text", "text, pictures"), ("text, pictures", "text")]:
        report(
            f"ranked on {ranked}; fitted on {fitted}", pruned(decoder, structure, ratio, texts[ranked], texts[fitted])
        )


if __name__ == "__main__":
    run(main)
