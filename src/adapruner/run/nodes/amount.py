"""The budget that the search starts from."""

from __future__ import annotations

from transformers import PreTrainedConfig

from adapruner.config import Layout, RatioOf
from adapruner.errors import AdaPrunerError
from adapruner.models._architecture import Architecture
from adapruner.models._config import find_wrapper
from adapruner.models._loading import empty_model
from adapruner.models._places import ModelLocation
from adapruner.planning._budget import Budget, UnreachableRatioError, default_budget
from adapruner.run.nodes.declared import GRAPH
from adapruner.structure._blocks import Structure, count_parameters


@GRAPH.in_memory
def share_of_decoder(location: ModelLocation, model_config: PreTrainedConfig) -> float:
    """The share of the parameters of a multimodal model that its decoder has; 1 for a text model."""
    wrapper = find_wrapper(location)
    if wrapper is None:
        return 1
    return count_parameters(empty_model(model_config)) / count_parameters(wrapper.around(model_config))


@GRAPH.in_memory
def ratio_of_decoder(share_of_decoder: float, ratio: float, ratio_of: RatioOf) -> float:
    """The share of the parameters of the decoder, or of its groups, that is removed."""
    if ratio_of != "parameters":
        return ratio
    if ratio >= share_of_decoder:
        raise UnreachableRatioError(
            f"`ratio` {ratio} is not reachable: the decoder, which alone is pruned, has {share_of_decoder:.3f} of the"
            " parameters"
        )
    return ratio / share_of_decoder


@GRAPH.in_memory
def starting_budget(
    structure: Structure,
    family: Architecture,
    ratio_of_decoder: float,
    layout: Layout,
    ratio_of: RatioOf,
    round_to: int,
    protect_first: int | None,
    protect_last: int | None,
    head_share: float | None,
) -> Budget:
    """The budget that the search starts from."""
    if layout not in family.layouts:
        raise AdaPrunerError(
            f"the layers of a {family.model_type} cannot be cut differently: set `layout` to {family.layouts[0]}"
        )
    options = layout, ratio_of, round_to, protect_first, protect_last, head_share
    return default_budget(structure, ratio_of_decoder, *options)
