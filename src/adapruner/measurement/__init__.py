"""One pass over the pool for Taylor and activation statistics, one over more text for second moments."""

from adapruner.measurement._moments import (
    InputMoments as InputMoments,
    StoredMoments as StoredMoments,
    measure_moments as measure_moments,
    projected_blocks as projected_blocks,
)
from adapruner.measurement._removal import removal_errors as removal_errors
from adapruner.measurement._samples import (
    measure as measure,
    measure_in_parts as measure_in_parts,
    saved_activations as saved_activations,
)
from adapruner.measurement._solving import (
    add_products as add_products,
    factorize as factorize,
    solve_damped as solve_damped,
    symmetric as symmetric,
)
from adapruner.measurement._statistics import Statistics as Statistics
