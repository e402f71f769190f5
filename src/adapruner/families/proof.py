"""Proof, on a tiny model, that the architecture of a family is right: pruned equals masked, saved equals loaded, and
generation is the same with and without a cache."""

from __future__ import annotations

import contextlib
import copy
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast, get_args

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel

from adapruner.base.errors import AdaPrunerError, reason
from adapruner.budget.plan import PruningPlan, make_plan
from adapruner.families.inference import random_model, tiny_config
from adapruner.model.architecture import Architecture, stock_config, using_architecture
from adapruner.model.layers import decoder_layers, enter_layers, skipping_layers
from adapruner.model.loading import load_model
from adapruner.model.places import ModelLocation, quiet_transformers
from adapruner.model.wrapper import Wrapper, give_wrapper
from adapruner.options import ExpertGranularity, Layout
from adapruner.structure.blocks import Block, Kind, Structure, count_parameters
from adapruner.structure.build import build_structure
from adapruner.surgery import prune_model

# Largest distance of the pruned from the masked logits, relative to the change by masking: sums have another order, and
# the epsilon of a norm over fewer heads has another weight.
_TOLERANCE = 2e-3
# Smallest change by masking, relative to the logits, that proves something.
_EFFECT = 1e-4
# Largest distance of the logits of a multimodal model from those of its decoder, relative to the logits.
_ROUNDING = 1e-5
_NEW_TOKENS = 8
_NEVER_CHOSEN = -1e9
_PARTS: dict[Kind, str] = {"heads": "attention", "channels": "feed_forward", "experts": "experts"}
_LAYOUTS: tuple[Layout, ...] = get_args(Layout)


def prove(config: PreTrainedConfig, architecture: Architecture) -> Architecture:
    """The architecture without the kinds of groups and the layouts for which a check on a tiny model of the config of a
    stock model fails."""
    model = random_model(tiny_config(config))
    try:
        with torch.no_grad():
            model(torch.arange(3, 15)[None])
    except Exception as error:  # anything that a model class raises
        raise AdaPrunerError(f"transformers cannot run a small {config.model_type}: {reason(error)}") from error
    proven = _proven_parts(model, architecture)
    experts = proven.experts
    if experts and experts.channels and failed_checks(model, proven, "channel").keys() & set(proven.layouts):
        proven = proven.changed(experts=experts.model_copy(update={"channels": None}))
    return proven.changed(removable_attention=False) if failed_without_attention(model, proven) else proven


def prove_around(wrapper: Wrapper, config: PreTrainedConfig, layouts: Sequence[Layout]) -> None:
    """Checks that a multimodal model reads text alone as its decoder does, dense and pruned; with a tiny decoder, and
    without weights in the other parts, which text must not reach.

    Args:
        config: of the decoder.
        layouts: in which it is pruned; none if it cannot be.
    """
    model = random_model(tiny_config(stock_config(config)))
    around, name = wrapper.with_decoder(model.config), wrapper.config.model_type
    give_wrapper(model, around)
    # Other tokens may stand for images.
    others = {value for value in vars(wrapper.config).values() if isinstance(value, int)}
    text = sorted(set(range(3, model.config.vocab_size)) - others)
    tokens = torch.tensor(text)[torch.randint(len(text), (2, 12), generator=torch.Generator().manual_seed(4))]
    for layout in (None, *layouts):
        try:
            with torch.no_grad(), quiet_transformers():
                decoder = model
                if layout:
                    structure = build_structure(model)
                    decoder = prune_model(model, structure, _random_plan(structure, _counts_of(structure, layout)))
                logits = around.holding(decoder)(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        except Exception as error:  # anything that a model class raises that needs more than text
            raise AdaPrunerError(f"a {name} cannot be run with text alone: {reason(error)}") from error
        # In multimodal models, transformers leaves out the factor of the logits that Cohere's decoders have.
        expected, factor = decoder(tokens).logits, getattr(config, "logit_scale", None) or 1
        if not min((logits * scale - expected).norm() for scale in (1, factor)) <= _ROUNDING * expected.norm():
            raise AdaPrunerError(f"a {name} does not read text alone as its decoder does, a {config.model_type}")


def _random_plan(structure: Structure, counts: list[int]) -> PruningPlan:
    scores = torch.rand(structure.group_offsets[-1], generator=torch.Generator().manual_seed(3))
    return make_plan(structure, scores, counts)


def _proven_parts(model: PreTrainedModel, architecture: Architecture) -> Architecture:
    """The result of `prove`, with whole experts."""
    refusals = dict[str, str]()
    if not failed_checks(model, architecture):
        return architecture
    for kind, part in _PARTS.items():
        if getattr(architecture, part) is None:
            continue
        others = {name: None for name in _PARTS.values() if name != part}
        failures = failed_checks(model, architecture.changed(**others))
        if failures and kind == "channels" and not architecture.fixed_channels:
            # If a class rounds the width in its config, projections are resized instead.
            resized = failed_checks(model, architecture.changed(**others, fixed_channels=True))
            if len(resized) < len(failures):
                failures, architecture = resized, architecture.changed(fixed_channels=True)
        if failures.keys() >= set(_LAYOUTS):
            refusals[kind] = failures["per-layer"]
            architecture = architecture.changed(**{part: None})
        else:
            layouts = tuple(layout for layout in architecture.layouts if layout not in failures)
            architecture = architecture.changed(layouts=layouts)
    if any(getattr(architecture, part) for part in _PARTS.values()):
        together = failed_checks(model, architecture)
        if layouts := tuple(layout for layout in architecture.layouts if layout not in together):
            return architecture.changed(layouts=layouts)
        refusals |= {f"together, {layout}": refusal for layout, refusal in together.items()}
    why = "; ".join(f"{kind}: {refusal}" for kind, refusal in refusals.items())
    raise AdaPrunerError(f"models of the family {architecture.model_type} cannot be pruned ({why})")


def failed_checks(
    model: PreTrainedModel, architecture: Architecture, experts: ExpertGranularity = "expert"
) -> dict[Layout, str]:
    """The first failing check of a random model of a stock class for each layout, with the reason; empty if none."""
    with using_architecture(architecture):
        failures = {layout: _failure(model, partial(_counts_of, layout=layout), experts) for layout in _LAYOUTS}
    return {layout: failure for layout, failure in failures.items() if failure}


def failed_parts(config: PreTrainedConfig, architecture: Architecture) -> dict[str, str]:
    """The failing checks of what a description of a family allows, on a tiny model of a config: its layouts, and if
    these pass, channels in experts and whole attention layers."""
    model = random_model(tiny_config(config))
    failed = failed_checks(model, architecture)
    if wrong := {str(layout): failed[layout] for layout in architecture.layouts if layout in failed}:
        return wrong
    if architecture.experts and architecture.experts.channels:
        failed = failed_checks(model, architecture, "channel")
        wrong = {
            f"channels in experts, {layout}": failed[layout] for layout in architecture.layouts if layout in failed
        }
    with using_architecture(architecture):
        structure = build_structure(model)
    if structure.attention_parameters and (why := failed_without_attention(model, architecture)):
        wrong["whole attention"] = why
    return wrong


def failed_without_attention(model: PreTrainedModel, architecture: Architecture) -> str | None:
    """The check that fails, with the reason, for a random model of a stock class without the attention of a layer; None
    if all pass."""

    def counts(structure: Structure) -> list[int]:
        # Transformers reads the length of the cache in the first layer with attention.
        removable = structure.attention_parameters
        if not removable:
            raise AdaPrunerError("there is none")
        return [
            0 if block.kind == "heads" and block.layer == min(removable) else block.groups for block in structure.blocks
        ]

    with using_architecture(architecture):
        return _failure(model, counts)


def _failure(
    model: PreTrainedModel, counts: Callable[[Structure], list[int]], experts: ExpertGranularity = "expert"
) -> str | None:
    checks = ["the structure is that of the model"]
    try:
        structure = build_structure(model, experts=experts)
        _check(model, structure, _random_plan(structure, counts(structure)), checks.append)
    except Exception as error:  # anything that a model class with another architecture raises
        return f"{checks[-1]} fails: {reason(error)}"
    return None


def _counts_of(structure: Structure, layout: Layout) -> list[int]:
    """The groups that each block keeps: a different number in every layer, or two thirds in all."""
    counts = []
    for block in structure.blocks:
        size, least = block.groups // block.strata, math.ceil(block.least / block.strata)
        removed = math.ceil(size / 3) if layout == "uniform" else block.layer * size // structure.layers + 1
        counts.append(block.strata * max(least, size - removed))
    if not structure.removed_parameters(counts):
        raise AdaPrunerError("nothing of it can be removed")
    return counts


def _check(model: PreTrainedModel, structure: Structure, plan: PruningPlan, checking: Callable[[str], object]) -> None:
    """Runs the checks; calls `checking` with the name of each before it."""
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(3, model.config.vocab_size, (2, 12), generator=generator)
    with torch.no_grad(), quiet_transformers():
        checking("pruned equals masked")
        pruned = prune_model(model, structure, plan)
        logits, dense = pruned(tokens).logits, model(tokens).logits
        with masked(model, structure, plan) as masked_model:
            expected = masked_model(tokens).logits
        effect, difference = (dense - expected).norm(), (logits - expected).norm()
        if not effect > _EFFECT * dense.norm():
            raise AdaPrunerError("the removed groups had no effect")
        if not difference <= _TOLERANCE * effect:
            raise AdaPrunerError(f"they differ by {float(difference / effect):.2g} of the change by masking")
        if count_parameters(pruned) != plan.total_parameters - plan.removed_parameters:
            raise AdaPrunerError(f"{count_parameters(pruned):,} parameters are left, not what the plan says")
        checking("saved equals loaded")
        with tempfile.TemporaryDirectory() as folder:
            pruned.save_pretrained(folder)
            loaded = load_model(ModelLocation(folder, written="the saved model"), device="cpu")
        torch.testing.assert_close(loaded(tokens).logits, logits, rtol=0, atol=0)
        checking("cached equals uncached")
        if not _generates_alike(loaded, tokens) and _generates_alike(model, tokens):
            raise AdaPrunerError("the tokens differ")
        checking("layer by layer equals at once")
        ((state, calls),) = enter_layers(loaded, [tokens])
        for call, layer in zip(calls, decoder_layers(loaded), strict=True):
            state = call.run(layer, state)
        with skipping_layers(loaded, structure.layers, state, calls[0]):
            torch.testing.assert_close(loaded(tokens, use_cache=False).logits, logits, rtol=1e-3, atol=1e-3)


def _generates_alike(model: PreTrainedModel, tokens: Tensor) -> bool:
    options = {"do_sample": False, "max_new_tokens": _NEW_TOKENS, "min_new_tokens": _NEW_TOKENS}
    prompt = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "pad_token_id": 0}
    return torch.equal(*(cast(Any, model).generate(**prompt, **options, use_cache=cached) for cached in (True, False)))


@contextlib.contextmanager
def masked(model: PreTrainedModel, structure: Structure, plan: PruningPlan) -> Iterator[PreTrainedModel]:
    """A copy of the model with the original sizes, in which the groups that the plan removes have no effect: no column
    reads them, no router chooses them. This is independent of the code that cuts."""
    model, never = copy.deepcopy(model), _NeverChosen()
    for block, planned in zip(structure.blocks, plan.blocks, strict=True):
        removed = torch.ones(block.groups, dtype=torch.bool)
        removed[list(planned.kept)] = False
        if block.is_projected:
            weights = block.row_wise.as_projections(model.get_parameter(block.row_wise.parameter).data)
            for weight, groups in zip(weights, removed.view(len(weights), -1), strict=True):
                weight.unflatten(1, (len(groups), -1))[:, groups] = 0
            _mask_norms(model, block, removed)
            bias = getattr(model.get_submodule(block.row_wise.module), "bias", None)
            if not planned.kept and isinstance(bias, Tensor):
                bias.data.zero_()
        else:
            _mask_experts(model, block, removed, never)
    with never:
        yield model


def _mask_norms(model: PreTrainedModel, block: Block, removed: Tensor) -> None:
    """Turns norms over all groups into norms over the kept ones: a mean of squares counts the zeros."""
    norms = [cut for cut in block.slices if not cut.is_matrix and cut.parameter.endswith(".weight")]
    for cut in block.slices if norms else ():
        if cut.axis == 0 and cut not in norms:
            rows = cut.as_projections(model.get_parameter(cut.parameter).data)[0]
            rows[cut.offset : cut.offset + block.groups * cut.width].unflatten(0, (block.groups, -1))[removed] = 0
    for norm in norms:
        model.get_parameter(norm.parameter).data *= (~removed).float().mean().sqrt()


def _mask_experts(model: PreTrainedModel, block: Block, removed: Tensor, never: _NeverChosen) -> None:
    for cut in block.slices:
        path, _, name = cut.parameter.rpartition(".")
        tensor = getattr(model.get_submodule(path), name)
        if tensor.numel() == block.groups:
            tensor.data.view(-1)[removed] = _NEVER_CHOSEN
        elif tensor.dim() == 2:
            never.routers[tensor.untyped_storage().data_ptr()] = removed


class _NeverChosen(TorchFunctionMode):
    """While it lasts, the removed experts have the lowest logit in every product with the weight of a router."""

    def __init__(self) -> None:
        super().__init__()
        self.routers: dict[int, Tensor] = {}

    def __torch_function__(self, call: Callable[..., Any], types: object, args: Any = (), kwargs: Any = None) -> object:
        result = call(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and getattr(call, "__name__", "") in ("linear", "matmul", "mm", "__matmul__"):
            for factor in (*args, *(kwargs or {}).values()):
                removed = self.routers.get(factor.untyped_storage().data_ptr()) if isinstance(factor, Tensor) else None
                if removed is not None and result.shape[-1] == len(removed):
                    result = result.masked_fill(removed, _NEVER_CHOSEN)
        return result
