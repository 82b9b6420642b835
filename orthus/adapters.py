"""LoRA adapters on the backbone (PEFT), on plain or quantised weights (torchao), and what is left when they are merged.

Only linear layers of the backbone are adapted. Token embeddings (with the code rows), codebook, LM head and diffusion head
keep training in full. What trains is in fp32, whatever the resting weights are in: small steps are lost in bf16.
`save_pretrained` of a model with adapters writes the merged, plain model, all in the dtype of the resting weights.
"""

import copy
import difflib
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from orthus.modeling import OrthusForConditionalGeneration

QUANTIZATIONS = ("int8", "int4")
INT4_GROUP_SIZE = 32
TRAINABLE = ("Int8Tensor", "IntxUnpackedToInt8Tensor")  # torchao's tensors that let gradients of the layer's input through
HINT = "pip install 'orthus[adapters]'"


def quantization(kind: str) -> Any:
    """The `quantization_config` for `from_pretrained` that stores the backbone's linear weights as integers; None for `"no"`.

    `"int8"`: one scale per output channel; `"int4"`: one scale per 32 inputs. Both run on any device; an int4 value takes a
    byte here, while torchao's `Int4WeightOnlyConfig` packs two into one and needs CUDA.
    """
    if kind == "no":
        return None
    if kind not in QUANTIZATIONS:
        raise ValueError(f"quantize={kind!r} is not one of {', '.join(QUANTIZATIONS)}")
    try:
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
        from transformers import TorchAoConfig
    except ImportError as error:
        raise ImportError(f"quantize={kind!r} needs torchao: {HINT}") from error
    if kind == "int8":
        return TorchAoConfig(Int8WeightOnlyConfig())
    return TorchAoConfig(IntxWeightOnlyConfig(getattr(torch, kind), PerGroup(INT4_GROUP_SIZE)))


def add_lora(
    model: "OrthusForConditionalGeneration",
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
) -> "OrthusForConditionalGeneration":
    """Put low-rank adapters beside linear layers of the backbone, in place: `W x + alpha / rank * B A x`, with B = 0 at first.

    The rest of the backbone stops training, but for its token embeddings; other parts train or rest as they did. Adapters, token
    embeddings that train and other parts in which something trains are in fp32 from now on.

    Args:
        targets: how the names of the layers end, such as `q_proj` or `self_attn.q_proj`; None for every linear layer.

    Raises:
        ValueError: a target that no layer has, adapters that are there already, or weights that cannot carry any.
        ImportError: without PEFT.
    """
    peft = _peft()
    if has_lora(model):
        raise ValueError("the model has adapters already; merge them first with merge_lora(model)")
    if rank < 1:
        raise ValueError(f"rank={rank}; give at least 1")
    names = _linear_names(model.backbone, targets)
    for name in names:
        weight = cast(Tensor, model.backbone.get_submodule(name).weight)
        if is_quantized(weight) and type(weight).__name__ not in TRAINABLE:
            kind = type(weight).__name__
            raise ValueError(f"{name} holds {kind}, through which torchao has no gradient; use quantization('int8')")
    table = cast(Tensor, model.get_input_embeddings().weight)
    table_trains = table.requires_grad
    with warnings.catch_warnings():  # PEFT's own merging would quantise the sum again; ours does not
        warnings.filterwarnings("ignore", message=".*get_apply_tensor_subclass.*")
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names)
        peft.inject_adapter_in_model(config, model.backbone)
    table.requires_grad_(table_trains)
    _lift(model)
    return model


def has_lora(model: nn.Module) -> bool:
    """Whether `add_lora` was called and `merge_lora` was not."""
    return bool(getattr(model.backbone, "peft_config", None))


@torch.no_grad()
def merge_lora(model: "OrthusForConditionalGeneration") -> "OrthusForConditionalGeneration":
    """Add the adapters to the weights, in place; quantised weights become plain ones. An ordinary model is left, all of which
    trains again."""
    if not has_lora(model):
        raise ValueError("the model has no adapters to merge; add_lora(model) adds them")
    for name, linear in _plain_linears(model):
        model.set_submodule(name, linear)
    _lower(model)
    del model.backbone.peft_config
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    for name, part in model.named_children():
        part.requires_grad_(name != "autoencoder")
    return model


@torch.no_grad()
def save_merged(
    model: "OrthusForConditionalGeneration", folder: str | Path, state_dict: dict[str, Tensor] | None = None, **options: Any
) -> None:
    """Write what `merge_lora` would leave, without changing `model`; `options` as for `save_pretrained`.

    state_dict: the model's weights, where it holds only shards of them itself.
    """
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    dtype, lifted = resting_dtype(model), {f"{name}." for name, _ in _lifted(model)}
    weights: dict[str, Tensor] = model.state_dict() if state_dict is None else state_dict
    weights = {key: value.to(dtype) if key.startswith(tuple(lifted)) else value for key, value in weights.items()}
    for name, linear in _plain_linears(model, state_dict):
        weights = {key: value for key, value in weights.items() if not key.startswith(f"{name}.")}
        weights |= {f"{name}.{key}": value for key, value in linear.state_dict().items()}
    with torch.device("meta"):  # `transformers` takes from it all but the weights
        plain: Any = type(model)(cast(Any, config))
    plain.generation_config = model.generation_config
    plain.to(dtype).save_pretrained(str(folder), state_dict=weights, **options)


def resting_dtype(model: "OrthusForConditionalGeneration") -> torch.dtype:
    """Of the weights in the backbone's layers that do not train, as numbers."""
    table = model.get_input_embeddings().weight
    named = [(name, p) for name, p in model.backbone.named_parameters() if p is not table and ".lora_" not in name]
    return next(p.dtype for _, p in named if p.is_floating_point() and not is_quantized(p))


def _lift(model: "OrthusForConditionalGeneration") -> None:
    """Put all that trains in fp32, with its neighbours of the same part; the backbone's layers get inputs of their own dtype."""
    dtype = resting_dtype(model)
    for name, parameter in model.backbone.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    for _, part in _lifted(model):
        if dtype.itemsize < 4 and any(p.requires_grad for p in part.parameters()):
            part.float()
            if part is model.get_input_embeddings():
                cast(Any, model.backbone).lowering = part.register_forward_hook(partial(_lowered, dtype))


def _lower(model: "OrthusForConditionalGeneration") -> None:
    """What [`_lift`] did, undone."""
    for _, part in _lifted(model):
        part.to(resting_dtype(model))
    if hasattr(model.backbone, "lowering"):
        cast(Any, model.backbone).lowering.remove()
        del model.backbone.lowering


def _lifted(model: "OrthusForConditionalGeneration") -> list[tuple[str, nn.Module]]:
    """Name and module of what may train beside adapters."""
    table = model.get_input_embeddings()
    parts = [(name, part) for name, part in model.named_children() if name not in ("backbone", "autoencoder")]
    return [next((name, part) for name, part in model.named_modules() if part is table), *parts]


def _lowered(dtype: torch.dtype, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.to(dtype)


def is_quantized(weight: Tensor) -> bool:
    """Whether torchao stores the tensor as integers."""
    return type(weight).__module__.startswith("torchao.")


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"LoRA needs peft: {HINT}") from error
    return peft


def _linear_names(backbone: nn.Module, targets: Sequence[str] | None) -> list[str]:
    """Names of the backbone's linear layers that `targets` select; ValueError for a target without a layer."""
    names = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    if not names or targets is not None and not targets:
        raise ValueError(f"{type(backbone).__name__} has {len(names)} linear layers and targets is {targets}: nothing to adapt")
    chosen = set(names) if targets is None else set()
    for target in targets or ():
        found = {name for name in names if name == target or name.endswith(f".{target}")}
        if not found:
            leaves = sorted({name.rpartition(".")[2] for name in names})
            near = difflib.get_close_matches(target, [*leaves, *names], n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"the backbone has {', '.join(leaves)}"
            raise ValueError(f"no linear layer of the backbone is called {target!r}; {hint}")
        chosen |= found
    return [name for name in names if name in chosen]


def _plain_linears(model: nn.Module, gathered: dict[str, Tensor] | None = None) -> Iterator[tuple[str, nn.Linear]]:
    """Name and plain replacement of each layer that has adapters or quantised weights; `gathered`: the model's weights, where it
    holds shards of them."""
    peft = _peft()
    modules: dict[str, Any] = dict(model.named_modules())
    adapted = {name: module for name, module in modules.items() if isinstance(module, peft.tuners.lora.LoraLayer)}
    within = tuple(f"{name}." for name in adapted)
    for name, module in modules.items():
        is_base = name.startswith(within)
        if name not in adapted and (is_base or not isinstance(module, nn.Linear) or not is_quantized(module.weight)):
            continue
        base = module.get_base_layer() if name in adapted else module
        tensors: dict[str, Tensor] = module.state_dict()
        if gathered is not None:
            tensors = {key: gathered[f"{name}.{key}"] for key in tensors}
        prefix = "base_layer." if name in adapted else ""
        weight, bias = tensors[f"{prefix}weight"], tensors.get(f"{prefix}bias")
        if gathered is None:
            weight = peft.utils.integrations.dequantize_module_weight(base).detach()
        if name in adapted:
            deltas = [_delta(tensors, adapter, module.scaling[adapter]) for adapter in module.active_adapters]
            weight = sum(deltas, start=weight.float()).to(weight.dtype)
        linear = nn.Linear(base.in_features, base.out_features, bias is not None, device="meta")
        linear.load_state_dict({"weight": weight, **({} if bias is None else {"bias": bias})}, assign=True)
        yield name, linear.train(module.training)


def _delta(tensors: dict[str, Tensor], adapter: str, scaling: float) -> Tensor:
    up, down = (tensors[f"lora_{part}.{adapter}.weight"].float() for part in "BA")
    return (up @ down) * scaling
