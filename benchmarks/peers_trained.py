"""Pruned models of several methods, before and after the same fine-tuning.

Makes "fine-tuned" of "Newer methods" in research/results.md. Takes 9 to 12 minutes of training for each model.

    ADAPRUNER_DATA=.data:DATA python benchmarks/peers_trained.py OUT --models RUN/model

The peers of peers.py, and LLM-Pruner with its best metric, are calibrated on the same windows of BoolQ passages, and
fine-tuned on the calibration part of that dataset with the dense model as teacher; so are other pruned models. Rows go
to OUT/results.jsonl, one for each model before and after; rerun to resume.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter, run
from transformers import PreTrainedModel

import adapruner
from adapruner.calibration._pool import evenly_spaced, text_windows
from adapruner.calibration._sources import parse_source
from adapruner.checkpoint._folder import save_checkpoint
from adapruner.importance._metric import LLM_PRUNER_METRICS, score_groups
from adapruner.measurement._samples import measure
from adapruner.models._loading import load_model, load_tokenizer
from adapruner.models._places import find_model
from adapruner.planning._budget import kept_counts
from adapruner.planning._plan import make_plan
from adapruner.structure._build import build_structure
from adapruner.surgery._cut import prune_model
from comparison import peer_budget
from frontier import TRAINING, perplexities
from peers import PEERS, Peer, Setting, append, read

TEXT = "boolq-passages@calibration"
Several = Parameter(consume_multiple=True)
Method = Literal["LLM-Pruner", Peer]


def main(
    output: Path,
    /,
    *,
    methods: Annotated[tuple[Method, ...], Several] = ("LLM-Pruner", "OSSCAR", "SlimGPT", "MoDeGPT"),
    ratios: Annotated[tuple[float, ...], Several] = (0.2, 0.3),
    models: Annotated[tuple[Path, ...], Several] = (),
    tokens: int = 100_000,
    windows: int = 192,
    calibration_windows: int = 768,
    samples: int = 64,
) -> None:
    """Makes, fine-tunes and evaluates what OUT does not hold yet.

    Args:
        models: pruned models to be fine-tuned too.
        tokens: of the fine-tuning.
        windows: of each reported text.
        samples: windows that measure LLM-Pruner's metric.
    """
    output.mkdir(parents=True, exist_ok=True)
    made = make_models(output, methods, ratios, calibration_windows, samples)
    unpruned = perplexities_of(output, "smollm2", windows)
    for model in (*models, *made):
        tuned = output / "tuned" / "-".join(model.parts[-2:])
        if not tuned.exists():
            adapruner.recover(model, TEXT, tuned, "smollm2", tokens=tokens, **TRAINING)
        for stage in (model, tuned):
            found = perplexities_of(output, str(stage), windows)
            print(stage, " / ".join(f"{found[name] / unpruned[name]:.3f}" for name in unpruned), flush=True)


def make_models(
    output: Path, methods: tuple[Method, ...], ratios: tuple[float, ...], calibration_windows: int, samples: int
) -> list[Path]:
    """The folders of the pruned models of all methods."""
    location = find_model("smollm2")
    tokenizer, dense = load_tokenizer(location), load_model(location)
    text = evenly_spaced(text_windows(parse_source(TEXT), tokenizer, 128), calibration_windows)
    structure = build_structure(dense)
    # No peer weights tokens by what a norm makes of them.
    structure = replace(structure, blocks=tuple(replace(block, is_normalized=False) for block in structure.blocks))
    setting = Setting(output, dense, structure, text, {}, text[:0], 0)
    makers: dict[Method, Callable[[float], PreTrainedModel]] = {
        "LLM-Pruner": lambda ratio: llm_pruner(setting, ratio, samples),
        **{peer: partial(make, setting) for peer, make in PEERS.items()},
    }
    made = []
    for ratio in ratios:
        for method in methods:
            folder = output / f"{method}-{ratio:g}"
            if not folder.exists():
                save_checkpoint(makers[method](ratio), tokenizer, folder)
            made.append(folder)
    return made


def llm_pruner(setting: Setting, ratio: float, samples: int) -> PreTrainedModel:
    """LLM-Pruner with the Fisher information, its best metric here; nothing is compensated."""
    dense, structure, budget = setting.dense, setting.structure, peer_budget(ratio)
    measured = measure(dense, structure, evenly_spaced(setting.windows, samples))
    scores = score_groups(measured, structure, LLM_PRUNER_METRICS["param_second"])
    return prune_model(dense, structure, make_plan(structure, scores, kept_counts(structure, budget)))


def perplexities_of(output: Path, model: str, windows: int) -> dict[str, float]:
    """The perplexity of a model on each text, measured once."""
    file = output / "results.jsonl"
    found: dict[str, dict[str, float]] = {line["model"]: line["perplexity"] for line in read(file)}
    if model not in found:
        found[model] = perplexities(model, windows)
        append(file, {"model": model, "perplexity": found[model]})
    return found[model]


if __name__ == "__main__":
    run(main)
