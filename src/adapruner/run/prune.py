"""Pruning a model, from top to bottom; a preview of that, and the memory that it would need."""

from dataclasses import dataclass
from pathlib import Path

import torch
from gguf import GGUFWriter
from pydantic import BaseModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from adapruner.base.errors import AdaPrunerError, describe_failure
from adapruner.base.files import given_path
from adapruner.base.processes import this_process
from adapruner.base.progress import Reporter
from adapruner.budget.counts import kept_counts
from adapruner.evaluation.tasks import check_tasks
from adapruner.formats.gguf_tokenizer import add_tokenizer
from adapruner.graph.making import Making
from adapruner.model.loading import computing_repeatably, empty_model, is_streamable, resolve_devices
from adapruner.options import PruneConfig, PruneOptions, size_in_bytes
from adapruner.run import choice, inputs, models, models as evaluation
from adapruner.run.folder import PruneResult, RunFolder
from adapruner.run.given import TextData
from adapruner.run.memory import Memory, Placement, bytes_in_files, choose_placement, estimate_memory
from adapruner.run.models import GRAPH
from adapruner.run.options import earlier_run, resolve
from adapruner.structure.blocks import count_parameters


@torch.inference_mode(False)  # measuring and training need gradients, whatever the caller does
def prune(
    model: str | Path | PreTrainedModel | None = None,
    calibration: TextData | None = None,
    *,
    output: str | Path | None = None,
    tokenizer: Tokenizer | None = None,
    config: PruneOptions | None = None,
    recipe: str | Path | None = None,
    from_: str | Path | None = None,
    overwrite: bool = False,
    **options: object,
) -> PruneResult:
    """Prunes a causal language model: measures, searches, cuts, heals, saves and evaluates.

    Called again with the same output, it loads what an earlier call made from the same model, text and options, and
    makes the rest.

    Args:
        model: Hub id, model folder, `.gguf` file, `smollm2`, or a model in memory with its `tokenizer`, which is not
            changed, and written to the run folder first; None takes the model of the recipe, the config or the earlier
            run.
        calibration: the calibration text, by default `mix`: names with shares; documents, as an iterable of strings or
            the rows of a `datasets.Dataset` with a column of text; or windows of tokens, [windows, tokens], int64.
        output: the run folder; the pruned model is in its `model/`. By default a temporary one that is
            removed with the result: save the model elsewhere if you want to keep it.
        tokenizer: of a model in memory.
        config: options to start from: a `PruneConfig` or `PruneOptions`; keyword arguments override them.
        recipe: the same, by the name of a shipped recipe or a YAML file.
        from_: folder of an earlier run. Its options are those to start from, and what it made is taken over as far as
            it depends on the same options; its search also if only the ratio differs.
        overwrite: rebuild what was made with other options, from another model or other text.
        options: the fields of `PruneOptions`, and of `SizeLimit` instead of a ratio.

    Raises:
        AdaPrunerError: an option, the model, the text or the folder is invalid; before any long work.
    """
    run = RunFolder.temporary() if output is None else RunFolder(given_path(output))
    earlier = earlier_run(from_, run)
    resolved = resolve({"model": model, "calibration": calibration, **options}, tokenizer, run, recipe, config, earlier)
    if (count := this_process().count) > 1:
        raise AdaPrunerError(
            f"pruning runs in one process, and {count} were started: prune with one, then train the pruned model with"
            " several by adapruner recover"
        )
    run.check_usable()
    reporter = Reporter()
    with computing_repeatably(resolve_devices(resolved.device)[0]):
        making = making_of(resolved, run, reporter, earlier)
        check(making, overwrite)
        with run.locked():
            run.check_usable()
            if not overwrite:
                making.refuse_outdated()
            reporter.log = run.log
            run.save_config(making.given["config"])
            run.remove_given_but(resolved)
            try:
                making.make_missing()
            except (MemoryError, RuntimeError, OSError) as error:
                needs_less = "`dtype` bfloat16 and a smaller `pool` need less memory, in another run"
                if not making.value(inputs.placement).layer_wise and making.value(inputs.location).gguf_file is None:
                    needs_less = "`layer_wise` needs less memory; with `overwrite`, it rebuilds what was made without"
                failure = describe_failure(error, needs_less)
                if failure is None:
                    raise
                kept = f"Finished artifacts are kept in {run.path}: rerun the same command to resume"
                resumes = kept if output else "Nothing is kept without `output`"
                raise AdaPrunerError(f"{reporter.current}: {failure}. {resumes}") from error
            return PruneResult(run.path, making.value(choice.plan), making.value(evaluation.result), run)


def making_of(config: PruneConfig, run: RunFolder, reporter: Reporter, earlier: RunFolder | None = None) -> Making:
    """What makes a run.

    Args:
        earlier: a run whose artifacts are taken over: those with the same key, and its search if only the ratio
            differs.
    """
    given = {
        "config": config,
        "reporter": reporter,
        "run_folder": run,
        "stage_costs": lambda: reporter.finished_stages([making.record(node).key for node in making.wanted]),
    }
    making: Making = Making(
        graph=GRAPH,
        options=dict(config),
        as_json=config.model_dump(mode="json"),
        given=given,
        folder=run,
        reporter=reporter,
        others=() if earlier is None else (earlier,),
    )
    if earlier and (then := earlier.record(choice.search_result.path)):
        now = making.record(choice.search_result)
        at_ratio = now.model_copy(update={"options": now.options | {"ratio": then.options.get("ratio")}})
        if now.key != then.key == at_ratio.key and earlier.is_made(then.name, then.key):
            making.taken = {then.name: then.model_copy(update={"files": None})}
            given["config"] = config.model_copy(update={"searched": then.options["ratio"]})
    return making


def check(making: Making, overwrite: bool) -> None:
    """Refuses what would fail later."""
    if not overwrite:
        making.refuse_outdated()
    if tasks := making.options["tasks"]:
        check_tasks(tasks)
    if "llama.cpp" in making.options["for_"]:
        vocab_size = making.value(inputs.model_config).vocab_size
        add_tokenizer(GGUFWriter(None, ""), making.value(inputs.tokenizer), vocab_size)
    making.prepare(making.missing())


_FLOAT32, _MIB = 4, 2**20


class Preview(BaseModel, frozen=True):
    """A preview of a run.

    Attributes:
        missing: the artifacts that would be made, in this order.
        parameters_before, parameters_after: of the given and of the pruned model. Where costs decide what is removed,
            the result may differ from the latter; both meet the ratio within 0.5 percentage points.
        model_bytes: of the weights of the pruned model.
        moments_bytes: of the second moments, which the run folder keeps; 0 if they are not to be made.
        layer_wise: whether one decoder layer at a time would be in memory.
        memory: None if the pruned model is not missing, or its memory cannot be estimated.
    """

    ratio: float
    missing: list[str]
    parameters_before: int
    parameters_after: int
    model_bytes: int
    moments_bytes: int
    device: str
    layer_wise: bool
    memory: Memory | None


def preview(
    model: str | None,
    *,
    output: str | Path,
    recipe: str | Path | None = None,
    from_: str | Path | None = None,
    overwrite: bool = False,
    **options: object,
) -> Preview:
    """A preview of `prune` with the same arguments, all of them names, after the same checks, from shapes and text: no
    weights are read, and nothing is written.

    Raises:
        AdaPrunerError: what the run would be refused for.
    """
    run = RunFolder(given_path(output))
    run.check_usable()
    earlier = earlier_run(from_, run)
    config = resolve({"model": model, **options}, None, run, recipe, None, earlier)
    making = making_of(config, run, Reporter(), earlier)
    check(making, overwrite)
    missing, placement, structure = making.missing(), making.value(inputs.placement), making.value(inputs.structure)
    counts = kept_counts(structure, making.value(inputs.starting_budget))
    after = structure.total_parameters - structure.removed_parameters(counts)
    of_files = config, making.value(inputs.location), making.value(inputs.empty), structure, counts
    model_bytes, itemsize = bytes_in_files(*of_files)[1], making.value(inputs.precision).weights.itemsize
    if tokens_left := making.value(inputs.tokens_left):
        after -= tokens_left.summary.removed_parameters
        model_bytes -= tokens_left.summary.removed_parameters * itemsize
    read = [structure.blocks[number] for number in making.value(choice.blocks_to_read)]
    moments = sum(block.inputs * block.inputs_of_one for block in read)
    return Preview(
        ratio=config.ratio,
        missing=[node.path for node in missing],
        parameters_before=count_parameters(empty_model(making.value(inputs.model_config))),
        parameters_after=after,
        model_bytes=model_bytes,
        moments_bytes=moments * _FLOAT32 * (choice.moments in missing),
        device=placement.device,
        layer_wise=placement.layer_wise,
        memory=placement.memory if models.pruned in missing else None,
    )


@dataclass(frozen=True)
class Estimate:
    """The memory of a run, and where the layers of its model are.

    Attributes:
        fits: None for a GPU that is not here and whose memory is not stated.
        refusal: why a model that does not fit is refused.
    """

    placement: Placement
    memory: Memory
    fits: bool | None
    refusal: str = ""


def estimate(model: str | Path, gpu_memory: str | None = None, **options: object) -> Estimate:
    """The memory that `prune` would need with these options, from shapes: no weights are read, and no text
    but that of `vocabulary`.

    Args:
        gpu_memory: of the GPUs that the run would have instead of this machine, as 24GB or 4x80GB.
        options: the fields of `PruneOptions`; `device` may be `cuda` where there is none.

    Raises:
        AdaPrunerError: there is no such model, or an option will not do.
    """
    stated, gpus = _gpus(gpu_memory) if gpu_memory else (None, (torch.device("cuda"),))
    run = RunFolder.temporary()
    config = resolve({"model": str(model), **options}, None, run, None, None)
    if gpu_memory and config.device not in ("auto", "cuda"):
        raise AdaPrunerError("`gpu_memory` is that of GPUs: leave `device` out")
    known: dict[str, object] = {}
    if gpu_memory or (config.device == "cuda" and not torch.cuda.is_available()):
        known = {"main_device": gpus[0], "placement": Placement(gpus[:1], bool(config.layer_wise))}
    counted = making_of(config, run, Reporter()).value(inputs.tokens_left)

    def placed(config: PruneConfig) -> tuple[Memory, Placement]:
        making = making_of(config, run, Reporter())
        making.values |= known | {"tokens_left": counted}
        empty, structure = making.value(inputs.empty), making.value(inputs.structure)
        of_model = config, empty, structure, making.value(inputs.starting_budget)
        location = making.value(inputs.location)
        if stated is None:
            placement = making.value(inputs.placement)
        else:
            streamable = is_streamable(location, empty.config)
            placement = choose_placement(*of_model, gpus, streamable, stated, location)
        return estimate_memory(*of_model, placement.devices, placement.layer_wise, stated, location), placement

    refusal = ""
    try:
        needed, placement = placed(config)
    except AdaPrunerError as error:
        # Refused for another reason than memory, it is refused again.
        needed, placement = placed(config.model_copy(update={"ignore_memory": True}))
        refusal = str(error)
    return Estimate(placement, needed, None if known and stated is None else not refusal, refusal)


def _gpus(memory: str) -> tuple[int, tuple[torch.device, ...]]:
    """Bytes of one of several equal GPUs, and the GPUs, of a text such as 24GB or 4x80GB."""
    count, _, size = memory.rpartition("x")
    try:
        stated, number = size_in_bytes(size), int(count or 1)
    except ValueError:
        stated = number = 0
    if stated < _MIB or number < 1:  # without a unit, bytes
        raise AdaPrunerError(f"`gpu_memory` {memory!r} is not the memory of GPUs: expected one such as 24GB or 4x80GB")
    return stated, tuple(torch.device("cuda", n) for n in range(number))
