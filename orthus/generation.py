"""`generate`: its options, their checks and its output. The loop itself is in `decoding.py`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper
from transformers.utils import ModelOutput

from orthus.decoding import DecodingLoop, Drawing, Limits, Prompt, Row, Writing

if TYPE_CHECKING:
    from orthus.modeling import OrthusForConditionalGeneration

MODALITIES = ("text", "image", "interleaved")
DEFAULT_TEXT_TOKENS = 256


@dataclass
class OrthusGenerateOutput(ModelOutput):
    """`sequences` `(B, T)`: new ids, right-padded; per row `image_latents` `(n, L, C)` and `pixel_values` `(n, 3, H, W)`."""

    sequences: Tensor | None = None
    image_latents: list[Tensor] | None = None
    pixel_values: list[Tensor] | None = None


@torch.no_grad()
def generate(
    model: "OrthusForConditionalGeneration",
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    pixel_values: Tensor | None = None,
    image_latents: Tensor | None = None,
    *,
    modality: str = "interleaved",
    guidance: float = 1.0,
    text_guidance: float = 1.0,
    negative_input_ids: Tensor | None = None,
    negative_attention_mask: Tensor | None = None,
    image_guidance: float | None = None,
    image_negative_input_ids: Tensor | None = None,
    image_negative_attention_mask: Tensor | None = None,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    num_diffusion_steps: int | None = None,
    solver: str | None = None,
    max_images: int | None = None,
    force_image: bool = False,
    max_new_tokens: int | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | list[torch.Generator] | None = None,
    noise: Tensor | None = None,
    decode: bool = True,
    on_position: Callable[[int], None] | None = None,
) -> OrthusGenerateOutput:
    """Continue each prompt of a batch.

    Args:
        input_ids, attention_mask: `(B, P)`, left-padded, ending in the separator of the user's turn.
        pixel_values, image_latents: the images of all prompts in order, `(N, 3, H, W)` or raw `(N, L, C)`.
        modality: `"text"`, `"image"` (begin-of-image is forced, `max_images` images, default 1) or `"interleaved"` (each row
            chooses by itself).
        guidance: classifier-free guidance weight of the text; other than 1 it needs `negative_input_ids` `(1 | B, P')`.
        text_guidance: the same for the tokens that a row writes before its first image: what it says that it will draw.
        image_guidance: weight of the picture in editing, with `image_negative_input_ids` `(1 | B, P'')`: the prompt with its
            images and without its text.
        guidance_interval: part of the diffusion time in which guidance acts; see [`DiffusionHead.sample`].
        max_images: images per row (default as many as `noise` holds, else 1 for `"image"`, 4 for `"interleaved"`).
        force_image: a row that would end without an image draws one instead.
        max_new_tokens: bound on new positions per row, image positions included.
        generator: one generator, or one per row (draws that do not depend on the rest of the batch).
        noise: `(B, max_images, L, C)` standard normal draws to replay.
        decode: also return pixels.
        on_position: called with the number of positions done, once per backbone call.

    Raises:
        ValueError: unknown modality, missing unconditional prompt, too long a prompt, noise of the wrong shape.
    """
    mask = _checked_mask("input_ids", input_ids, attention_mask)
    latents = model._resolve_latents(pixel_values, image_latents)
    streams = [Prompt(input_ids, mask, latents)]
    if image_guidance is not None:
        streams.append(_stream("image_guidance", image_negative_input_ids, image_negative_attention_mask, input_ids, latents))
    if guidance != 1.0 or text_guidance != 1.0 or image_guidance is not None:
        streams.append(_stream("guidance", negative_input_ids, negative_attention_mask, input_ids, None))
    if max_images is None and noise is not None and noise.ndim == 4 and modality != "text":
        max_images = noise.shape[1]
    limits = _limits(model, modality, max_new_tokens, max_images, force_image, max(len(s.input_ids[0]) for s in streams))
    drawing = Drawing(guidance, image_guidance, guidance_interval, num_diffusion_steps, solver, noise, generator)
    _check_draws(model, drawing, len(input_ids), limits.max_images)
    warpers = LogitsProcessorList()
    if do_sample and temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if do_sample and top_p < 1.0:
        warpers.append(TopPLogitsWarper(float(top_p)))
    loop = DecodingLoop(model, streams, limits, drawing, Writing(warpers if do_sample else None, text_guidance))
    rows = loop.run(on_position)
    return _output(model, rows, decode)


def _checked_mask(name: str, ids: Tensor, mask: Tensor | None) -> Tensor:
    """The mask of a prompt, ones when None; ValueError unless prompt and mask are `(B, P)` and every row ends in a real token."""
    if ids.ndim != 2 or ids.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(ids.shape)}, expected (rows, tokens) with at least one of each")
    mask = torch.ones_like(ids) if mask is None else mask
    if mask.shape != ids.shape:
        raise ValueError(f"the attention mask of {name} has shape {tuple(mask.shape)}, expected {tuple(ids.shape)}")
    if not bool(mask[:, -1].all()):
        raise ValueError(f"{name} is padded on the right; prompts are continued at their end: pad on the left")
    return mask


def _stream(name: str, ids: Tensor | None, mask: Tensor | None, like: Tensor, latents: Tensor | None) -> Prompt:
    """A guidance stream for every row; its prompt may be given once for all rows."""
    if ids is None:
        prefix = "image_negative" if name == "image_guidance" else "negative"
        raise ValueError(f"{name} needs {prefix}_input_ids, the unconditional prompt (see OrthusProcessor.unconditional)")
    mask = _checked_mask("the unconditional prompt", ids, mask)
    if len(ids) not in (1, len(like)):
        raise ValueError(f"the unconditional prompt has {len(ids)} rows, expected 1 or {len(like)}")
    return Prompt(ids.expand(len(like), -1).to(like.device), mask.expand(len(like), -1).to(like.device), latents)


def _limits(
    model: "OrthusForConditionalGeneration",
    modality: str,
    max_new_tokens: int | None,
    max_images: int | None,
    force_image: bool,
    prompt_width: int,
) -> Limits:
    if modality not in MODALITIES:
        raise ValueError(f"modality={modality!r} is not one of {', '.join(MODALITIES)}")
    per_image = model.config.num_latents + 2
    max_images = {"text": 0, "image": 1, "interleaved": 4}[modality] if max_images is None else max_images
    if modality == "image" and max_images < 1:
        raise ValueError(f"modality='image' needs max_images of at least 1, got {max_images}")
    limit = getattr(model.config.text_config, "max_position_embeddings", None)
    if modality == "image":
        max_new_tokens = max_images * per_image
    elif max_new_tokens is None:
        max_new_tokens = DEFAULT_TEXT_TOKENS + max_images * per_image
        max_new_tokens = max_new_tokens if limit is None else max(min(max_new_tokens, limit - prompt_width), 1)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if limit is not None and prompt_width + max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {prompt_width} positions and {max_new_tokens} new ones exceed the backbone's limit of {limit}; "
            "shorten the prompt, or lower max_new_tokens or max_images"
        )
    return Limits(modality, max_new_tokens, max_images, force_image)


def _check_draws(model: "OrthusForConditionalGeneration", drawing: Drawing, num_rows: int, max_images: int) -> None:
    if isinstance(drawing.generator, list) and len(drawing.generator) != num_rows:
        raise ValueError(f"generator is a list of {len(drawing.generator)}, expected one per row: {num_rows}")
    if drawing.noise is None:
        return
    head = model.config.head_config
    shape, expected = tuple(drawing.noise.shape), (num_rows, max_images, model.config.num_latents, head.latent_dim)
    if len(shape) != 4 or shape[0] != num_rows or shape[1] < max_images or shape[2:] != expected[2:]:
        raise ValueError(f"noise has shape {shape}, expected (num_rows, num_images, num_latents, latent_dim) = {expected}")


def _output(model: "OrthusForConditionalGeneration", rows: list[Row], decode: bool) -> OrthusGenerateOutput:
    config, device = model.config, model.lm_head.weight.device
    width = max(len(row.tokens) for row in rows)
    sequences = torch.full((len(rows), width), config.pad_token_id, device=device)
    for index, row in enumerate(rows):
        sequences[index, : len(row.tokens)] = torch.tensor(row.tokens, device=device)
    empty = torch.empty(0, config.num_latents, config.head_config.latent_dim, device=device)
    latents = [torch.stack([torch.stack(image) for image in row.images]) if row.images else empty for row in rows]
    pixels: list[Tensor] | None = None
    if decode:
        counts = [len(image) for image in latents]
        flat = torch.cat(latents)
        size = config.autoencoder_config.image_size
        decoded = model.decode_image_latents(flat) if len(flat) else torch.empty(0, 3, size, size, device=device)
        pixels = list(decoded.split(counts))
    return OrthusGenerateOutput(sequences=sequences, image_latents=latents, pixel_values=pixels)
