"""An importance term of your own, searched together with the others.

`--small` took 54 seconds on a busy core.
"""

from inputs import model, options, texts, tokenizer

import adapruner
from adapruner import register_term


@register_term(unit="inputs", family="energy", share=0.5)
def input_energy(statistics):
    """[inputs]: E[x²] · ‖W_c‖², what an input adds to the output of its block, on average and squared."""
    return statistics.input_squared.mean(0) * statistics.column_squared


result = adapruner.prune(model, texts, tokenizer=tokenizer, ratio=0.2, **{"trials": 24} | options)
for name, weight in result.result.search.best.point.weights.items():
    print(f"{name:16} {weight:.3f}")
