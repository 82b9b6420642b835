"""`load_autoencoder`: any autoencoder from a folder or a hub name, as the image side of Orthus."""

import inspect
import json
import math
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import MODEL_MAPPING, AutoModel, PreTrainedConfig
from transformers.utils import cached_file, logging

from orthus import conversion, loading
from orthus.autoencoder import Autoencoder
from orthus.configuration import HUB_OPTIONS, as_config
from orthus.foreign_autoencoders import (
    DIFFUSERS_CLASSES,
    DiffusersAutoencoder,
    DiffusersAutoencoderConfig,
    RepresentationAutoencoder,
    RepresentationAutoencoderConfig,
    create_timm_model,
    library,
    patch_features,
    side,
)

logger = logging.get_logger(__name__)

READING_OPTIONS = ("subfolder", "dtype", *HUB_OPTIONS)
OURS = (
    "orthus_patch_autoencoder",
    "orthus_vqgan_autoencoder",
    DiffusersAutoencoderConfig.model_type,
    RepresentationAutoencoderConfig.model_type,
)
ACCEPTED = (
    f"an Orthus autoencoder ({', '.join(OURS)}), a Chameleon, Anole or Orthus checkpoint, a diffusers folder of "
    f"{' or '.join(DIFFUSERS_CLASSES)} (subfolder='vae' in a pipeline) or a timm model"
)
DECODER_PARTS = ("decoder.", "post_quant_conv.")  # what a Chameleon may lack: it reads pictures and draws none
INDEX = "model.safetensors.index.json"


def load_autoencoder(name_or_path: str | Path = "", image_size: int | None = None, **options: Any) -> Autoencoder:
    """The autoencoder in a folder or hub repository, in eval mode; its `config.json` says of which kind it is.

    An autoencoder of ours, a Chameleon, Anole or Orthus checkpoint (only tensors of its autoencoder are read; an image
    decoder that it lacks starts from random values, with a warning), a `diffusers` AutoencoderKL or AutoencoderDC, or a
    `timm` vision transformer, which becomes the frozen encoder of a [`RepresentationAutoencoder`] with a new decoder. The
    latents of the last two are calibrated by `calibrate` and not before.

    Args:
        name_or_path: may be left out with `timm_name`.
        image_size: side of the pictures in pixels, default the stored one. Another one needs a `diffusers` network, which
            is convolutional; `timm` resamples the positions of a transformer for `encoder_kwargs={"img_size": ...}`.
        options: where and how to read: `subfolder`, `dtype` (of torch), `revision`, `cache_dir`, `token`,
            `local_files_only`; fields of the config, such as `merge`, `latent_noise`, `decoder_dim`, `encoder_kwargs`; and
            `timm_name` with `pretrained` (default False: random weights) for an encoder by its name in `timm`.

    Raises:
        ValueError: for another kind of checkpoint, an image size or option that it cannot have, missing or misshaped
            tensors, a damaged file, or pickles.
        ImportError: naming what to install, where `diffusers` or `timm` is needed and absent.
    """
    reading = {key: options.pop(key) for key in READING_OPTIONS if key in options}
    if "timm_name" in options:
        if name_or_path:
            raise ValueError(f"both name_or_path={str(name_or_path)!r} and timm_name={options['timm_name']!r}; give one of them")
        timm_name, pretrained = options.pop("timm_name"), options.pop("pretrained", False)
        return _representation(timm_name, timm_name, {}, image_size, options, reading, pretrained)
    name = str(name_or_path)
    found = _read_config(name, reading)
    load = _loader_of(name, found)
    try:
        return load(name, found, image_size, options, reading).eval()
    except SafetensorError as error:
        raise loading.damaged(error, name) from error


def _read_config(name: str, reading: dict[str, Any]) -> dict[str, Any]:
    if not name:
        raise ValueError("load_autoencoder needs name_or_path or timm_name")
    folder = Path(name) / reading.get("subfolder", "")
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            hint = "it is a diffusers pipeline: pass subfolder='vae'; " if (folder / "model_index.json").is_file() else ""
            raise ValueError(f"{folder} has no config.json; {hint}load_autoencoder takes {ACCEPTED}")
        loading.refuse_pickles(name, reading.get("subfolder", ""))
    try:
        return PreTrainedConfig.get_config_dict(name, **_place(reading))[0]
    except OSError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"cannot find an autoencoder at {name!r}: {reason} | Give a folder or hub name of {ACCEPTED}") from error


def _loader_of(name: str, found: dict[str, Any]) -> Any:
    """Which of the functions below reads a checkpoint with this config.json."""
    if found.get("model_type") in OURS:
        return _load_ours
    if found.get("model_type") in ("chameleon", "orthus"):
        return _load_part
    if found.get("_class_name") in DIFFUSERS_CLASSES:
        return _load_diffusers
    if "architecture" in found:
        return _load_timm
    kinds = [f"{key} {found[key]!r}" for key in ("model_type", "_class_name") if key in found]
    raise ValueError(f"{name}: config.json names {' and '.join(kinds) or 'no kind of model'}; load_autoencoder takes {ACCEPTED}")


def _place(reading: dict[str, Any]) -> dict[str, Any]:
    """The options that say where to read."""
    return {key: value for key, value in reading.items() if key != "dtype"}


def _with_fields(name: str, stored: dict[str, Any], fields: dict[str, Any]) -> PreTrainedConfig:
    """The config of `stored`, with `fields` changed."""
    config = as_config("config", stored, OURS[0])
    unknown = sorted(set(fields) - set(config.to_dict()))
    if unknown:
        raise ValueError(f"{name} is an {config.model_type}, which has no option {', '.join(unknown)}; drop it")
    return as_config("config", {**stored, **fields}, OURS[0]) if fields else config


def _refuse_size(name: str, stored: int, image_size: int | None, remedy: str = "leave image_size out") -> None:
    if image_size not in (None, stored):
        raise ValueError(f"image_size={image_size}, but {name} takes pictures of {stored} pixels; {remedy}")


def _refuse_missing(name: str, missing: Any) -> None:
    if missing:
        shown = ", ".join(sorted(missing)[: loading.SHOWN_KEYS])
        raise ValueError(f"{name} lacks {len(missing)} tensors of the autoencoder, such as {shown}; download it again")


# ---------------------------------------------------------------------- ours, alone or in an Orthus


def _load_ours(
    name: str, found: dict[str, Any], image_size: int | None, fields: dict[str, Any], reading: dict[str, Any]
) -> Autoencoder:
    stored = _with_fields(name, found, {})
    if image_size is not None and found["model_type"] == DiffusersAutoencoderConfig.model_type:
        fields = {**fields, "image_size": image_size}
    else:
        _refuse_size(name, stored.image_size, image_size)
    config = _with_fields(name, found, fields)
    loading.refuse_missing_shards(name, reading.get("subfolder", ""))
    model, report = AutoModel.from_pretrained(
        name, config=config, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **reading
    )
    loading.check_shapes(name, report)
    _refuse_missing(name, report["missing_keys"])
    return model


def _load_part(
    name: str, found: dict[str, Any], image_size: int | None, fields: dict[str, Any], reading: dict[str, Any]
) -> Autoencoder:
    """The autoencoder of a whole Chameleon or Orthus, without reading the other tensors."""
    tensors = _read_part(name, reading)
    shapes = {published.removeprefix(conversion.OPTIONAL_PREFIX): tuple(value.shape) for published, value in tensors.items()}
    if conversion.is_published(found):
        part = conversion.autoencoder_fields(found.get("vq_config") or {}, shapes)
    else:
        part = found["autoencoder_config"]
    config = _with_fields(name, part, fields)
    _refuse_size(name, config.image_size, image_size)
    model, report = cast(Any, MODEL_MAPPING)[type(config)].from_pretrained(
        None,
        config=config,
        state_dict={_name_in_part(stored): value for stored, value in tensors.items()},
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **({"dtype": reading["dtype"]} if "dtype" in reading else {}),
    )
    loading.check_shapes(name, report)
    lost = [key for key in report["missing_keys"] if key.startswith(DECODER_PARTS) and conversion.is_published(found)]
    _refuse_missing(name, set(report["missing_keys"]) - set(lost))
    if lost:
        parts = " and ".join(sorted({key.split(".")[0] for key in lost}))
        logger.warning(
            f"{name} has no image decoder, as a plain Chameleon has none: {len(lost)} tensors of {parts} start from random "
            "values. Its latents are sound; train the decoder before pictures are drawn (train.autoencoder with "
            "frozen='[encoder, quant_conv]')."
        )
    return model


def _read_part(name: str, reading: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of the autoencoder under their stored names, from the files that hold any."""
    place = _place(reading)
    index = cached_file(name, INDEX, _raise_exceptions_for_missing_entries=False, **place)
    files = ["model.safetensors"]
    if index is not None:
        weight_map = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        files = sorted({file for stored, file in weight_map.items() if _name_in_part(stored)})
    tensors: dict[str, Tensor] = {}
    for file in files:
        with safe_open(cached_file(name, file, **place), framework="pt") as opened:
            tensors |= {stored: opened.get_tensor(stored) for stored in opened.keys() if _name_in_part(stored)}
    return tensors


def _name_in_part(stored: str) -> str:
    """`encoder.conv_in.bias` of `model.vqmodel.encoder.conv_in.bias` or `autoencoder.encoder.conv_in.bias`, "" for a tensor
    that is no part of the autoencoder."""
    ours = conversion.our_name(stored) if "model.vqmodel." in stored else stored
    return ours.removeprefix("autoencoder.") if ours.startswith("autoencoder.") else ""


# ---------------------------------------------------------------------- of other libraries


def _load_diffusers(
    name: str, found: dict[str, Any], image_size: int | None, fields: dict[str, Any], reading: dict[str, Any]
) -> Autoencoder:
    network_class = getattr(library("diffusers"), found["_class_name"])
    network, report = network_class.from_pretrained(
        name,
        use_safetensors=True,
        output_loading_info=True,
        torch_dtype=reading.get("dtype", torch.float32),
        **_place(reading),
    )
    _refuse_missing(name, report["missing_keys"])
    known = inspect.signature(network_class.__init__).parameters
    network_config = {key: value for key, value in network.config.items() if key in known}
    if image_size is None and "sample_size" not in network_config:
        raise ValueError(f"{name} is an {found['_class_name']}, which stores no image size; pass image_size")
    config = DiffusersAutoencoderConfig(
        network_class=found["_class_name"],
        network_config=network_config,
        image_size=image_size or side(network_config["sample_size"]),
        **fields,
    )
    return DiffusersAutoencoder(config, network).to(network.dtype)


def _load_timm(
    name: str, found: dict[str, Any], image_size: int | None, fields: dict[str, Any], reading: dict[str, Any]
) -> Autoencoder:
    folder, inside = Path(name), Path(reading.get("subfolder", ""))
    if not folder.is_dir():
        hub = {key: reading[key] for key in HUB_OPTIONS if key in reading}
        wanted = [str(inside / file) for file in ("config.json", "model.safetensors")]
        folder = Path(snapshot_download(name, allow_patterns=wanted, **hub))
    source = f"local-dir:{folder / inside}"
    kwargs = found.get("model_args") or {}
    return _representation(source, found["architecture"], kwargs, image_size, fields, reading, pretrained=True)


def _representation(
    source: str,
    encoder_name: str,
    kwargs: dict[str, Any],
    image_size: int | None,
    fields: dict[str, Any],
    reading: dict[str, Any],
    pretrained: bool,
) -> RepresentationAutoencoder:
    """A new autoencoder around the `timm` model `source`, whose config names it `encoder_name`."""
    kwargs = {**kwargs, **fields.get("encoder_kwargs", {})}
    # With the classifier that its weights have, if any: only then does timm refuse missing tensors.
    encoder = create_timm_model(source, kwargs, pretrained).eval()
    stored = encoder.pretrained_cfg
    size = side(kwargs.get("img_size", stored["input_size"][-1]))
    remedy = f"with encoder_kwargs={{'img_size': {image_size}}} timm resamples the positions of a transformer"
    _refuse_size(encoder_name, size, image_size, remedy)
    with torch.no_grad():
        features = patch_features(encoder, encoder.forward_features(torch.zeros(1, 3, size, size)))  # (1, L, C)
    config = RepresentationAutoencoderConfig(
        **{
            "pixel_mean": stored["mean"],
            "pixel_std": stored["std"],
            **fields,
            "encoder_name": encoder_name,
            "encoder_kwargs": {**kwargs, "img_size": size} if stored.get("fixed_input_size") else kwargs,
            "image_size": size,
            "patch_size": size // math.isqrt(features.shape[1]),
            "latent_dim": features.shape[2],
        }
    )
    model = RepresentationAutoencoder(config)
    _refuse_missing(source, model.encoder.load_state_dict(encoder.state_dict(), strict=False).missing_keys)
    return model.to(reading.get("dtype", torch.float32)).eval()
