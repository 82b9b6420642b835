"""Latents in: soft vector quantisation (eq. 4 of the paper) and the two alternatives of its ablation."""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from orthus.configuration import OrthusConfig


class LatentEmbedding(nn.Module):
    """Embeds raw latents `(N, L, C)` as backbone inputs `(N, L, D)`.

    `"softmax"`: `softmax(-|z - c|^2 / tau) W` with a trainable codebook `c` and `W` = the code rows of the input embeddings;
    `"argmin"`: the row of the nearest centre (the limit tau -> 0); `"linear"`: a linear map, no codebook.
    """

    def __init__(self, config: OrthusConfig) -> None:
        super().__init__()
        self.positions: nn.Parameter | None
        self.kind = config.latent_embedding
        self.temperature = config.soft_vq_temperature
        self.fp32_distances = config.soft_vq_fp32_distances
        latent_dim, hidden_dim = config.head_config.latent_dim, config.text_config.hidden_size
        if self.kind == "linear":
            self.projection = nn.Linear(latent_dim, hidden_dim)
        else:
            self.codebook = nn.Parameter(torch.empty(config.num_codes, latent_dim))
        if config.use_latent_positions:
            self.positions = nn.Parameter(torch.empty(config.num_latents, hidden_dim))
        else:
            self.register_parameter("positions", None)

    def reset_parameters(self, std: float) -> None:
        """Starting values of the tensors of this module itself."""
        if self.kind != "linear":
            init.normal_(self.codebook)
        if self.positions is not None:
            init.normal_(self.positions, std=std)

    def log_weights(self, latents: Tensor) -> Tensor:
        """Unnormalised log assignment `(..., K)`: `(2 z.c - |c|^2) / tau`; `|z|^2` is the same for all codes and dropped."""
        codebook: Tensor = self.codebook
        if self.fp32_distances:
            dtype = torch.promote_types(codebook.dtype, torch.float32)
            latents, codebook = latents.to(dtype), codebook.to(dtype)
        distances = codebook.square().sum(-1) - 2 * latents.to(codebook.dtype) @ codebook.T
        return -distances / self.temperature

    def forward(self, latents: Tensor, code_embeddings: Tensor, first_position: Tensor | None = None) -> Tensor:
        """Embeddings `(N, L, D)`.

        Args:
            latents: `(N, L, C)` raw latents.
            code_embeddings: `(K, D)`, the `W` of eq. 4.
            first_position: `(N,)` raster index of each row's first latent (None = 0), for the learned positions.
        """
        if self.kind == "linear":
            embeddings = self.projection(latents.to(self.projection.weight.dtype))
        elif self.kind == "argmin":
            embeddings = code_embeddings[self.log_weights(latents).argmax(-1)]
        else:
            with torch.autocast(latents.device.type, enabled=False):
                weights = self.log_weights(latents).softmax(-1)
            embeddings = weights.to(code_embeddings.dtype) @ code_embeddings
        if self.positions is None:
            return embeddings
        index = torch.arange(latents.shape[1], device=latents.device)
        if first_position is not None:
            index = index + first_position.unsqueeze(-1)
        return embeddings + self.positions[index].to(embeddings.dtype)
