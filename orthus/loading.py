"""What `from_pretrained` adds to `transformers`' own: refusal of incomplete, misshaped, damaged and unsafe weights, and which
parts quantisation and offloading spare."""

import copy
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers.quantizers.auto import AutoQuantizationConfig

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
SHOWN_KEYS = 8
HEADS = ("autoencoder", "latent_embedding", "lm_head", "diffusion_head")
SKIP_LISTS = ("modules_to_not_convert", "llm_int8_skip_modules", "skip_modules")  # names for it in the configs of `transformers`


def refuse_pickles(name_or_path: str, subfolder: str = "") -> None:
    """ValueError for a local folder whose only weights are pickles, which can run code when they are opened."""
    folder = Path(name_or_path) / subfolder
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    found = f"only {', '.join(pickles)}, which orthus does not open because a pickle can run code" if pickles else "no weights"
    raise ValueError(f"{folder} holds {found}; save the weights as model.safetensors")


def refuse_missing_shards(name_or_path: str, subfolder: str = "") -> None:
    """ValueError for a local folder that lacks some of the weight files which its index names."""
    folder = Path(name_or_path) / subfolder
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} of {len(shards)} weight files: {', '.join(missing)}; download again")


def damaged(error: SafetensorError, name_or_path: str) -> ValueError:
    """A ValueError in place of what `safetensors` raises for a file that it cannot read."""
    return ValueError(f"{name_or_path}: a weight file is damaged or is no safetensors file ({error}); download it again")


def check_shapes(name_or_path: str, report: dict[str, Any]) -> None:
    """ValueError naming the tensors whose shapes are not those of the config."""
    wrong = sorted(report["mismatched_keys"])
    if wrong:
        shown = "; ".join(f"{key}: {tuple(found)} in the file, {tuple(wanted)} by the config" for key, found, wanted in wrong)
        raise ValueError(f"{name_or_path}: misshaped tensors ({shown}); weights and config.json do not belong together")


def check_complete(name_or_path: str, report: dict[str, Any]) -> None:
    """ValueError naming the tensors that the checkpoint lacks."""
    missing = sorted(report["missing_keys"])
    if missing:
        more = f" and {len(missing) - SHOWN_KEYS} more" if len(missing) > SHOWN_KEYS else ""
        raise ValueError(
            f"{name_or_path} lacks {len(missing)} tensors: {', '.join(missing[:SHOWN_KEYS])}{more}; the file is incomplete or "
            "belongs to another config (allow_missing=True starts them from random values; `python -m train.build` makes an "
            "Orthus-base of a Chameleon)"
        )


def spare_heads(quantization: Any) -> Any:
    """A quantisation config (or its dict) that leaves all but the backbone alone, unless it says itself what to leave alone.

    Raises ValueError if it asks for quantised embeddings: soft VQ reads their code rows as a plain matrix.
    """
    config = AutoQuantizationConfig.from_dict(quantization) if isinstance(quantization, dict) else copy.copy(quantization)
    if getattr(config, "include_input_output_embeddings", False):
        raise ValueError("include_input_output_embeddings=True: soft VQ reads rows of the embeddings, leave them unquantised")
    for name in SKIP_LISTS:
        if hasattr(config, name) and getattr(config, name) is None:
            setattr(config, name, list(HEADS))
    return config


def check_resident(name_or_path: str, model: Any) -> None:
    """ValueError if a device map leaves more than layers of the backbone on the disk or another device until they are called:
    embeddings, autoencoder and heads are also read directly."""
    embeddings = model.get_input_embeddings()
    parts = {name: module for name, module in model.named_modules() if module is embeddings or name in HEADS}
    away = [name for name, module in parts.items() if any(parameter.is_meta for parameter in module.parameters())]
    if not away or not hasattr(model, "hf_device_map"):
        return
    device = next((place for place in model.hf_device_map.values() if place not in ("cpu", "disk")), "cpu")
    fitting = dict.fromkeys(HEADS, device)
    for name, child in model.backbone.named_children():
        fitting[f"backbone.{name}"] = "disk" if isinstance(child, nn.ModuleList) else device
    raise ValueError(
        f"{name_or_path}: device_map offloads {', '.join(away)}; only layers of the backbone can be offloaded. "
        f"Give more memory, or a map such as device_map={fitting}"
    )
