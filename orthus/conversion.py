"""The published layout (the Orthus release, Chameleon, Anole) <-> ours.

Tensors only change their names: one table, read in both directions. `transformers` applies it while loading
(`from_pretrained(..., key_mapping=PUBLISHED_KEY_MAPPING)`), so shards, dtype, device maps and low memory are its business.
The published config describes a Chameleon; what it omits (head width and depth, codebook size) is read off the tensors.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

logger = logging.get_logger(__name__)

Shapes = dict[str, tuple[int, ...]]

# (published, ours): how names begin, or whole names. `{i}` is the number of a block.
NAME_TABLE = (
    ("model.embed_tokens.", "backbone.embed_tokens."),
    ("model.layers.", "backbone.layers."),
    ("model.norm.", "backbone.norm."),
    ("model.vqmodel.quantize.embedding.weight", "autoencoder.quantizer_codebook"),
    ("model.vqmodel.encoder.", "autoencoder.encoder."),
    ("model.vqmodel.decoder.", "autoencoder.decoder."),
    ("model.vqmodel.quant_conv.", "autoencoder.quant_conv."),
    ("model.vqmodel.post_quant_conv.", "autoencoder.post_quant_conv."),
    ("model.codebook_in.weight", "latent_embedding.codebook"),
    ("lm_head.", "lm_head."),
    ("mlp_head.time_embed.mlp.", "diffusion_head.time_embed."),
    ("mlp_head.cond_embed.", "diffusion_head.cond_embed."),
    ("mlp_head.input_proj.", "diffusion_head.input_proj."),
    ("mlp_head.res_blocks.{i}.in_ln.", "diffusion_head.blocks.{i}.norm."),
    ("mlp_head.res_blocks.{i}.mlp.", "diffusion_head.blocks.{i}.mlp."),
    ("mlp_head.res_blocks.{i}.adaLN_modulation.1.", "diffusion_head.blocks.{i}.modulation."),
    ("mlp_head.final_layer.adaLN_modulation.1.", "diffusion_head.final_modulation."),
    ("mlp_head.final_layer.linear.", "diffusion_head.final_linear."),
)
OPTIONAL_PREFIX = "module."  # of files that a wrapped model wrote


def _pattern(name: str, optional_prefix: str = "") -> str:
    # `(?:prefix|)`, not `(?:prefix)?`: transformers strips whole `(?...)` groups when it reverses a mapping to save.
    start = f"^(?:{re.escape(optional_prefix)}|)" if optional_prefix else "^"
    return start + re.escape(name).replace(r"\{i\}", r"(\d+)")


# For `from_pretrained(..., key_mapping=...)`. Our own names match none of the patterns, so it may always be passed.
PUBLISHED_KEY_MAPPING = {_pattern(published, OPTIONAL_PREFIX): ours.replace("{i}", r"\1") for published, ours in NAME_TABLE}
_TO_PUBLISHED = {_pattern(ours): published.replace("{i}", r"\1") for published, ours in NAME_TABLE}

# Tensors that old files may hold and no model needs.
IGNORED_KEYS = (r"rotary_emb\.inv_freq$",)

SPECIAL_TOKENS = {
    "bos_token_id": "<s>",
    "pad_token_id": "<pad>",
    "eos_token_id": "</s>",
    "boi_token_id": "<racm3:break>",
    "eoi_token_id": "<eoss>",
    "image_token_id": "<image>",
    "separator_token_id": "<reserved08706>",
}
PUBLISHED_LATENT_SCALE = 0.1
DEFAULT_HEAD = {"latent_dim": 256, "width": 1536, "num_blocks": 3}
_VQ_FIELDS = (
    *("resolution", "in_channels", "base_channels", "channel_multiplier", "num_res_blocks", "latent_channels"),
    *("embed_dim", "attn_resolutions", "attn_type", "dropout", "double_latent"),
)
_NOT_IN_TEXT_CONFIG = {"architectures", "boi_token_id", "eoi_token_id", "image_token_id", "vocabulary_map"}
_NOT_IN_TEXT_CONFIG |= {"torch_dtype", "dtype", "transformers_version", "_name_or_path", "vq_config"}


def _rename(name: str, table: Mapping[str, str]) -> str | None:
    for pattern, replacement in table.items():
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return None


def our_name(published: str) -> str:
    """Our name of a published tensor; ValueError for one that is not in the table."""
    name = _rename(published, PUBLISHED_KEY_MAPPING)
    if name is None:
        raise ValueError(f"{published!r} is no tensor of the published layout; see NAME_TABLE in {__name__}")
    return name


def published_name(ours: str) -> str:
    """The published name of one of our tensors; ValueError for one that the published layout cannot hold."""
    name = _rename(ours, _TO_PUBLISHED)
    if name is None:
        raise ValueError(f"the published layout has no place for {ours!r}; save with model.save_pretrained instead")
    return name


# ---------------------------------------------------------------------- reading


def is_published(config: Mapping[str, Any]) -> bool:
    """Whether `config` (a parsed config.json) is of the published layout, which calls itself a Chameleon."""
    return config.get("model_type") == "chameleon"


def read_tensor_shapes(name_or_path: str | Path, subfolder: str = "", **download_options: Any) -> Shapes:
    """Name -> shape of every tensor of a checkpoint, from the headers of its safetensors files.

    Args:
        name_or_path: a folder, or the name of a repository, whose weight files are then downloaded to the usual cache.
        subfolder: where in it the weights lie.
        download_options: `revision`, `cache_dir`, `token`, `local_files_only`.

    Raises:
        ValueError: when there is no safetensors file.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        patterns = ["*.safetensors", "*.safetensors.index.json"]
        folder = Path(snapshot_download(str(name_or_path), allow_patterns=patterns, **download_options))
    folder = folder / subfolder
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no model*.safetensors; convert its weights to safetensors first")
    shapes: Shapes = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
    return shapes


def config_from_published(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Our config as a dict for `OrthusConfig.from_dict`.

    Token ids come from the vocabulary map, because a converted repository may carry bos = 1, which is pad. Without head
    tensors (a Chameleon to start training from) the head takes the published size, with a warning.

    Args:
        config: the published config.json, parsed.
        shapes: name -> shape of the checkpoint's tensors; see [`read_tensor_shapes`].

    Raises:
        ValueError: when the vocabulary map lacks a special token or its image codes are not consecutive.
    """
    shapes = {name.removeprefix(OPTIONAL_PREFIX): shape for name, shape in shapes.items()}
    vocabulary = config.get("vocabulary_map") or {}
    ids = _special_ids(vocabulary)
    text_config = {key: value for key, value in config.items() if key not in _NOT_IN_TEXT_CONFIG}
    text_config |= {key: ids[key] for key in ("bos_token_id", "pad_token_id", "eos_token_id")}
    text_config["vocabulary_map"] = {"<image>": ids["image_token_id"]}  # the whole map is kept once, one level up
    autoencoder = autoencoder_fields(config.get("vq_config") or {}, shapes)
    text_config["vq_config"] = {key: autoencoder[key] for key in _VQ_FIELDS if key in autoencoder}
    codebook = shapes.get("model.codebook_in.weight") or shapes.get("model.vqmodel.quantize.embedding.weight")
    code_offset, num_codes = _code_rows(vocabulary)
    if codebook is not None and codebook[0] != num_codes:
        raise ValueError(f"the codebook has {codebook[0]} rows, the vocabulary map {num_codes} image codes; fix the map")
    return {
        "model_type": "orthus",
        "architectures": ["OrthusForConditionalGeneration"],
        "dtype": config.get("dtype") or config.get("torch_dtype"),
        "text_config": text_config,
        "autoencoder_config": autoencoder,
        "head_config": _head_config(shapes, autoencoder["embed_dim"], config["hidden_size"]),
        "num_codes": num_codes,
        "code_offset": code_offset,
        "vocabulary_map": dict(vocabulary),
        **ids,
    }


def _special_ids(vocabulary: Mapping[str, int]) -> dict[str, int]:
    missing = [token for token in SPECIAL_TOKENS.values() if token not in vocabulary]
    if missing:
        raise ValueError(f"vocabulary_map in config.json lacks {', '.join(missing)}; copy the map of the published config")
    return {field: vocabulary[token] for field, token in SPECIAL_TOKENS.items()}


def _code_rows(vocabulary: Mapping[str, int]) -> tuple[int, int]:
    """First id and number of the image codes. Their names spell the codebook index in letters: IMGIMG, A-J for 0-9, Z."""
    digits = str.maketrans("ABCDEFGHIJ", "0123456789")
    ids = {int(name[6:-1].translate(digits)): token for name, token in vocabulary.items() if re.fullmatch("IMGIMG[A-J]+Z", name)}
    if not ids or any(ids.get(index) != ids.get(0, 0) + index for index in range(len(ids))):
        raise ValueError(f"vocabulary_map holds {len(ids)} image codes (IMGIMG...Z) that are not consecutive ids from code 0")
    return ids[0], len(ids)


def autoencoder_fields(vq_config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    fields = {key: vq_config[key] for key in _VQ_FIELDS if key in vq_config}
    quantizer = shapes.get("model.vqmodel.quantize.embedding.weight")
    fields["num_embeddings"] = 0 if quantizer is None else quantizer[0]
    latent_dim = shapes.get("model.vqmodel.quant_conv.weight", (fields.get("embed_dim", DEFAULT_HEAD["latent_dim"]),))[0]
    return {"model_type": "orthus_vqgan_autoencoder", **fields, "embed_dim": latent_dim}


def _head_config(shapes: Mapping[str, tuple[int, ...]], latent_dim: int, hidden_dim: int) -> dict[str, Any]:
    fixed = {"cond_dim": hidden_dim, "objective": "v_prediction", "latent_scale": PUBLISHED_LATENT_SCALE}
    if "mlp_head.input_proj.weight" not in shapes:
        logger.warning(
            "No mlp_head tensors in the checkpoint: it is a Chameleon, not an Orthus. The diffusion head, the codebook and "
            "the image decoder, where absent, start from random values and must be trained. `python -m train.build` makes an "
            "Orthus-base of it, with the codebook of its quantiser."
        )
        return {**DEFAULT_HEAD, "latent_dim": latent_dim, **fixed}
    width, latent_dim = shapes["mlp_head.input_proj.weight"]
    blocks = {name.split(".")[2] for name in shapes if name.startswith("mlp_head.res_blocks.")}
    time_dim = shapes["mlp_head.time_embed.mlp.0.weight"][1]
    return {"latent_dim": latent_dim, "width": width, "num_blocks": len(blocks), "time_embed_dim": time_dim, **fixed}


# ---------------------------------------------------------------------- writing


def config_to_published(config: Mapping[str, Any]) -> dict[str, Any]:
    """The published config.json for ours (`OrthusConfig.to_dict()`), for a model whose every part the published code has.

    Raises:
        ValueError: naming the part that the published code lacks.
    """
    text, autoencoder, head = (config[key] for key in ("text_config", "autoencoder_config", "head_config"))
    required = {
        "text_config.model_type": (text["model_type"], "chameleon"),
        "autoencoder_config.model_type": (autoencoder["model_type"], "orthus_vqgan_autoencoder"),
        "head_config.objective": (head["objective"], "v_prediction"),
        "head_config.latent_scale": (head["latent_scale"], PUBLISHED_LATENT_SCALE),
        "latent_embedding": (config.get("latent_embedding", "softmax"), "softmax"),
    }
    for name, (value, needed) in required.items():
        if value != needed:
            raise ValueError(f"{name}={value!r}, but the published layout means {needed!r}; save with save_pretrained")
    rope = dict(text.get("rope_parameters") or {})
    rope_theta = rope.pop("rope_theta", 10000.0)
    base_fields = set(PreTrainedConfig().to_dict()) - {"model_type"}  # of every transformers config, not of a Chameleon
    dropped = _NOT_IN_TEXT_CONFIG | base_fields | {"rope_parameters"}
    ids = {key: config[key] for key in SPECIAL_TOKENS if key != "separator_token_id"}
    return {
        **{key: value for key, value in text.items() if key not in dropped},
        "tie_word_embeddings": text["tie_word_embeddings"],
        "rope_theta": rope_theta,
        "rope_scaling": None if rope.get("rope_type", "default") == "default" else rope,
        **ids,
        "architectures": ["OrthusForConditionalGeneration"],
        "torch_dtype": str(config.get("dtype") or "float32").removeprefix("torch."),
        "vocabulary_map": dict(config.get("vocabulary_map") or {}),
        "vq_config": {"model_type": "chameleon_vqgan", **{key: autoencoder[key] for key in _VQ_FIELDS}},
    }


def save_published(model: PreTrainedModel, folder: str | Path, max_shard_size: str | int = "5GB") -> None:
    """Write `model` in the published layout, readable by the published code: config.json and safetensors shards.

    Raises:
        ValueError: naming the part of the model that the published layout cannot hold: adapters and integer weights too.
    """
    config = config_to_published(model.config.to_dict())
    tensors = model.state_dict()
    odd = [name for name, value in tensors.items() if "lora_" in name or type(value) is not torch.Tensor]
    if odd:
        raise ValueError(
            f"{odd[0]} is an adapter or a quantised weight, which the published layout lacks; "
            "merge_lora(model) first, or load the weights without quantization_config"
        )
    state_dict: dict[str, torch.Tensor] = {published_name(name): value for name, value in tensors.items()}
    config["torch_dtype"] = str(model.dtype).removeprefix("torch.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(state_dict, folder, max_shard_size=max_shard_size, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
