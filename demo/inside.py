"""What happens inside the model while it draws: soft-VQ assignments, the denoising of one latent, attention to words.

Everything is computed in one pass over a conversation that ends with a picture, with the modules that draw; the app shows it.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from orthus.backbone_rows import positions_from_mask
from orthus.data.schema import Turn
from orthus.modeling import OrthusForConditionalGeneration
from orthus.processing import OrthusProcessor
from orthus.sampling import Sampling

WORD_MARKS = ("\u0120", "\u2581", " ")  # with which byte-level and SentencePiece tokens begin a word


@dataclass(frozen=True)
class Words:
    """Words of a conversation and the positions `(start, end)` that each takes in the sequence."""

    texts: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    roles: tuple[str, ...]


@dataclass(frozen=True)
class Look:
    """One pass over turns whose last picture is looked at.

    latents `(L, C)` of that picture; sources `(L, D)`: hidden states that predict them; unguided `(L, D)`: the same given only
    the unconditional prompt; attention `(layers, L, T)`: from the position that predicts a latent to all positions, mean over
    heads; first: position of latent 0.
    """

    latents: Tensor
    sources: Tensor
    unguided: Tensor
    attention: Tensor
    first: int
    words: Words


@dataclass(frozen=True)
class Attended:
    """Where the position that predicts one latent looks, in shares that sum to 1."""

    words: tuple[float, ...]  # as `Look.words`
    latents: Tensor  # `(L,)`, the picture's own earlier latents
    rest: float  # control tokens and other pictures


class Microscope:
    """A model to look into. Shares the model's weights and leaves it as it is, so that it can serve meanwhile."""

    def __init__(self, model: OrthusForConditionalGeneration, processor: OrthusProcessor) -> None:
        self.model, self.processor = model, processor
        config = copy.deepcopy(model.backbone.config)
        config._attn_implementation = "eager"  # the only one that returns its weights
        self.backbone: Any = _twin(model.backbone, model.backbone.config, config)

    @torch.no_grad()
    def look(self, turns: Sequence[Turn]) -> Look:
        """Raises ValueError where the turns hold no picture."""
        rendered = self.processor.render(turns)
        if not rendered.images:
            raise ValueError("the conversation holds no picture to look into; draw or upload one first")
        ids = torch.tensor([rendered.input_ids], device=self.model.lm_head.weight.device)
        given = {name: value.to(ids.device) for name, value in self.processor._pictures(rendered.images).items()}
        latents = cast(Tensor, self.model._resolve_latents(given.get("pixel_values"), given.get("image_latents")))
        count = self.model.config.num_latents
        first = int((ids[0] == self.model.config.image_token_id).nonzero()[-count])
        hidden, attentions = self._pass(ids, latents)
        rows = slice(first - 1, first - 1 + count)
        prompt = self.processor.unconditional([[turns[0]]])["input_ids"].to(ids.device)
        begin = torch.tensor([[self.model.config.boi_token_id] + [self.model.config.image_token_id] * count], device=ids.device)
        unguided, _ = self._pass(torch.cat([prompt, begin], 1), latents[-1:])
        attention = torch.stack([layer[0].mean(0)[rows] for layer in attentions]).float()
        words = words_of(self.processor, turns)
        return Look(latents[-1].float(), hidden[rows], unguided[-count - 1 : -1], attention, first, words)

    def _pass(self, ids: Tensor, latents: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Hidden states `(T, D)` and attention `(1, H, T, T)` of each layer."""
        mask = torch.ones_like(ids)
        outputs = self.backbone(
            inputs_embeds=self.model.embed_inputs(ids, latents),
            attention_mask=mask,
            position_ids=positions_from_mask(mask),
            output_attentions=True,
            use_cache=False,
        )
        return outputs.last_hidden_state[0], outputs.attentions

    @torch.no_grad()
    def assignment(self, latents: Tensor) -> Tensor:
        """Soft assignment to the codebook `(L, K)` of latents `(L, C)` (eq. 4). Raises ValueError without a codebook."""
        embedding = self.model.latent_embedding
        if embedding.kind == "linear":
            raise ValueError("latent_embedding='linear' has no codebook, so nothing is assigned; use a soft-VQ checkpoint")
        weights = embedding.log_weights(latents).float()
        if embedding.kind == "argmin":
            return torch.nn.functional.one_hot(weights.argmax(-1), weights.shape[-1]).float()
        return weights.softmax(-1)

    @torch.no_grad()
    def trajectory(self, look: Look, place: int, noise: Tensor, guidance: float, sampling: Sampling) -> Tensor:
        """Raw states `(S + 1, C)` of the latent at raster index `place`, from `noise` `(C,)` to what is drawn: one evaluation of
        the head a step, as `LatentSampler` without looking ahead."""
        head = self.model.diffusion_head
        steps = head.sampler_steps(sampling)
        guided = head.is_guided(steps.times, sampling.guidance_interval)
        x, states = noise.unsqueeze(0).float(), [noise.float()]
        memory, cond, uncond = torch.zeros_like(x), look.sources[place : place + 1], look.unguided[place : place + 1]
        for index, time in enumerate(steps.times):
            times = time.expand(1).to(x.device)
            v = head(x.to(cond.dtype), times, cond).float()
            if guided[index] and guidance != 1.0:
                other = head(x.to(cond.dtype), times, uncond).float()
                v = other + guidance * (v - other)
            (a, b, c), (d, e, f) = steps.state[index].tolist(), steps.memory[index].tolist()
            x, memory = a * x + b * v + c * memory, d * x + e * v + f * memory
            states.append(x[0])
        return torch.stack(states) / head.config.latent_scale

    @torch.no_grad()
    def patches(self, look: Look, place: int, states: Tensor) -> list[Image.Image]:
        """The patch at `place` for each of `states` `(S, C)`, cut from the picture decoded with that latent in its place."""
        latents = look.latents.repeat(len(states), 1, 1)
        latents[:, place] = states.to(latents)
        pictures = self.processor.image_processor.postprocess(self.model.decode_image_latents(latents))
        side = round(len(look.latents) ** 0.5)
        size, (row, column) = pictures[0].width // side, divmod(place, side)
        box = (column * size, row * size, (column + 1) * size, (row + 1) * size)
        return [picture.crop(box) for picture in pictures]


def _twin(module: nn.Module, config: Any, own: Any) -> nn.Module:
    """The same modules around the same tensors, with `own` in place of `config`, hooks of their own, and plain forwards (an
    engine that serves may have replaced those of its linear layers)."""
    twin = copy.copy(module)
    twin.__dict__.pop("forward", None)
    for name in [name for name in twin.__dict__ if name.startswith("_forward_")]:
        twin.__dict__[name] = copy.copy(twin.__dict__[name])
    if getattr(module, "config", None) is config:
        twin.__dict__["config"] = own
    twin._modules = {name: None if child is None else _twin(child, config, own) for name, child in module._modules.items()}
    return twin


def entropy_bits(assignment: Tensor) -> Tensor:
    """Entropy in bits `(L,)` of assignments `(L, K)`; 0 for one code alone."""
    return -(assignment * assignment.clamp(min=torch.finfo(assignment.dtype).tiny).log2()).sum(-1)


def attended(look: Look, place: int, layer: int | None = None) -> Attended:
    """Shares of attention of the position that predicts latent `place`; `layer` None is the mean of all layers."""
    weights = look.attention[:, place].mean(0) if layer is None else look.attention[layer, place]
    words = tuple(float(weights[start:end].sum()) for start, end in look.words.spans)
    latents = weights[look.first : look.first + len(look.latents)]
    return Attended(words, latents, max(0.0, 1.0 - sum(words) - float(latents.sum())))


def words_of(processor: OrthusProcessor, turns: Sequence[Turn]) -> Words:
    """The words of all text segments with their positions in `processor.render(turns)`."""
    texts: list[str] = []
    spans: list[tuple[int, int]] = []
    roles: list[str] = []
    position = 1  # after begin-of-text
    for turn in turns:
        for segment in turn.segments:
            if not isinstance(segment, str):
                position += processor.num_image_tokens + 2
                continue
            ids = processor.encode_text(segment) if segment else ()
            tokens = processor.tokenizer.convert_ids_to_tokens(list(ids))
            starts = [i for i, token in enumerate(tokens) if i == 0 or token.startswith(WORD_MARKS)]
            for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
                texts.append(processor.tokenizer.decode(list(ids[start:end])).strip())
                spans.append((position + start, position + end))
                roles.append(turn.role)
            position += len(ids)
        position += 1  # separator
    return Words(tuple(texts), tuple(spans), tuple(roles))
