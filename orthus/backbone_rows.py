"""The backbone's side of decoding: lines (a line is one stream of one row) with one mask, one cache and their positions.

The lines of prompts that are read together are stream-major. A stream that restarts at each image (guidance) hides the columns
after its prompt and starts its positions again, so one cache serves all rows and streams. Positions are explicit, so lines may be
joined: the newest columns of both become one, and what is left of the shorter ones is hidden.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from orthus import acceleration as ways

if TYPE_CHECKING:
    from orthus.modeling import OrthusForConditionalGeneration

STATIC_BLOCK = 2048  # columns by which a static cache grows; each time its graph is captured anew
GROWTH = 1.5  # of the room of a dynamic cache that is full


class GrowingLayer(DynamicLayer):
    """A dynamic layer with room to spare: a step writes its column, where the plain one copies all columns before it as well."""

    room: tuple[Tensor, Tensor] | None = None  # of which `keys` and `values` are the first columns

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values `(R, H, N, D)`, the new ones last."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        known = self.get_seq_length()
        total = known + key_states.shape[-2]
        if self.room is None or self.room[0].data_ptr() != self.keys.data_ptr() or total > self.room[0].shape[-2]:
            self.room = (_room(self.keys, key_states, known, total), _room(self.values, value_states, known, total))
        keys, values = self.room
        keys[..., known:total, :], values[..., known:total, :] = key_states, value_states
        self.keys, self.values = keys[..., :total, :], values[..., :total, :]
        return self.keys, self.values

    def joined(self, other: "GrowingLayer") -> tuple[Tensor, Tensor]:
        """Keys and values with the rows of `other` below, last columns aligned; the shorter ones get zeros on the left."""
        assert self.keys is not None and self.values is not None and other.keys is not None and other.values is not None
        width = max(self.get_seq_length(), other.get_seq_length())
        keys, values = (
            torch.cat([torch.nn.functional.pad(held, (0, 0, width - held.shape[-2], 0)) for held in pair])
            for pair in ((self.keys, other.keys), (self.values, other.values))
        )
        return keys, values

    def keep(self, rows: list[int], first: int) -> None:
        """Forget all but some rows and the columns from `first` on."""
        assert self.keys is not None and self.values is not None
        self.keys, self.values = self.keys[rows, :, first:], self.values[rows, :, first:]
        self.room = None


def _room(held: Tensor, new: Tensor, known: int, total: int) -> Tensor:
    """Space for more than `total` columns like those of `new`, the `known` first ones filled from `held`."""
    room = new.new_empty(*new.shape[:-2], int(total * GROWTH), new.shape[-1])
    if known:
        room[..., :known, :] = held
    return room


def growing_cache(config: Any) -> DynamicCache:
    """The dynamic cache of a backbone; layers without a sliding window grow in place."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def lines_may_join(config: Any) -> bool:
    """Whether lines that were read apart may share a cache: every layer keeps all columns (no sliding windows, no recurrent
    layers), and no line's positions are encoded according to the longest one."""
    ropes = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type") for rope in (ropes, *ropes.values()) if isinstance(rope, dict)}
    return all(type(layer) is GrowingLayer for layer in growing_cache(config).layers) and not kinds & {"dynamic", "longrope"}


@dataclass(frozen=True)
class Prompt:
    """One stream's prompts, `(B, P)`, left-padded, with the latents of their images `(N, L, C)`."""

    input_ids: Tensor
    attention_mask: Tensor
    image_latents: Tensor | None


class BackboneRows:
    """Feeds embeddings of the lines of `B` rows in each of several streams and returns the hidden states of their last position.

    `acceleration`: `"compile"` and `"graph"` keep a static cache, which grows by blocks. `may_fall_back`: do without where the
    backbone does not allow that, and, with a warning, where a graph cannot be captured.
    """

    def __init__(
        self,
        model: "OrthusForConditionalGeneration",
        streams: list[Prompt],
        max_new_positions: int,
        acceleration: str = "none",
        may_fall_back: bool = False,
    ) -> None:
        self.model, self.may_fall_back = model, may_fall_back
        self.num_streams, self.num_rows = len(streams), len(streams[0].input_ids)
        self.width = max(stream.input_ids.shape[1] for stream in streams)
        ids = [pad_left(stream.input_ids, self.width, model.config.pad_token_id) for stream in streams]
        self.input_ids = torch.cat(ids)
        self.latents = [stream.image_latents for stream in streams if stream.image_latents is not None]
        known = torch.cat([pad_left(stream.attention_mask, self.width, 0) for stream in streams]).long()
        # Of all columns that there will ever be, and those that calls before a capture fill for nothing.
        self.mask = torch.nn.functional.pad(known, (0, max_new_positions + ways.WARM_UP_CALLS))
        self.prompt_lengths = known.sum(-1)
        self.positions = self.prompt_lengths.clone()
        self.prompt_ends = [self.width] * len(known)  # columns
        self.num_columns = self.width
        self.capacity = 0  # columns of the static cache
        self.cache: Any = growing_cache(model.config.text_config)
        self.is_static = acceleration in ("compile", "graph")
        if self.is_static and not all(type(layer) is GrowingLayer for layer in self.cache.layers):
            if not may_fall_back:
                raise ValueError(
                    f"acceleration={acceleration!r} needs a backbone that keeps all positions in every layer (no sliding "
                    "windows, no recurrent layers); use 'auto' or 'none'"
                )
            self.is_static, acceleration = False, "none"
        self.graphs = ways.Graphs() if acceleration == "graph" or (acceleration == "compile" and ids[0].is_cuda) else None
        self.forward = ways.compiled(_forward) if acceleration == "compile" else _forward

    def read_prompts(self) -> Tensor:
        """Feed all prompts, equal ones once; hidden states `(streams, B, D)` of their last positions."""
        latents = torch.cat(self.latents) if self.latents else None
        known, config = self.mask[:, : self.width], self.model.config
        rows, copies = list(range(len(known))), torch.arange(len(known), device=known.device)
        if all(hasattr(layer, "batch_select_indices") for layer in self.cache.layers):
            rows, copies = _unique_rows(self.input_ids, known, latents, config)
        if latents is not None:
            split = _per_row(self.input_ids, latents, config)
            latents = torch.cat([split[row] for row in rows])
        embeddings = self.model.embed_inputs(self.input_ids[rows], latents)
        hidden = _forward(self.model.backbone, self.cache, known[rows], embeddings, positions_from_mask(known)[rows])
        if len(rows) < len(copies):
            self.cache.batch_select_indices(copies)
        if self.is_static:
            self._grow(self.width)
        return hidden[copies].unflatten(0, (self.num_streams, self.num_rows))

    def feed(self, embeddings: Tensor, visible: Tensor) -> Tensor:
        """One or more columns `embeddings` `(lines, T, D)`, seen from now on by the lines that are `visible` `(lines,)`. Returns
        hidden states `(lines, D)` of the last of them."""
        added = embeddings.shape[1]
        self.mask[:, self.num_columns : self.num_columns + added] = visible.unsqueeze(-1)
        positions = self.positions.unsqueeze(-1) + torch.arange(added, device=visible.device)
        self.positions = self.positions + added * visible
        self.num_columns += added
        if self.is_static and self.num_columns + ways.WARM_UP_CALLS > self.capacity:
            self._grow(self.num_columns - added)
        if not self.is_static:
            return _forward(self.model.backbone, self.cache, self.mask[:, : self.num_columns], embeddings, positions)
        if added > 1:
            return _forward(self.model.backbone, self.cache, self.mask[:, : self.capacity], embeddings, positions)
        graphs = self.graphs
        return self._step(embeddings, positions) if graphs is None else self._replay(graphs, embeddings, positions)

    def restart(self, lines: list[int]) -> None:
        """Let guidance streams forget all but their prompts."""
        for line in lines:
            self.mask[line, self.prompt_ends[line] : self.num_columns] = 0
            self.positions[line] = self.prompt_lengths[line]

    @property
    def can_be_joined(self) -> bool:
        return all(type(layer) is GrowingLayer for layer in self.cache.layers)

    def join(self, other: "BackboneRows") -> None:
        """Take over the lines of `other`, which come after those that are here. An error, of memory say, changes nothing."""
        assert self.can_be_joined and other.can_be_joined
        joined = [layer.joined(new) for layer, new in zip(self.cache.layers, other.cache.layers, strict=True)]
        width = max(self.num_columns, other.num_columns)
        total = width + max(len(rows.mask[0]) - rows.num_columns for rows in (self, other))
        masks, ends = [], list[int]()
        for rows in (self, other):
            left = width - rows.num_columns
            masks.append(torch.nn.functional.pad(rows.mask, (left, total - left - rows.mask.shape[1])))
            ends += [end + left for end in rows.prompt_ends]
        mask, positions = torch.cat(masks), torch.cat([self.positions, other.positions])
        self.prompt_lengths = torch.cat([self.prompt_lengths, other.prompt_lengths])
        self.mask, self.positions, self.prompt_ends, self.num_columns = mask, positions, ends, width
        for layer, (keys, values) in zip(self.cache.layers, joined, strict=True):
            layer.keys, layer.values, layer.room = keys, values, None

    def keep(self, lines: list[int]) -> None:
        """Forget all other lines, and the columns on the left that none of these sees."""
        first = int(self.mask[lines].any(0).long().argmax())
        for layer in self.cache.layers:
            layer.keep(lines, first)
        self.mask, self.prompt_ends = self.mask[lines, first:], [self.prompt_ends[line] - first for line in lines]
        self.positions, self.prompt_lengths = self.positions[lines], self.prompt_lengths[lines]
        self.num_columns -= first

    def _step(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        """A step on the static cache; reads nothing that moves."""
        return self.forward(self.model.backbone, self.cache, self.mask[:, : self.capacity], embeddings, positions)

    def _grow(self, known: int) -> None:
        """Move the `known` columns of the cache into a static one with room for those fed now and a block more."""
        self.capacity = min(self.num_columns + ways.WARM_UP_CALLS + STATIC_BLOCK, self.mask.shape[1])
        static = StaticCache(config=self.model.config.text_config, max_cache_len=self.capacity)
        for index, layer in enumerate(self.cache.layers):
            static.update(layer.keys[:, :, :known], layer.values[:, :, :known], index)
        self.cache, self.graphs = static, None if self.graphs is None else ways.Graphs()

    def _replay(self, graphs: ways.Graphs, embeddings: Tensor, positions: Tensor) -> Tensor:
        if not graphs.captured:
            try:
                with _lengths_kept(self.cache):
                    graphs.capture("backbone", self._step, embeddings, positions)
            except RuntimeError as error:
                if not self.may_fall_back:
                    raise
                warnings.warn(f"the backbone cannot be captured as a graph ({error}); it runs without", stacklevel=2)
                self.graphs = None
                return self._step(embeddings, positions)
        return graphs("backbone", self._step, embeddings, positions)


def _forward(backbone: Any, cache: Any, mask: Tensor, embeddings: Tensor, positions: Tensor) -> Tensor:
    """Hidden states `(R, D)` of the last positions; keys and values go into `cache`."""
    outputs = backbone(
        inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
    )
    return cast(Tensor, outputs.last_hidden_state[:, -1])


@contextmanager
def _lengths_kept(cache: Any) -> Iterator[None]:
    """Steps made within do not count: what they wrote is written again."""
    lengths = [layer.cumulative_length.clone() for layer in cache.layers]
    try:
        yield
    finally:
        for layer, length in zip(cache.layers, lengths, strict=True):
            layer.cumulative_length.copy_(length)


def _unique_rows(ids: Tensor, mask: Tensor, latents: Tensor | None, config: Any) -> tuple[list[int], Tensor]:
    """Places of the first of each group of equal prompts, and for every row which of these it equals."""
    split = [] if latents is None else _per_row(ids, latents, config)
    pictures = [row.float().cpu().numpy().tobytes() for row in split] or [b""] * len(ids)
    keys = [(tuple(i), tuple(m), p) for i, m, p in zip(ids.tolist(), mask.tolist(), pictures, strict=True)]
    places: dict[Any, int] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, place)
    order = {key: number for number, key in enumerate(places)}
    return list(places.values()), torch.tensor([order[key] for key in keys], device=ids.device)


def _per_row(ids: Tensor, latents: Tensor, config: Any) -> tuple[Tensor, ...]:
    """Latents `(N, L, C)` of the pictures in all rows of `ids`, split by row."""
    return latents.split(((ids == config.image_token_id).sum(-1) // config.num_latents).tolist())


def pad_left(ids: Tensor, width: int, value: int) -> Tensor:
    return torch.nn.functional.pad(ids, (width - ids.shape[1], 0), value=value)


def positions_from_mask(attention_mask: Tensor) -> Tensor:
    """Positions `(B, T)` that count real tokens; padding gets 1, as in the published code."""
    positions = attention_mask.long().cumsum(-1) - 1
    return positions.masked_fill(attention_mask == 0, 1)
