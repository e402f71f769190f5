"""The model card: what was removed, what it cost, and how to load what is left."""

from __future__ import annotations

import html
import mmap
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCardData
from transformers import PreTrainedConfig
from transformers.utils.hub import cached_file

from adapruner.evaluation import AGREEMENT_PROTOCOL, REPETITION_PROTOCOL
from adapruner.models import ModelLocation, is_pruned, quiet_transformers
from adapruner.plain_yaml import PlainLoader
from adapruner.planning import PruningPlan
from adapruner.recovery import RecoveryRecord
from adapruner.result import ModelNumbers, Role, RunResult, shown_name
from adapruner.search import MovedChannels
from adapruner.tokens import VocabularySummary

# The rest of a longer card is not read, nor a longer licence shown.
_LONGEST_CARD = 2**20
_LONGEST_METADATA = 2**16
_LONGEST_LICENCE = 200
_LONGEST_GGUF_METADATA = 2**26
# Length of the key, key, type (a string), length of the value, value.
_GGUF_LICENCE = re.compile(rb"\x0f\0\0\0\0\0\0\0general\.license\x08\0\0\0(.{8})(.{,200})", re.DOTALL)
_LOADING = "## Loading\n\n"
_NOT_TRAINED = "It was not fine-tuned."
_MOST_SCRIPTS = 12
# On fewer items, accuracies differ by chance more than models do: they are in the table, and not in the metadata.
_FEWEST_ITEMS = 100


def model_card(
    location: ModelLocation,
    config: PreTrainedConfig,
    plan: PruningPlan,
    result: RunResult,
    of: Role = "searched",
) -> str:
    """The README.md of a pruned checkpoint, with the metadata that the Hugging Face Hub reads. Folders of this machine
    are named without their path.

    Args:
        location: of the base model.
        config: of the pruned model.
        of: which of the models of the run.
    """
    base, licence = shown_name(result.config.model), base_licence(location) or {}
    numbers = list(_numbers(result.model(of)))
    metadata = ModelCardData(
        **_licence_fields(licence),
        base_model=None if location.is_local else result.config.model,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["adapruner", "pruned", config.model_type],
        model_name=f"{base}, {result.removed_share:.0%} pruned",
        eval_results=[number.as_metadata() for number in numbers if number.is_comparable] or None,
    )
    trained = trained_sentence(result.recovery) if of == "recovered" and result.recovery else _NOT_TRAINED
    before, after = result.model("dense").parameters, result.model("searched").parameters
    sections = [
        f"# {_escaped(base)}, {result.removed_share:.1%} pruned",
        f"{before - after:,} of the {before:,} parameters of `{_escaped(base)}` were removed:"
        f" {_what_was_removed(plan, result)}. {trained}",
        *([_tokens_removed(result.vocabulary, result.config.vocabulary)] if result.vocabulary else []),
        "## What was removed\n\n" + _removed(plan),
        "## What it cost\n\n" + _verdict(result.model(of)) + _cost(_numbers(result.model("dense")), numbers),
        "## How it was made\n\n" + _made(plan, result),
        _LOADING + _loading(config),
        _licence_section(licence),
    ]
    return f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def _what_was_removed(plan: PruningPlan, result: RunResult) -> str:
    """The kinds of what was removed, with commas between them."""
    removed = ["tokens"] if result.vocabulary else []
    for kind, groups, whole in (
        ("heads", "attention heads", "whole attentions"),
        ("experts", "experts", "whole mixtures of experts"),
        ("channels", "feed-forward channels", "whole feed-forwards"),
    ):
        cut = [block for block in plan.blocks if block.kind == kind and len(block.kept) < block.groups]
        removed += [groups] * any(block.kept for block in cut) + [whole] * any(not block.kept for block in cut)
    return ", ".join(removed)


def vocabulary_card(
    location: ModelLocation, config: PreTrainedConfig, base: str, summary: VocabularySummary, texts: Iterable[str]
) -> str:
    """The README.md of a model of which tokens were removed and nothing else.

    Args:
        location: of the base model.
        config: of the smaller model.
        base: what the base model is called.
        texts: whose tokens were kept.
    """
    licence = base_licence(location) or {}
    metadata = ModelCardData(
        **_licence_fields(licence),
        base_model=None if location.is_local else base,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["adapruner", "pruned", config.model_type],
        model_name=f"{base}, fewer tokens",
    )
    share = summary.removed_parameters / summary.parameters_before
    sections = [
        f"# {_escaped(base)}, fewer tokens",
        f"{summary.removed_parameters:,} of the {summary.parameters_before:,} parameters ({share:.1%}) of"
        f" `{_escaped(base)}` were removed: rows of the embedding and the output layer. {_NOT_TRAINED}",
        _tokens_removed(summary, texts),
        _LOADING + _loading(config),
        _licence_section(licence),
    ]
    return f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def _tokens_removed(summary: VocabularySummary, texts: Iterable[str]) -> str:
    """Which languages are gone, and a table of the scripts."""
    lines = [
        "# ⚠ OTHER LANGUAGES THAN THOSE OF THE TEXT BELOW ARE GONE",
        "",
        "The model can still spell them byte by byte, and was not trained to.",
        "",
        f"- {summary.sentence}",
        f"- text: {', '.join(f'`{_escaped(_public(text))}`' for text in texts)}",
        "",
        "| script | tokens before | tokens kept |",
        "|---|---|---|",
    ]
    for script, (before, after) in list(summary.scripts.items())[:_MOST_SCRIPTS]:
        lines.append(f"| {_escaped(script)} | {before:,} | {after:,} |")
    return "\n".join(lines)


def _licence_fields(licence: dict[str, str]) -> dict[str, Any]:
    return {
        "license": licence.get("license", "other"),
        "license_name": licence.get("license_name"),
        "license_link": licence.get("license_link"),
    }


def _licence_section(licence: dict[str, str]) -> str:
    named = licence.get("license_name") or licence.get("license")
    return f"## Licence\n\nThat of the base model: {_escaped(named) if named else 'see there, it could not be read'}."


class _Number(NamedTuple):
    """A number that was measured of a model; the dataset is a text or a task.

    Attributes:
        error: standard error of the value.
        is_comparable: whether it was measured on enough items to compare models by it.
    """

    dataset: str
    metric: str
    value: float
    digits: int
    protocol: str
    error: float | None = None
    is_comparable: bool = True

    def __str__(self) -> str:
        error = "" if self.error is None else f" ± {self.error:.{self.digits}f}"
        return f"{self.value:.{self.digits}f}{error}"

    def as_metadata(self) -> EvalResult:
        return EvalResult(
            task_type="text-generation",
            # Without configuration, split and part.
            dataset_type=self.dataset.removeprefix("hf:").partition("@")[0].partition(":")[0],
            dataset_name=self.dataset,
            metric_type=self.metric,
            metric_value=round(self.value, max(self.digits, 3)),
            metric_name=self.protocol if self.error is None else f"{self.protocol}, standard error {self.error:.4f}",
        )


def _numbers(model: ModelNumbers) -> Iterator[_Number]:
    for text, perplexity in model.perplexity.items():
        protocol = _public(perplexity.protocol)
        yield _Number(_public(text), "perplexity", perplexity.perplexity, 2, protocol)
        if perplexity.bits_per_byte is not None:
            yield _Number(_public(text), "bits per byte", perplexity.bits_per_byte, 4, protocol)
    if model.breakage:
        for text, perplexity in model.breakage.texts.items():
            if perplexity.bits_per_byte is not None:
                yield _Number(text, "bits per byte", perplexity.bits_per_byte, 4, perplexity.protocol)
        if model.breakage.agreement is not None:
            yield _Number("openings", "agreement", model.breakage.agreement, 2, AGREEMENT_PROTOCOL)
        if model.breakage.repetition is not None:
            yield _Number("openings", "repetition", model.breakage.repetition, 2, REPETITION_PROTOCOL)
    for task, score in model.tasks.items():
        for metric, value in score.metrics.items():
            error, is_comparable = score.standard_errors.get(metric), score.items >= _FEWEST_ITEMS
            yield _Number(task, metric, value, 4, _public(score.protocol), error, is_comparable)


def read_card(location: ModelLocation) -> str:
    """The README.md of a model, up to its first MiB; empty where there is none, or it cannot be read."""
    try:
        with quiet_transformers():
            found = None if location.gguf_file else cached_file(location.path, "README.md")
        if found is None:
            return ""
        with open(found, encoding="utf-8", errors="replace") as file:
            return file.read(_LONGEST_CARD)
    except (OSError, ValueError):  # no such card, or no network
        return ""


def card_of_export(card: str, config: PreTrainedConfig) -> str | None:
    """The card of a pruned model for the same model in another form; None if the card is not one of ours.

    Args:
        config: of the exported model.
    """
    before, heading, rest = card.partition(_LOADING)
    if not heading:
        return None
    _, next_heading, after = rest.partition("\n## ")
    return before + heading + _loading(config) + "\n" + next_heading + after


def base_licence(location: ModelLocation) -> dict[str, str] | None:
    """What the base model says of its licence, in the fields of a model card: from the metadata of a GGUF file or from
    its card; None where it is silent or cannot be asked. Whatever is in the files, it is quick and raises nothing."""
    if location.gguf_file:
        fields: dict[Any, Any] = {"license": _gguf_licence(Path(location.path) / location.gguf_file)}
    else:
        fields = _metadata(read_card(location))
    texts = {name: fields.get(name) for name in ("license", "license_name", "license_link")}
    return {name: text[:_LONGEST_LICENCE] for name, text in texts.items() if isinstance(text, str)} or None


def _metadata(card: str) -> dict[Any, Any]:
    """The front matter of a card."""
    front = re.match(r"\s*---[ \t]*\n(.*?)^---", card[:_LONGEST_METADATA], re.DOTALL | re.MULTILINE)
    try:
        metadata = yaml.load(front[1], PlainLoader) if front else None
    except (yaml.YAMLError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RecursionError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def _gguf_licence(path: Path) -> str | None:
    """`general.license`, without a reader of whole files, which takes seconds for the tokens."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            found = _GGUF_LICENCE.search(content, 0, _LONGEST_GGUF_METADATA)
            return found[2][: int.from_bytes(found[1], "little")].decode() if found else None
    except (OSError, ValueError):
        return None


def _removed(plan: PruningPlan) -> str:
    """A table with a row for each stretch of layers that are alike."""
    titles = " | ".join(f"{plan.name_of(kind)} kept" for kind in plan.kinds)
    lines = [f"| layers | {titles} |", "|---" * (1 + len(plan.kinds)) + "|"]
    kept = {
        layer: " | ".join(own[kind].kept_of_all if kind in own else "–" for kind in plan.kinds)
        for layer, own in plan.by_layer.items()
    }
    for numbers, layers in groupby(kept, kept.__getitem__):
        first, *others = layers
        lines.append(f"| {'–'.join(map(str, (first, *others[-1:])))} | {numbers} |")
    if plan.note:
        lines += ["", f"{plan.note[0].upper()}{plan.note[1:]}."]
    return "\n".join(lines)


def trained_sentence(record: RecoveryRecord) -> str:
    """What was done after the pruning."""
    how = {"lora": "LoRA, merged", "ia3": "IA3, merged", "full": "all weights"}[record.config["train"]]
    learnt = "the predictions of the dense model" if record.method == "distillation" else "the text itself"
    return (
        f"It was fine-tuned on `{_escaped(_public(record.config['data']))}`: {record.steps:,} steps,"
        f" {record.tokens:,} tokens, {how}, learning {learnt}."
    )


def card_of_recovered(card: str, record: RecoveryRecord) -> str | None:
    """The card of a pruned model for the same model after recovery; None if the card is not one of ours. Its numbers
    are those from before and go."""
    if _NOT_TRAINED not in card:
        return None
    card = card.replace(_NOT_TRAINED, trained_sentence(record))
    before, heading, rest = card.partition("## What it cost\n\n")
    after = rest.partition("\n## ")[2]
    # That of a model of which tokens alone were removed says nothing of costs.
    card = f"{before}{heading}Not measured after fine-tuning.\n\n## {after}" if heading else card
    return re.sub(r"(?m)^model-index:\n(?:(?!---)[ -].*\n)+", "", card)


def _verdict(model: ModelNumbers) -> str:
    return f"Verdict of the signs of breakage below: **{model.verdict}**.\n\n" if model.verdict else ""


def _cost(dense: Iterable[_Number], pruned: list[_Number]) -> str:
    lines = ["| measured | dense | this model | protocol |", "|---|---|---|---|"]
    for before, after in zip(dense, pruned, strict=True):
        is_of_text = after.metric in ("perplexity", "bits per byte", "agreement", "repetition")
        what = f"{after.metric} on {after.dataset}" if is_of_text else f"{after.dataset}, {after.metric}"
        lines.append(f"| {_escaped(what)} | {before} | {after} | {_escaped(after.protocol)} |")
    return "\n".join(lines) if pruned else "Not measured."


def _made(plan: PruningPlan, result: RunResult) -> str:
    config, search, versions = result.config, result.search, result.versions
    terms = Counter(search.best.point.weights).most_common(3)
    mix = ", ".join(f"{name} {weight:.2f}" for name, weight in terms if weight)
    is_tuned = any(model.role == "compensated" for model in result.models)
    return "\n".join(
        [
            f"- calibration text: {_escaped(_public(config.calibration))}; objective:"
            f" {_escaped(config.objective_function or f'{_public(config.objective_dataset)}, other documents')}",
            f"- search: {search.trials} trials, seed {config.seed}; importance {mix}{_levelled(result)}",
            f"- compensation: {config.compensation}{', scales tuned' * is_tuned}; layout: {config.layout}",
            f"- plan: `{plan.hash[:12]}`",
            f"- adapruner {versions['adapruner']}, transformers {versions['transformers']}, torch {versions['torch']}",
        ]
    )


def _levelled(result: RunResult) -> str:
    moves = [one for one in result.levelled.moves if one.accepted] if result.levelled else []
    rounds = sum(isinstance(one, MovedChannels) for one in moves)
    widths = f"; widths levelled in {rounds} round{'s'[: rounds != 1]}" if rounds else ""
    return f"{widths}; numbers of heads levelled" if len(moves) > rounds else widths


def _loading(config: PreTrainedConfig) -> str:
    written = f"Written by transformers {version('transformers')}"
    if is_pruned(config):
        remote = ", trust_remote_code=True"
        why = f"Layers differ, so the folder contains a modelling file. {written}; versions before 5.14 cannot read it."
        others = (
            "vLLM: `--trust-remote-code`, if every layer has an attention; other loaders:"
            " `adapruner export FOLDER --to stock -o PADDED`"
        )
    else:
        remote = ""
        why = f"A stock `{config.model_type}` without code of its own. {written}."
        others = "vLLM and others: as they read the family (not tried)"
    return f"""{why}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER{remote})
tokenizer = AutoTokenizer.from_pretrained(FOLDER{remote})
```

- with adapruner: `adapruner.load(FOLDER)`, no remote code
- llama.cpp: `adapruner export FOLDER --to gguf -o model.gguf` (families of the Llama kind)
- {others}"""


def _public(text: str) -> str:
    """Without the folders of paths, which are nobody's business."""
    return re.sub(r"(?<!\S)(?:\.{0,2}|~)/(?:[^\s/]+/)*", "", text)


def _escaped(text: str) -> str:
    """Text of the user's for Markdown that is shown as HTML: on one line, and without links, emphasis and tables."""
    return "".join(f"&#{ord(sign)};" if sign in "|`[]*\\" else sign for sign in html.escape(" ".join(text.split())))
