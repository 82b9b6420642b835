"""Orthus: embed -> backbone -> LM head | diffusion head. The losses sit inside `forward`, each formula has one home."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.models import auto
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

from orthus import adapters, loading, remote_code
from orthus import autoencoder as _autoencoder  # noqa: F401  (registers the autoencoders with AutoConfig and AutoModel)
from orthus.backbone_rows import positions_from_mask
from orthus.configuration import IGNORE_INDEX, OrthusConfig
from orthus.conversion import IGNORED_KEYS, PUBLISHED_KEY_MAPPING
from orthus.diffusion_head import DiffusionHead, init_layer
from orthus.generation import OrthusGenerationMixin
from orthus.soft_vq import LatentEmbedding
from orthus.text_head import TextHead

NOISE_LEVELS = 4  # in which the image loss is reported


@dataclass
class OrthusOutput(ModelOutput):
    """Output of [`OrthusForConditionalGeneration.forward`].

    `loss_sums` and `loss_counts` hold, under "text" and "image", the summed loss and the number of targets; `text_loss` and
    `image_loss` are their means and `loss` their weighted sum. A loss without targets is 0. `diagnostics` `(4, 2)`: sum and
    number of the image losses of all noise draws, by quarters of the diffusion time from data to noise.
    """

    loss: Tensor | None = None
    text_loss: Tensor | None = None
    image_loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    last_hidden_state: Tensor | None = None
    loss_sums: dict[str, Tensor] | None = None
    loss_counts: dict[str, int] | None = None
    diagnostics: Tensor | None = None


class OrthusForConditionalGeneration(PreTrainedModel, OrthusGenerationMixin):
    """One causal transformer over text tokens and continuous image latents (arXiv 2412.00127).

    Latents `(N, L, C)` are raw autoencoder features at every public method; `N` counts images in order of appearance over
    the flattened batch.
    """

    config_class = OrthusConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["DiffusionHead"]
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _keys_to_ignore_on_load_unexpected = list(IGNORED_KEYS)

    def __init__(self, config: OrthusConfig) -> None:
        super().__init__(config)
        self.generation_config.eos_token_id = config.end_token_ids
        self.backbone = AutoModel.from_config(config.text_config)
        table = next(name for name, module in self.backbone.named_modules() if module is self.backbone.get_input_embeddings())
        self._tied_weights_keys = {"lm_head.weight": f"backbone.{table}.weight"}
        if hasattr(self.backbone, "vqmodel"):  # Chameleon brings a discrete tokenizer of its own; ours is `autoencoder`
            del self.backbone.vqmodel
        self.autoencoder = AutoModel.from_config(config.autoencoder_config).requires_grad_(False)  # trained by itself
        self.latent_embedding = LatentEmbedding(config)
        self.lm_head = TextHead(config.text_config, config.lm_head_bias)
        self.diffusion_head = DiffusionHead(config.head_config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, LatentEmbedding):
            module.reset_parameters(std)
        elif module is self.lm_head or module is getattr(self.latent_embedding, "projection", None):
            init.normal_(cast(nn.Linear, module).weight, std=std)
            if cast(nn.Linear, module).bias is not None:
                init.zeros_(cast(nn.Linear, module).bias)
        else:
            init_layer(module)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | None, *args: Any, allow_missing: bool = False, **options: Any
    ) -> Any:
        """Load our layout or the published one (`model_type: chameleon`), from a folder or a hub name, safetensors only.

        Options are those of `PreTrainedModel.from_pretrained`. Raises ValueError for missing or misshaped tensors, a missing
        or damaged file, or pickles; `allow_missing=True` starts missing tensors from random values (Chameleon as a base).
        """
        path = str(pretrained_model_name_or_path)
        wants_report = options.pop("output_loading_info", False)
        loading.refuse_pickles(path, options.get("subfolder", ""))
        loading.refuse_missing_shards(path, options.get("subfolder", ""))
        accept_misshaped = options.pop("ignore_mismatched_sizes", False)
        if options.get("quantization_config") is not None:
            options["quantization_config"] = loading.spare_heads(options["quantization_config"])
        options = {"use_safetensors": True, "key_mapping": PUBLISHED_KEY_MAPPING, **options}
        try:
            source: Any = path if pretrained_model_name_or_path is not None else None  # None: `config` and `state_dict`
            options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
            loaded: Any = super().from_pretrained(source, *args, **options)
        except SafetensorError as error:
            raise loading.damaged(error, path) from error
        model, report = loaded
        model.generation_config.eos_token_id = model.config.end_token_ids  # whatever the files say
        model.autoencoder.requires_grad_(False)  # loading makes new parameters
        if not accept_misshaped:
            loading.check_shapes(path, report)
        if not allow_missing:
            loading.check_complete(path, report)
        loading.check_resident(path, model)
        return (model, report) if wants_report else model

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = remote_code.MODEL_AUTO_CLASSES[0]) -> None:
        """From now on, what is saved holds our code too; see `remote_code.register`."""
        remote_code.register(cls, auto_class)

    def save_pretrained(self, save_directory: str, *, save_original_format: bool = False, **options: Any) -> None:  # type: ignore[override]
        """As in `transformers`, in our layout, adapters merged; `conversion.save_published` writes the published one."""
        if adapters.has_lora(self):
            adapters.save_merged(self, save_directory, save_original_format=save_original_format, **options)
            return
        super().save_pretrained(save_directory, save_original_format=save_original_format, **options)

    # ------------------------------------------------------------------ latents in and out

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weights of the loss terms: text + lambda * image."""
        return {"text": 1.0, "image": self.config.image_loss_weight}

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    @torch.no_grad()
    def get_image_latents(self, pixel_values: Tensor) -> Tensor:
        """Raw latents `(N, L, C)` of pictures `(N, 3, H, W)` in [-1, 1]."""
        size = self.config.autoencoder_config.image_size
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, size, size):
            raise ValueError(f"pixel_values has shape {tuple(pixel_values.shape)}, expected (N, 3, {size}, {size})")
        return self.autoencoder.encode(pixel_values.to(next(self.autoencoder.parameters()).dtype))

    @torch.no_grad()
    def decode_image_latents(self, latents: Tensor) -> Tensor:
        """Pictures `(N, 3, H, W)`, about [-1, 1], of raw latents `(N, L, C)`."""
        self._check_latents(latents)
        return self.autoencoder.decode(latents.to(next(self.autoencoder.parameters()).dtype))

    def embed_image_latents(self, latents: Tensor) -> Tensor:
        """Backbone inputs `(N, L, D)` of raw latents `(N, L, C)` (eq. 4)."""
        self._check_latents(latents)
        return cast(Tensor, self.latent_embedding(latents, self.code_embeddings()))

    def code_embeddings(self) -> Tensor:
        """`(K, D)`: the input embeddings of the codebook's ids, the `W` of eq. 4: rows of the table, which Gemma scales."""
        table, start = self.get_input_embeddings(), self.config.code_offset
        end = start + self.config.num_codes
        if type(table).forward is nn.Embedding.forward:
            return cast(Tensor, table.weight)[start:end]
        return cast(Tensor, table(torch.arange(start, end, device=cast(Tensor, table.weight).device)))

    def embed_inputs(self, input_ids: Tensor, image_latents: Tensor | None) -> Tensor:
        """Backbone inputs `(B, T, D)`: token embeddings, with embedded latents at the image placeholders."""
        placeholders = input_ids == self.config.image_token_id
        num_placeholders, num_given = int(placeholders.sum()), 0 if image_latents is None else image_latents[..., 0].numel()
        if num_placeholders != num_given:
            per_image = self.config.num_latents
            raise ValueError(
                f"the prompt holds {num_placeholders} image placeholders ({num_placeholders / per_image:g} images of "
                f"{per_image}) but {num_given} latents ({num_given / per_image:g} images) were given; "
                "pass one image per <image> in the prompt"
            )
        per_row = placeholders.sum(-1)
        if bool((per_row % self.config.num_latents).any()):
            raise ValueError(f"rows hold {per_row.tolist()} image placeholders, not multiples of {self.config.num_latents}")
        embeddings = self.get_input_embeddings()(input_ids)
        if image_latents is None:
            return embeddings
        embedded = self.embed_image_latents(image_latents).to(embeddings.dtype).flatten(0, 1)
        return embeddings.masked_scatter(placeholders.unsqueeze(-1), embedded)

    diagnostics = tuple(f"noise {i / NOISE_LEVELS:.2f}-{(i + 1) / NOISE_LEVELS:.2f}" for i in range(NOISE_LEVELS))
    """Names of what `OrthusOutput.diagnostics` counts, for logs."""

    def count_targets(self, batch: dict[str, Any]) -> dict[str, int]:
        """Number of text tokens and latents that `batch` asks the model to predict."""
        targets = batch["labels"][:, 1:]
        num_image = int((targets == self.config.image_token_id).sum())
        return {"text": int((targets != IGNORE_INDEX).sum()) - num_image, "image": num_image}

    # ------------------------------------------------------------------ forward

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_latents: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        timesteps: Tensor | None = None,
        noise: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        skip_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> OrthusOutput:
        """Run the backbone and, given `labels`, both losses.

        Args:
            input_ids: `(B, T)`, with `num_latents` image placeholders per image.
            attention_mask: `(B, T)`, 0 at padding. None with `position_ids` that restart means packed examples.
            position_ids: `(B, T)`; counts real tokens when None.
            pixel_values: `(N, 3, H, W)` in [-1, 1], or else `image_latents`: `(N, L, C)` raw.
            labels: `(B, T)`: the token id where a text token is to be predicted, `image_token_id` where a latent is, -100
                elsewhere. The position before predicts it.
            timesteps, noise: fixed draws of the image loss; see [`DiffusionHead.latent_losses`].
            logits_to_keep: compute logits for the last so many positions only (0 = all).
            skip_logits: do not return logits; default: in training with labels, where the loss needs only text positions.
        """
        latents = self._resolve_latents(pixel_values, image_latents)
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("pass input_ids or inputs_embeds")
            inputs_embeds = self.embed_inputs(input_ids, self._noise_inputs(latents))
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            position_ids = positions_from_mask(attention_mask)[:, -inputs_embeds.shape[1] :]
        self._check_length(inputs_embeds.shape[1], past_key_values)
        shape, packed = inputs_embeds.shape, past_key_values is None and is_packed(attention_mask, position_ids)
        if use_cache is None and past_key_values is None:
            # A cache would keep the backbone from seeing packed examples in `position_ids`; a loss has no use for one.
            use_cache = None if labels is None and not packed else False
        one_row = packed and needs_one_row(self.backbone.config)
        if one_row:
            inputs_embeds, position_ids = inputs_embeds.reshape(1, -1, shape[-1]), cast(Tensor, position_ids).reshape(1, -1)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        outputs = self.backbone(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        hidden = outputs.last_hidden_state.reshape(shape)
        if skip_logits is None:
            skip_logits = self.training and labels is not None
        if labels is not None and input_ids is None:
            raise ValueError("labels need input_ids, which say where the latents stand")
        losses = {} if labels is None else self._losses(hidden, labels, cast(Tensor, input_ids), latents, timesteps, noise)
        return OrthusOutput(
            **losses,
            logits=None if skip_logits else self.lm_head(hidden[:, -logits_to_keep:]),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states if not one_row else tuple(s.reshape(shape) for s in outputs.hidden_states or ()),
            attentions=outputs.attentions,
            last_hidden_state=hidden,
        )

    def _losses(
        self,
        hidden: Tensor,
        labels: Tensor,
        input_ids: Tensor,
        latents: Tensor | None,
        timesteps: Tensor | None,
        noise: Tensor | None,
    ) -> dict[str, Any]:
        """Cross-entropy at text targets and diffusion loss at latent targets, as sums and counts."""
        image_token = self.config.image_token_id
        targets, sources = labels[:, 1:], hidden[:, :-1]
        is_latent, is_text = targets == image_token, (targets != IGNORE_INDEX) & (targets != image_token)
        text_sum = cast(TextHead, self.lm_head).cross_entropy(sources[is_text], targets[is_text])
        image_sum = sources.flatten()[:1].sum().float() * 0  # part of the graph, as every process of a sharded run needs it to be
        by_noise = text_sum.new_zeros(NOISE_LEVELS, 2)
        if bool(is_latent.any()):
            if latents is None or bool((labels[:, 1:][is_latent] != input_ids[:, 1:][is_latent]).any()):
                raise ValueError("labels mark latents to predict where input_ids has no image placeholder with latents")
            chosen = latents.flatten(0, 1)[(labels == image_token)[input_ids == image_token]]
            losses, times = self.diffusion_head.draw_losses(sources[is_latent], chosen, timesteps=timesteps, noise=noise)
            image_sum = losses.mean(dim=0).sum()
            level = (times.flatten() * NOISE_LEVELS).long().clamp(max=NOISE_LEVELS - 1)
            by_noise[:, 0].index_add_(0, level, losses.detach().flatten())
            by_noise[:, 1] += level.bincount(minlength=NOISE_LEVELS)
        sums = {"text": text_sum, "image": image_sum}
        counts = {"text": int(is_text.sum()), "image": int(is_latent.sum())}
        text_loss, image_loss = (sums[name] / max(counts[name], 1) for name in ("text", "image"))
        return {
            "loss": text_loss + self.config.image_loss_weight * image_loss,
            "text_loss": text_loss,
            "image_loss": image_loss,
            "loss_sums": sums,
            "loss_counts": counts,
            "diagnostics": by_noise,
        }

    def _resolve_latents(self, pixel_values: Tensor | None, image_latents: Tensor | None) -> Tensor | None:
        """Latents `(N, L, C)` of all pictures. Given both, pixels stand for the pictures whose latents are NaN."""
        if pixel_values is None:
            if image_latents is not None:
                self._check_latents(image_latents)
            return image_latents
        encoded = self.get_image_latents(pixel_values)
        if image_latents is None:
            return encoded
        self._check_latents(image_latents)
        unknown = image_latents.isnan().flatten(1).all(-1)
        if int(unknown.sum()) != len(encoded):
            raise ValueError(
                f"pixel_values holds {len(encoded)} pictures but {int(unknown.sum())} of {len(image_latents)} image_latents are "
                "NaN, which marks those that come as pixels; pass one of them, not both, or as many pixels as NaN entries"
            )
        return image_latents.to(encoded).index_copy(0, unknown.nonzero()[:, 0], encoded)

    def _noise_inputs(self, latents: Tensor | None) -> Tensor | None:
        """In training, latents that the backbone reads carry noise of a random strength per image; targets stay clean."""
        if latents is None or not self.training or self.config.input_noise == 0:
            return latents
        strength = torch.rand(len(latents), 1, 1, device=latents.device) * self.config.input_noise
        return latents + strength / self.config.head_config.latent_scale * torch.randn_like(latents)

    def _check_latents(self, latents: Tensor) -> None:
        expected = (self.config.num_latents, self.config.head_config.latent_dim)
        if latents.ndim != 3 or tuple(latents.shape[1:]) != expected:
            found = tuple(latents.shape)
            raise ValueError(f"image latents have shape {found}, expected (N, {expected[0]}, {expected[1]})")

    def _check_length(self, num_new: int, past_key_values: Cache | None) -> None:
        length = num_new + (past_key_values.get_seq_length() if past_key_values is not None else 0)
        limit = getattr(self.config.text_config, "max_position_embeddings", None)
        if limit is not None and length > limit:
            raise ValueError(f"{length} positions exceed the backbone's limit of {limit}; shorten the prompt")


def is_packed(attention_mask: Tensor | None, position_ids: Tensor | None) -> bool:
    """Whether rows hold several examples: no mask, and positions that restart."""
    if attention_mask is not None or position_ids is None:
        return False
    return bool((position_ids.diff(dim=-1) != 1).any())


def needs_one_row(config: Any) -> bool:
    """Whether the attention back end finds packed examples in a single row only, as FlashAttention does in `transformers`:
    with more rows it would attend across examples, so packed rows are laid end to end."""
    return "flash" in (config._attn_implementation or "")


AutoConfig.register(OrthusConfig.model_type, OrthusConfig, exist_ok=True)
for _name in remote_code.MODEL_AUTO_CLASSES:
    if hasattr(auto, _name):
        getattr(auto, _name).register(OrthusConfig, OrthusForConditionalGeneration, exist_ok=True)
