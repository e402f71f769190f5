"""Collectives of the simulated device: NCCL is replaced by gloo, which reads and writes the memory of the tensors."""

import functools
import os
from typing import Any

import simulated_cuda
import torch
import torch.distributed as distributed
from torch._C._distributed_c10d import AllgatherOptions, AllreduceOptions, BarrierOptions, ReduceScatterOptions


def install() -> None:
    """Makes `init_process_group` create groups of this class, and keeps this process to its own device: an allocation
    on another one fails."""
    distributed.Backend.register_backend("simulated", _Group, devices=["cuda", "cpu"])
    init = distributed.init_process_group

    @functools.wraps(init)
    def init_simulated(backend: str | None = None, *arguments: Any, device_id: Any = None, **named: Any) -> None:
        simulated = backend is None or "nccl" in backend
        init("simulated" if simulated else backend, *arguments, **named)

    for module in (distributed, distributed.distributed_c10d):
        module.init_process_group = init_simulated
        module.is_nccl_available = lambda: True
    for index in range(simulated_cuda.native.device_count()):
        if index != int(os.environ["LOCAL_RANK"]):
            simulated_cuda.native.set_total(index, 0)


def _views(tensors: Any) -> list[torch.Tensor]:
    return [simulated_cuda.native.host_view(tensor) for tensor in tensors]


class _Group(distributed.ProcessGroup):
    def __init__(self, store: Any, rank: int, size: int, timeout: Any) -> None:
        super().__init__(rank, size)
        self.gloo = distributed.ProcessGroupGloo(store, rank, size, timeout)

    def getBackendName(self) -> str:  # noqa: N802
        return "simulated"

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cuda")]

    # A group that is written in Python has no backend that knows its name.
    @property
    def group_name(self) -> str:
        return distributed.distributed_c10d._world.pg_names[self]

    def getGroupName(self) -> str:  # noqa: N802
        return self.group_name

    def setGroupName(self, name: str) -> None: ...  # noqa: N802

    def _set_group_name(self, name: str) -> None:
        distributed.distributed_c10d._world.pg_names[self] = name

    def getGroupDesc(self) -> str:  # noqa: N802
        return "simulated"

    def setGroupDesc(self, text: str) -> None: ...  # noqa: N802

    def _set_group_desc(self, text: str) -> None: ...

    def allreduce(self, tensors: Any, opts: Any = None) -> Any:
        opts, views = opts or AllreduceOptions(), _views(tensors)
        if opts.reduceOp != distributed.ReduceOp.AVG:
            return self.gloo.allreduce(views, opts)
        opts.reduceOp = distributed.ReduceOp.SUM
        work = self.gloo.allreduce(views, opts)
        work.wait()
        for view in views:
            view.div_(self.size())
        return work

    def allreduce_coalesced(self, tensors: Any, opts: Any) -> Any:
        for tensor in tensors:
            own = AllreduceOptions()
            own.reduceOp = opts.reduceOp
            work = self.allreduce([tensor], own)
            work.wait()
        return work

    def broadcast(self, tensors: Any, opts: Any) -> Any:
        return self.gloo.broadcast(_views(tensors), opts)

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        return self.gloo.allgather([_views(each) for each in outputs], _views(inputs), opts or AllgatherOptions())

    def _allgather_base(self, output: Any, given: Any, opts: Any = None) -> Any:
        whole, own = _views([output, given])
        parts = [list(whole.view(self.size(), -1))]
        return self.gloo.allgather(parts, [own.reshape(-1)], opts or AllgatherOptions())

    def allgather_into_tensor_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        for output, given in zip(outputs, inputs, strict=True):
            work = self._allgather_base(output, given, opts)
            work.wait()
        return work

    def _reduce_scatter_base(self, output: Any, given: Any, opts: Any = None) -> Any:
        opts = opts or ReduceScatterOptions()
        part, whole = _views([output, given])
        reduce = AllreduceOptions()
        averages = opts.reduceOp == distributed.ReduceOp.AVG
        reduce.reduceOp = distributed.ReduceOp.SUM if averages else opts.reduceOp
        summed = whole.float().clone()
        work = self.gloo.allreduce([summed], reduce)
        work.wait()
        result = summed / self.size() if averages else summed
        part.copy_(result.reshape(self.size(), -1)[self.rank()].view_as(part))
        return work

    def reduce_scatter_tensor_coalesced(self, outputs: Any, inputs: Any, opts: Any) -> Any:
        for output, given in zip(outputs, inputs, strict=True):
            work = self._reduce_scatter_base(output, given, opts)
        return work

    def gather(self, outputs: Any, inputs: Any, opts: Any) -> Any:
        return self.gloo.gather([_views(each) for each in outputs], _views(inputs), opts)

    def scatter(self, outputs: Any, inputs: Any, opts: Any) -> Any:
        return self.gloo.scatter(_views(outputs), [_views(each) for each in inputs], opts)

    # Names of PyTorch 2.13.
    all_gather_single, all_gather_single_coalesced = _allgather_base, allgather_into_tensor_coalesced
    reduce_scatter_single, reduce_scatter_single_coalesced = _reduce_scatter_base, reduce_scatter_tensor_coalesced

    def barrier(self, opts: Any = None) -> Any:
        return self.gloo.barrier(BarrierOptions())
