"""Pixels `(N, 3, H, W)` in [-1, 1] to continuous latents `(N, L, C)` in raster order, and back.

`PatchAutoencoder` is small and trained here; `VQGANAutoencoder` is Chameleon's VQGAN with its quantiser left out (paper,
section 3.1) and has the tensors of the published checkpoint. Both share one interface with those of other libraries
(`foreign_autoencoders.py`): `encode`, `decode`, `forward`.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig
from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAEEncoder
from transformers.models.janus.modeling_janus import JanusVQVAEAttnBlock, JanusVQVAEConvUpsample, JanusVQVAEResnetBlock
from transformers.utils import ModelOutput

from orthus.configuration import require_noise, require_patches


class PatchAutoencoderConfig(PreTrainedConfig):
    """Configuration of [`PatchAutoencoder`].

    Args:
        image_size: side of the square images in pixels.
        patch_size: side of a patch in pixels; each patch is one latent.
        latent_dim: channels `C` of a latent.
        hidden_dim: width of the two MLPs.
        num_layers: residual blocks in each MLP.
        latent_noise: upper end of the uniformly drawn strength of Gaussian noise on the latents in training, in units of
            their standard deviation; it makes the decoder forgive latents that are slightly wrong.
    """

    model_type = "orthus_patch_autoencoder"
    base_config_key = "autoencoder_config"

    image_size: int = 64
    patch_size: int = 16
    latent_dim: int = 16
    hidden_dim: int = 384
    num_layers: int = 2
    latent_noise: float = 0.0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        require_patches(self.image_size, self.patch_size)
        require_noise(self.latent_noise)
        super().__post_init__(**kwargs)

    @property
    def num_latents(self) -> int:
        """Latents per image, `L`."""
        return (self.image_size // self.patch_size) ** 2


class VQGANAutoencoderConfig(ChameleonVQVAEConfig):
    """Configuration of [`VQGANAutoencoder`]: the fields of `transformers`' `ChameleonVQVAEConfig`.

    `num_embeddings` is the number of rows of the quantiser's codebook, which no computation uses: it is kept only so that
    a published checkpoint can be saved back exactly, and is 0 for a checkpoint that lacks it.
    """

    model_type = "orthus_vqgan_autoencoder"
    base_config_key = "autoencoder_config"

    num_embeddings: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.double_latent:
            raise ValueError("double_latent=True is not supported: latents would be twice latent_channels; use False")
        if self.resolution % self.downsampling:
            raise ValueError(
                f"resolution={self.resolution} is not a multiple of {self.downsampling}, the factor by which "
                f"channel_multiplier={list(self.channel_multiplier)} shrinks an image"
            )
        super().__post_init__(**kwargs)

    @property
    def downsampling(self) -> int:
        """Pixels of a latent's side."""
        return int(2 ** (len(self.channel_multiplier) - 1))

    @property
    def image_size(self) -> int:
        """Side of the square images in pixels."""
        return self.resolution

    @property
    def latent_dim(self) -> int:
        """Channels of a latent, `C`."""
        return self.embed_dim

    @property
    def num_latents(self) -> int:
        """Latents per image, `L`."""
        return int((self.resolution // self.downsampling) ** 2)


@dataclass
class AutoencoderOutput(ModelOutput):
    """What a training forward returns: `loss_sums / loss_counts` is the mean squared error per pixel value.

    Args:
        loss: that quotient, a scalar.
        loss_sums, loss_counts: `{"reconstruction": scalar}`, the sum of squared errors and the number of pixel values.
        pixel_values: `(N, 3, H, W)` reconstructions, not clipped.
        latents: `(N, L, C)` without noise.
    """

    loss: Tensor | None = None
    loss_sums: dict[str, Tensor] | None = None
    loss_counts: dict[str, int] | None = None
    pixel_values: Tensor | None = None
    latents: Tensor | None = None


class Autoencoder(PreTrainedModel):
    """The interface of every autoencoder; a subclass defines `_encode` and `_decode`."""

    base_model_prefix = "autoencoder"
    main_input_name = "pixel_values"
    input_modalities = "image"
    # No attention that an implementation could be chosen for, so that none stands in the way of the backbone's.
    _supports_sdpa = _supports_flex_attn = _supports_flash_attn = _supports_attention_backend = True

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Raw latents `(N, L, C)` of pixels `(N, 3, H, W)` in [-1, 1]; ValueError for another image size."""
        size = self.config.image_size
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != (3, size, size):
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, this autoencoder needs (N, 3, {size}, {size}); "
                "resize and crop with the processor"
            )
        return self._encode(pixel_values.to(self.device, self.dtype))

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels `(N, 3, H, W)`, about [-1, 1] and not clipped, of raw latents `(N, L, C)`."""
        expected = (self.config.num_latents, self.config.latent_dim)
        if latents.dim() != 3 or tuple(latents.shape[1:]) != expected:
            raise ValueError(
                f"latents has shape {tuple(latents.shape)}, expected (N, {expected[0]}, {expected[1]}): whole images only"
            )
        return self._decode(latents.to(self.device, self.dtype))

    def forward(self, pixel_values: Tensor, noise: Tensor | None = None) -> AutoencoderOutput:
        """Reconstruct `(N, 3, H, W)`.

        Args:
            noise: `(N, L, C)` added to the latents as it is; when None, drawn in training with a strength that is uniform
                in [0, latent_noise] per image.
        """
        latents = self.encode(pixel_values)
        if noise is None and self.training:
            noise = self.draw_noise(latents)
        pixels = self.decode(latents if noise is None else latents + noise.to(latents))
        squared_error = (pixels.float() - pixel_values.to(pixels.device).float()).square().sum()
        return AutoencoderOutput(
            loss=squared_error / pixels.numel(),
            loss_sums={"reconstruction": squared_error},
            loss_counts={"reconstruction": pixels.numel()},
            pixel_values=pixels,
            latents=latents,
        )

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weights of the loss terms."""
        return {"reconstruction": 1.0}

    def count_targets(self, batch: dict[str, Any]) -> dict[str, int]:
        """Number of pixel values in `batch`."""
        return {"reconstruction": batch["pixel_values"].numel()}

    def draw_noise(self, latents: Tensor) -> Tensor | None:
        """Training noise `(N, L, C)` for `latents`, None where the config asks for none."""
        strength = getattr(self.config, "latent_noise", 0.0)
        if strength == 0:
            return None
        per_image = strength * torch.rand(len(latents), 1, 1, device=latents.device, dtype=latents.dtype)
        return per_image * torch.randn_like(latents)

    def _encode(self, pixel_values: Tensor) -> Tensor:
        raise NotImplementedError

    def _decode(self, latents: Tensor) -> Tensor:
        raise NotImplementedError


class CalibratedAutoencoder(Autoencoder):
    """Its latents are features that `calibrate` has given mean 0 and variance 1 per channel: a subclass ends `_encode` with
    `_calibrated(features)` and begins `_decode` with `_features(latents)`."""

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self._no_split_modules = {type(self).__name__}
        self.register_buffer("latent_mean", torch.zeros(config.latent_dim))
        self.register_buffer("latent_std", torch.ones(config.latent_dim))

    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            init.zeros_(self.latent_mean)
            init.ones_(self.latent_std)

    @torch.no_grad()
    def calibrate(self, pixel_values: Tensor) -> None:
        """Set `latent_mean` and `latent_std` so that the latents of `pixel_values` `(N, 3, H, W)` have mean 0 and variance 1
        per channel. Call it after training and before the first latent is used elsewhere; ValueError for constant latents.
        """
        features = torch.cat([self._features(self.encode(some)) for some in pixel_values.split(64)])
        std, mean = torch.std_mean(features.float(), dim=(0, 1))
        if not bool((std > 0).all()):
            raise ValueError(f"{len(pixel_values)} images give a constant latent channel; calibrate on varied images")
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)

    def _calibrated(self, features: Tensor) -> Tensor:
        return (features - self.latent_mean) / self.latent_std

    def _features(self, latents: Tensor) -> Tensor:
        return latents * self.latent_std + self.latent_mean


class ResidualMLP(nn.Module):
    """`x + W2 gelu(W1 LN(x))`, twice as wide inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


def _mlp(in_dim: int, config: PatchAutoencoderConfig, out_dim: int) -> nn.Sequential:
    blocks = [ResidualMLP(config.hidden_dim) for _ in range(config.num_layers)]
    output = [nn.LayerNorm(config.hidden_dim), nn.Linear(config.hidden_dim, out_dim)]
    return nn.Sequential(nn.Linear(in_dim, config.hidden_dim), *blocks, *output)


class PatchAutoencoder(CalibratedAutoencoder):
    """Encodes and decodes each patch by itself with an MLP, so that one latent says everything about its patch.

    The bottleneck divides each latent by its root mean square: training noise has a fixed strength, which an unbounded
    latent would escape by growing. RMS rather than LayerNorm, because it costs one degree of freedom instead of two.
    """

    config_class = PatchAutoencoderConfig

    def __init__(self, config: PatchAutoencoderConfig) -> None:
        super().__init__(config)
        patch_dim = 3 * config.patch_size**2
        self.encoder = _mlp(patch_dim, config, config.latent_dim)
        self.decoder = _mlp(config.latent_dim, config, patch_dim)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    def _encode(self, pixel_values: Tensor) -> Tensor:
        size = self.config.patch_size
        patches = rearrange(pixel_values, "n c (h p) (w q) -> n (h w) (c p q)", p=size, q=size)  # (N, L, 3 p p)
        return self._calibrated(F.rms_norm(self.encoder(patches), (self.config.latent_dim,)))  # (N, L, C)

    def _decode(self, latents: Tensor) -> Tensor:
        size = self.config.patch_size
        patches = self.decoder(self._features(latents))  # (N, L, 3 p p)
        height = self.config.image_size // size
        return rearrange(patches, "n (h w) (c p q) -> n c (h p) (w q)", h=height, c=3, p=size, q=size)


class VQGANMidBlock(nn.Module):
    """Residual block, attention (unless the config's `attn_type` is not "vanilla"), residual block."""

    def __init__(self, config: VQGANAutoencoderConfig, channels: int) -> None:
        super().__init__()
        self.block_1 = JanusVQVAEResnetBlock(config, channels, channels)
        self.attn_1 = JanusVQVAEAttnBlock(channels) if config.attn_type == "vanilla" else nn.Identity()
        self.block_2 = JanusVQVAEResnetBlock(config, channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class VQGANLevel(nn.Module):
    """One resolution of the decoder: residual blocks, attention where the config asks for it, upsampling above level 0."""

    def __init__(self, config: VQGANAutoencoderConfig, level: int, in_channels: int) -> None:
        super().__init__()
        out_channels = config.base_channels * config.channel_multiplier[level]
        resolution = config.resolution // 2**level
        has_attention = config.attn_type == "vanilla" and resolution in (config.attn_resolutions or ())
        num_blocks = config.num_res_blocks + 1
        self.block = nn.ModuleList(
            JanusVQVAEResnetBlock(config, in_channels if index == 0 else out_channels, out_channels)
            for index in range(num_blocks)
        )
        self.attn = nn.ModuleList(JanusVQVAEAttnBlock(out_channels) for _ in range(num_blocks if has_attention else 0))
        self.upsample = JanusVQVAEConvUpsample(out_channels) if level > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if len(self.attn) > 0:
                x = self.attn[index](x)
        return self.upsample(x)


class VQGANDecoder(nn.Module):
    """Mirror of `ChameleonVQVAEEncoder`, from Janus's blocks.

    `JanusVQVAEDecoder` as a whole does not fit: it numbers its levels from the coarsest, the published tensors from the
    finest, and it always attends at the coarsest, where the published decoder does not.
    """

    def __init__(self, config: VQGANAutoencoderConfig) -> None:
        super().__init__()
        widths = [config.base_channels * multiplier for multiplier in config.channel_multiplier]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], kernel_size=3, padding=1)
        self.mid = VQGANMidBlock(config, widths[-1])
        coarser = [*widths[1:], widths[-1]]
        self.up = nn.ModuleList(VQGANLevel(config, level, coarser[level]) for level in range(len(widths)))
        self.norm_out = nn.GroupNorm(num_groups=32, num_channels=widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], config.in_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Pixels `(N, 3, H, W)` of feature maps `(N, latent_channels, h, w)`."""
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VQGANAutoencoder(Autoencoder):
    """Chameleon's VQGAN without its quantiser, in the published tensors.

    The quantiser's codebook is the buffer `quantizer_codebook`, present when `config.num_embeddings > 0` and read by
    nothing but saving back to the published layout.
    """

    config_class = VQGANAutoencoderConfig

    quantizer_codebook: Tensor

    def __init__(self, config: VQGANAutoencoderConfig) -> None:
        super().__init__(config)
        self._no_split_modules = {"VQGANAutoencoder"}
        self.encoder = ChameleonVQVAEEncoder(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.embed_dim, kernel_size=1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.latent_channels, kernel_size=1)
        self.decoder = VQGANDecoder(config)
        if config.num_embeddings > 0:
            self.register_buffer("quantizer_codebook", torch.zeros(config.num_embeddings, config.embed_dim))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.GroupNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, VQGANAutoencoder) and module.config.num_embeddings > 0:
            init.zeros_(module.quantizer_codebook)

    def _encode(self, pixel_values: Tensor) -> Tensor:
        latents = self.quant_conv(self.encoder(pixel_values))  # (N, C, h, w)
        return rearrange(latents, "n c h w -> n (h w) c")

    def _decode(self, latents: Tensor) -> Tensor:
        height = self.config.resolution // self.config.downsampling
        return self.decoder(self.post_quant_conv(rearrange(latents, "n (h w) c -> n c h w", h=height).contiguous()))


def register(config_class: type[PreTrainedConfig], model_class: type[Autoencoder]) -> None:
    """Make `AutoConfig` and `AutoModel` know a model type, so that a config can be built from its `model_type`."""
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, model_class, exist_ok=True)


register(PatchAutoencoderConfig, PatchAutoencoder)
register(VQGANAutoencoderConfig, VQGANAutoencoder)
