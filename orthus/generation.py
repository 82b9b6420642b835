"""`generate`: its options, their checks and its output.

Text alone is written by `transformers`' own loop; images, and text in which rows switch to images, by `decoding.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import (
    GenerationMixin,
    LogitsProcessorList,
    MinPLogitsWarper,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils import ModelOutput

from orthus import decoding
from orthus.backbone_rows import Prompt
from orthus.continuation import Continuation, Drawing, Limits, PromptTooLong, RandomChoice, Row, Writing, banned_ids
from orthus.sampling import EXACT, Sampling

if TYPE_CHECKING:
    from orthus.modeling import OrthusForConditionalGeneration

MODALITIES = ("text", "image", "interleaved")
DEFAULT_TEXT_TOKENS = 256
MIN_TEMPERATURE = 1e-4  # scores over less overflow
FOREIGN_NAMES = {"num_inference_steps": "num_diffusion_steps", "guidance_scale": "guidance"}  # what others call our options
Generators = torch.Generator | list[torch.Generator] | None


@dataclass
class OrthusGenerateOutput(ModelOutput):
    """`sequences` `(B, T)`: new ids, right-padded; per row `image_latents` `(n, L, C)` and `pixel_values` `(n, 3, H, W)`."""

    sequences: Tensor | None = None
    image_latents: list[Tensor] | None = None
    pixel_values: list[Tensor] | None = None


class OrthusGenerationMixin(GenerationMixin):
    """`generate` for a model whose rows write text and draw images.

    `GenerationMixin.generate(model, ...)` remains `transformers`' own loop: text only, with its own output.
    """

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
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
        preset: str | None = None,
        image_prefix: Tensor | None = None,
        max_images: int | None = None,
        force_image: bool = False,
        max_new_tokens: int | None = None,
        num_return_sequences: int = 1,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        streamer: Any = None,
        generator: Generators = None,
        noise: Tensor | None = None,
        acceleration: str = "auto",
        decode: bool = True,
        on_position: Callable[[int], None] | None = None,
        **options: Any,
    ) -> OrthusGenerateOutput:
        """Continue each prompt of a batch.

        Args:
            input_ids, attention_mask: `(B, P)`, left-padded, ending in the separator of the user's turn.
            pixel_values, image_latents: the images of all prompts in order, `(N, 3, H, W)` or raw `(N, L, C)`; both when some
                come as pixels, whose latents are then NaN.
            modality: `"text"`, `"image"` (begin-of-image is forced, `max_images` images, default 1) or `"interleaved"` (each row
                chooses by itself).
            guidance: classifier-free guidance weight of the text; other than 1 it needs `negative_input_ids` `(1 | B, P')`.
            text_guidance: the same for the tokens that a row writes before its first image: what it says that it will draw.
            image_guidance: weight of the picture in editing, with `image_negative_input_ids` `(1 | B, P'')`: the prompt with its
                images and without its text.
            preset: `"exact"`: the published sampler (DDIM, 100 steps) whatever the head's config says.
            image_prefix: `(B, P, C)` raw latents with which each row's first image begins, for `"image"`: the rest is drawn.
            max_images: images per row (default as many as `noise` holds, else 1 for `"image"`, 4 for `"interleaved"`).
            force_image: a row that would end without an image draws one instead.
            max_new_tokens: bound on new positions per row, image positions included.
            num_return_sequences: continuations of each prompt; row `i * n + j` of the output is the j-th of prompt i.
            do_sample, temperature, top_k, top_p, min_p, logits_processor: of the text, as in `transformers`.
            stopping_criteria: as in `transformers`, asked at every position; a picture that is not whole when its row is stopped
                is dropped.
            streamer: receives the prompt, then one id per row and call of the backbone, as `transformers`' streamers do, and
                latents as they are drawn if it has `put_latents`; see [`orthus.streaming.SegmentStreamer`].
            generator: one generator, or one per row of the output (draws that do not depend on the rest of the batch).
            noise: `(B, max_images, L, C)` standard normal draws to replay.
            acceleration: `"auto"` (`"graph"`, captured graphs, on CUDA; `"packed"`, packed weights and look-ahead, on a CPU),
                `"compile"` or `"none"`, the plain loop.
            decode: also return pixels.
            on_position: called with the number of positions done, once per backbone call.
            options: fields of [`orthus.sampling.Sampling`] (`solver`, `num_diffusion_steps`, `guidance_interval`, ...).
                For `"text"` alone: the other options of `transformers`' `generate` (`generation_config`, `num_beams`,
                `max_length`, `cache_implementation`, `prompt_lookup_num_tokens`, ...) but those that ask for more than sequences.

        Raises:
            ValueError: unknown modality or option, missing unconditional prompt, too long a prompt, noise of the wrong shape.
        """
        model = cast("OrthusForConditionalGeneration", self)
        sampling, text_options = _sampling(preset, options)
        mask = _checked_mask("input_ids", input_ids, attention_mask)
        latents = model._resolve_latents(pixel_values, image_latents)
        with_beams = modality == "text" and text_options.get("num_beams", 1) != 1
        prompt = _repeated(model, Prompt(input_ids, mask, latents), 1 if with_beams else num_return_sequences)
        streams = [prompt]
        if image_guidance is not None:
            negative = (image_negative_input_ids, image_negative_attention_mask)
            streams.append(guidance_stream("image_guidance", *negative, prompt, num_return_sequences, prompt.image_latents))
        if guidance != 1.0 or text_guidance != 1.0 or image_guidance is not None:
            negative = (negative_input_ids, negative_attention_mask)
            streams.append(guidance_stream("guidance", *negative, prompt, num_return_sequences, None))
        if max_images is None and noise is not None and noise.ndim == 4 and modality != "text":
            max_images = noise.shape[1]
        limits = limits_for(model, modality, max_new_tokens, max_images, force_image, streams)
        drawing = Drawing(guidance, image_guidance, sampling, noise, generator, image_prefix)
        _check_draws(model, drawing, len(prompt.input_ids), limits)
        processors = LogitsProcessorList([*(logits_processor or ()), *warpers(do_sample, temperature, top_k, top_p, min_p)])
        choice = RandomChoice(generator) if do_sample else None
        if choice and text_options.get("num_beams", 1) != 1:
            raise ValueError(f"num_beams={text_options['num_beams']} with do_sample=True is not supported; drop one of them")
        if modality == "text" and text_guidance == 1.0:
            processors += [choice] if choice else []
            options = {"max_new_tokens": limits.max_new_tokens, "streamer": streamer, **text_options}
            options |= {"num_return_sequences": num_return_sequences} if with_beams else {}
            return _write(model, prompt, processors, stopping_criteria, on_position, options)
        if text_options:
            meant = [f"{name} is {FOREIGN_NAMES[name]} here" for name in text_options if name in FOREIGN_NAMES]
            remedy = "; ".join(meant) or "drop them"
            raise ValueError(f"options {sorted(text_options)} are for modality='text' without text_guidance only; {remedy}")
        writing = Writing(processors, StoppingCriteriaList(stopping_criteria or ()), choice, text_guidance, streamer)
        rows = decoding.run(model, Continuation(model.config, streams, limits, drawing, writing, on_position), acceleration)
        return output_of(model, rows, decode)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_latents: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,  # transformers looks for this very name
    ) -> dict[str, Any]:
        """As in `transformers`; pictures are passed on only where their placeholders are fed."""
        inputs: dict[str, Any] = cast(Any, super()).prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        fed = inputs.get("input_ids")
        image_token = cast("OrthusForConditionalGeneration", self).config.image_token_id
        if fed is not None and fed.shape[1] > 1 and bool((fed == image_token).any()):
            inputs |= {"pixel_values": pixel_values, "image_latents": image_latents}
        return inputs

    def _expand_inputs_for_generation(  # type: ignore[override]
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **inputs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """As in `transformers`, with the pictures of a row repeated together."""
        model = cast("OrthusForConditionalGeneration", self)
        pictures = {name: inputs.pop(name) for name in ("pixel_values", "image_latents") if inputs.get(name) is not None}
        if pictures and input_ids is not None and expand_size > 1 and inputs.get("inputs_embeds") is None:
            latents = cast(Tensor, model._resolve_latents(pictures.get("pixel_values"), pictures.get("image_latents")))
            pictures = {"image_latents": _repeat_pictures(model, input_ids, latents, expand_size)}
        ids, inputs = cast(Any, super())._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **inputs)
        return ids, {**inputs, **pictures}


def _sampling(preset: str | None, options: dict[str, Any]) -> tuple[Sampling, dict[str, Any]]:
    """How latents are drawn, and the options that are not about that."""
    if preset not in (None, "exact"):
        raise ValueError(f"preset={preset!r} is unknown; use 'exact' or leave it out")
    names = {field.name for field in fields(Sampling)}
    given = {name: value for name, value in options.items() if name in names}
    clash = [name for name in ("solver", "num_diffusion_steps", "spacing", "step_schedule") if preset and name in given]
    if clash:
        raise ValueError(f"preset='exact' sets {', '.join(clash)}; drop one of them")
    return replace(EXACT if preset else Sampling(), **given), {k: v for k, v in options.items() if k not in names}


def warpers(do_sample: bool, temperature: float, top_k: int, top_p: float, min_p: float) -> list[Any]:
    """What turns scores into those that are sampled from, in the order of `transformers`."""
    if not do_sample:
        return []
    if temperature < MIN_TEMPERATURE:
        raise ValueError(f"temperature={temperature} is below {MIN_TEMPERATURE:g}; use do_sample=False for the likeliest words")
    wanted: list[tuple[bool, Callable[[], Any]]] = [
        (temperature != 1.0, lambda: TemperatureLogitsWarper(float(temperature))),
        (top_k > 0, lambda: TopKLogitsWarper(top_k)),
        (top_p < 1.0, lambda: TopPLogitsWarper(float(top_p))),
        (min_p > 0.0, lambda: MinPLogitsWarper(float(min_p))),
    ]
    return [make() for is_wanted, make in wanted if is_wanted]


def _write(
    model: "OrthusForConditionalGeneration",
    prompt: Prompt,
    processors: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList | None,
    on_position: Callable[[int], None] | None,
    options: dict[str, Any],
) -> OrthusGenerateOutput:
    """Text alone, by `transformers`: what the head may not write is suppressed, and no image begins."""
    config, given = model.config, options.get("generation_config")
    asked = sorted(name for name, value in options.items() if value and name.startswith(("return_dict", "output_")))
    if asked:
        raise ValueError(f"{', '.join(asked)}: generate returns sequences and pictures; use GenerationMixin.generate(model, ...)")
    if "max_length" in options or getattr(given, "max_new_tokens", None) or getattr(given, "max_length", None):
        del options["max_new_tokens"]
    never = torch.cat([banned_ids(config, torch.device("cpu")), torch.tensor([config.boi_token_id])])
    suppressed = SuppressTokensLogitsProcessor(never.tolist(), device=str(prompt.input_ids.device))
    counted = StoppingCriteriaList([*(stopping_criteria or ()), *([_Counter(on_position)] if on_position else [])])
    settings: dict[str, Any] = {"eos_token_id": config.end_token_ids, "pad_token_id": config.pad_token_id}
    settings |= {} if given is not None else {"do_sample": False}
    sequences = GenerationMixin.generate(
        model,  # type: ignore[arg-type]
        prompt.input_ids,
        attention_mask=prompt.attention_mask,
        image_latents=prompt.image_latents,
        logits_processor=LogitsProcessorList([suppressed, *processors]),
        stopping_criteria=counted,
        return_dict_in_generate=False,
        **{**settings, **options},
    )
    new = cast(Tensor, sequences)[:, prompt.input_ids.shape[1] :]
    return OrthusGenerateOutput(new, *([empty] * len(new) for empty in _nothing_drawn(model)))


def _nothing_drawn(model: "OrthusForConditionalGeneration") -> tuple[Tensor, Tensor]:
    """Latents `(0, L, C)` and pixels `(0, 3, H, W)`."""
    config, device = model.config, model.lm_head.weight.device
    size = config.autoencoder_config.image_size
    latents = torch.empty(0, config.num_latents, config.head_config.latent_dim, device=device)
    return latents, torch.empty(0, 3, size, size, device=device)


class _Counter:
    """A stopping criterion that never stops and reports how many positions are done."""

    def __init__(self, on_position: Callable[[int], None]) -> None:
        self.on_position, self.done = on_position, 0

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        self.done += 1
        self.on_position(self.done)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _repeat_pictures(model: "OrthusForConditionalGeneration", ids: Tensor, latents: Tensor, times: int) -> Tensor:
    """Latents `(N, L, C)` of the pictures of all rows of `ids`, those of each row `times` times in turn."""
    counts = ((ids == model.config.image_token_id).sum(-1) // model.config.num_latents).tolist()
    return torch.cat([row.repeat(times, 1, 1) for row in latents.split(counts)])


def _repeated(model: "OrthusForConditionalGeneration", prompt: Prompt, times: int) -> Prompt:
    """Every row `times` times in turn."""
    if times < 1:
        raise ValueError(f"num_return_sequences={times} is below 1")
    if times == 1:
        return prompt
    latents = prompt.image_latents
    return Prompt(
        prompt.input_ids.repeat_interleave(times, 0),
        prompt.attention_mask.repeat_interleave(times, 0),
        None if latents is None else _repeat_pictures(model, prompt.input_ids, latents, times),
    )


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


def guidance_stream(
    name: str, ids: Tensor | None, mask: Tensor | None, prompt: Prompt, times: int, latents: Tensor | None
) -> Prompt:
    """A guidance stream for every row of `prompt`; its own prompt may be given once for all, or once per prompt."""
    if ids is None:
        prefix = "image_negative" if name == "image_guidance" else "negative"
        raise ValueError(f"{name} needs {prefix}_input_ids, the unconditional prompt (see OrthusProcessor.unconditional)")
    mask = _checked_mask("the unconditional prompt", ids, mask)
    num_rows, device = len(prompt.input_ids), prompt.input_ids.device
    if len(ids) not in (1, num_rows // times):
        raise ValueError(f"the unconditional prompt has {len(ids)} rows, expected 1 or {num_rows // times}")
    repeats = num_rows // len(ids)
    return Prompt(ids.repeat_interleave(repeats, 0).to(device), mask.repeat_interleave(repeats, 0).to(device), latents)


def limits_for(
    model: "OrthusForConditionalGeneration",
    modality: str,
    max_new_tokens: int | None,
    max_images: int | None,
    force_image: bool,
    streams: list[Prompt],
) -> Limits:
    if modality not in MODALITIES:
        raise ValueError(f"modality={modality!r} is not one of {', '.join(MODALITIES)}")
    per_image = model.config.num_latents + 2
    max_images = {"text": 0, "image": 1, "interleaved": 4}[modality] if max_images is None else max_images
    if modality == "image" and max_images < 1:
        raise ValueError(f"modality='image' needs max_images of at least 1, got {max_images}")
    prompt_width = max(stream.input_ids.shape[1] for stream in streams)
    limit, kind = getattr(model.config.text_config, "max_position_embeddings", None), "limit"
    window = _window(model.config.text_config)
    if window is not None and len(streams) > 1 and (limit is None or window < limit):
        limit, kind = window, "sliding window, beyond which guidance would lose its prompt,"
    if force_image and max_new_tokens is not None and modality == "interleaved" and max_new_tokens < per_image:
        raise ValueError(f"force_image=True needs max_new_tokens of at least {per_image}, a picture's, got {max_new_tokens}")
    if modality == "image":
        max_new_tokens = max_images * per_image
    elif max_new_tokens is None:
        max_new_tokens = DEFAULT_TEXT_TOKENS + max_images * per_image
        max_new_tokens = max_new_tokens if limit is None else max(min(max_new_tokens, limit - prompt_width), 1)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if limit is not None and prompt_width + max_new_tokens > limit:
        message = f"a prompt of {prompt_width} positions and {max_new_tokens} new ones exceed the backbone's {kind} of {limit}; "
        message += "shorten the prompt, begin a new conversation, or lower max_new_tokens or max_images"
        raise PromptTooLong(message, prompt_width, limit)
    return Limits(modality, max_new_tokens, max_images, force_image)


def _window(text_config: Any) -> int | None:
    """How many columns of the cache a backbone's local layers see, None without such layers. A stream that restarts hides
    columns, which count all the same."""
    kinds = getattr(text_config, "layer_types", None)
    return None if kinds is not None and "sliding_attention" not in kinds else getattr(text_config, "sliding_window", None)


def _check_draws(model: "OrthusForConditionalGeneration", drawing: Drawing, num_rows: int, limits: Limits) -> None:
    if isinstance(drawing.generator, list) and len(drawing.generator) != num_rows:
        raise ValueError(f"generator is a list of {len(drawing.generator)}, expected one per row: {num_rows}")
    num_latents, latent_dim = model.config.num_latents, model.config.head_config.latent_dim
    if drawing.prefix is not None:
        shape = tuple(drawing.prefix.shape)
        if limits.modality != "image" or len(shape) != 3 or (shape[0], shape[2]) != (num_rows, latent_dim):
            wanted = (num_rows, "P", latent_dim)
            raise ValueError(f"image_prefix has shape {shape}; it needs modality='image' and shape {wanted}")
        if not 1 <= shape[1] < num_latents:
            raise ValueError(f"image_prefix holds {shape[1]} latents of an image, expected 1 to {num_latents - 1}")
    if drawing.noise is None:
        return
    shape, expected = tuple(drawing.noise.shape), (num_rows, limits.max_images, num_latents, latent_dim)
    if len(shape) != 4 or shape[0] != num_rows or shape[1] < limits.max_images or shape[2:] != expected[2:]:
        raise ValueError(f"noise has shape {shape}, expected (num_rows, num_images, num_latents, latent_dim) = {expected}")


def output_of(model: "OrthusForConditionalGeneration", rows: list[Row], decode: bool) -> OrthusGenerateOutput:
    config, device = model.config, model.lm_head.weight.device
    width = max(len(row.tokens) for row in rows)
    sequences = torch.full((len(rows), width), config.pad_token_id, device=device)
    for index, row in enumerate(rows):
        sequences[index, : len(row.tokens)] = torch.tensor(row.tokens, device=device)
    no_latents, no_pixels = _nothing_drawn(model)
    latents = [torch.stack([torch.stack(image) for image in row.images]) if row.images else no_latents for row in rows]
    pixels: list[Tensor] | None = None
    if decode:
        counts = [len(image) for image in latents]
        flat = torch.cat(latents)
        decoded = model.decode_image_latents(flat) if len(flat) else no_pixels
        pixels = list(decoded.split(counts))
    return OrthusGenerateOutput(sequences=sequences, image_latents=latents, pixel_values=pixels)
