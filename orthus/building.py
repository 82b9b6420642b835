"""A new Orthus from its parts: a backbone config, a trained autoencoder, a tokenizer and latents to initialise the codebook."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from orthus.autoencoder import Autoencoder
from orthus.configuration import DiffusionHeadConfig, OrthusConfig, as_config
from orthus.modeling import OrthusForConditionalGeneration
from orthus.tokenization import BOI_TOKEN, EOI_TOKEN, IMAGE_TOKEN, SEPARATOR_TOKEN

TOKENS = {
    "boi_token_id": BOI_TOKEN,
    "eoi_token_id": EOI_TOKEN,
    "separator_token_id": SEPARATOR_TOKEN,
    "image_token_id": IMAGE_TOKEN,
}


def build_orthus(
    autoencoder: Autoencoder,
    tokenizer: PreTrainedTokenizerBase,
    backbone: dict[str, Any],
    head: dict[str, Any],
    options: dict[str, Any],
    latents: Tensor,
    embedding_std: float | None = None,
) -> OrthusForConditionalGeneration:
    """A model with a new backbone and head around a trained autoencoder.

    Args:
        backbone: fields of the backbone's config with `model_type`; `vocab_size` becomes text tokens + `num_codes`.
        head: fields of [`DiffusionHeadConfig`]; the two widths are set here.
        options: further fields of [`OrthusConfig`], with `num_codes`.
        latents: `(N, L, C)` raw latents of typical pictures: centres of the codebook are found among them by k-means.
        embedding_std: standard deviation of the initial token embeddings and code rows, None for the backbone's own.
    """
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in TOKENS.items()}
    ids |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "pad_token_id", "eos_token_id")}
    missing = sorted(name for name, value in ids.items() if value is None)
    if missing:
        raise ValueError(f"the tokenizer lacks {', '.join(missing)}; add the special tokens to it first")
    num_codes = options["num_codes"]
    token_ids = {name: ids[name] for name in ("bos_token_id", "pad_token_id", "eos_token_id")}
    text_config = as_config("backbone", {**backbone, **token_ids, "vocab_size": len(tokenizer) + num_codes}, "llama")
    head_config = DiffusionHeadConfig(
        **{**head, "latent_dim": autoencoder.config.latent_dim, "cond_dim": text_config.hidden_size}
    )
    config = OrthusConfig(
        text_config=text_config,
        autoencoder_config=autoencoder.config,
        head_config=head_config,
        code_offset=len(tokenizer),
        **{**options, **ids},
    )
    model = OrthusForConditionalGeneration(config)
    model.autoencoder.load_state_dict(autoencoder.state_dict())
    if embedding_std is not None:
        nn.init.normal_(cast(Tensor, model.get_input_embeddings().weight), std=embedding_std)
    if config.latent_embedding != "linear":
        with torch.no_grad():
            model.latent_embedding.codebook.copy_(kmeans(latents.flatten(0, 1), num_codes))
    return model


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


def freeze(model: OrthusForConditionalGeneration, parts: Sequence[str]) -> None:
    """Stop training the named children or dotted sub-modules; ValueError for a name that the model lacks."""
    names = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    for part in parts:
        if part not in names:
            children = ", ".join(dict(model.named_children()))
            raise ValueError(f"cannot freeze {part!r}: the model has no such part; it has {children}")
        chosen = dict(model.named_modules()).get(part) or dict(model.named_parameters())[part]
        chosen.requires_grad_(False)
