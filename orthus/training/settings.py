"""Strict settings: frozen dataclasses filled from one YAML file plus dotted overrides.

YAML is read with the scalar rules of YAML 1.2 (`1e-3` is a float, `no` is a string), an unknown key is an error that
suggests the nearest right one, and a value of the wrong type is an error that names its key.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class OptimSettings:
    """Optimiser and learning-rate schedule; rates are per optimiser step, `weight_decay` is decoupled."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    peak_lr: float = 1e-3  # AdamW's
    muon_lr: float = 0.02  # of the hidden matrices, with optimizer=muon
    lr_factors: dict[str, float] = dataclasses.field(default_factory=dict)  # by part; the longest name counts
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.02
    warmup_steps: int = 100
    decay: Literal["linear", "cosine"] = "linear"
    decay_fraction: float = 0.33  # last part of the run, over which the rate falls; constant before
    final_lr_fraction: float = 0.0
    clip_norm: float = 1.0  # .inf: never clip

    def __post_init__(self) -> None:
        for name in ("peak_lr", "muon_lr", "clip_norm"):
            _require(self, name, getattr(self, name) > 0, "a number above 0")
        for name in ("decay_fraction", "final_lr_fraction"):
            _require(self, name, 0 <= getattr(self, name) <= 1, "a fraction from 0 to 1")
        _require(self, "lr_factors", all(factor > 0 for factor in self.lr_factors.values()), "numbers above 0; freeze what rests")
        _require(self, "betas", all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)")
        _require(self, "weight_decay", self.weight_decay >= 0, "a number of at least 0")
        _require(self, "warmup_steps", self.warmup_steps >= 0, "a number of at least 0")


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """One run: where it writes, how long it is and how often it reports. `*_every` count optimiser steps."""

    output_dir: str
    num_steps: int
    seed: int = 0
    lanes: int | None = None  # batches per optimiser step over all processes; null: as the checkpoint, or one per process
    sharding: Literal["no", "full", "offload"] = "no"  # FSDP2; offload: shards wait in the memory of the CPU
    tensor_parallel: int = 1  # processes that split each linear layer of the backbone between them
    checkpoint_activations: bool = False  # keep only the inputs of the backbone's layers and compute the rest again
    compile: bool = False  # each layer of the backbone; needs a compiler
    loss_weights: dict[str, float] = dataclasses.field(default_factory=dict)  # of the model's terms, where another is wanted
    ema_decay: float = 0.995  # 0: no average is kept, and final/ holds the last weights
    log_every: int = 10
    save_every: int = 250
    keep_checkpoints: int = 2
    async_checkpoints: bool = False  # written in a thread, from a copy in the memory of the CPU, while training goes on
    sample_every: int = 0  # 0: never
    eval_every: int = 0  # 0: never; else also at the end
    eval_batches: int = 8  # of held-out data, over all processes
    peak_flops: float | None = None  # of one device, for MFU; null: as in `reporting.PEAK_FLOPS`
    tracker: Literal["no", "wandb", "trackio"] = "no"
    autocast: Literal["no", "bfloat16"] = "no"
    num_threads: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("num_steps", "log_every", "save_every", "keep_checkpoints", "eval_batches", "tensor_parallel"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        _require(self, "lanes", self.lanes is None or self.lanes >= 1, "null or at least 1")
        for name in ("sample_every", "eval_every"):
            _require(self, name, getattr(self, name) >= 0, "at least 0 (0: never)")
        _require(self, "peak_flops", self.peak_flops is None or self.peak_flops > 0, "null or operations per second, as 989e12")
        _require(self, "loss_weights", all(weight >= 0 for weight in self.loss_weights.values()), "numbers of at least 0")
        _require(self, "ema_decay", 0 <= self.ema_decay < 1, "a number in [0, 1)")
        _require(self, "num_threads", self.num_threads is None or self.num_threads >= 1, "null or at least 1")

    @property
    def shares_weights(self) -> bool:
        """Whether no process holds the whole model."""
        return self.sharding != "no" or self.tensor_parallel > 1


def load_settings(cls: type[T], path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> T:
    """Fill the dataclass `cls` from the YAML file `path` and `overrides` such as `optim.peak_lr=2e-4` (last one wins).

    Raises ValueError for an unknown or missing key, a value of the wrong type or an override without `=`.
    """
    raw = read(path)
    for override in overrides:
        _apply_override(raw, override)
    return _build(cls, raw, prefix="")


def to_dict(settings: Any) -> dict[str, Any]:
    """The settings as plain YAML types (nested dicts, lists, numbers, strings)."""
    if not dataclasses.is_dataclass(settings) or isinstance(settings, type):
        raise ValueError(f"to_dict got {settings!r}; give it an instance of a settings dataclass")
    return {field.name: _plain(getattr(settings, field.name)) for field in dataclasses.fields(settings)}


def save(settings: Any, path: str | os.PathLike[str]) -> None:
    """Write a settings dataclass, or a mapping of such, as YAML that `load_settings` reads back to the same values."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.write_text(yaml.dump(_plain(settings), Dumper=_Dumper, sort_keys=False), encoding="utf-8")
    os.replace(temporary, target)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The plain values of a YAML file. Raises ValueError if it is not a mapping."""
    try:
        raw = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds {raw!r}; a settings file is a mapping of keys to values")
    return raw


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`key old -> new` for each value of two nested dicts that differs."""
    found = []
    for name in dict.fromkeys((*old, *new)):
        key, before, after = _join(prefix, name), old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, key)
        elif before != after:
            found.append(f"{key} {before!r} -> {after!r}")
    return found


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _require(settings: Any, name: str, holds: bool, remedy: str) -> None:
    if not holds:
        raise ValueError(f"{type(settings).__name__}.{name} is {getattr(settings, name)!r}; give {remedy}")


# -- YAML 1.2 scalars ----------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ValueError(f"key {key!r} is given twice in{key_node.start_mark}; keep one of the two")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes exactly the strings that `_Loader` would read as something else."""


_SCALARS = [
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
]
for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}
    for _tag, _pattern, _first in _SCALARS:
        _class.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


# -- from raw values to dataclasses --------------------------------------------------------------------------------


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ValueError(f"override {override!r} has no value; write it as key=value, e.g. optim.peak_lr=2e-4")
    *parents, last = key.split(".")
    node: Any = raw
    for depth, name in enumerate(parents):
        if node.get(name) is None:
            node[name] = {}
        node = node[name]
        if not isinstance(node, dict):
            raise ValueError(f"override {override!r}: {'.'.join(parents[: depth + 1])} is {node!r}, which has no keys")
    try:
        node[last] = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"override {override!r}: {text!r} is not a valid YAML value") from error


def _build(cls: type[T], raw: Any, prefix: str, base: Any = None) -> T:
    """`base`: what holds where `raw` names nothing, as the default of a field does that is settings itself."""
    assert dataclasses.is_dataclass(cls), cls
    if not isinstance(raw, dict):
        raise _wrong(prefix, raw, f"a mapping with the keys of {cls.__name__}")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in raw:
        if key not in fields:
            raise ValueError(f"unknown key {_join(prefix, key)!r}{_suggestion(prefix, str(key), list(fields))}")
    missing = [name for name, field in fields.items() if base is None and name not in raw and _is_required(field)]
    if missing:
        names = ", ".join(repr(_join(prefix, name)) for name in missing)
        raise ValueError(f"missing key {names}; {cls.__name__} needs it")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in raw.items():
        own = fields[key].default if base is None else getattr(base, key)
        is_nested = isinstance(own, hints[key]) if dataclasses.is_dataclass(hints[key]) else False
        name = _join(prefix, key)
        values[key] = _build(hints[key], value, name, own) if is_nested else _convert(hints[key], value, name)
    return typing.cast(T, cls(**values) if base is None else dataclasses.replace(base, **values))


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _join(prefix: str, key: Any) -> str:
    return f"{prefix}.{key}" if prefix else str(key)


def _suggestion(prefix: str, key: str, names: list[str]) -> str:
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {_join(prefix, close[0])!r}?"
    return f"; the keys here are {', '.join(names)}"


def _wrong(key: str, value: Any, wanted: str) -> ValueError:
    return ValueError(f"{key or 'the settings'} is {value!r} ({type(value).__name__}); give {wanted}")


def _convert(hint: Any, value: Any, key: str) -> Any:
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast("type[Any]", hint), value, key)
    origin = typing.get_origin(hint)
    if origin is None:
        return _convert_plain(hint, value, key)
    convert = _CONVERTERS.get(origin)
    if convert is None:
        raise TypeError(f"{key}: settings cannot hold {hint}; annotate it with a simpler type")
    return convert(hint, value, key)


def _convert_plain(hint: Any, value: Any, key: str) -> Any:
    if hint is type(None):
        accepted = value is None
    elif hint is float:
        accepted = isinstance(value, (int, float)) and not isinstance(value, bool)
    elif hint is int:
        accepted = isinstance(value, int) and not isinstance(value, bool)
    elif hint in (str, Path):
        accepted = isinstance(value, (str, hint))
    elif hint in (bool, dict, list):
        accepted = isinstance(value, hint)
    else:
        raise TypeError(f"{key}: settings cannot hold {hint}; annotate it with a simpler type")
    if not accepted:
        raise _wrong(key, value, _ARTICLES[hint])
    return value if hint is type(None) else hint(value)


def _convert_literal(hint: Any, value: Any, key: str) -> Any:
    for choice in typing.get_args(hint):
        if type(choice) is type(value) and choice == value:
            return value
    raise _wrong(key, value, "one of " + ", ".join(repr(choice) for choice in typing.get_args(hint)))


def _convert_union(hint: Any, value: Any, key: str) -> Any:
    errors = []
    for choice in sorted(typing.get_args(hint), key=lambda choice: choice is not type(value)):  # the exact type first
        if value is None and choice is not type(None):
            continue
        try:
            return _convert(choice, value, key)
        except ValueError as error:
            if choice is not type(None):
                errors.append(error)
    raise errors[0] if len(errors) == 1 else _wrong(key, value, f"a value of type {hint}")


def _convert_tuple(hint: Any, value: Any, key: str) -> Any:
    if not isinstance(value, (list, tuple)):
        raise _wrong(key, value, "a list such as [1, 2]")
    items = typing.get_args(hint)
    if items[-1] is Ellipsis:
        items = (items[0],) * len(value)
    if len(items) != len(value):
        raise _wrong(key, value, f"a list of {len(items)} values")
    return tuple(_convert(item, part, f"{key}[{i}]") for i, (item, part) in enumerate(zip(items, value, strict=True)))


def _convert_list(hint: Any, value: Any, key: str) -> Any:
    if not isinstance(value, list):
        raise _wrong(key, value, "a list such as [1, 2]")
    (item,) = typing.get_args(hint)
    return [_convert(item, part, f"{key}[{i}]") for i, part in enumerate(value)]


def _convert_dict(hint: Any, value: Any, key: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong(key, value, "a mapping such as {text: 1.0}")
    key_hint, item = typing.get_args(hint)
    return {_convert(key_hint, name, key): _convert(item, part, _join(key, name)) for name, part in value.items()}


_ARTICLES: dict[Any, str] = {
    type(None): "null",
    float: "a number",
    int: "a whole number, without a decimal point or exponent",
    str: "a string (quote it in YAML if it looks like a number)",
    Path: "a path",
    bool: "true or false",
    dict: "a mapping",
    list: "a list",
}
_CONVERTERS: dict[Any, Callable[[Any, Any, str], Any]] = {
    Literal: _convert_literal,
    typing.Union: _convert_union,
    types.UnionType: _convert_union,
    tuple: _convert_tuple,
    list: _convert_list,
    dict: _convert_dict,
}
