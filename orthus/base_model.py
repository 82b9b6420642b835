"""An Orthus-base, ready for stage 1: from a language model and any autoencoder, or from a Chameleon as in the paper."""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from orthus.autoencoder import Autoencoder
from orthus.backbones import check_same_text, load_backbone, load_tokenizer
from orthus.building import (
    assemble,
    build_orthus,
    fitting_temperature,
    measure_latents,
    missing_expected,
    quantizer_codebook,
    starting_codebook,
)
from orthus.configuration import OrthusConfig
from orthus.conversion import PUBLISHED_LATENT_SCALE
from orthus.conversion import SPECIAL_TOKENS as TOKEN_IDS
from orthus.image_processing import OrthusImageProcessor
from orthus.modeling import OrthusForConditionalGeneration
from orthus.processing import OrthusProcessor
from orthus.tokenization import BOI_TOKEN, EOI_TOKEN, IMAGE_TOKEN, SEPARATOR_TOKEN, num_token_ids, prepare_tokenizer

DEFAULT_NUM_CODES = 8192
LATENTS_PER_CODE = 32  # that k-means sees, if there are enough pictures
MIN_PICTURES = 64
SHARE_OF_CODES = 0.2  # that a latent is spread over where the temperature is measured: 100 of 512 in the shipped recipe
MIN_TEXT_TOKENS = 16  # beside a picture in the longest row
MAX_UNKNOWN_TOKENS = 64  # of a tokenizer, beyond the rows of the backbone: some add padding and the like
IMAGE_SIDE = ("diffusion_head.", "latent_embedding.codebook", "autoencoder.decoder.", "autoencoder.post_quant_conv.")

logger = logging.getLogger(__name__)

Pictures = Callable[[OrthusImageProcessor, int], Iterable[Mapping[str, Tensor]]]  # (processor, number) -> batches
Base = tuple[OrthusForConditionalGeneration, OrthusProcessor]


@dataclass(frozen=True)
class BaseOptions:
    """What may be chosen; None: the paper's for a Chameleon, measured or the default otherwise."""

    num_codes: int | None = None
    objective: str | None = None
    head_width: int = 1536
    head_blocks: int = 3
    temperature: float | None = None
    image_loss_weight: float = 100.0
    dtype: torch.dtype | str = torch.float32


# ---------------------------------------------------------------------- any language model


def base_from_language_model(
    name: str, autoencoder: Autoencoder, pictures: Pictures | None, options: BaseOptions, gguf_file: str | None = None
) -> Base:
    """Backbone, LM head and tokenizer of a language model, with new tokens, code rows, codebook and head.

    Args:
        name, gguf_file: see [`load_backbone`].
        pictures: where latents are measured, and their centres found. May be None if the autoencoder brings a codebook.

    Raises:
        ValueError: what cannot be loaded, a tokenizer of another model, too few positions for a picture, no codebook, and a
            family that Orthus does not follow (see [`check_same_text`]).
    """
    tokenizer = load_tokenizer(name, gguf_file)
    backbone = load_backbone(name, gguf_file, options.dtype)
    unknown = num_token_ids(tokenizer) - backbone.vocab_size
    if unknown > MAX_UNKNOWN_TOKENS:
        raise ValueError(f"{name}: the tokenizer has ids up to {num_token_ids(tokenizer) - 1}, the embeddings "
                         f"{backbone.vocab_size} rows; they do not belong together")  # fmt: skip
    if unknown > 0:
        logger.warning("tokenizer: the backbone has no rows for the last %d of its tokens; they get new ones", unknown)
    num_latents = autoencoder.config.num_latents
    limit = getattr(backbone.text_config, "max_position_embeddings", None)
    if limit is not None and limit < num_latents + 2 + MIN_TEXT_TOKENS:
        raise ValueError(f"{name} has {limit} positions, too few for a picture of {num_latents} latents and some text; "
                         "lower --image-size or choose another autoencoder")  # fmt: skip
    new_ids = prepare_tokenizer(tokenizer)
    image_processor = OrthusImageProcessor(size=autoencoder.config.image_size)
    fields, head, codebook = measure(autoencoder, image_processor, pictures, options, options.objective or "flow_matching")
    model = build_orthus(
        autoencoder, tokenizer, backbone, head, fields, None, codebook=codebook, new_ids=new_ids, dtype=options.dtype
    )
    error = check_same_text(model, backbone, new_ids)
    logger.info("text: the logits of old tokens are the language model's (relative difference %.1g)", error)
    named = tokenizer.convert_ids_to_tokens(new_ids)
    logger.info("tokenizer: %d new tokens%s", len(new_ids), "".join(f" {t}={i}" for t, i in zip(named, new_ids, strict=True)))
    processor = OrthusProcessor(
        image_processor,
        tokenizer,
        num_image_tokens=num_latents,
        image_token=IMAGE_TOKEN,
        boi_token=BOI_TOKEN,
        eoi_token=EOI_TOKEN,
        separator_token=SEPARATOR_TOKEN,
    )
    return model, processor


def measure(
    autoencoder: Autoencoder,
    image_processor: OrthusImageProcessor,
    pictures: Pictures | None,
    options: BaseOptions,
    objective: str,
) -> tuple[dict[str, Any], dict[str, Any], Tensor]:
    """What follows from the latents: fields of the config, fields of the head's, and the codebook `(num_codes, C)`.

    Raises ValueError when neither pictures nor the autoencoder's own codebook are there.
    """
    quantizer = quantizer_codebook(autoencoder)
    num_codes = options.num_codes or (DEFAULT_NUM_CODES if quantizer is None else len(quantizer))
    is_copied = quantizer is not None and len(quantizer) == num_codes
    if pictures is None and not is_copied:
        raise ValueError(f"{type(autoencoder).__name__} brings no codebook of {num_codes} codes; give --images, a folder of "
                         "pictures like those to be drawn, and centres are found among their latents")  # fmt: skip
    latents = None
    if pictures is not None:
        wanted = 0 if is_copied else math.ceil(LATENTS_PER_CODE * num_codes / autoencoder.config.num_latents)
        latents = measure_latents(autoencoder, pictures(image_processor, max(wanted, MIN_PICTURES)))
        logger.info("latents: %d pictures, mean %.3g, standard deviation %.3g", len(latents), latents.mean(), latents.std())
    codebook = starting_codebook(autoencoder, latents, num_codes)
    source = "copied from the quantiser" if is_copied else "centres by k-means"
    scale = PUBLISHED_LATENT_SCALE if latents is None else float(f"{1 / float(latents.std()):.3g}")
    temperature = options.temperature
    if temperature is None:
        temperature = 1.0 if is_copied or latents is None else fitting_temperature(latents, codebook, SHARE_OF_CODES)
    logger.info("codebook: %d codes, %s; temperature %g, latent scale %g", num_codes, source, temperature, scale)
    fields = {
        "num_codes": num_codes,
        "soft_vq_temperature": temperature,
        "image_loss_weight": options.image_loss_weight,
    }
    return fields, {**_head(options, objective), "latent_scale": scale}, codebook


def _head(options: BaseOptions, objective: str) -> dict[str, Any]:
    return {"objective": objective, "width": options.head_width, "num_blocks": options.head_blocks}


# ---------------------------------------------------------------------- Chameleon


def base_from_chameleon(name: str, autoencoder: Autoencoder | None, pictures: Pictures | None, options: BaseOptions) -> Base:
    """A Chameleon or Anole as the paper starts from it: the codebook is a copy of the quantiser's, the `W` of eq. 4 are the
    embeddings of its image codes, the head is new, everything else kept. A published Orthus keeps its codebook and head too.

    Args:
        autoencoder: None for the checkpoint's own. One with the same encoder gives its image decoder; another one replaces it,
            and then codebook and head are new, as for any language model, on the published ids.

    Raises:
        ValueError: incomplete files, a vocabulary map without the needed ids, no tokenizer or another's, or no codebook.
    """
    with missing_expected():
        model, report = OrthusForConditionalGeneration.from_pretrained(
            name, allow_missing=True, output_loading_info=True, dtype=options.dtype
        )
    missing = sorted(report["missing_keys"])
    lacking = [key for key in missing if not key.startswith(IMAGE_SIDE)]
    if lacking:
        raise ValueError(f"{name} lacks {len(lacking)} tensors, among them {', '.join(lacking[:4])}; the files are incomplete")
    if options.num_codes not in (None, model.config.num_codes):
        raise ValueError(f"num_codes={options.num_codes}, but the vocabulary of {name} has {model.config.num_codes} image codes")
    used = model.autoencoder if autoencoder is None else autoencoder
    processor = _published_processor(name, model.config, used)
    is_same_space = autoencoder is None or _same_encoder(model.autoencoder, autoencoder)
    has_head = not any(key.startswith("diffusion_head.") for key in missing)
    if is_same_space and pictures is not None:
        logger.warning("images: not used, because latents and codebook are those of the checkpoint")
    if autoencoder is None and any(key.startswith("autoencoder.") for key in missing):
        logger.warning("image decoder: %s brings none and it starts from random values; give --autoencoder, or train it", name)
    if is_same_space and has_head:
        model.autoencoder, model.config.autoencoder_config = used.to(model.dtype), used.config
        logger.info("head and codebook: kept as they are; %s is an Orthus", name)
        return model, processor
    if is_same_space:
        fields, head, codebook = _published_parts(name, model, autoencoder, options, "latent_embedding.codebook" in missing)
    else:
        logger.warning("autoencoder: not the checkpoint's; the code rows must be learned anew")
        options = dataclasses.replace(options, num_codes=model.config.num_codes)
        objective = options.objective or "v_prediction"
        fields, head, codebook = measure(used, processor.image_processor, pictures, options, objective)
    return _with_new_head(model, used, fields, head, codebook), processor


def _same_encoder(ours: Autoencoder, other: Autoencoder) -> bool:
    """Whether both make the same latents of a picture."""
    parts = ("encoder.", "quant_conv.")
    mine, its = ({k: v for k, v in a.state_dict().items() if k.startswith(parts)} for a in (ours, other))
    same_size = ours.config.image_size == other.config.image_size
    return same_size and mine.keys() == its.keys() and all(torch.equal(mine[key], its[key].to(mine[key].dtype)) for key in mine)


def _published_parts(
    name: str, model: OrthusForConditionalGeneration, autoencoder: Autoencoder | None, options: BaseOptions, is_new: bool
) -> tuple[dict[str, Any], dict[str, Any], Tensor]:
    """As [`measure`], for the latents of the checkpoint itself: everything as published."""
    codebook = cast(Tensor, model.latent_embedding.codebook).detach()
    if is_new:
        holders = (model.autoencoder, autoencoder)
        found = [quantizer_codebook(holder) for holder in holders if holder is not None]
        copied = next((rows for rows in found if rows is not None and rows.shape == codebook.shape), None)
        if copied is None:
            raise ValueError(f"{name} holds neither a codebook (codebook_in) nor its quantiser's (vqmodel.quantize)")
        codebook = copied.clone()
    logger.info("codebook: %d codes, %s", len(codebook), "copied from the quantiser" if is_new else "kept")
    fields = {
        "num_codes": len(codebook),
        "soft_vq_temperature": options.temperature or 1.0,
        "image_loss_weight": options.image_loss_weight,
    }
    head = {**_head(options, options.objective or "v_prediction"), "latent_scale": PUBLISHED_LATENT_SCALE}
    return fields, head, codebook


def _with_new_head(
    model: OrthusForConditionalGeneration,
    autoencoder: Autoencoder,
    fields: dict[str, Any],
    head: dict[str, Any],
    codebook: Tensor,
) -> OrthusForConditionalGeneration:
    """The same backbone, LM head and ids with another image side; their tensors are shared, not copied."""
    old = model.config
    widths = {"latent_dim": autoencoder.config.latent_dim, "cond_dim": old.text_config.hidden_size}
    config = OrthusConfig(
        text_config=old.text_config,
        autoencoder_config=autoencoder.config,
        head_config={**head, **widths},
        code_offset=old.code_offset,
        vocabulary_map=old.vocabulary_map,
        **fields,
        **{key: getattr(old, key) for key in TOKEN_IDS},
    )
    tensors = {key: value for key, value in model.state_dict().items() if key.startswith(("backbone.", "lm_head."))}
    return assemble(config, tensors, autoencoder, codebook, model.dtype)


def _published_processor(name: str, config: OrthusConfig, autoencoder: Autoencoder) -> OrthusProcessor:
    """Tokenizer and image settings of the checkpoint, for pictures of this autoencoder; ValueError where ids disagree."""
    size, num_latents = autoencoder.config.image_size, autoencoder.config.num_latents
    try:
        processor = OrthusProcessor.from_pretrained(name, num_image_tokens=num_latents)
    except OSError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"cannot load the processor of {name!r}: {reason} | Add its tokenizer and preprocessor files") from error
    if processor.image_processor.crop_size != {"height": size, "width": size}:
        names = {key: getattr(processor, key) for key in ("image_token", "boi_token", "eoi_token", "separator_token")}
        image_processor = OrthusImageProcessor(size=size)
        processor = OrthusProcessor(image_processor, processor.tokenizer, num_image_tokens=num_latents, **names)
    for key in TOKEN_IDS:
        found, expected = getattr(processor, key, None), getattr(config, key)
        if found not in (None, expected):
            raise ValueError(f"{name}: {key} is {found} in the tokenizer but {expected} in the vocabulary map; they must agree")
    return processor
