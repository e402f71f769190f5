"""Checks for custom importance terms, families, datasets and objectives, and a tiny model to try them on.

Each check raises `AssertionError` with the reason, so it can be called in a test.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import torch
from tokenizers import Tokenizer as Backend, models, pre_tokenizers
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase as Tokenizer,
    PreTrainedTokenizerFast,
)

from adapruner.calibration import fingerprint, parse_source, read_documents
from adapruner.families import learn, resolve
from adapruner.families.proof import failed_parts
from adapruner.families.tiny import random_model, tiny_config
from adapruner.importance import TERMS, MetricPoint, score_groups
from adapruner.measurement import measure, measure_moments, removal_errors
from adapruner.models import Architecture
from adapruner.structure import build_structure

_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
_WORDS = (
    *("the", "a", "of", "and", "to", "in", "is", "was", "with", "from", "river", "city", "music", "game", "king"),
    *("school", "water", "light", "house", "year", "people", "world", "state", "war", "film", "book", "stone"),
)

# Options of a run that takes seconds.
SMALL: dict[str, Any] = {
    "pool": 8,
    "samples": 4,
    "objective_windows": 4,
    "final_windows": 0,
    "compensation_windows": 16,
    "evaluate_windows": 4,
    "seq_len": 16,
    "trials": 5,
    "level_rounds": 0,
    "round_to": 1,
    "tune_scales": False,
}


def tiny_tokenizer() -> Tokenizer:
    """A tokenizer of a few words, each a token."""
    numbers = {word: number for number, word in enumerate((*_SPECIAL, *_WORDS))}
    backend = Backend(models.WordLevel(numbers, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ("pad_token", "bos_token", "eos_token", "unk_token")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **dict(zip(names, _SPECIAL, strict=True)))


def tiny_model(family: str = "llama") -> PreTrainedModel:
    """A random model of a family of transformers, by `model_type`, with a vocabulary for `tiny_tokenizer`."""
    config = tiny_config(AutoConfig.for_model(family))
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, 1, 2
    learn(config)
    return random_model(config)


def tiny_texts(count: int = 200, seed: int = 0) -> list[str]:
    """Documents of 30 words of `tiny_tokenizer`, drawn at random."""
    generator = random.Random(seed)
    return [" ".join(generator.choices(_WORDS, k=30)) for _ in range(count)]


def check_term(name: str, family: str = "llama") -> None:
    """Checks a registered importance term on a tiny model.

    It gives one finite, non-negative number for each vector, input or group, for any number and order of samples; and
    the scores of the groups follow from it.

    Args:
        family: family of the model; `mixtral` for terms that need `routing`.
    """
    term, model = TERMS[name], tiny_model(family)
    structure = build_structure(model)
    windows = torch.randint(3, model.config.vocab_size, (16, 16), generator=torch.Generator().manual_seed(0))
    errors = removal_errors(model, structure, dict(measure_moments(model, structure, windows)))
    statistics = replace(measure(model, structure, windows[:4]), **errors)
    units = {
        "vectors": len(structure.group_of_vector),
        "inputs": len(structure.group_of_input),
        "groups": structure.group_offsets[-1],
    }[term.unit]
    for kind, samples in {
        "all samples": statistics,
        "a single sample": statistics.select([0]),
        "other samples": statistics.select([2, 1]),
    }.items():
        values = term.function(samples)
        assert values.shape == (units,), (
            f"{name} of {kind}: shape {list(values.shape)}, expected [{units}], {term.unit}"
        )
        assert values.isfinite().all(), f"{name} of {kind} is not finite"
        assert (values >= 0).all(), f"{name} of {kind} is negative: larger is more important, 0 is least"
    reordered = term.function(statistics.select([3, 1, 0, 2]))
    assert torch.allclose(reordered, term.function(statistics), rtol=1e-4), (
        f"{name} depends on the order of the samples"
    )
    scores = score_groups(statistics, structure, MetricPoint(weights={name: 1.0}))
    assert scores.unique().numel() > 1, f"{name} gives all groups the same score"


def check_family(config: PreTrainedConfig | str, architecture: Architecture | None = None) -> None:
    """Checks the description of a family on a tiny random model: pruned equals dense with the removed groups masked,
    saved equals loaded, generation is the same with and without a cache, and layer by layer equals at once; for every
    layout that the description allows, channels in experts, and parts that are removed whole.

    Args:
        config: config of a stock model, or its `model_type`.
        architecture: the description; by default the registered or inferred one.
    """
    config = tiny_config(AutoConfig.for_model(config) if isinstance(config, str) else config)
    architecture = architecture or resolve(config)
    wrong = failed_parts(config, architecture)
    assert not wrong, f"{architecture.model_type}: {wrong}"


def check_source(name: str) -> None:
    """Checks a dataset by its name: reading it twice gives the same documents; its three parts are disjoint and
    complete; its content has a fingerprint.

    Args:
        name: known, registered or a file, without a part.
    """
    documents = read_documents(parse_source(name))
    assert documents == read_documents(parse_source(name)), f"{name} gives other documents when it is read again"
    parts = [read_documents(parse_source(f"{name}@{part}")) for part in ("calibration", "objective", "report")]
    assert sum(map(len, parts)) == len(documents), f"the parts of {name} are not complete"
    shared = set(parts[0]) & set(parts[1]) | set(parts[1]) & set(parts[2]) | set(parts[0]) & set(parts[2])
    assert not shared, f"the parts of {name} share {len(shared)} documents"
    assert fingerprint(parse_source(name)), f"the content of {name} has no fingerprint"
