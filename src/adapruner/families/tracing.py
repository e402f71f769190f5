"""The inputs of the projections of a decoder layer, and the rows of the parameters from which they are computed.

Found by differentiation on a tiny random model. Parameter names are not used.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adapruner.model.architecture import RowKind

_TOKENS = 48
# Row-wise projections with more inputs are skipped: no tiny model has them.
_MOST_INPUTS = 1024


class _Transparent(TorchFunctionMode):
    """While it lasts, statistics of norms are constants and rectifiers are smooth, so that a number has gradients to
    exactly the numbers that it is computed from."""

    def __torch_function__(self, call: Callable[..., Any], types: object, args: Any = (), kwargs: Any = None) -> object:
        kwargs = kwargs or {}
        if call in (functional.layer_norm, functional.rms_norm):
            return _norm(call is functional.layer_norm, *args, **kwargs)
        if call in (functional.relu, functional.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_):
            return functional.silu(args[0])
        result = call(*args, **kwargs)
        return result.detach() if getattr(call, "__name__", "") in ("rsqrt", "mean", "var") else result


def _norm(
    centred: bool, x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: Any = None
) -> Tensor:
    axes = tuple(range(-len(shape), 0))
    mean = x.mean(axes, keepdim=True) if centred else torch.zeros(())
    scaled = (x - mean) * ((x - mean).square().mean(axes, keepdim=True) + (eps or 1e-6)).rsqrt()
    scaled = scaled if weight is None else scaled * weight
    return scaled if bias is None else scaled + bias


@dataclass(frozen=True)
class Part:
    """The rows of one parameter, along its outputs, that inputs of a writer depend on.

    Attributes:
        rows: [inputs, rows] bool: True if the input depends on the row.
        groups, query_heads: the group and the query head of every row; None if there is not exactly one.
    """

    parameter: str
    rows: Tensor
    groups: list[int | None]
    query_heads: list[int | None]

    def passes(self, count: int) -> list[slice] | None:
        """The stretches of rows in which all groups follow each other in order, with equal widths; None for any other
        arrangement."""
        runs = [(group, len(list(rows))) for group, rows in groupby(self.groups)]
        if [group for group, _ in runs] != list(range(count)) * (len(runs) // count):
            return None
        passes, start = [], 0
        for width, equal in groupby(runs, key=lambda run: run[1]):
            for _ in range(len(list(equal)) // count):
                passes.append(slice(start, start + width * count))
                start += width * count
        return passes if start == len(self.groups) else None

    def kind_of_heads(self, stretch: slice, count: int) -> RowKind:
        """The kind of the rows of a pass: a query belongs to one query head; each input has a value of its own."""
        has_one_head = {head is not None for head in self.query_heads[stretch]}
        if len(has_one_head) > 1:
            return "query-key-value"
        is_query = has_one_head.pop()
        if is_query and self.query_heads[stretch] != self.groups[stretch]:
            return "query"
        is_value = stretch.stop - stretch.start > count and int(self.rows[:, stretch].sum(1).max()) == 1
        return "value" if is_value else "query" if is_query else "key"


@dataclass(frozen=True)
class Writer:
    """A projection whose output is added to the hidden state.

    Attributes:
        weight: name of its weight in the model.
        axis: axis of its inputs in the stored weight.
        inputs: number of inputs per token.
        normalized: a norm follows before the output is added, so that its scale has no effect.
    """

    path: str
    weight: str
    axis: int
    inputs: int
    normalized: bool


@dataclass(frozen=True)
class ExpertWriter:
    """A stack of down projections, and the parts of other stacks on which the channels of an expert depend.

    Attributes:
        axes: axis of the channels in the stored parameter and in each parameter of `parts`.
    """

    parameter: str
    parts: list[Part]
    axes: dict[str, int]


class Layer:
    """One decoder layer of the tiny model, with the inputs of its projections."""

    def __init__(self, model: PreTrainedModel, path: str, layers: list[nn.Module], index: int) -> None:
        self.path, self._model, self._layer = f"{path}.{index}", model, layers[index]
        self.parameters = dict(self._layer.named_parameters())
        modules = dict(self._layer.named_modules())
        # By path, the plain projections, and those into the hidden state.
        self.linears = {path: module for path, module in modules.items() if isinstance(module, nn.Linear | Conv1D)}
        self._projections = {
            path: module
            for path, module in self.linears.items()
            if (module.nf if isinstance(module, Conv1D) else module.out_features) == model.config.hidden_size
        }
        self._read: dict[str, Tensor] = {}
        hooks = [
            module.register_forward_pre_hook(lambda _, args, name=name: self._read.__setitem__(name, args[0]))
            for name, module in self._projections.items()
        ]
        self._run(hooks)
        self.writers = self._find_writers()

    def returned(self, path: str) -> int:
        """Number of values that a module returns; 0 for a single tensor."""
        seen: list[object] = []
        self._run([self._layer.get_submodule(path).register_forward_hook(lambda *call: seen.append(call[2]))])
        return len(seen[0]) if seen and isinstance(seen[0], tuple | list) else 0

    def groups(self, writer: Writer, heads: int) -> tuple[int, list[Part]]:
        """Number of groups that the inputs of a writer fall into, and the rows of parameters that belong to them. The
        inputs of query heads, of which there may be none, follow each other."""
        touched = self._touched(writer)
        count, owner = _components(writer.inputs, touched.values())
        query_head = torch.arange(writer.inputs) * heads // writer.inputs if heads > 1 else owner
        return count, [
            Part(name, rows, *([_only(numbers[column]) for column in rows.T] for numbers in (owner, query_head)))
            for name, rows in touched.items()
        ]

    def expert_writer(self, stacks: Iterable[str]) -> ExpertWriter | None:
        """The down projections of the experts, and the parameters that compute their channels, among the parameters
        with a part for every expert along their first axis; None if they are not found."""
        path = next((name.rpartition(".")[0] for name in stacks if self.parameters[name].dim() == 3), None)
        if path is None:
            return None
        module, called = self._layer.get_submodule(path), list[object]()
        self._run([module.register_forward_pre_hook(lambda *call: called.extend(call[1:]), with_kwargs=True)])
        stored = {name.rpartition(".")[2]: self.parameters[name] for name in stacks if name.rpartition(".")[0] == path}
        arguments, named = tree_map(lambda value: value.detach() if isinstance(value, Tensor) else value, called[:2])

        def output(values: Mapping[str, Tensor]) -> Tensor:
            with _Transparent(), torch.enable_grad():
                return _first(torch.func.functional_call(module, dict(values), arguments, named)).flatten(0, -2)

        for name in stored:
            writes = torch.autograd.grad(output(stored)[:, 5].sum(), stored[name])[0] != 0
            expert = int(writes.flatten(1).any(1).nonzero()[0]) if writes.any() else 0
            # The axis of the inputs is the other one if output 5 depends on row or column 5 of its matrix alone.
            axes = [
                2 - axis
                for axis in (0, 1)
                if writes.dim() == 3 and writes[expert].any(1 - axis).nonzero().flatten().tolist() == [5]
            ]
            if axes:
                touched = _touched_by_channels(output, stored, name, axes[0], expert)
                parts = [
                    Part(f"{path}.{other}", rows, [_only(column.nonzero()) for column in rows.T], [])
                    for other, (_, rows) in touched.items()
                ]
                axis_of = {f"{path}.{other}": axis for other, (axis, _) in touched.items()}
                return ExpertWriter(f"{path}.{name}", parts, axis_of | {f"{path}.{name}": axes[0]})
        return None

    def _touched(self, writer: Writer) -> dict[str, Tensor]:
        """[inputs, rows] bool for each parameter of which no input depends on all rows: the rows that it depends on."""
        read = self._read[writer.path]
        mix = torch.randn(read.shape[:-1], generator=torch.Generator().manual_seed(2))
        inputs = ((read[..., number] * mix).sum() for number in range(writer.inputs))

        def by_output(name: str, entries: Tensor) -> Tensor:
            is_transposed = isinstance(self._layer.get_submodule(name.rpartition(".")[0]), Conv1D)
            return _any_beside(entries, int(is_transposed and entries.dim() > 1))

        touched = _touched(inputs, self.parameters, by_output)
        return {name: rows for name, rows in touched.items() if rows.any(1).all() and not rows.all(1).any()}

    def _find_writers(self) -> list[Writer]:
        """Projections whose output is added to the hidden state; with all others silent, nothing else is added."""
        writers = []
        for name in self._projections:
            read = self._read.get(name)
            if read is None or not read.requires_grad or read.shape[-1] > _MOST_INPUTS:
                continue
            before, written, after = self._alone(name)
            if not written.requires_grad or not after.requires_grad:
                continue
            (gradient,) = torch.autograd.grad(after[:, 5].sum(), written, allow_unused=True)
            if gradient is not None and (gradient.flatten(0, -2) != 0).any(0).nonzero().flatten().tolist() == [5]:
                plain = torch.allclose(after, before + written.view_as(before))
                axis = 0 if isinstance(self._projections[name], Conv1D) else 1
                # Under a norm, doubling the output changes nothing.
                change = torch.zeros(()) if plain else self._alone(name, times=2)[2] - after
                normalized = not plain and bool(change.norm() < 0.01 * (after - before).norm())
                writers.append(Writer(name, f"{self.path}.{name}.weight", axis, read.shape[-1], normalized))
        return writers

    def _alone(self, name: str, times: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """[tokens, hidden]: the input of the layer, the output of a candidate times a factor, and the output of the
        layer with all other candidates silent."""
        noted: dict[str, Tensor] = {}
        silent: list[nn.Module] = [module for path, module in self._projections.items() if path != name]
        # Experts are parameters of three axes, not projections.
        for module in self._layer.modules():
            if any(parameter.dim() == 3 for parameter in module.parameters(recurse=False)):
                silent.append(module)

        def note_written(*call: Any) -> Tensor:
            noted["written"] = call[2] * times
            return noted["written"]

        hooks = [
            *(module.register_forward_hook(lambda *call: _silenced(call[2])) for module in silent),
            self._projections[name].register_forward_hook(note_written),
            self._layer.register_forward_pre_hook(
                lambda _, args, named: noted.update(before=(args or list(named.values()))[0]), with_kwargs=True
            ),
            self._layer.register_forward_hook(lambda *call: noted.update(after=_first(call[2]))),
        ]
        self._run(hooks)
        return noted["before"].flatten(0, -2), noted["written"], noted["after"].flatten(0, -2)

    def _run(self, hooks: Iterable[Any]) -> None:
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(3, self._model.config.vocab_size, (2, _TOKENS // 2), generator=generator)
        try:
            with _Transparent(), torch.enable_grad():
                self._model(tokens, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()


def _touched_by_channels(
    output: Callable[[Mapping[str, Tensor]], Tensor], stacks: Mapping[str, Tensor], name: str, axis: int, expert: int
) -> dict[str, tuple[int, Tensor]]:
    """The axis of the channels in each other stack, and [channels, rows] bool: True if a channel depends on the row of
    one expert. The output of a channel is the output with all other channels silent."""
    others = {other: stack for other, stack in stacks.items() if other != name}

    def alone(channel: int) -> Tensor:
        silenced = torch.zeros_like(stacks[name])
        silenced.select(axis, channel).copy_(stacks[name].detach().select(axis, channel))
        return output({**stacks, name: silenced}).square().sum()

    outputs = map(alone, range(stacks[name].shape[axis]) if others else ())
    rows_by_stack = {}
    for other, touched in _touched(outputs, others, lambda _, entries: entries[expert]).items():
        for stored in range(1, touched.dim()):
            rows = _any_beside(touched, 0, stored)
            if rows.any(1).all() and (rows.sum(0) == 1).all():
                rows_by_stack[other] = (stored, rows)
    return rows_by_stack


def _touched(
    outputs: Iterable[Tensor], parameters: Mapping[str, Tensor], reduce: Callable[[str, Tensor], Tensor]
) -> dict[str, Tensor]:
    """[outputs, …] bool for each parameter: True if the output depends on an entry, after reduction."""
    touched: dict[str, list[Tensor]] = {}
    for output in outputs:
        gradients = torch.autograd.grad(output, list(parameters.values()), retain_graph=True, allow_unused=True)
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
            entries = torch.zeros_like(parameter, dtype=torch.bool) if gradient is None else gradient != 0
            touched.setdefault(name, []).append(reduce(name, entries))
    return {name: torch.stack(entries) for name, entries in touched.items()}


def _any_beside(entries: Tensor, *axes: int) -> Tensor:
    """True if any entry is, over all axes except the given ones."""
    others = [axis for axis in range(entries.dim()) if axis not in axes]
    return entries.amax(others) if others else entries


def _silenced(output: Tensor | tuple[Tensor, ...]) -> object:
    return torch.zeros_like(output) if isinstance(output, Tensor) else tuple(map(_silenced, output))


def _first(output: object) -> Tensor:
    return cast(Tensor, output[0] if isinstance(output, tuple | list) else output)


def _components(inputs: int, touched: Iterable[Tensor]) -> tuple[int, Tensor]:
    """Number of groups, and the group of each input: inputs that share a row belong to one group."""
    parent = list(range(inputs))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    for rows in touched:
        for column in rows.T:
            together = column.nonzero().flatten().tolist()
            for number in together[1:]:
                parent[root(number)] = root(together[0])
    roots = [root(number) for number in range(inputs)]
    groups = {number: group for group, number in enumerate(dict.fromkeys(roots))}
    return len(groups), torch.tensor([groups[number] for number in roots])


def _only(values: Tensor) -> int | None:
    """The only distinct value; None if there are several or none."""
    distinct = values.unique()
    return int(distinct) if len(distinct) == 1 else None
