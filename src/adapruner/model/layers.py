"""Decoder layers of a model one at a time: run alone, skipped, on several devices, or in memory only while in use."""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from adapruner.model.architecture import architecture_of

# Weights by name within a layer.
ReadLayer = Callable[[], dict[str, Tensor]]


@dataclass(frozen=True)
class LayerCall:
    """The arguments of a layer besides the hidden state (masks, positions), and the values that it returns besides the
    hidden state, None if it returns no tuple; the same for all batches of one shape."""

    arguments: tuple[object, ...]
    named: dict[str, object]
    others: tuple[object, ...] | None

    def output(self, state: Tensor) -> object:
        """The return value of the layer with another hidden state."""
        return state if self.others is None else (state, *self.others)

    def run(self, layer: nn.Module, state: Tensor) -> Tensor:
        """[batch, tokens, hidden]: the hidden state after a layer."""
        output = layer(state, *self.arguments, **self.named)
        return cast(Tensor, output[0] if isinstance(output, tuple) else output)


_has_no_weights = ContextVar("_has_no_weights", default=False)


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """While it lasts, parameters of new modules are on the meta device, and buffers are where they would be; for this
    thread alone, while `init_empty_weights` of accelerate is for the process."""
    outer = _has_no_weights.set(True)
    try:
        yield
    finally:
        _has_no_weights.reset(outer)


def _to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
    return nn.Parameter(parameter.to("meta"), parameter.requires_grad) if _has_no_weights.get() else None


register_module_parameter_registration_hook(cast(Any, _to_meta))


def decoder_layers(model: PreTrainedModel) -> Sequence[nn.Module]:
    """The decoder layers, from the input to the output."""
    return list(cast(nn.ModuleList, model.get_submodule(architecture_of(model.config).layers)))


def enter_layers(model: PreTrainedModel, batches: Iterable[Tensor]) -> list[tuple[Tensor, list[LayerCall]]]:
    """The hidden state that the first layer reads and the calls of all layers, for every batch, int64 [windows,
    tokens]; computes one layer for each shape of batch."""
    calls: dict[torch.Size, list[LayerCall]] = {}
    entered = []
    for batch in batches:
        state, noted = _enter(model, batch, calls.get(batch.shape))
        entered.append((state, calls.setdefault(batch.shape, noted)))
    return entered


def _enter(model: PreTrainedModel, batch: Tensor, known: list[LayerCall] | None) -> tuple[Tensor, list[LayerCall]]:
    layers = decoder_layers(model)
    first_forward = layers[0].forward
    states: list[Tensor] = []
    calls: list[LayerCall] = []

    def note(state: Tensor, *arguments: object, **named: object) -> object:
        states.append(state)
        if known or calls:
            others = (known or calls)[0].others
        else:
            output = first_forward(state, *arguments, **named)
            others = output[1:] if isinstance(output, tuple) else None
        calls.append(LayerCall(arguments, named, others))
        return calls[-1].output(state)

    with other_forwards(dict.fromkeys(layers, note)):
        model.base_model(batch.to(model.device), use_cache=False)
    return states[0], calls


@contextlib.contextmanager
def skipping_layers(model: PreTrainedModel, count: int, state: Tensor, call: LayerCall) -> Iterator[None]:
    """While it lasts, the first `count` layers are not computed: the last of them returns `state`, [batch, tokens,
    hidden], for the batch that the model will be called with, as it does in the `call` of any layer."""
    output = call.output(state)
    with other_forwards({layer: lambda *_, **__: output for layer in decoder_layers(model)[:count]}):
        yield


@contextlib.contextmanager
def other_forwards(forwards: dict[nn.Module, Callable[..., object]]) -> Iterator[None]:
    """While it lasts, modules have other forward passes."""
    before = {layer: layer.__dict__.get("forward") for layer in forwards}
    for layer, forward in forwards.items():
        layer.forward = forward
    try:
        yield
    finally:
        for layer, forward_before in before.items():
            if forward_before is None:
                del layer.forward
            else:
                layer.forward = forward_before


def allow_any_width(model: PreTrainedModel) -> PreTrainedModel:
    """The model; experts are computed one by one if grouped products of PyTorch want other rows, of n · 16 bytes."""
    stacks = [parameter for parameter in model.parameters() if parameter.dim() == 3]
    is_odd = any(size * stack.element_size() % 16 for stack in stacks for size in stack.shape[1:])
    if is_odd and getattr(model.config, "_experts_implementation", None) == "grouped_mm":
        model.set_experts_implementation("eager")
    return model


def layer_devices(model: PreTrainedModel) -> list[torch.device]:
    """The device of every decoder layer."""
    return [_device_of(layer) for layer in decoder_layers(model)]


def share_out(model: PreTrainedModel, devices: Sequence[torch.device]) -> list[torch.device]:
    """A device for every decoder layer, so that all hold about equal bytes; the first also holds all other weights."""
    sizes = [sum(weight.nbytes for weight in layer.parameters()) for layer in decoder_layers(model)]
    total = sum(weight.nbytes for weight in model.parameters())
    held, shares = total - sum(sizes), list[torch.device]()
    for size in sizes:
        shares.append(devices[int((held + size / 2) * len(devices) / total)])
        held += size
    return shares


def place_layers(model: PreTrainedModel, device: torch.device, of_layers: Sequence[torch.device]) -> None:
    """Moves every decoder layer to its device, and everything else to one device. If these differ, layers and the
    modules outside them move their arguments to their device from then on.

    The hooks of `accelerate.dispatch_model` would do the same, but refer to their modules: the weights would stay in
    memory until cycles are collected, and `to` of a copy would move the original model.
    """
    layers = decoder_layers(model)
    inside = {module for layer in layers for module in layer.modules()}
    outside = [module for module in model.modules() if module not in inside]
    for layer, layer_device in zip(layers, of_layers, strict=True):
        layer.to(layer_device)
    for module in outside:
        module._apply(lambda tensor: tensor.to(device), recurse=False)
    if {*of_layers} != {device}:
        holding = (module for module in outside if [*module.parameters(False), *module.buffers(False)])
        for module in (*layers, *holding):
            # Caches are left alone: their part of a layer is with the layer.
            module.register_forward_pre_hook(
                lambda module, *called: send_to_device(called, _device_of(module)), with_kwargs=True
            )


def _device_of(module: nn.Module) -> torch.device:
    return next(chain(module.parameters(), module.buffers())).device


class _Stream:
    """Loads the weights of a layer while it is in use.

    The layer refers to the stream, not the reverse, so that both are freed with the last reference to the model:
    otherwise gigabytes would wait for the collector of cycles.
    """

    def __init__(self, layer: nn.Module, read: ReadLayer) -> None:
        self.read, self._layer, self._users = read, weakref.ref(layer), 0
        self._placeholders = {name: tensor.to("meta") for name, tensor in layer.state_dict().items()}
        # Adapters change the paths of modules.
        self._owners = {name: weakref.ref(layer.get_submodule(name.rpartition(".")[0])) for name in self._placeholders}

    def forward(self, *arguments: object, **named: Any) -> object:
        if self._users or not torch.is_grad_enabled():
            return self._run(*arguments, **named)
        # The weights would be kept for the backward pass: the layer is read and run again when its gradient arrives.
        return checkpoint(self._run, *arguments, use_reentrant=False, **named)

    def _run(self, *arguments: object, **named: object) -> object:
        layer = cast(nn.Module, self._layer())
        with self.loaded():
            # What is read from a model that is spread over devices is where it was.
            arguments, named = send_to_device((arguments, named), _device_of(layer))
            return type(layer).forward(layer, *arguments, **named)

    @contextlib.contextmanager
    def loaded(self) -> Iterator[None]:
        if not self._users:
            self._put(self.read())
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._put(self._placeholders)

    def _put(self, weights: dict[str, Tensor]) -> None:
        # Assigned and not copied into place: a backward pass uses the tensors of its forward pass.
        with torch.inference_mode(False):
            for name, weight in weights.items():
                module = cast(nn.Module, self._owners[name]())
                attribute = name.rpartition(".")[2]
                is_parameter = attribute in module._parameters
                setattr(module, attribute, nn.Parameter(weight, requires_grad=False) if is_parameter else weight)

    def hold_places(self, device: torch.device) -> None:
        """Gives weights that are not in use a device, each with one number in memory."""
        for name, tensor in self._placeholders.items():
            self._placeholders[name] = torch.zeros((), dtype=tensor.dtype, device=device).expand(tensor.shape)
        self._put(self._placeholders)


def stream_layers(model: PreTrainedModel, readers: Sequence[ReadLayer]) -> None:
    """Makes every layer read its weights, by its reader and onto the device of the rest of the model, when it is
    called, and drop them afterwards."""
    for layer, read in zip(decoder_layers(model), readers, strict=True):
        stream = _Stream(layer, read)
        layer.requires_grad_(False)
        layer.forward, layer.stream = stream.forward, stream  # type: ignore[assignment]  # for this layer alone


def hold_places(model: PreTrainedModel) -> None:
    """Gives the weights of streamed layers that are not in use the device of the model, each with one number in memory:
    libraries look at it, and move models, before they train them."""
    for layer in decoder_layers(model):
        cast(_Stream, layer.stream).hold_places(model.device)


def move_resident(model: PreTrainedModel, device: torch.device) -> None:
    """Moves everything in memory: all but the weights of streamed layers."""
    model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))


def change_weight(model: PreTrainedModel, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """Changes a parameter in place; that of a streamed layer, whenever it is read."""
    stream, name_in_layer = _stream_of(model, name)
    if stream is None:
        weight = model.get_parameter(name).data
        weight.copy_(change(weight))
        return
    read: ReadLayer = stream.read

    def read_changed() -> dict[str, Tensor]:
        weights = read()
        with torch.no_grad():
            return weights | {name_in_layer: change(weights[name_in_layer]).to(weights[name_in_layer].dtype)}

    stream.read = read_changed


def _stream_of(model: PreTrainedModel, name: str) -> tuple[Any, str]:
    """The stream of the layer of a parameter, None if there is none, and the name of the parameter in the layer."""
    prefix = f"{architecture_of(model.config).layers}."
    if not name.startswith(prefix):
        return None, name
    index, _, name_in_layer = name.removeprefix(prefix).partition(".")
    return vars(decoder_layers(model)[int(index)]).get("stream"), name_in_layer


def state_in_parts(model: PreTrainedModel, most: int) -> Iterator[dict[str, Tensor]]:
    """The state of a model, without its streamed layers first, then with these on the CPU: in parts of at most so many
    bytes, but for a layer that has more; in one part if no layer is streamed."""
    if not is_streamed(model):
        yield model.state_dict()
        return
    prefix = f"{architecture_of(model.config).layers}."
    part = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(prefix)}
    for index in range(len(decoder_layers(model))):
        with loaded_layer(model, index) as layer:
            weights = {f"{prefix}{index}.{name}": tensor.cpu() for name, tensor in layer.state_dict().items()}
        if sum(tensor.nbytes for tensor in (*part.values(), *weights.values())) > most:
            yield part
            part = {}
        part |= weights
    yield part


def whole_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state of a model with the weights of all layers; weights of streamed layers are on the CPU."""
    return {name: tensor for part in state_in_parts(model, 0) for name, tensor in part.items()}


def is_streamed(model: PreTrainedModel) -> bool:
    """True if layers are in memory only while they are in use."""
    # Also called for families that cannot be pruned.
    return any("stream" in vars(module) for module in model.modules())


@contextlib.contextmanager
def loaded_layer(model: PreTrainedModel, layer: int) -> Iterator[nn.Module]:
    """A decoder layer with its weights in memory while this lasts, for streamed and other models."""
    module = decoder_layers(model)[layer]
    stream: _Stream | None = getattr(module, "stream", None)
    with stream.loaded() if stream else contextlib.nullcontext():
        yield module


def plain_weights(tensors: dict[str, Tensor], device: torch.device, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors on a device; floating-point tensors in a dtype, or with None in theirs."""
    return {name: tensor.to(device, dtype if tensor.is_floating_point() else None) for name, tensor in tensors.items()}
