"""The verbs that load a model: recover, evaluate, benchmark, export, vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from pydantic_core import to_jsonable_python

from adapruner.base.tables import Column, Table
from adapruner.cli.shared import (
    Device,
    Dtype,
    Flag,
    Json,
    Model,
    Names,
    Output,
    RecoveryOptions,
    WholeNumber,
    given,
    print_advice,
    print_output,
    starting,
)
from adapruner.options import GgufType

if TYPE_CHECKING:
    from adapruner.evaluation.speed import Speed
    from adapruner.run.evaluate import Evaluation


def recover(
    model: Model,
    /,
    *,
    data: str | None = None,
    output: Output | None = None,
    teacher: str | None = None,
    recipe: str | None = None,
    options: Annotated[RecoveryOptions | None, Parameter(name="*")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    overwrite: Flag = False,
    json: Json = False,
) -> None:
    """Fine-tune a pruned model, or distil the dense model into it. Rerun the same command to resume.

    Nothing is trained in float16: such weights are trained in another dtype, and saved in float16.

    ```console
    adapruner recover runs/a
    adapruner recover runs/a/model --data alpaca -o runs/a/tuned
    adapruner recover runs/a/model --data c4 --teacher Qwen/Qwen3-0.6B -o runs/b
    adapruner recover runs/a/model --data c4 --train full --tokens 2M -o runs/b
    adapruner recover runs/paper-20 --recipe paper
    ```

    Args:
        data: Instructions with answers (columns instruction, output, input), any text, mix (the teacher writes it), or
            answers:DATASET (the teacher answers instructions); several with shares, as mix:0.3,c4:0.3,alpaca:0.4. Of a
            run, by default the text that it was calibrated on, with its teacher and tokens.
        output: Folder of the fine-tuned model; of a run, by default recovered/ in it.
        teacher: The dense model, for distillation.
        recipe: Options to start from: paper, which is the fine-tuning of the paper, or a YAML file.
        overwrite: Start again if the folder holds another fine-tuned model.
    """
    with starting():
        from adapruner.base.processes import this_process
        from adapruner.run.recover import recover as run

    record = run(model, data, output, teacher, overwrite, dtype, device, recipe, **given(options))
    if not this_process().leads:
        return
    losses = f"validation loss {record.loss_before:.4f} → {record.loss_after:.4f} nats per token"
    steps = f"best after {record.best_step} of {record.steps} steps, {record.tokens:,} tokens"
    print_output(record, json, [f"{output or f'{model}/recovered'}: {losses}, {steps}"])
    if record.loss_after >= record.loss_before and not json:
        print_advice(["training has not lowered the validation loss: train longer, or lower `learning_rate`"])


def evaluate(
    model: Model,
    /,
    *others: Annotated[str, Parameter(help="Further models, to compare with the first in one table.")],
    evaluate: Names = (),
    protocol: str | None = None,
    seq_len: WholeNumber | None = None,
    stride: WholeNumber | None = None,
    bos: bool = True,
    tasks: Names = (),
    limit: WholeNumber | None = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    layer_wise: bool | None = None,
    against: str | None = None,
    json: Json = False,
) -> None:
    """Perplexity of models, dense or pruned, their scores in tasks of lm-eval, and the verdict on pruned models.

    Of several models, which are measured one after the other, also size and tokens per second, in one table.

    ```console
    adapruner evaluate runs/a/model --evaluate wikitext2 --evaluate ptb
    adapruner evaluate runs/a/model --against Qwen/Qwen3-0.6B
    adapruner evaluate Qwen/Qwen3-0.6B runs/a/model runs/a/tuned --evaluate wikitext2 --limit 256
    adapruner evaluate runs/a/model --tasks commonsense --limit 200
    ```

    Args:
        evaluate: Dataset to report perplexity on; may be repeated.
        protocol: Perplexity as others report it. llm-pruner: WikiText2 test and PTB validation, 128 tokens; the default
            if no dataset, task or dense model is named. 2048: WikiText2 test, 2048 tokens.
        seq_len: Tokens per window of these datasets; by default both 128 and 2048, or the context of the model.
        stride: Tokens between the beginnings of these windows; by default they do not overlap.
        bos: Begin each of these windows with the token for the beginning of a text, if the tokenizer has one.
        tasks: Tasks of lm-eval, separated by commas or repeated; commonsense is the seven of the paper,
            generative is GSM8K and IFEval.
        limit: Maximum number of windows of each dataset and of items of each task, evenly spaced.
        layer_wise: Keep one decoder layer in memory at a time; by default if the model does not fit.
        against: The dense model, to compare with: what the model can still do, and the verdict.
    """
    with starting():
        from adapruner.run.evaluate import evaluate as evaluate_one, evaluate_each

    options: dict[str, Any] = {
        "perplexity": evaluate,
        **{"protocol": protocol, "seq_len": seq_len, "stride": stride, "bos": bos, "tasks": tasks, "limit": limit},
        **{"dtype": dtype, "device": device, "layer_wise": layer_wise, "against": against},
    }
    models = list(dict.fromkeys((model, *others)))
    results = {model: evaluate_one(model, **options)} if len(models) == 1 else evaluate_each(models, **options)
    for result in results.values():
        print_advice(result.overlaps)
    contents = [
        {"model": name, **to_jsonable_python(result), "task_means": result.mean_accuracies}
        for name, result in results.items()
    ]
    print_output(contents if len(models) > 1 else contents[0], json, _tables_of_evaluation(results, against or ""))


def benchmark(
    model: Model,
    /,
    *,
    against: str | None = None,
    batch_size: Annotated[tuple[WholeNumber, ...], Parameter(negative="")] = (1, 16),
    prompt: WholeNumber = 128,
    new_tokens: WholeNumber = 32,
    repetitions: WholeNumber = 5,
    dtype: Dtype = "auto",
    device: Device = "auto",
    output: Output | None = None,
    json: Json = False,
) -> None:
    """Measure size, memory and tokens per second of a model, and compare it with another one.

    ```console
    adapruner benchmark runs/a/model --against Qwen/Qwen3-0.6B
    adapruner benchmark runs/a/model --against Qwen/Qwen3-0.6B -o speed.json
    adapruner benchmark runs/a/model --batch-size 32 --prompt 512
    ```

    Args:
        against: The model to compare with, usually the dense one.
        batch_size: Sequences at once; may be repeated.
        prompt: Tokens that are read at once.
        new_tokens: Tokens that are then generated.
        repetitions: Number of timed runs; models alternate, and the median is reported.
        output: Write the result here as JSON; as speed.json in a run folder, the report of the run shows it.
    """
    with starting():
        from adapruner.run.steps import benchmark as run

    speeds = run(model, against, batch_size, prompt, new_tokens, repetitions, dtype, device, output)
    print_output(speeds, json, [_table_of_speeds(speeds, prompt, new_tokens)])
    print_advice(
        [
            f"the model {verb} no faster than the model it is compared with at batch size {batch}"
            for kind, verb in (("prefill", "reads prompts"), ("decode", "generates"))
            for batch, rate in (getattr(speeds[model], kind).items() if against else ())
            if rate.median <= getattr(speeds[str(against)], kind)[batch].median
        ]
    )


def export(
    model: Model,
    /,
    *,
    to: str,
    output: Output,
    gguf_type: GgufType = "f16",
    overwrite: Flag = False,
    json: Json = False,
) -> None:
    """Write a model, pruned or dense, in a form that other loaders read.

    ```console
    adapruner export runs/a/model --to gguf -o small.gguf
    adapruner export runs/a/model --to gguf --gguf-type q4_k_m -o small-q4.gguf
    adapruner export runs/a/model --to decilm -o runs/a/decilm
    ```

    Args:
        to: gguf: one file for llama.cpp. decilm: a folder for vLLM, SGLang, TensorRT-LLM and mlx-lm, of a Llama with
            equal heads and widths in multiples of 256.
        output: The file or folder to write.
        gguf_type: How a GGUF file stores matrices. Quantizations other than q8_0 need pip install '.[gguf]'.
        overwrite: Replace an existing GGUF file, or a folder that adapruner wrote.
    """
    with starting():
        from adapruner.run.export import export as run

    exported = run(model, to, output, gguf_type, overwrite)
    stored = exported.stored_types
    content = {"model": model, "format": to, "path": exported.path, "bytes": exported.size}
    types = f"; {stored.sentence}" if stored and stored.sentence else ""
    print_output(
        content | ({"tensor_bytes": stored.tensor_bytes} if stored else {}),
        json,
        [f"{exported.path}: {exported.size / 1e6:,.1f} MB{types}"],
    )


def vocabulary(
    model: Model,
    /,
    *,
    output: Output,
    vocabulary: Names = (),
    vocabulary_size: str | None = None,
    vocabulary_multiple: WholeNumber = 64,
    overwrite: Flag = False,
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Remove from a model the tokens that its text needs least, and nothing else.

    ```console
    adapruner vocabulary Qwen/Qwen3-0.6B --vocabulary-size 49152 -o runs/a
    adapruner vocabulary Qwen/Qwen3-0.6B --vocabulary c4,my-text.txt -o runs/b
    adapruner vocabulary smollm2 --vocabulary c4 --vocabulary-size 40960 -o runs/c
    ```

    Args:
        output: Folder of the smaller model.
        vocabulary: Datasets whose tokens are kept, comma-separated or repeated.
        vocabulary_size: Tokens to keep, as 32k: the most likely in text like vocabulary, by default code and English.
        vocabulary_multiple: The number of kept tokens is rounded up to a multiple of this.
        overwrite: Replace a folder that adapruner wrote.
    """
    with starting():
        from adapruner.run.export import vocabulary as run

    pruned = run(model, vocabulary, output, vocabulary_size, vocabulary_multiple, overwrite, dtype)
    removed, before = pruned.vocabulary.removed_parameters, pruned.vocabulary.parameters_before
    share = f"{removed:,} of {before:,} parameters were removed ({removed / before:.1%})"
    print_output(
        {"model": model, **pruned.model_dump()}, json, [f"{pruned.path}: {pruned.vocabulary.sentence} {share}"]
    )


def _tables_of_evaluation(results: dict[str, Evaluation], dense: str) -> Iterator[Table]:
    from adapruner.evaluation.abilities import sentence
    from adapruner.report.result import ability_table, measured_table, model_table, numbers_of, task_table

    if len(results) > 1:
        rows = {}
        for model, result in results.items():
            texts = [perplexity.text for perplexity in result.perplexity]
            # One text may be measured in the windows of a protocol, and in others.
            named = {
                text if texts.index(text) == number else f"{text} ({number + 1})": result.perplexity[number]
                for number, text in enumerate(texts)
            }
            rows[model] = numbers_of(named, speed=result.speed)
        yield model_table("", rows)
    else:
        for model, result in results.items():
            for perplexity in result.perplexity:
                yield measured_table({model: numbers_of({perplexity.text: perplexity})}, "text")
    if judged := {model: result for model, result in results.items() if result.verdict}:
        known = {dense: numbers_of({}, next(iter(judged.values())).dense)}
        known |= {model: numbers_of({}, result.abilities, left=result.left) for model, result in judged.items()}
        yield ability_table(known, {model: sentence(result.verdict, result.left) for model, result in judged.items()})
    scores = {model: numbers_of({}, None, {score.task: score for score in r.tasks}) for model, r in results.items()}
    if any(scores.values()):
        yield task_table(scores)


def _table_of_speeds(speeds: dict[str, Speed], prompt: int, new_tokens: int) -> Table:
    """A row for each quantity; of two models, a last column says by how much the second one is smaller or faster."""
    measured, is_pair = list(speeds.values()), len(speeds) == 2
    sizes: dict[str, list[int | None]] = {
        "parameters": [speed.parameters for speed in measured],
        "bytes of weights": [speed.weight_bytes for speed in measured],
        "peak bytes of memory": [speed.peak_memory_bytes for speed in measured],
        "MACs per token of the prompt": [speed.prompt_macs for speed in measured],
        "MACs per generated token": [speed.new_token_macs for speed in measured],
    }
    rows = []
    for name, values in sizes.items():
        known = [value for value in values if value is not None]
        gain = f"{known[0] / known[1]:.2f} ×" if len(known) == 2 else ""
        rows.append([name, *("unknown" if value is None else f"{value:,}" for value in values), *[gain] * is_pair])
    for name, kind in (("prompt tokens/s", "prefill"), ("generated tokens/s", "decode")):
        for batch in measured[0].prefill:
            rates = [getattr(speed, kind)[batch] for speed in measured]
            gain = f"{rates[-1].median / rates[0].median:.2f} ×"
            shown = [f"{rate.median:,.1f} ({rate.least:,.1f}–{rate.greatest:,.1f})" for rate in rates]
            rows.append([f"{name}, batch {batch}", *shown, *[gain] * is_pair])
    columns = [Column("", is_number=False), *map(Column, speeds), *[Column("gain")] * is_pair]
    caption = (
        f"prompts of {prompt} tokens, then {new_tokens} generated with a cache; medians (least–greatest) of repetitions"
        " in turn"
    )
    return Table("speeds", "", columns, rows, [caption])
