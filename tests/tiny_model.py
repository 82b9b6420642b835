"""A model and a loader with the contracts that `orthus.training.fit` asks for, small enough for milliseconds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

NUM_CODES, DIM = 11, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.up = nn.Linear(DIM, 3 * DIM)
        self.down = nn.Linear(3 * DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(NUM_CODES, DIM)
        self.layers = nn.ModuleList([Block()])


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_proj = nn.Linear(1, DIM)
        self.blocks = nn.ModuleList([nn.ModuleDict({"adaln": nn.Linear(DIM, 3 * DIM), "mlp": nn.Linear(DIM, DIM)})])
        self.output = nn.Linear(DIM, 1)


class TinyModel(nn.Module):
    """Stands in for Orthus: a text term, and an image term that draws noise if `noise_scale` is not zero."""

    loss_weights: ClassVar[dict[str, float]] = {"text": 1.0, "image": 2.0}

    def __init__(self, noise_scale: float = 1.0) -> None:
        super().__init__()
        self.noise_scale = noise_scale
        self.backbone = Backbone()
        self.codebook = nn.Parameter(torch.randn(4, DIM))
        self.lm_head = nn.Linear(DIM, NUM_CODES)
        self.diffusion_head = Head()
        self.never_used = nn.Linear(2, 2)
        self.register_buffer("num_forwards", torch.zeros((), dtype=torch.int64))

    def count_targets(self, batch: dict[str, Tensor]) -> dict[str, int]:
        is_image = batch["labels"] == NUM_CODES
        return {"text": int((batch["labels"] >= 0).sum() - is_image.sum()), "image": int(is_image.sum())}

    def forward(self, input_ids: Tensor, labels: Tensor) -> SimpleNamespace:
        self.num_forwards += 1
        hidden = self.backbone.embed_tokens(input_ids)
        for layer in self.backbone.layers:
            hidden = layer(hidden)
        hidden = hidden + (torch.softmax(hidden @ self.codebook.T, -1) @ self.codebook)
        is_image = labels == NUM_CODES
        is_text = (labels >= 0) & ~is_image
        text = nn.functional.cross_entropy(self.lm_head(hidden[is_text]), labels[is_text], reduction="sum")
        cond = hidden[is_image]
        noise = self.noise_scale * torch.randn(len(cond), 1)
        block = self.diffusion_head.blocks[0]
        scale, shift, gate = block["adaln"](cond).chunk(3, -1)
        x = gate * block["mlp"](self.diffusion_head.input_proj(noise) * scale + shift)
        image = (self.diffusion_head.output(x) - 1 + noise).square().sum()
        return SimpleNamespace(
            loss_sums={"text": text, "image": image}, loss_counts={"text": is_text.sum(), "image": is_image.sum()}
        )

    def save_pretrained(self, folder: str | os.PathLike[str], state_dict: dict[str, Tensor] | None = None) -> None:
        save_file(
            {name: tensor.contiguous() for name, tensor in (state_dict or self.state_dict()).items()},
            Path(folder) / "model.safetensors",
        )


class TinyLoader:
    """Ragged batches, a pure function of (position, shard); epochs of 7 batches, so that a run crosses their ends."""

    def __init__(self, rows: int = 4, shard: int = 0, num_shards: int = 1) -> None:
        self.rows, self.shard, self.num_shards = rows, shard, num_shards
        self.position = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            position = self.position
            self.position += 1
            yield self.batch(position)
            if self.position % 7 == 0:
                return

    def batch(self, position: int) -> dict[str, Tensor]:
        """Rows [position * rows, ...) of an endless table, in every `num_shards`-th slice."""
        first = (position * self.num_shards + self.shard) * self.rows
        rows = [torch.Generator().manual_seed(i) for i in range(first, first + self.rows)]
        ids = torch.stack([torch.randint(NUM_CODES, (6,), generator=g) for g in rows])
        kinds = torch.stack([torch.randint(4, (6,), generator=g) for g in rows])
        labels = torch.where(kinds == 0, -100, torch.where(kinds == 1, NUM_CODES, (ids + 1) % NUM_CODES))
        return {"input_ids": ids, "labels": labels}

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]
