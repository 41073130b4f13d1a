"""A CPU that answers to ``cuda``, for trying out scripts that name the device in every call.

Devices in calls of torch are rewritten, and what scripts commonly ask ``torch.cuda`` for is answered; not
streams, events, ``torch.Generator``, properties and capability. Autocast for ``cuda`` leaves operations on
the CPU as they are, fp32.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader

_active: list[TorchFunctionMode] = []


def use_cpu(devices: int = 1) -> None:
    """Let this process find so many CUDA devices, all of which are its CPU. Lasts until the process ends."""
    if _active:
        return
    mode = _CpuForCuda()
    mode.__enter__()
    _active.append(mode)
    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "device_count": lambda: devices,
        "device": _SameDevice,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: "CPU",
        "synchronize": lambda device=None: None,
        "reset_peak_memory_stats": lambda device=None: None,
        "get_rng_state": lambda device=0: torch.get_rng_state(),
        "set_rng_state": lambda new_state, device=0: _set_rng_states([new_state]),
        "get_rng_state_all": lambda: [torch.get_rng_state() for _ in range(devices)],
        "set_rng_state_all": _set_rng_states,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    # What torch itself asks: its optimizers whether a graph is captured, its loaders for memory to pin.
    for module, name in ((torch.accelerator, "is_available"), (torch.cuda, "is_current_stream_capturing")):
        setattr(module, name, lambda: False)
    # Where files are loaded to; asked before CUDA's own, whose priority is 20.
    torch.serialization.register_package(15, lambda storage: None, _stay)
    gloo = {"backend": "gloo", "device_id": None, "pg_options": None}
    _with_options(dist, "init_process_group", **gloo)
    _with_options(dist, "new_group", **gloo)
    _with_options(dist, "barrier", device_ids=None)
    _with_options(DistributedDataParallel, "__init__", device_ids=None, output_device=None)
    _with_options(torch.random, "fork_rng", devices=())  # forks the CPU's, which is that of all
    _with_options(DataLoader, "__init__", pin_memory=False)  # by a thread, which has no mode
    _convert_batch_norms()


class _CpuForCuda(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.device:
            return _cpu(func(*args, **kwargs))
        if func in (Tensor.cuda, Tensor.pin_memory):
            return args[0]
        kwargs = {name: _cpu(value, name == "device") for name, value in kwargs.items()}
        return func(*(_cpu(value, func is Tensor.to and i == 1) for i, value in enumerate(args)), **kwargs)


def _cpu(value: Any, device: bool = False) -> Any:
    """The CPU for a CUDA device, which may be a number where a ``device`` is expected; else the value."""
    named = value.type if isinstance(value, torch.device) else value if isinstance(value, str) else ""
    number = device and isinstance(value, int) and not isinstance(value, bool)
    return torch.device("cpu") if number or named.partition(":")[0] == "cuda" else value


class _SameDevice(nullcontext):
    """``torch.cuda.device``: there is no other device to change to."""

    def __init__(self, device: Any) -> None:
        super().__init__()


def _set_rng_states(new_states: Iterable[Tensor]) -> None:
    for state in new_states:
        if state.shape == torch.get_rng_state().shape:  # a GPU's, from a checkpoint, has no meaning here
            torch.set_rng_state(state)


def _stay(storage: Any, location: str) -> Any:
    """What was, or should be, on a CUDA device stays where it was read to."""
    return storage if location.startswith("cuda") else None


def _with_options(owner: Any, name: str, **options: Any) -> None:
    """Let a function have these arguments, whatever it is called with."""
    original = getattr(owner, name)
    signature = inspect.signature(original)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.arguments.update(options)
        return original(*given.args, **given.kwargs)

    setattr(owner, name, call)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad):
        return _SumOverRanks.forward(ctx, grad)


class _RanksBatchNorm(_BatchNorm):
    """Batch norm with the statistics of all ranks, which torch has for GPUs only."""

    def forward(
        self,
        x: Tensor,  # (N, C, ...)
    ) -> Tensor:
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        axes = [axis for axis in range(x.ndim) if axis != 1]
        channels = (1, -1) + (1,) * (x.ndim - 2)
        values = x.numel() // x.shape[1] * dist.get_world_size()
        mean = _SumOverRanks.apply(x.sum(axes)) / values
        centred = x - mean.view(channels)
        var = _SumOverRanks.apply((centred * centred).sum(axes)) / values
        y = centred * torch.rsqrt(var + self.eps).view(channels)
        if self.affine:
            y = y * self.weight.view(channels) + self.bias.view(channels)
        if self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.detach(), share)
            self.running_var.lerp_(var.detach() * values / (values - 1), share)
        return y

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"input must be (N, C, ...), got shape {tuple(input.shape)}")


def _convert_batch_norms() -> None:
    """Let ``convert_sync_batchnorm`` give modules that a CPU can run."""
    original = nn.SyncBatchNorm.convert_sync_batchnorm

    def convert(module: nn.Module, process_group: Any = None) -> nn.Module:
        converted = original(module, process_group)
        for part in converted.modules():
            if isinstance(part, nn.SyncBatchNorm):
                part.__class__ = _RanksBatchNorm  # type: ignore[assignment]
        return converted

    setattr(nn.SyncBatchNorm, "convert_sync_batchnorm", convert)  # noqa: B010
