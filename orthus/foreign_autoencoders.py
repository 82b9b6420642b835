"""Autoencoders of other libraries as the image side of Orthus; `autoencoder_loading.py` reads them from their folders.

`DiffusersAutoencoder` wraps an AutoencoderKL or AutoencoderDC of `diffusers`; `RepresentationAutoencoder` puts a trainable
decoder behind a frozen vision transformer of `timm` (arXiv 2510.11690). `pip install 'orthus[autoencoders]'` brings both
libraries; they are imported when such a model is built, never before.
"""

import importlib
import json
import math
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init

from orthus.autoencoder import CalibratedAutoencoder, register
from orthus.configuration import reject_unknown_keys, require_choice, require_noise, require_patches

# Per class: the fields with one entry per resolution, how many entries they have by default, and the default channels.
DIFFUSERS_CLASSES: dict[str, tuple[tuple[str, ...], int, int]] = {
    "AutoencoderKL": (("block_out_channels", "down_block_types", "up_block_types"), 1, 4),
    "AutoencoderDC": (("encoder_block_out_channels", "decoder_block_out_channels"), 6, 32),
}


class DiffusersAutoencoderConfig(PreTrainedConfig):
    """Configuration of [`DiffusersAutoencoder`].

    Args:
        network_class: `"AutoencoderKL"` or `"AutoencoderDC"`.
        network_config: the arguments of that class; those left out have the defaults of `diffusers`.
        image_size: side of the square images in pixels, any multiple of `downsampling * merge`.
        merge: so many neighbouring latents in each direction become one latent of `merge * merge` times the channels.
        latent_noise: see [`PatchAutoencoderConfig`].
    """

    model_type = "orthus_diffusers_autoencoder"
    base_config_key = "autoencoder_config"

    network_class: str = "AutoencoderKL"
    network_config: dict | None = None
    image_size: int = 256
    merge: int = 1
    latent_noise: float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        reject_unknown_keys(self, kwargs)
        require_choice("network_class", self.network_class, tuple(DIFFUSERS_CLASSES))
        self.network_config = json.loads(json.dumps(self.network_config or {}))  # plain lists, as a file gives them back
        lengths = self._num_levels()
        if len(set(lengths.values())) > 1:
            raise ValueError(f"network_config differs in the number of resolutions, {lengths}; give each as many entries")
        for name in ("in_channels", "out_channels"):
            if self.network_config.get(name, 3) != 3:
                raise ValueError(f"network_config.{name}={self.network_config[name]}, but pictures have 3 channels; use 3")
        if self.merge < 1 or self.image_size % (self.downsampling * self.merge) or self.image_size < 1:
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of downsampling * merge = {self.downsampling} * {self.merge}; "
                "change image_size or merge"
            )
        require_noise(self.latent_noise)
        super().__post_init__(**kwargs)

    def _num_levels(self) -> dict[str, int]:
        names, default, _ = DIFFUSERS_CLASSES[self.network_class]
        return {name: len((self.network_config or {}).get(name, range(default))) for name in names}

    @property
    def downsampling(self) -> int:
        """Pixels of the side of one of the network's own latents."""
        return int(2 ** (max(self._num_levels().values()) - 1))

    @property
    def latent_dim(self) -> int:
        """Channels of a latent, `C`."""
        channels = (self.network_config or {}).get("latent_channels", DIFFUSERS_CLASSES[self.network_class][2])
        return int(channels * self.merge**2)

    @property
    def num_latents(self) -> int:
        """Latents per image, `L`."""
        return int((self.image_size // (self.downsampling * self.merge)) ** 2)


class RepresentationAutoencoderConfig(PreTrainedConfig):
    """Configuration of [`RepresentationAutoencoder`]. `load_autoencoder(timm_name=...)` reads most of it off the encoder.

    Args:
        encoder_name, encoder_kwargs: the name of the encoder in `timm` and arguments of `timm.create_model`.
        image_size: side of the square images in pixels.
        patch_size: side of the encoder's patches in pixels; each patch is one latent.
        latent_dim: channels `C` of a latent: the width of the encoder.
        pixel_mean, pixel_std: what the encoder expects of red, green and blue in [0, 1]; `timm`'s `pretrained_cfg` has it.
        decoder_dim, num_decoder_layers, num_decoder_heads: size of the decoder.
        latent_noise: see [`PatchAutoencoderConfig`].
    """

    model_type = "orthus_representation_autoencoder"
    base_config_key = "autoencoder_config"

    encoder_name: str = "vit_tiny_patch16_224"
    encoder_kwargs: dict | None = None
    image_size: int = 224
    patch_size: int = 16
    latent_dim: int = 192
    pixel_mean: list | tuple = (0.5, 0.5, 0.5)
    pixel_std: list | tuple = (0.5, 0.5, 0.5)
    decoder_dim: int = 384
    num_decoder_layers: int = 4
    num_decoder_heads: int = 6
    latent_noise: float = 0.0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        reject_unknown_keys(self, kwargs)
        self.encoder_kwargs = json.loads(json.dumps(self.encoder_kwargs or {}))
        self.pixel_mean, self.pixel_std = list(self.pixel_mean), list(self.pixel_std)
        require_patches(self.image_size, self.patch_size)
        encoder_size = side(self.encoder_kwargs.get("img_size", self.image_size))
        if encoder_size != self.image_size:
            raise ValueError(f"image_size={self.image_size}, but encoder_kwargs.img_size={encoder_size}; make them equal")
        if self.decoder_dim % self.num_decoder_heads:
            raise ValueError(
                f"decoder_dim={self.decoder_dim} is not a multiple of num_decoder_heads={self.num_decoder_heads}; change one"
            )
        if len(self.pixel_mean) != 3 or len(self.pixel_std) != 3 or min(self.pixel_std) <= 0:
            raise ValueError(f"pixel_mean={self.pixel_mean}, pixel_std={self.pixel_std}: give three numbers each, std above 0")
        require_noise(self.latent_noise)
        super().__post_init__(**kwargs)

    @property
    def num_latents(self) -> int:
        """Latents per image, `L`."""
        return (self.image_size // self.patch_size) ** 2


def side(size: Any) -> int:
    """Side of a square given as a number or as (height, width)."""
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    if height != width:
        raise ValueError(f"pictures of {height} x {width} pixels are not square; choose one side for both")
    return int(height)


# ---------------------------------------------------------------------- models


def library(name: str) -> Any:
    """An optional library; ImportError that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"this autoencoder needs {name} ({error}); pip install 'orthus[autoencoders]'") from error


class ForeignAutoencoder(CalibratedAutoencoder):
    """Holds a network that its own library builds and initialises.

    `transformers` loads a checkpoint into a network on the meta device. What the checkpoint lacks then has no values: the
    buffers that a library keeps out of its state dict, such as tables of positions. They are copied from a second network.
    """

    def _own(self, network: nn.Module) -> nn.Module:
        """`network`, with its values marked as final unless it is on the meta device and has none."""
        if not any(tensor.is_meta for tensor in network.state_dict().values()):
            for module in network.modules():
                module._is_hf_initialized = True  # type: ignore[assignment]
        return network

    def _fill(self, network: nn.Module, module: nn.Module, build: Callable[[], nn.Module]) -> bool:
        """Whether `module` is part of `network`, whose tensors without values then have those of a network just built."""
        if all(module is not part for part in network.modules()):
            return False
        own, fresh = (dict([*net.named_parameters(), *net.named_buffers()]) for net in (network, build()))
        for name, tensor in own.items():
            init.copy_(tensor, fresh[name])
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]
        return True


class DiffusersAutoencoder(ForeignAutoencoder):
    """An AutoencoderKL or AutoencoderDC of `diffusers`, the child `network`. A latent is the mode of its posterior (KL) or
    `.latent` (DC), `merge x merge` of them as one, its channels in the order of `torch.nn.PixelUnshuffle`, calibrated."""

    config_class = DiffusersAutoencoderConfig
    config: DiffusersAutoencoderConfig

    def __init__(self, config: DiffusersAutoencoderConfig, network: nn.Module | None = None) -> None:
        """`network`: one that exists and fits the config; built from the config when None."""
        super().__init__(config)
        self.network = self._own(build_diffusers_network(config) if network is None else network)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        self._fill(self.network, module, lambda: build_diffusers_network(self.config))

    def _encode(self, pixel_values: Tensor) -> Tensor:
        output = self.network.encode(pixel_values)  # type: ignore[operator]
        features = output.latent_dist.mode() if self.config.network_class == "AutoencoderKL" else output.latent  # (N, c, h, w)
        size = self.config.merge
        return self._calibrated(rearrange(features, "n c (h p) (w q) -> n (h w) (c p q)", p=size, q=size))

    def _decode(self, latents: Tensor) -> Tensor:
        size, height = self.config.merge, math.isqrt(self.config.num_latents)
        features = rearrange(self._features(latents), "n (h w) (c p q) -> n c (h p) (w q)", h=height, p=size, q=size)
        return self.network.decode(features.contiguous()).sample  # type: ignore[operator]


def build_diffusers_network(config: DiffusersAutoencoderConfig) -> nn.Module:
    """The network of a config with random weights; ImportError without `diffusers`, ValueError for arguments it rejects."""
    network_class = getattr(library("diffusers"), config.network_class)
    try:
        return network_class(**(config.network_config or {}))
    except TypeError as error:
        raise ValueError(f"{config.network_class} of diffusers refuses network_config: {error}") from error


class PixelDecoder(nn.Module):
    """Features `(N, L, C)` to pixels `(N, 3, H, W)`: `timm`'s transformer blocks with learned positions, then a linear map."""

    def __init__(self, config: RepresentationAutoencoderConfig) -> None:
        super().__init__()
        self.patch_size, self.height, dim = config.patch_size, config.image_size // config.patch_size, config.decoder_dim
        self.input = nn.Linear(config.latent_dim, dim)
        self.positions = nn.Parameter(torch.zeros(config.num_latents, dim))
        block = library("timm").models.vision_transformer.Block
        self.blocks = nn.Sequential(
            *(block(dim, config.num_decoder_heads, qkv_bias=True) for _ in range(config.num_decoder_layers))
        )
        self.norm = nn.LayerNorm(dim)
        self.output = nn.Linear(dim, 3 * config.patch_size**2)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.blocks(self.input(features) + self.positions)  # (N, L, D)
        patches, size = self.output(self.norm(hidden)), self.patch_size  # (N, L, 3 p p)
        return rearrange(patches, "n (h w) (c p q) -> n c (h p) (w q)", h=self.height, c=3, p=size, q=size)


class RepresentationAutoencoder(ForeignAutoencoder):
    """Latents are the calibrated patch features of a frozen vision transformer after its final norm, without prefix tokens;
    a transformer `decoder` makes pixels of them (arXiv 2510.11690). `forward` trains the decoder only."""

    config_class = RepresentationAutoencoderConfig
    config: RepresentationAutoencoderConfig

    def __init__(self, config: RepresentationAutoencoderConfig) -> None:
        super().__init__(config)
        self.encoder = self._own(build_encoder(config))
        width = getattr(self.encoder, "num_features", config.latent_dim)
        if width != config.latent_dim:
            raise ValueError(f"latent_dim={config.latent_dim}, but {config.encoder_name} has width {width}; set it to that")
        self.decoder = PixelDecoder(config)
        self.post_init()
        self.train()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if self._fill(self.encoder, module, lambda: build_encoder(self.config)):
            return
        if isinstance(module, PixelDecoder):
            init.normal_(module.positions, std=self.config.initializer_range)
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    def train(self, mode: bool = True) -> "RepresentationAutoencoder":
        """As in `torch`, but the encoder stays in eval mode and frozen (`from_pretrained`, which calls this, unfreezes all)."""
        super().train(mode)
        self.encoder.eval().requires_grad_(False)
        return self

    @torch.no_grad()
    def _encode(self, pixel_values: Tensor) -> Tensor:
        mean, std = (pixel_values.new_tensor(v).view(3, 1, 1) for v in (self.config.pixel_mean, self.config.pixel_std))
        tokens = self.encoder.forward_features(((pixel_values + 1) / 2 - mean) / std)  # type: ignore[operator]
        return self._calibrated(patch_features(self.encoder, tokens, self.config.num_latents))

    def _decode(self, latents: Tensor) -> Tensor:
        return self.decoder(self._features(latents))


def patch_features(encoder: nn.Module, tokens: Tensor, num_latents: int | None = None) -> Tensor:
    """`(N, L, C)` without prefix tokens of what `forward_features` gave; ValueError unless that is a square of patches."""
    num_prefix = int(getattr(encoder, "num_prefix_tokens", 0))  # type: ignore[arg-type]
    found = tokens.shape[1] - num_prefix
    if tokens.dim() != 3 or found != (num_latents or math.isqrt(max(found, 0)) ** 2):
        raise ValueError(
            f"{type(encoder).__name__} gives features of shape {tuple(tokens.shape)} with {num_prefix} prefix tokens, not "
            f"(N, {num_latents or 'a square'}, C); choose a plain vision transformer and the patch_size that it has"
        )
    return tokens[:, num_prefix:]


def build_encoder(config: RepresentationAutoencoderConfig) -> nn.Module:
    """The encoder of a config with random weights; ImportError without `timm`, ValueError for arguments it rejects."""
    return create_timm_model(config.encoder_name, {**(config.encoder_kwargs or {}), "num_classes": 0})


def create_timm_model(name: str, kwargs: dict[str, Any], pretrained: bool = False) -> Any:
    """`timm.create_model`; ImportError without `timm`, ValueError for a name, arguments or weights that it rejects."""
    timm = library("timm")
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"timm cannot make {name!r} with {kwargs}: {error}") from error


register(DiffusersAutoencoderConfig, DiffusersAutoencoder)
register(RepresentationAutoencoderConfig, RepresentationAutoencoder)
