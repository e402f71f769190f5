# python examples/many_ratios.py HuggingFaceTB/SmolLM2-360M c4 wikitext2 runs/ratios
"""Measures and searches once, then prunes at several ratios: the channels kept in every layer, and the perplexity.

Arguments: a model, the dataset to calibrate on, the dataset to report on, a folder for the runs. To search at every
ratio too, give `prune_ratios` all of them.
"""

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

import adapruner

model, calibration, report, folder = sys.argv[1:]

# The search is at 20 %; its best point is used for the other ratios, which only cut, compensate and evaluate.
searched = adapruner.prune(model, output=Path(folder, "20"), ratio=0.2, calibration=calibration, evaluate=(report,))
results = {20: searched}
for percent in (5, 10, 15, 25, 30):
    try:
        results[percent] = adapruner.plan_again(searched.output, Path(folder, f"{percent}"), percent / 100)
    except adapruner.AdaPrunerError as error:
        print(f"{percent} %: {error}")  # names the largest feasible ratio

table = Table("ratio", "parameters", "perplexity", "channels kept, layer by layer")
dense = searched.result.model("dense")
[measured] = dense.perplexity.values()
table.add_row("0 %", f"{dense.parameters:,}", f"{measured.perplexity:.2f}", "all")
for percent, result in sorted(results.items()):
    pruned = result.result.final
    [measured] = pruned.perplexity.values()
    shares = [len(block.kept) / block.groups for block in result.plan.blocks if block.kind == "channels"]
    table.add_row(
        f"{percent} %",
        f"{pruned.parameters:,}",
        f"{measured.perplexity:.2f}",
        " ".join(f"{share:.0%}" for share in shares),
    )
table.caption = measured.protocol
Console().print(table)
