"""Ways to run the same arithmetic faster: packed weights on a CPU, captured graphs on CUDA, compiled regions.

Each has the plain modules as its fallback and needs nothing that torch does not bring; only compilation needs a compiler.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

ACCELERATIONS = ("auto", "none", "packed", "compile", "graph")
MAX_PACKED_BYTES = 2**30  # weights of a backbone that may be kept twice
WARM_UP_CALLS = 3
Module = TypeVar("Module", bound=nn.Module)


def resolve(acceleration: str, device: torch.device) -> str:
    """What `acceleration` means on `device`: `"auto"` is graphs on CUDA and packed weights on a CPU. Raises ValueError."""
    if acceleration not in ACCELERATIONS:
        raise ValueError(f"acceleration={acceleration!r} is not one of {', '.join(ACCELERATIONS)}")
    if acceleration == "auto":
        return {"cuda": "graph", "cpu": "packed"}.get(device.type, "none")
    if acceleration == "graph" and device.type != "cuda":
        raise ValueError(f"acceleration='graph' needs a CUDA device, the model is on {device}; use 'auto', 'none' or 'compile'")
    return acceleration


class PackedLinear(nn.Module):
    """A linear layer whose weight lies in the blocked layout of oneDNN: several times faster than the plain one for few rows,
    which on a CPU is bound by reading weights. Inference only; a change of the plain layer is not seen."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], ""))


def is_packable(module: nn.Module) -> bool:
    """Whether `module` is a plain linear layer on a CPU whose arithmetic oneDNN has, and which nobody watches."""
    if type(module).forward is not nn.Linear.forward or not isinstance(module, nn.Linear):
        return False
    if module._forward_hooks or module._forward_pre_hooks or torch.is_autocast_enabled("cpu"):
        return False
    weight = module.weight
    plain = type(weight) in (nn.Parameter, Tensor) and weight.device.type == "cpu" and "forward" not in module.__dict__
    if not plain or not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    has_bfloat16 = weight.dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32 or has_bfloat16


def packed_copy(module: Module) -> Module:
    """`module` with packed linear layers, sharing every other tensor; `module` itself where there is nothing to pack."""
    if is_packable(module):
        return cast(Module, PackedLinear(cast(nn.Linear, module)))
    children = {name: packed_copy(child) for name, child in module.named_children()}
    if all(children[name] is child for name, child in module.named_children()):
        return module
    clone = copy.copy(module)
    clone._modules = {**module._modules, **children}
    return clone


@contextmanager
def packed(module: nn.Module) -> Iterator[None]:
    """Let the linear layers of `module` run packed, unless they are too large to be kept twice."""
    layers = [layer for layer in module.modules() if is_packable(layer)]
    if sum(layer.weight.numel() * layer.weight.itemsize for layer in cast(list[nn.Linear], layers)) > MAX_PACKED_BYTES:
        layers = []
    for layer in layers:
        layer.forward = PackedLinear(cast(nn.Linear, layer)).forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)  # another thread's generation may have taken it away: it runs on, unpacked


class Graphs:
    """Captures a function of tensors once per key and shapes, then replays it: one launch for all of its kernels.

    The function must not depend on values of tensors, and what it reads besides its arguments (weights, a static cache) must
    stay where it is.
    """

    def __init__(self) -> None:
        self.captured: dict[Any, tuple[Any, tuple[Tensor, ...], Tensor]] = {}
        self.pool: Any = None

    def __call__(self, key: Any, function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
        """`function(*arguments)`, a new tensor."""
        full_key = _key(key, arguments)
        if full_key not in self.captured:
            self.capture(key, function, *arguments)
        graph, inputs, output = self.captured[full_key]
        for mine, given in zip(inputs, arguments, strict=True):
            mine.copy_(given)
        graph.replay()
        return output.clone()

    def capture(self, key: Any, function: Callable[..., Tensor], *arguments: Tensor) -> None:
        """Record `function` for arguments like these; it runs a few times, with every side effect that it has."""
        inputs = tuple(argument.clone(memory_format=torch.contiguous_format) for argument in arguments)
        with torch.cuda.device(inputs[0].device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP_CALLS):  # libraries choose kernels and allocate workspaces outside of the graph
                    function(*inputs)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                output = function(*inputs)
        self.pool = graph.pool()
        self.captured[_key(key, arguments)] = (graph, inputs, output)


def _key(key: Any, arguments: tuple[Tensor, ...]) -> tuple[Any, ...]:
    return (key, *((tuple(argument.shape), argument.dtype) for argument in arguments))


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` compiled for the shapes that it is called with; needs the compiler that torch.compile needs on the device."""
    return cast(Callable[..., Tensor], torch.compile(function, dynamic=False))
