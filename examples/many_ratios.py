# python examples/many_ratios.py HuggingFaceTB/SmolLM2-360M c4 wikitext2 runs/ratios
"""Measures and searches once, then looks at many ratios: what is left of every layer, and what it costs in perplexity.

Arguments: a model, the text to calibrate on, the text to report on, a folder for the runs.
"""

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

import adapruner

model, calibration, report, folder = sys.argv[1:]

# The search is for 20 %; what it found is used for the other ratios, which only cut, fit and evaluate.
searched = adapruner.prune(model, Path(folder, "20"), ratio=0.2, calibration=calibration, evaluate=(report,))
results = {20: searched}
for percent in (5, 10, 15, 25, 30):
    try:
        results[percent] = adapruner.plan_again(searched.output, Path(folder, f"{percent}"), percent / 100)
    except adapruner.AdaPrunerError as error:
        print(f"{percent} %: {error}")  # with the largest ratio that is possible

table = Table("ratio", "parameters", "perplexity", "channels that stay, layer by layer")
dense = next(iter(searched.result["perplexity"].values()))["dense"]
table.add_row("0 %", f"{searched.result['parameters']['before']:,}", f"{dense['perplexity']:.2f}", "all")
for percent, result in sorted(results.items()):
    measured = next(iter(result.result["perplexity"].values()))["searched"]
    shares = [len(block.kept) / block.groups for block in result.plan.blocks if block.kind == "channels"]
    table.add_row(
        f"{percent} %",
        f"{result.result['parameters']['after']:,}",
        f"{measured['perplexity']:.2f}",
        " ".join(f"{share:.0%}" for share in shares),
    )
table.caption = dense["protocol"]
Console().print(table)
