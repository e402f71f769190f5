"""Three models, ours and four peers, three ratios: what is left, and what it took.

Makes "Compared with other methods" of research/results.md. A ratio is a share of the blocks (attention and
feed-forward), because embeddings are 21 to 63 % of these models. Every cell is a process of its own: processor seconds
and peak memory are those until the model is made. What does not depend on the ratio (moments, elimination, costs) is
made by the first cell that needs it, and counts in full in every cell. Only the text is given: windows that the model
wrote as `mix`, from a run. The peers read those of them that ours reads for compensation, so `quick` is run first.
Another seed of ours reads the text in another order, and so other windows of it. A trained peer reads what `standard`
reads, and is trained as it is: `standard` is run before it.

    adapruner prune MODEL --compensation-windows 384 --ratio 0.05 -o runs/text
    python benchmarks/models.py --model MODEL --text runs/text --output runs/models
    python benchmarks/models.py --table --output runs/models
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
from cyclopts import Parameter, run
from transformers import PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from adapruner.base.progress import Reporter
from adapruner.checkpoint import save_checkpoint
from adapruner.evaluation.losses import measure_perplexity
from adapruner.model.loading import computing_repeatably, in_fastest_dtype, load_model, load_tokenizer
from adapruner.model.places import find_model
from adapruner.run.folder import RunFolder
from adapruner.run.given import save_text
from adapruner.run.inputs import HELD_OUT_TO_HEAL
from adapruner.run.options import resolve
from adapruner.run.prune import making_of
from adapruner.structure.blocks import count_parameters
from adapruner.structure.build import build_structure
from adapruner.text.sources import parse_source
from adapruner.text.windows import Text, evenly_spaced, load_texts_by_use, start_of_windows, text_windows
from adapruner.train.healing import heal, healing_options, length_of_windows
from peers import PEERS, WITHOUT_PROTECTION, Setting

TEXTS = ("boolq-passages@report", "wikitext2:validation", "ptb")
# The end of the name of a method that gives all layers the same widths.
EQUAL = ", uniform"
# What ours is called in results, and its options.
OURS: dict[str, dict[str, Any]] = {
    "quick": {"effort": "quick"},
    f"quick{EQUAL}": {"effort": "quick", "layout": "uniform"},
    "standard": {"effort": "standard"},
    f"standard{EQUAL}": {"effort": "standard", "layout": "uniform"},
}
EQUAL_PEERS = tuple(peer + EQUAL for peer in WITHOUT_PROTECTION)
# The end of the name of a peer that is trained, and the tokens of that: those of `standard`.
TRAINED, TOKENS = ", trained", 50_000
Names = Annotated[tuple[str, ...], Parameter(consume_multiple=True)]


def main(
    *,
    output: Path,
    model: str = "smollm2",
    text: Path | None = None,
    methods: Names = (*OURS, *PEERS, *EQUAL_PEERS),
    ratios: Annotated[tuple[float, ...], Parameter(consume_multiple=True)] = (0.1, 0.2, 0.3),
    seeds: Annotated[tuple[int, ...], Parameter(consume_multiple=True)] = (0,),
    reported: int = 48,
    cell: bool = False,
    table: bool = False,
) -> None:
    """Runs what results.jsonl does not hold yet.

    Args:
        text: the run that wrote the text, or its windows.safetensors.
        seeds: of ours; the peers have none.
        reported: windows of each reported text, evenly spaced.
        cell: one cell, in this process; the others are processes that this one starts.
        table: print the table.
    """
    output.mkdir(parents=True, exist_ok=True)
    results = output / "results.jsonl"
    if table:
        print_table([json.loads(line) for line in results.read_text().splitlines()])
        return
    assert text is not None, "name the run that wrote the text: --text"
    if cell:
        entry = measured(output, model, text, methods[0], ratios[0], seeds[0], reported)
        with results.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        print(entry, flush=True)
        return
    known = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    done = {(entry["model"], entry["method"], entry["ratio"], entry["seed"]) for entry in known}
    cells = [("dense", 0.0, 0), *((name, ratio, seed) for ratio, name in product(ratios, methods) for seed in seeds)]
    for name, ratio, seed in cells:
        if (name not in OURS and seed != seeds[0] and name != "dense") or (shown(model), name, ratio, seed) in done:
            continue
        arguments = {"output": output, "model": model, "text": text, "methods": name, "ratios": ratio, "seeds": seed}
        arguments["reported"] = reported
        flags = [part for key, value in arguments.items() for part in (f"--{key}", str(value))]
        subprocess.run([sys.executable, __file__, *flags, "--cell"], check=True)


def shown(model: str) -> str:
    """The name of a model in results."""
    return Path(model).name


def measured(
    output: Path, name: str, text: Path, method: str, ratio: float, seed: int, reported: int
) -> dict[str, Any]:
    """A cell: the numbers of the model that a method makes."""
    path = text / "windows.safetensors" if text.is_dir() else text
    windows = load_texts_by_use(path)["compensation"].windows
    windows = windows.roll(seed * (len(windows) // 2), 0)
    location, begun = find_model(name), time.process_time()
    tokenizer, dense = load_tokenizer(location), load_model(location)
    structure = build_structure(dense)
    blocks = sum(block.groups * block.parameters_per_group + block.rest for block in structure.blocks)
    folder = output / f"{shown(name)}-{method}-{ratio:g}-{seed}"
    seconds = 0.0
    peer, is_trained, _ = method.removesuffix(EQUAL).partition(TRAINED)
    if peer in PEERS:
        ours = "standard" if is_trained else "quick"
        read = next(output.glob(f"{shown(name)}-{ours}-0.?-0/windows.safetensors"))  # a part is kept for other uses
        # No peer weights tokens by what a norm makes of them.
        plain = replace(structure, blocks=tuple(replace(block, is_normalized=False) for block in structure.blocks))
        given = load_texts_by_use(read)["compensation"]
        shared = output / f"{shown(name)}-peers-of-{ours}"
        setting = Setting(dense, plain, given.windows, ratio * blocks, shared, protects=not method.endswith(EQUAL))
        cut = PEERS[peer](setting)
        if is_trained:
            cut = trained(cut, given, dense, tokenizer, folder)
        save_checkpoint(cut, tokenizer, folder / "model")
        seconds = setting.saved_seconds
    elif method in OURS:
        options = OURS[method] | {"ratio": ratio * blocks / structure.total_parameters, "seed": seed}
        # It loads the model itself.
        begun, kept = time.process_time(), output / f"{shown(name)}-text-{seed}"
        seconds = prune(name, save_text(windows, kept, "windows"), options, output, folder)
    seconds += time.process_time() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    made = load_model(find_model(str(folder / "model"))) if method != "dense" else dense
    fast = in_fastest_dtype(made)
    reports = {of: evenly_spaced(text_windows(parse_source(of, "report"), tokenizer, 128), reported) for of in TEXTS}
    return {
        "model": shown(name),
        "method": method,
        "ratio": ratio,
        "seed": seed,
        "removed": 1 - count_parameters(made) / count_parameters(dense),
        "seconds": round(seconds),
        "peak": peak,
        "perplexity": {of: measure_perplexity(fast, part, of).perplexity for of, part in reports.items()},
    }


def trained(
    cut: PreTrainedModel, text: Text, dense: PreTrainedModel, tokenizer: Tokenizer, folder: Path
) -> PreTrainedModel:
    """A model, trained as `standard` trains, on the windows that its method read."""
    save_checkpoint(cut, tokenizer, folder / "cut")
    learnt, held_out = text.held_out(HELD_OUT_TO_HEAL)
    device = torch.device("cpu")
    length = length_of_windows(text.windows.shape[1], len(text), None)
    options = healing_options("ia3", TOKENS, length, 0, device, False)
    read, start = partial(load_model, find_model(str(folder / "cut"))), start_of_windows(tokenizer, length)
    teacher, training = in_fastest_dtype(dense), folder / "training"
    healed, record = heal(read, learnt, held_out, teacher, options, training, start=start)
    assert healed is not None, record.reason
    return healed


def prune(name: str, text: str, options: dict[str, Any], output: Path, folder: Path, until: str = "model") -> float:
    """Makes what a run makes until its model, or another artifact, is saved: what is told of models afterwards has no
    part in their price.

    Returns:
        The processor seconds that other cells spent on what is taken over from them.
    """
    run, prices = RunFolder(folder), output / "seconds.json"
    given = {"model": name, "calibration": text, "evaluate": ("ptb",), "limit": 1}
    making = making_of(resolve(given | options, None, run, None, None), run, Reporter())
    making.others = [RunFolder(path.parent) for path in output.glob("*/config.yaml") if path.parent != folder]
    spent: dict[str, float] = json.loads(prices.read_text()) if prices.exists() else {}
    taken = 0.0
    with computing_repeatably(torch.device("cpu")), run.locked():
        run.save_config(making.value("config"))
        making.value("dense")  # Loading has no part in what cells share.
        missing = {node.path for node in making.missing()}
        for node in making.wanted:
            path, key = node.path, making.record(node).key
            # After a kill, the folder has some itself.
            source = next((other for other in (run, *making.others) if other.is_made(path, key)), None)
            if source:
                if source is not run:
                    run.take_over(path, source)
                taken += spent.get(key, 0.0)
            elif path in missing:
                begun = time.process_time()
                making.make(node)
                making.release_unneeded([other.name for other in making.missing()])
                spent[key] = time.process_time() - begun
            if path == until:
                break
    prices.write_text(json.dumps(spent, indent=2))
    return taken


def print_table(entries: list[dict[str, Any]]) -> None:
    """Markdown: a row for each model, ratio and method; perplexities as multiples of the dense model's."""
    print("| model | blocks removed | of all | method | processor seconds | GiB | BoolQ | WikiText2 | PTB |")
    print("|---|---|---|---|---|---|---|---|---|")
    dense = {entry["model"]: entry["perplexity"] for entry in entries if entry["method"] == "dense"}
    rows: dict[tuple[str, float, str], list[dict[str, Any]]] = defaultdict(list)
    for entry in entries:
        rows[entry["model"], entry["ratio"], entry["method"]].append(entry)
    for (model, ratio, method), own in sorted(rows.items()):
        if method != "dense":
            times = [fmean(entry["perplexity"][of] / dense[model][of] for entry in own) for of in TEXTS]
            cells = [f"{ratio:.0%}", f"{own[0]['removed']:.1%}", method, f"{fmean(e['seconds'] for e in own):,.0f}"]
            cells += [f"{max(entry['peak'] for entry in own) / 2**30:.1f}", *(f"{value:.3f}" for value in times)]
            print(f"| {model} | {' | '.join(cells)} |")


if __name__ == "__main__":
    torch.manual_seed(0)
    run(main)
