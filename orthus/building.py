"""A new Orthus from its parts: a backbone (a config, or a pretrained one), a trained autoencoder, a tokenizer and a codebook."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from orthus import conversion
from orthus.autoencoder import Autoencoder, CalibratedAutoencoder
from orthus.configuration import DiffusionHeadConfig, OrthusConfig, as_config
from orthus.modeling import OrthusForConditionalGeneration
from orthus.tokenization import BOI_TOKEN, EOI_TOKEN, IMAGE_TOKEN, SEPARATOR_TOKEN, num_token_ids

if TYPE_CHECKING:
    from orthus.backbones import Backbone

TOKENS = {
    "boi_token_id": BOI_TOKEN,
    "eoi_token_id": EOI_TOKEN,
    "separator_token_id": SEPARATOR_TOKEN,
    "image_token_id": IMAGE_TOKEN,
}
NEW_PARTS = ("diffusion_head.", "latent_embedding.")


def build_orthus(
    autoencoder: Autoencoder,
    tokenizer: PreTrainedTokenizerBase,
    backbone: "dict[str, Any] | Backbone",
    head: dict[str, Any],
    options: dict[str, Any],
    latents: Tensor | None,
    embedding_std: float | None = None,
    codebook: Tensor | None = None,
    new_ids: Iterable[int] = (),
    dtype: torch.dtype | str = torch.float32,
) -> OrthusForConditionalGeneration:
    """A model with a new head around a trained autoencoder and a new or a pretrained backbone.

    Code rows follow all text tokens; `vocab_size` becomes the text tokens (the rows of a pretrained backbone, if these are
    more) + `num_codes`.

    Args:
        backbone: fields of a new backbone's config with `model_type`, or a pretrained one.
        head: fields of [`DiffusionHeadConfig`]; the two widths are set here.
        options: further fields of [`OrthusConfig`], with `num_codes`.
        latents: `(N, L, C)` raw latents of typical pictures: centres of the codebook are found among them by k-means.
        embedding_std: standard deviation of a new backbone's initial token embeddings and code rows, None for the backbone's own.
        codebook: `(num_codes, C)`, in place of `latents`.
        new_ids: tokens that a pretrained backbone has not seen.
        dtype: of a model with a pretrained backbone.
    """
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in TOKENS.items()}
    ids |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "pad_token_id", "eos_token_id")}
    missing = sorted(name for name, value in ids.items() if value is None or name in TOKENS and value == tokenizer.unk_token_id)
    if missing:
        raise ValueError(f"the tokenizer lacks {', '.join(missing)}; add the special tokens to it first")
    num_codes = options["num_codes"]
    token_ids = {name: ids[name] for name in ("bos_token_id", "pad_token_id", "eos_token_id")}
    code_offset = len(tokenizer) if isinstance(backbone, dict) else max(num_token_ids(tokenizer), backbone.vocab_size)
    fields = backbone if isinstance(backbone, dict) else backbone.text_config.to_dict()
    if not isinstance(backbone, dict):
        options = {**options, "lm_head_bias": "lm_head.bias" in backbone.tensors}
    text_config = as_config("backbone", {**fields, **token_ids, "vocab_size": code_offset + num_codes}, "llama")
    head_config = DiffusionHeadConfig(
        **{**head, "latent_dim": autoencoder.config.latent_dim, "cond_dim": text_config.hidden_size}
    )
    config = OrthusConfig(
        text_config=text_config,
        autoencoder_config=autoencoder.config,
        head_config=head_config,
        code_offset=code_offset,
        **{**options, **ids},
    )
    if config.latent_embedding == "linear":
        codebook = None
    elif codebook is None:
        codebook = starting_codebook(autoencoder, latents, num_codes)
    if not isinstance(backbone, dict):
        return assemble(config, backbone.grown(text_config.vocab_size, new_ids), autoencoder, codebook, dtype)
    model = OrthusForConditionalGeneration(config)
    model.autoencoder.load_state_dict(autoencoder.state_dict())
    if embedding_std is not None:
        nn.init.normal_(cast(Tensor, model.get_input_embeddings().weight), std=embedding_std)
    if codebook is not None:
        with torch.no_grad():
            model.latent_embedding.codebook.copy_(codebook)
    return model


def assemble(
    config: OrthusConfig,
    tensors: Mapping[str, Tensor],
    autoencoder: Autoencoder,
    codebook: Tensor | None,
    dtype: torch.dtype | str = torch.float32,
) -> OrthusForConditionalGeneration:
    """A model of `backbone.*` and `lm_head.*` tensors, an autoencoder and a codebook; the head is new. No tensor is copied that
    has its `dtype`. ValueError for tensors that are not those of the config."""
    parts = {**tensors, **{f"autoencoder.{name}": value for name, value in autoencoder.state_dict().items()}}
    if codebook is not None:
        parts["latent_embedding.codebook"] = codebook
    with missing_expected():
        model, report = OrthusForConditionalGeneration.from_pretrained(
            None, config=config, state_dict=parts, dtype=dtype, allow_missing=True, output_loading_info=True
        )
    wrong = sorted({name for name in report["missing_keys"] if not name.startswith(NEW_PARTS)} | report["unexpected_keys"])
    if wrong:
        raise ValueError(f"{config.text_config.model_type}: {len(wrong)} tensors do not fit the config, among them {wrong[:4]}")
    return model


@contextmanager
def missing_expected() -> Iterator[None]:
    """While it lasts, loading does not warn of missing tensors; the caller looks at the report."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    conversion.logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        conversion.logger.setLevel(logging.NOTSET)


# ---------------------------------------------------------------------- measured on latents


@torch.no_grad()
def measure_latents(autoencoder: Autoencoder, batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """Raw latents `(N, L, C)` of pictures; an autoencoder that can be calibrated is, and these are its latents from then on.

    Raises ValueError for no pictures, and for latents of which a channel is constant.
    """
    found = [autoencoder.encode(batch["pixel_values"]).float() for batch in batches]
    if not found:
        raise ValueError("no pictures to encode")
    latents = torch.cat(found)
    std, mean = torch.std_mean(latents, dim=(0, 1))
    if not bool((std > 0).all()):
        raise ValueError(f"{len(latents)} pictures give a constant latent channel; give more and varied ones")
    if not isinstance(autoencoder, CalibratedAutoencoder):
        return latents
    # New tensors: a model that was built from this autoencoder before shares the old ones.
    autoencoder.latent_mean = autoencoder.latent_mean + autoencoder.latent_std * mean.to(autoencoder.latent_mean)
    autoencoder.latent_std = autoencoder.latent_std * std.to(autoencoder.latent_std)
    return (latents - mean) / std


def quantizer_codebook(autoencoder: Autoencoder) -> Tensor | None:
    """`(K, C)`: the codebook of the quantiser that an autoencoder was trained with, None for one without."""
    num_codes = getattr(autoencoder.config, "num_embeddings", 0)
    return cast(Tensor, autoencoder.quantizer_codebook) if num_codes else None


def starting_codebook(autoencoder: Autoencoder, latents: Tensor | None, num_codes: int) -> Tensor:
    """`(num_codes, C)`: a copy of the quantiser's codebook if the autoencoder has one of that size (as the paper does), else
    the centres that k-means finds among `latents`. ValueError for neither."""
    quantizer = quantizer_codebook(autoencoder)
    if quantizer is not None and len(quantizer) == num_codes:
        return quantizer.detach().clone()
    if latents is None:
        kind = type(autoencoder).__name__
        raise ValueError(f"{kind} brings no codebook of {num_codes} codes; give pictures to find one by k-means")
    return kmeans(latents.flatten(0, 1), num_codes)


@torch.no_grad()
def fitting_temperature(latents: Tensor, codebook: Tensor, share: float, num_points: int = 1024) -> float:
    """The tau of eq. 4 at which a latent is spread over `share` of the codes on average (exponential of the entropy).

    What tau means depends on the scale of the latents: where one code takes all, the embedding loses what tells latents of one
    code apart (docs/LOG.md). Bisection, to two digits.
    """
    points = latents.flatten(0, 1).float()
    points = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:num_points]]
    distances = torch.cdist(points, codebook.float()).square()
    low, high = -6.0, 6.0  # decimal logarithm of tau
    for _ in range(20):
        middle = (low + high) / 2
        log_weights = (-distances / 10**middle).log_softmax(-1)
        num_used = (-(log_weights.exp() * log_weights).sum(-1)).exp().mean()
        low, high = (middle, high) if num_used < share * len(codebook) else (low, middle)
    return float(f"{10**low:.2g}")


@torch.no_grad()
def kmeans(points: Tensor, num_centres: int, num_rounds: int = 15) -> Tensor:
    """Lloyd's centres `(num_centres, C)` of `points` `(N, C)`; an empty cluster moves to a random point."""
    if len(points) < num_centres:
        raise ValueError(f"{len(points)} latents are too few for {num_centres} codes; give more pictures or lower num_codes")
    generator = torch.Generator().manual_seed(0)
    points = points.float()
    centres = points[torch.randperm(len(points), generator=generator)[:num_centres]].clone()
    for _ in range(num_rounds):
        nearest = torch.cat([torch.cdist(chunk, centres).argmin(-1) for chunk in points.split(8192)])
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        counts = torch.bincount(nearest, minlength=num_centres)
        centres = sums / counts.clamp(min=1).unsqueeze(-1)
        empty = counts == 0
        centres[empty] = points[torch.randint(len(points), (int(empty.sum()),), generator=generator)]
    return centres
