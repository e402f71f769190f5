"""The model card: what was removed, what that cost, and how to load the model."""

import html
import mmap
import re
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from transformers import PreTrainedConfig
from transformers.utils.hub import cached_file

from adapruner.base.files import parse_yaml
from adapruner.budget.plan import PruningPlan
from adapruner.model.architecture import is_pruned
from adapruner.model.config import find_wrapper, load_config
from adapruner.model.places import ModelLocation, quiet_transformers
from adapruner.model.stored import has_multi_token_head
from adapruner.report.result import Number, RunResult, measured_table, shown_name
from adapruner.tokens.model import VocabularySummary
from adapruner.train.training import RecoveryRecord

# Longer cards, metadata and licences are cut off.
_LONGEST_CARD = 2**20
_LONGEST_METADATA = 2**16
_LONGEST_LICENCE = 200
_LONGEST_GGUF_METADATA = 2**26
# Length of the key, key, type (a string), length of the value, value.
_GGUF_LICENCE = re.compile(rb"\x0f\0\0\0\0\0\0\0general\.license\x08\0\0\0(.{8})(.{,200})", re.DOTALL)
_LOADING = "## Loading\n\n"
_TRAINED = {"lora": "LoRA, merged", "ia3": "IA3, merged", "layers": "all weights of the layers", "full": "all weights"}
_NOT_TRAINED = "It was not fine-tuned."
_HEALED = "It was trained to predict as the dense model does"
# With fewer items, chance changes accuracies more than models do: they are in the table, but not in the metadata.
_FEWEST_ITEMS = 100


def model_card(location: ModelLocation, config: PreTrainedConfig, plan: PruningPlan, result: RunResult) -> str:
    """The README.md of a pruned checkpoint, with the metadata that the Hugging Face Hub reads. Local folders are named
    without their path.

    Args:
        location: of the base model.
        config: of the pruned model.
    """
    model, dense = result.final, result.model("dense")
    base = shown_name(result.config.model)
    numbers = {"dense": dense.numbers, "this model": model.numbers}
    search = result.search
    weights = search.best.point.weights if search else {"tempered_elimination": 1.0}
    chosen = f"search: {search.trials} trials, seed {result.config.seed}" if search else "no search"
    if result.costs:
        chosen += "; what costs the least divergence is removed first, in whatever layer"
    trained, healing = _NOT_TRAINED, result.healing
    if healing and healing.record:
        kinds = ", ".join(f"`{_escaped(_public(name))}`" for name in healing.record.parts)
        trained = f"{_HEALED}, on {healing.record.tokens:,} tokens of {kinds}: {_TRAINED[healing.trained]}."
    return _render(
        location,
        config,
        result.config.model,
        f"{base}, {result.removed_share:.0%} pruned",
        [
            _as_metadata(number)
            for number in model.numbers.values()
            if number.kind in ("text", "ability") or (number.kind == "task" and (number.items or 0) >= _FEWEST_ITEMS)
        ],
        base=base,
        removed=dense.parameters - model.parameters,
        parameters=round(dense.parameters / result.share_of_decoder),
        parts=_what_was_removed(plan) + ", tokens" * bool(result.vocabulary),
        trained=trained,
        plan=plan,
        model=model,
        is_read_by_layer=not model.abilities.writes,
        cost=measured_table(numbers, "text", "ability", "task"),
        options=result.config,
        vocabulary=result.vocabulary,
        texts=result.config.vocabulary,
        chosen=chosen,
        terms=[(name, weight) for name, weight in Counter(weights).most_common(3) if weight],
        versions=result.versions,
    )


def vocabulary_card(
    location: ModelLocation, config: PreTrainedConfig, base: str, summary: VocabularySummary, texts: Iterable[str]
) -> str:
    """The README.md of a model from which only tokens were removed.

    Args:
        location: of the base model.
        config: of the smaller model.
        base: the name of the base model.
        texts: the datasets whose tokens were kept.
    """
    return _render(
        location,
        config,
        base,
        f"{base}, fewer tokens",
        [],
        base=base,
        removed=summary.removed_parameters,
        parameters=summary.parameters_before,
        parts="rows of the embedding and the output layer",
        trained=_NOT_TRAINED,
        vocabulary=summary,
        texts=texts,
        plan=None,
    )


def _render(
    location: ModelLocation,
    config: PreTrainedConfig,
    base_model: str,
    name: str,
    results: list[EvalResult],
    **content: object,
) -> str:
    licence, wrapper = base_licence(location) or {}, find_wrapper(location)
    model_type = wrapper.config.model_type if wrapper else config.model_type
    metadata = ModelCardData(
        license=licence.get("license", "other"),
        license_name=licence.get("license_name"),
        license_link=licence.get("license_link"),
        base_model=None if location.is_local else base_model,
        library_name="transformers",
        pipeline_tag="image-text-to-text" if wrapper else "text-generation",
        tags=["adapruner", "pruned", model_type],
        model_name=name,
        eval_results=results or None,
    )
    page = _TEMPLATES.get_template("card.md.jinja").render(
        content,
        metadata=metadata.to_yaml(),
        licence=licence,
        had_multi_token_head=has_multi_token_head(location, load_config(location)),
        needs_code=is_pruned(config),
        model_type=model_type,
        is_multimodal=wrapper is not None,
        transformers=version("transformers"),
    )
    return f"{page}\n"


def _what_was_removed(plan: PruningPlan) -> str:
    """The kinds of removed parts, separated by commas."""
    removed = list[str]()
    cut = [block for block in plan.blocks if len(block.kept) < block.groups]
    for kind, groups in (("heads", "attention heads"), ("experts", "experts"), ("channels", "feed-forward channels")):
        removed += [groups] * any(block.kind == kind and block.kept for block in cut)
        removed += ["whole attention layers"] * any(block.kind == kind and not block.kept for block in cut)
    return ", ".join(removed)


def _as_metadata(number: Number) -> EvalResult:
    dataset, protocol = _public(number.dataset), _public(number.protocol)
    return EvalResult(
        task_type="text-generation",
        # Without configuration, split and part.
        dataset_type=dataset.removeprefix("hf:").partition("@")[0].partition(":")[0],
        dataset_name=dataset,
        metric_type=number.metric,
        metric_value=round(number.value, max(number.digits, 3)),
        metric_name=protocol if number.error is None else f"{protocol}, standard error {number.error:.4f}",
    )


def read_card(location: ModelLocation) -> str:
    """The README.md of a model, up to its first MiB; empty if there is none, or it cannot be read."""
    try:
        with quiet_transformers():
            path = None if location.gguf_file else cached_file(location.path, "README.md")
        if path is None:
            return ""
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(_LONGEST_CARD)
    except (OSError, ValueError):  # no such card, or no network
        return ""


def card_of_export(card: str) -> str | None:
    """The card of a pruned model for the same model as a DeciLM; None if this package did not write the card."""
    before, heading, rest = card.partition(_LOADING)
    if not heading:
        return None
    _, next_heading, after = rest.partition("\n## ")
    loading = _TEMPLATES.get_template("loading_decilm.md.jinja").render()
    return f"{before}{heading}{loading}\n{next_heading}{after}"


def base_licence(location: ModelLocation) -> dict[str, str] | None:
    """The licence of the base model, in the fields of a model card: from the metadata of a GGUF file or from its card;
    None if it names none or cannot be read. Whatever the files contain, this is quick and raises nothing."""
    if location.gguf_file:
        fields: dict[object, object] = {"license": _gguf_licence(Path(location.path) / location.gguf_file)}
    else:
        front = re.match(r"\s*---[ \t]*\n(.*?)^---", read_card(location)[:_LONGEST_METADATA], re.DOTALL | re.MULTILINE)
        try:
            metadata = parse_yaml(front[1]) if front else None
        except ValueError:
            metadata = None
        fields = metadata if isinstance(metadata, dict) else {}
    texts = {name: fields.get(name) for name in ("license", "license_name", "license_link")}
    return {name: text[:_LONGEST_LICENCE] for name, text in texts.items() if isinstance(text, str)} or None


def _gguf_licence(path: Path) -> str | None:
    """`general.license`. Readers of whole files take seconds for the tokens."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            entry = _GGUF_LICENCE.search(content, 0, _LONGEST_GGUF_METADATA)
            return entry[2][: int.from_bytes(entry[1], "little")].decode() if entry else None
    except (OSError, ValueError):
        return None


def trained_sentence(record: RecoveryRecord) -> str:
    """The fine-tuning in one sentence."""
    how = _TRAINED[record.config["train"]]
    learnt = "the predictions of the dense model" if record.method == "distillation" else "the text itself"
    names = [f"`{_escaped(_public(name))}`" for name in record.parts or [record.config["data"]]]
    return (
        f"It was fine-tuned on {', '.join(names)}: {record.steps:,} steps,"
        f" {record.tokens:,} tokens, {how}, learning {learnt}."
    )


def card_of_recovered(card: str, record: RecoveryRecord) -> str | None:
    """The card of a pruned model for the same model after recovery; None if this package did not write the card. Its
    numbers are removed: they were measured before."""
    ends = "|".join(map(re.escape, _TRAINED.values()))
    trained = rf"{re.escape(_HEALED)}.*?: (?:{ends})\.|It was fine-tuned on .*?, learning [a-z ]+\."
    *_, earlier = [None, *re.finditer(rf"{re.escape(_NOT_TRAINED)}|{trained}", card)]
    if earlier is None:
        return None
    sentences = [text for text in (earlier[0], trained_sentence(record)) if text != _NOT_TRAINED]
    card = card.replace(earlier[0], " ".join(sentences))
    before, heading, rest = card.partition("## What it cost\n\n")
    after = rest.partition("\n## ")[2]
    # The card of a model from which only tokens were removed has no such section.
    card = f"{before}{heading}Not measured after fine-tuning.\n\n## {after}" if heading else card
    return re.sub(r"(?m)^model-index:\n(?:(?!---)[ -].*\n)+", "", card)


def _public(text: str) -> str:
    """A text without the folders of its paths, which are private."""
    return re.sub(r"(?<![^\s,])((?:answers:|hf:)?)(?:\.{0,2}|~)/(?:[^\s,/]+/)*", r"\1", text)


def _escaped(text: str) -> str:
    """A text of the user for Markdown that is shown as HTML: on one line, and without links, emphasis and tables."""
    return "".join(f"&#{ord(sign)};" if sign in "|`[]*\\" else sign for sign in html.escape(" ".join(text.split())))


def _shown(value: object) -> str:
    """A value in a template: escaped and without the folders of paths, unless it is marked as safe."""
    return value if isinstance(value, Markup) else _escaped(_public(str(value)))


_TEMPLATES = Environment(
    loader=PackageLoader("adapruner.report"), undefined=StrictUndefined, finalize=_shown, trim_blocks=True
)
_TEMPLATES.filters["markdown"] = lambda table: Markup(table.markdown(_shown))
