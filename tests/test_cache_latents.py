"""Latents encoded once: training on them is training on the pictures, and a cache of anything else is refused."""

import errno
import hashlib
import io
import json
import os
import pickle
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from conftest import tiny_model
from PIL import Image

from orthus.data import latent_writing, latents
from orthus.data.packing import PackedLoader
from orthus.data.schema import BadItem
from orthus.data.sources import RecordSource, SourceSettings, open_mixture
from orthus.data.world.scene import WorldConfig
from orthus.modeling import OrthusForConditionalGeneration
from orthus.processing import OrthusProcessor, build_processor
from orthus.training.metrics import read_metrics
from orthus.training.stages import DataSettings, open_data
from train import cache_latents, posttrain

TEXT_TOKENS, NUM_CODES = 320, 24
NUM_PAIRS, BAD = 11, 4
OPTIONS = ["items_per_shard=4", "batch_size=3"]
EXACT = {"rtol": 1e-5, "atol": 1e-6}  # fp32: batches of other sizes are encoded by other kernels
ROUNDED = {"rtol": 2e-2, "atol": 2e-2}  # bfloat16 latents have 8 bits


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[OrthusForConditionalGeneration, OrthusProcessor, Path]:
    """A tiny model for 8 x 8 pictures, its processor, and the folder that they are saved in."""
    text_config = {
        "model_type": "llama", "vocab_size": TEXT_TOKENS + NUM_CODES, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    }  # fmt: skip
    model = tiny_model(text_config=text_config, code_offset=TEXT_TOKENS)
    processor = build_processor(["a photo of a red circle"] * 9, TEXT_TOKENS, 8, 4, "a photo")
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(str(folder))
    processor.save_pretrained(folder)
    return model, processor, folder


def png(number: int) -> bytes:
    stream = io.BytesIO()
    pixels = torch.randint(256, (10, 12, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(stream, format="PNG")
    return stream.getvalue()


@pytest.fixture
def sources(tmp_path: Path) -> list[dict[str, Any]]:
    """Captioned pictures, of which one is damaged; documents with none to two pictures; texts."""
    with tarfile.open(tmp_path / "pairs.tar", "w") as tar:
        for number in range(NUM_PAIRS):
            data = png(number)[: 20 if number == BAD else None]
            for name, content in ((f"{number:03d}.png", data), (f"{number:03d}.txt", f"red circle {number}".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    (tmp_path / "images").mkdir()
    for number in range(6):
        (tmp_path / "images" / f"{number}.png").write_bytes(png(100 + number))
    documents = [
        {"images": [f"{n}.png", None, "5.png"][: 1 + n], "texts": [None, f"circle {n}", None][: 1 + n]} for n in range(3)
    ]
    documents.append({"images": [None], "texts": ["no picture"]})
    (tmp_path / "stories.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": f"a photo {n}"}) for n in range(5)))
    return [
        {"kind": "webdataset", "path": str(tmp_path / "pairs.tar"), "weight": 3.0},
        {"kind": "interleaved", "path": str(tmp_path / "stories.jsonl"), "images": str(tmp_path / "images")},
        {"kind": "text", "path": str(tmp_path / "texts.jsonl")},
    ]


def chosen(sources: list[dict[str, Any]]) -> tuple[SourceSettings, ...]:
    return tuple(SourceSettings(**source) for source in sources)


def config(folder: Path, sources: list[dict[str, Any]], model: Path) -> str:
    """A config of post-training."""
    path = folder / "stage.yaml"
    data = json.dumps({"sources": sources, "rows_per_batch": 2, "row_length": 64, "max_dropped_fraction": 0.2})
    path.write_text(f"model: {model}\ndata: {data}\nrun: {{output_dir: {folder / 'run'}, num_steps: 2, log_every: 1}}\n")
    return str(path)


def write_cache(parts: Any, sources: list[dict[str, Any]], folder: Path, **changes: Any) -> latent_writing.LatentWriter:
    """The writer of a cache of small shards; `run` writes."""
    model, processor, _ = parts
    settings = latent_writing.CacheSettings(**{"output": str(folder), "items_per_shard": 4, "batch_size": 3, **changes})
    images, some = processor.image_processor, chosen(sources)
    opened = cast(list[RecordSource], open_mixture(some, 0, images.prepare).sources)
    plan = latent_writing.make_plan(settings, some, opened, model.autoencoder, images)
    return latent_writing.LatentWriter(settings, plan, opened, model.autoencoder, images)


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def batches(parts: Any, data: DataSettings, row_length: int = 64) -> Iterator[dict[str, torch.Tensor]]:
    model, processor, _ = parts
    dataset, seed = open_data(data, processor, 0, model)
    return PackedLoader(dataset, processor, 2, row_length, seed=seed, buffer_size=6, max_dropped_fraction=0.2, num_threads=2)


def losses(model: OrthusForConditionalGeneration, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        output = model(**batch)
    return torch.stack([output.loss_sums["text"], output.loss_sums["image"]])


# -- the same training ---------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:source")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", EXACT), ("bfloat16", ROUNDED), ("float16", ROUNDED)])
def test_losses_are_those_of_the_pictures(
    parts: Any, sources: list[dict[str, Any]], tmp_path: Path, dtype: str, tolerance: dict[str, float]
) -> None:
    assert write_cache(parts, sources, tmp_path / "cache", dtype=dtype).run(num_threads=2)
    plain, cached = DataSettings(sources=chosen(sources)), DataSettings(sources=chosen(sources), latents=str(tmp_path / "cache"))
    num_pictures = 0
    for one, other in islice(zip(batches(parts, plain), batches(parts, cached), strict=False), 12):
        assert "pixel_values" not in other
        assert all(torch.equal(one[name], other[name]) for name in ("input_ids", "position_ids", "labels"))
        if "pixel_values" in one:
            num_pictures += len(one["pixel_values"])
            assert other["image_latents"].dtype == torch.float32
            torch.testing.assert_close(other["image_latents"], parts[0].get_image_latents(one["pixel_values"]), **tolerance)
        torch.testing.assert_close(losses(parts[0], other), losses(parts[0], one), **tolerance)
    assert num_pictures > 20


def test_pictures_are_not_read(parts: Any, sources: list[dict[str, Any]], tmp_path: Path) -> None:
    """Their files may be gone; those of the records are needed."""
    write_cache(parts, sources[1:2], tmp_path / "cache").run()
    for path in (tmp_path / "images").iterdir():
        path.unlink()
    data = DataSettings(sources=chosen(sources[1:2]), latents=str(tmp_path / "cache"))
    assert "image_latents" in next(batches(parts, data))


@pytest.mark.filterwarnings("ignore:source")
def test_beside_the_small_world_pixels_and_latents_are_mixed(parts: Any, sources: list[dict[str, Any]], tmp_path: Path) -> None:
    write_cache(parts, sources, tmp_path / "cache", dtype="float32").run()
    mixed = {"tasks": {"t2i": 1.0}, "world": WorldConfig(level="grid", image_size=64), "sources": chosen(sources)}
    both = (DataSettings(**mixed), DataSettings(**mixed, latents=str(tmp_path / "cache")))
    for one, other in islice(zip(*(batches(parts, data, 224) for data in both), strict=False), 4):
        unknown = other["image_latents"].isnan().flatten(1).all(-1)
        assert 0 < len(other["pixel_values"]) == int(unknown.sum()) < len(one["pixel_values"]) == len(unknown)
        torch.testing.assert_close(losses(parts[0], other), losses(parts[0], one), **EXACT)


@pytest.mark.filterwarnings("ignore:source")
def test_commands(parts: Any, sources: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    yaml = config(tmp_path, sources, parts[2])
    cache_latents.main([yaml, f"output={tmp_path / 'cache'}", "dtype=float32", *OPTIONS])
    assert f"webdataset:pairs: {NUM_PAIRS} items, {NUM_PAIRS - 1} pictures, 1 unusable items" in capsys.readouterr().out
    for name, setting in (("plain", "null"), ("cached", tmp_path / "cache")):
        posttrain.main([yaml, f"run.output_dir={tmp_path / name}", f"data.latents={setting}", "frozen=[backbone]"])
    plain, cached = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("plain", "cached"))
    assert [record["loss"] for record in cached] == pytest.approx([record["loss"] for record in plain], rel=1e-4)
    with pytest.raises(ValueError, match="nothing to encode once"):
        cache_latents.main([yaml, f"output={tmp_path / 'new'}", "data.sources=[]", "data.tasks={t2i: 1.0}"])
    with pytest.raises(ValueError, match=r"data.latents='x' belongs to data.sources"):
        DataSettings(tasks={"t2i": 1.0}, latents="x")


def test_bad_items_are_recorded_and_stay_bad(parts: Any, sources: list[dict[str, Any]], tmp_path: Path) -> None:
    manifest = cast(Any, write_cache(parts, sources, tmp_path / "cache").run())
    assert [entry["num_bad"] for entry in manifest["sources"]] == [1, 0, 0]
    assert [entry["num_pictures"] for entry in manifest["sources"]] == [NUM_PAIRS - 1, 4, 0]
    opened = [open_data(DataSettings(sources=chosen(sources), latents=place), parts[1], 0, parts[0])[0] for place in
              (None, str(tmp_path / "cache"))]  # fmt: skip
    plain, cached = (cast(Any, mixture).sources[0] for mixture in opened)
    for index in range(NUM_PAIRS):
        if index == BAD:
            with pytest.raises(BadItem) as before:
                plain[index]
            with pytest.raises(BadItem) as after:
                cached[index]
            assert str(after.value) == str(before.value) and "004" in str(after.value)
        else:
            assert cached[index].turns[0] == plain[index].turns[0]
    with pytest.raises(IndexError):
        cached[NUM_PAIRS]
    assert pickle.loads(pickle.dumps(cached))[0].turns[0] == cached[0].turns[0]


# -- writing -------------------------------------------------------------------------------------------------------


def test_processes_write_the_same_files(parts: Any, sources: list[dict[str, Any]], tmp_path: Path) -> None:
    write_cache(parts, sources, tmp_path / "one").run()
    writers = [write_cache(parts, sources, tmp_path / "three") for _ in range(3)]
    results = [writer.run(rank, 3, num_threads=rank) for rank, writer in enumerate(writers)]
    assert results[:2] == [None, None] and results[2] is not None
    assert hashes(tmp_path / "one") == hashes(tmp_path / "three")
    assert len(hashes(tmp_path / "one")) == 2 + 3 + 1 + 2


def test_a_killed_run_goes_on_with_what_is_missing(
    parts: Any, sources: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cache(parts, sources, tmp_path / "whole").run()
    folder, written = tmp_path / "killed", []
    real = latent_writing.write

    def write(path: Path, data: bytes) -> None:
        if len(written) == 3:
            path.with_name(f".{path.name}.x1y2.tmp").write_bytes(data[:-3])  # what SIGKILL leaves
            raise KeyboardInterrupt
        real(path, data)
        written.append(path.name)

    monkeypatch.setattr(latent_writing, "write", write)
    with pytest.raises(KeyboardInterrupt):
        write_cache(parts, sources, folder).run()
    assert written == ["plan.json", "000000.safetensors", "000001.safetensors"] and list(folder.rglob("*.tmp"))
    with pytest.raises(ValueError, match=r"is not finished: run the command .* again"):
        latents.read_manifest(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    monkeypatch.setattr(latent_writing, "write", real)
    for rank in range(2):  # with another number of processes
        write_cache(parts, sources, folder).run(rank, 2)
    assert hashes(folder) == hashes(tmp_path / "whole")
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_full_disk_is_named_and_leaves_nothing(
    parts: Any, sources: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = write_cache(parts, sources, tmp_path / "cache")
    writer._begin()

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"disk is full: \d+ bytes for .*000000.safetensors do not fit; make room and run"):
            writer.run()
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == ["plan.json"]
    assert writer.run() is not None


def test_another_plan_is_refused_on_the_way(parts: Any, sources: list[dict[str, Any]], tmp_path: Path) -> None:
    write_cache(parts, sources, tmp_path / "cache").run()
    for changes, message in (
        ({"dtype": "float16"}, "dtype = 'bfloat16'.*'float16'"),
        ({"items_per_shard": 5}, "items_per_shard = 4"),
    ):
        with pytest.raises(ValueError, match=message):
            write_cache(parts, sources, tmp_path / "cache", **changes).run()
    (tmp_path / "texts.jsonl").write_text('{"text": "another"}')
    with pytest.raises(ValueError, match=r"source 'text:texts' was written for files = .*another output"):
        write_cache(parts, sources, tmp_path / "cache").run()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds 'thesis.tex' but no plan.json; give a new folder"):
        write_cache(parts, sources, tmp_path / "other").run()
    with pytest.raises(ValueError, match="dtype = 'int8' is unknown; use one of float16"):
        latent_writing.CacheSettings(output="x", dtype=cast(Any, "int8"))
    with pytest.raises(ValueError, match="each must be at least 1"):
        latent_writing.CacheSettings(output="x", batch_size=0)


def test_latents_that_float16_cannot_hold_are_refused(parts: Any, sources: list[dict[str, Any]], tmp_path: Path) -> None:
    writer = write_cache(parts, sources, tmp_path / "cache", dtype="float16")
    writer.autoencoder = cast(Any, SimpleNamespace(encode=lambda pixels: torch.full((len(pixels), 4, 3), 1e6)))
    with pytest.raises(ValueError, match="not finite as float16; use dtype=bfloat16"):
        writer.run()


# -- what is refused in training -----------------------------------------------------------------------------------


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


REFUSALS = {
    "autoencoder": (
        lambda f: edit(f / "manifest.json", autoencoder_sha256="ab"),
        "autoencoder_sha256 = 'ab', and here it is '.*write",
    ),
    "image size": (lambda f: edit(f / "manifest.json", image_size=16), "image_size = 16, and here it is 8; write a cache"),
    "pictures": (lambda f: edit(f / "manifest.json", image_processor={}), "image_processor = {}, and here"),
    "version": (lambda f: edit(f / "manifest.json", format_version=7), "format_version = 7, this code reads 1; write the cache"),
    "dtype": (lambda f: edit(f / "manifest.json", dtype="int8"), "dtype = 'int8'; known are float16, bfloat16, float32: write"),
    "damaged manifest": (lambda f: (f / "manifest.json").write_text("{"), "manifest.json is damaged .*; remove its folder"),
    "missing shard": (lambda f: (f / "000" / "000001.safetensors").unlink(), "000001.safetensors of the latents is missing; run"),
    "truncated shard": (
        lambda f: truncate(f / "000" / "000002.safetensors"),
        "000002.safetensors of .* bytes is truncated or dam",
    ),
    "swapped shards": (
        lambda f: (f / "000" / "000001.safetensors").replace(f / "000" / "000000.safetensors"),
        "000000.safetensors was written for first = 4, and here it is 0; it is of another cache: delete it",
    ),
    "other files": (
        lambda f: os.utime(f.parent / "pairs.tar", ns=(5, 5)),
        r"source 'webdataset:pairs', .* files = .*, 5\]; write",
    ),
    "more items": (
        lambda f: (f.parent / "texts.jsonl").write_text('{"text": "a"}\n' * 9),
        r"source 'text:texts', was written for files = \[.*texts.jsonl', \d+, \d+\], and here",
    ),
    "no cache": (lambda f: (f / "plan.json").unlink() or (f / "manifest.json").unlink(), "is no cache of latents: write a cache"),
}


@pytest.mark.parametrize(("damage", "message"), REFUSALS.values(), ids=list(REFUSALS))
def test_refused_with_value_and_remedy(
    parts: Any, sources: list[dict[str, Any]], tmp_path: Path, damage: Any, message: str
) -> None:
    write_cache(parts, sources, tmp_path / "cache").run()
    damage(tmp_path / "cache")
    data = DataSettings(sources=chosen(sources), latents=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=message):
        open_data(data, parts[1], 0, parts[0])


def test_other_counts_sources_and_weights_are_refused(parts: Any, sources: list[dict[str, Any]], tmp_path: Path) -> None:
    model, processor, folder = parts
    write_cache(parts, sources[:1], tmp_path / "cache").run()
    data = DataSettings(sources=chosen(sources), latents=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="has no source 'interleaved:stories', only webdataset:pairs; write"):
        open_data(data, processor, 0, model)
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    manifest["sources"][0]["num_items"] = 3
    edit(tmp_path / "cache" / "manifest.json", sources=manifest["sources"])
    alone = DataSettings(sources=chosen(sources[:1]), latents=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=f"num_items = 3, and here it is {NUM_PAIRS}"):
        open_data(alone, processor, 0, model)
    other = OrthusForConditionalGeneration.from_pretrained(str(folder))
    assert latents.weights_hash(other.autoencoder) == latents.weights_hash(model.autoencoder)
    rounded = other.autoencoder.bfloat16()
    half = latents.weights_hash(rounded)
    assert latents.weights_hash(rounded.float()) == half != latents.weights_hash(model.autoencoder)
    with pytest.raises(ValueError, match="autoencoder_sha256"):
        open_data(alone, processor, 0, other)


def test_a_truncated_shard_is_written_again(parts: Any, sources: list[dict[str, Any]], tmp_path: Path) -> None:
    write_cache(parts, sources, tmp_path / "cache").run()
    before = hashes(tmp_path / "cache")
    truncate(tmp_path / "cache" / "000" / "000002.safetensors")
    assert write_cache(parts, sources, tmp_path / "cache").run() is not None
    assert hashes(tmp_path / "cache") == before
