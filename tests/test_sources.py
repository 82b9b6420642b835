"""Sources: each format round trip, each kind of damage with its outcome, indices beside the files."""

import io
import json
import os
import pickle
import sys
import tarfile
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from orthus.data.schema import BadItem, Example
from orthus.data.sources import SourceSettings, open_mixture, open_source
from orthus.data.sources.files import expand
from orthus.data.sources.tar import TarShards, members
from orthus.image_processing import OrthusImageProcessor

Said = list[tuple[str, tuple[Any, ...]]]


def picture_bytes(shade: int, size: tuple[int, int] = (4, 4), kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 0)).save(stream, kind)
    return stream.getvalue()


def write_tar(path: Path, files: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    for number in range(4):
        (folder / f"{number}.png").write_bytes(picture_bytes(number))
    (folder / "deep" / "9.png").write_bytes(picture_bytes(9))
    (folder / "cut.png").write_bytes(picture_bytes(1, (64, 64))[:60])
    (folder / "huge.png").write_bytes(picture_bytes(1, (300, 300)))
    return folder


def said(example: Example) -> Said:
    """Turns with the shade of red in place of each picture."""
    return [
        (turn.role, tuple(s if isinstance(s, str) else s.getpixel((0, 0))[0] for s in turn.segments))  # type: ignore[index]
        for turn in example.turns
    ]


def source(kind: str, path: Path | str, **options: Any) -> Any:
    limit = {"max_pixels": options.pop("max_pixels")} if "max_pixels" in options else {}
    return open_source(SourceSettings(kind, str(path), **options), **limit)  # type: ignore[arg-type]


def reason_of(opened: Any, index: int) -> str:
    with pytest.raises(BadItem) as caught:
        opened[index]
    assert caught.value.source == opened.name and str(caught.value) == f"source {opened.name!r}: {caught.value.reason}"
    return caught.value.reason


# -- tar shards ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_a_tar_shard_is_read_at_random(tmp_path: Path, form: int) -> None:
    long = "f" * 90 + "/" + ("n" * 90 if form != tarfile.USTAR_FORMAT else "n" * 60)
    accents = {"ä/öü.webp": picture_bytes(5, kind="WEBP"), "ä/öü.json": b'{"text": "five"}'}
    accents = {} if form == tarfile.USTAR_FORMAT else accents
    files = {
        "a/000.png": picture_bytes(1), "a/000.txt": "one \u00e9\n".encode(),
        "a/000.json": b'{"caption": "other", "long": "a long one"}',
        "b/000.png": picture_bytes(2), "b/000.caption": b"two", "__notes__": b"x", ".hidden.png": b"y",
        f"{long}.png": picture_bytes(3), f"{long}.json": b'{"caption": "three"}', **accents,
    }  # fmt: skip
    path = write_tar(tmp_path / "x.tar", files, form)
    opened = source("webdataset", path)
    expected = [("one é", 1), ("two", 2), ("three", 3)] + ([("five", 5)] if accents else [])
    assert opened.task == "t2i" and opened.name == "webdataset:x" and len(opened) == len(expected)
    for index in reversed(range(len(expected))):
        caption, shade = expected[index]
        drawn = said(opened[index])
        assert drawn[0] == ("user", (caption,)) and drawn[1][0] == "assistant" and abs(drawn[1][1][0] - shade) < 4
    assert said(source("webdataset", path, columns={"caption": "long"})[0])[0] == ("user", ("a long one",))
    assert "no caption (looked for long;" in reason_of(source("webdataset", path, columns={"caption": "long"}), 2)
    described = source("webdataset", path, answer="text", name="again")
    assert said(described[1]) == [("user", (2, "Describe the picture.")), ("assistant", ("two",))]
    assert described.task == "describe"
    with open(path, "rb") as file, tarfile.open(path) as archive:  # every member where the standard library finds it
        ours = [(name, offset, size) for name, _, offset, size in members(file.fileno(), "x")]
        assert ours == [(info.name, info.offset_data, info.size) for info in archive]


def test_bad_samples_name_shard_and_key(tmp_path: Path) -> None:
    long = "k" * 150
    path = write_tar(
        tmp_path / "x.tar",
        {
            "0.png": picture_bytes(0), "1.png": picture_bytes(1), "1.txt": b" \n", "2.txt": b"text",
            f"{long}.png": picture_bytes(1, (64, 64))[:70], f"{long}.txt": b"cut", "4.png": b"no picture", "4.txt": b"four",
            "5.png": picture_bytes(5), "5.json": b'{"caption": ', "6.png": picture_bytes(6), "6.txt": b"\xff\xfe",
            "7.png": picture_bytes(7, (300, 300)), "7.txt": b"large", "8.png": b"", "8.txt": b"empty",
        },
    )  # fmt: skip
    opened = source("webdataset", path, max_pixels=80_000)
    reasons = [reason_of(opened, index) for index in range(9)]
    keys = ["0", "1", "2", long, "4", "5", "6", "7", "8"]
    assert all(reason.startswith(f"shard {path}, key {key}: ") for reason, key in zip(reasons, keys, strict=True))
    parts = ["no caption", "empty caption", "no image", "damaged", "damaged", "Expecting value", "utf-8", "max_pixels", "damaged"]
    assert all(part in reason for reason, part in zip(reasons, parts, strict=True)), reasons


def test_damaged_shards_are_refused_or_counted(tmp_path: Path) -> None:
    good = {f"{number}.{end}": data for number in range(3) for end, data in (("png", picture_bytes(number)), ("txt", b"t"))}
    whole = write_tar(tmp_path / "0.tar", good).read_bytes()
    bad = bytearray(whole)
    bad[4 * 512 + 148] ^= 7
    kinds = {
        "1.tar": (b"", "is empty (0 bytes)"), "2.tar": (whole[:700], "truncated"), "3.tar": (whole[:2048], "no end mark"),
        "4.tar": (bytes(10240), "no sample"), "5.tar": (bytes(bad), "damaged: no valid tar header"),
        "6.tar": (whole + whole, "several archives"), "7.tar": (b"\x1f\x8b" + bytes(range(200)) * 20, "unpacked to .tar"),
    }  # fmt: skip
    for name, (data, message) in kinds.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"shard .*{name}.*allow_bad_shards") as caught:
            source("webdataset", tmp_path / name)
        assert message in str(caught.value)
    with pytest.raises(ValueError, match="7 damaged files are more than allow_bad_shards = 6"):
        source("webdataset", tmp_path, allow_bad_shards=6)
    with pytest.warns(UserWarning, match="left out 7 of 8 files"):
        opened = source("webdataset", tmp_path / "{0..7}.tar", allow_bad_shards=7)
    assert len(opened) == 3 and opened.num_bad_shards == 7
    with pytest.raises(ValueError, match=r"No such file.*missing\.tar"):
        source("webdataset", tmp_path / "missing.tar")


def test_the_index_is_kept_rebuilt_and_survives_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_tar(tmp_path / "x.tar", {"0.png": picture_bytes(0), "0.txt": b"zero"})
    beside = tmp_path / "x.tar.index.npy"
    assert len(source("webdataset", path)) == 1 and beside.exists()
    with monkeypatch.context() as patched:
        patched.setattr("orthus.data.sources.tar.build_index", lambda path: pytest.fail("indexed again"))
        assert said(source("webdataset", path)[0])[0] == ("user", ("zero",))
    write_tar(path, {f"{n}.{end}": data for n in range(2) for end, data in (("png", picture_bytes(n)), ("txt", b"new"))})
    opened = source("webdataset", path)
    assert len(opened) == 2 and said(opened[1]) == [("user", ("new",)), ("assistant", (1,))]
    for damage in (beside.read_bytes()[:-8], b"", b"nonsense", pickle.dumps([1])):
        beside.write_bytes(damage)
        assert len(source("webdataset", path)) == 2 and np.load(beside).dtype == np.int64
    beside.unlink()
    beside.mkdir()  # as where the folder of the data cannot be written
    assert len(source("webdataset", path)) == 2 and len(list((tmp_path / "cache").rglob("*.npy"))) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))  # and the cache folder neither
    with pytest.warns(UserWarning, match="stays in memory"):
        assert said(source("webdataset", path)[0])[0] == ("user", ("new",))


def test_many_may_index_at_once(tmp_path: Path) -> None:
    files = {f"{n}.{e}": d for n in range(50) for e, d in (("png", picture_bytes(n)), ("txt", b"t"))}
    path = write_tar(tmp_path / "x.tar", files)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: len(source("webdataset", path)), range(8))) == [50] * 8
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.tar", "x.tar.index.npy"]


# -- lines ---------------------------------------------------------------------------------------------------------


TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "Red."}]
HELLO = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
ASKED = [("user", (0, "What is it?")), ("assistant", ("Red.",))]


@pytest.mark.parametrize("ending", ["jsonl", "json", "indented.json", "parquet"])
def test_conversations(tmp_path: Path, images: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = [
        {"role": "system", "content": "Be short."},
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image", "path": "deep/9.png"}],
        },
        {"role": "assistant", "content": "ok <image> é"},
    ]
    records: list[Any] = [
        {"id": 1, "image": "0.png", "conversations": TURNS},
        {"id": "ü", "image": ["2.png", "3.png"], "conversations": [{"from": "human", "value": "A <image> b<image>"}, TURNS[1]]},
        {"id": 3, "conversations": [*HELLO, *TURNS], "image": "0.png"},
        {"id": 4, "images": ["1.png", "2.png"], "messages": chat},
        {"id": 5, "image": None, "conversations": HELLO},
    ]
    path = tmp_path / f"x.{ending}"
    if ending == "jsonl":
        path.write_text("\ufeff\n" + "\n\n".join(json.dumps(record, ensure_ascii=False) for record in records))
    elif ending == "parquet":
        fake_pyarrow(monkeypatch)
        write_fake_parquet(path, records, 2)
    else:
        path.write_text(json.dumps(records, ensure_ascii=False, indent=2 if "indent" in ending else None))
    opened = source("parquet" if ending == "parquet" else "llava", path, images=str(images))
    assert len(opened) == 5 and opened.task == "vqa"
    hello = [("user", ("Hi",)), ("assistant", ("Hello",))]
    assert said(opened[0]) == ASKED and said(opened[4]) == hello
    assert said(opened[1])[0] == ("user", ("A", 2, "b", 3)) and said(opened[2]) == [*hello, *ASKED]
    assert said(opened[3]) == [("user", ("Be short.", 1, "and", 9)), ("assistant", ("ok", 2, "é"))]


def test_bad_lines_name_file_and_line(tmp_path: Path, images: Path) -> None:
    def asked(image: Any, *turns: Any) -> str:
        return json.dumps({"image": image, "conversations": list(turns) or TURNS})

    outside = "does not stay inside"
    mark = "1 marks <image> for"
    lines = {
        asked("0.png")[:-9]: "Expecting", "[1]": "a JSON list, not an object", asked(["0.png", "1.png"]): f"{mark} 2",
        asked(None): f"{mark} 0", asked("0.png", {"from": "human", "value": "Hi"}, TURNS[1]): "0 marks <image> for 1",
        asked("../secret.png"): outside, asked("/etc/passwd"): outside, asked("a/../../b.png"): outside,
        asked("gone.png"): "no image file", asked("cut.png"): "truncated", asked("huge.png"): "exceeds max_pixels",
        asked("deep"): "cannot read", asked("0.png", TURNS[0]): "no assistant's turn", asked("C:/x.png"): outside,
        asked("0.png", *TURNS, TURNS[1]): "take turns",
        asked("0.png", TURNS[0], {"from": "gpt", "value": ""}): "turn 1 is a NoneType", "{}": "no conversations (looked for",
        asked("0.png", TURNS[0], {"from": "gpt", "value": " "}): "empty turn 1", asked(7): "a picture is a int",
        asked("0.png", TURNS[0], {"from": "alien", "value": "x"}): "'alien'", "[" * 100_000: "recursion",
        asked("0.png", TURNS[0], {"from": "gpt", "value": "\ud800"}): "half of a character", '{"conversations": 3}': "not a list",
    }  # fmt: skip
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"conversations": 1}) + "\n\n" + "\n".join(lines))
    opened = source("llava", path, images=str(images), max_pixels=80_000)
    assert len(opened) == len(lines) + 1
    for index, part in enumerate(lines.values(), start=1):
        reason = reason_of(opened, index)
        assert reason.startswith(f"{path}, line {index + 2}: ") and part in reason, (index, part, reason)
    write_lines(path, [{"image": "0.png", "conversations": TURNS}])
    assert "`images` is not set" in reason_of(source("llava", path), 0)
    with pytest.raises(ValueError, match="is no folder"):
        source("llava", path, images=str(path))
    with pytest.raises(IndexError, match="outside 0 to 0"):
        source("llava", path)[1]


@pytest.mark.parametrize("text", ['[{"a": 1}, {"a": ', '[{"a": 1} {"a": 2}]', '[{"a": 1}', "[]", ""])
def test_a_damaged_list_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json (is no valid JSON list|holds no records).*allow_bad_shards"):
        source("llava", tmp_path / "x.json")


def test_documents(tmp_path: Path, images: Path) -> None:
    info = [{"image_name": "0.png", "matched_text_index": 1}, {"image_name": "1.png", "matched_text_index": 1}]
    records = [
        {"text_list": ["First.", "Then.", "End."], "image_info": info},
        {"images": [None, "2.png", None, None], "texts": ["A", None, None, "B"]},
        {"images": [None, None, "3.png"], "texts": ["A", " B ", None]},
        {"text_list": ["x"], "image_info": [{"image_name": "0.png", "matched_text_index": 1}]},
        {"text_list": ["x"], "image_info": [{"image_name": None, "matched_text_index": 0}]},
        {"images": [None], "texts": [None]}, {"images": [None], "texts": ["a", "b"]}, {"texts": ["a"]},
    ]  # fmt: skip
    opened = source("interleaved", write_lines(tmp_path / "x.jsonl", records), images=str(images))
    assert opened.task == "story"
    ask = ("user", ("generate images",))
    assert said(opened[0]) == [ask, ("assistant", ("First. Then.", 0, 1, "End."))]
    assert said(opened[1]) == [ask, ("assistant", ("A", 2, "B"))]
    assert said(opened[2]) == [ask, ("assistant", ("A\n\nB", 3))]
    parts = ["matched to text 1 of 1", "a picture is a NoneType", "neither text nor pictures", "1 images stand", "no images"]
    assert all(part in reason_of(opened, index) for index, part in enumerate(parts, start=3))
    prompted = open_source(SourceSettings("interleaved", str(tmp_path / "x.jsonl"), images=str(images)), document_prompt="draw")
    assert said(prompted[1])[0] == ("user", ("draw",))


def test_edits_and_texts(tmp_path: Path, images: Path) -> None:
    records = [
        {"input_image": "0.png", "edit_prompt": "make it blue", "edited_image": "1.png"},
        {"source": "2.png", "instruction": "turn it", "target": "3.png"},
        {"source": "2.png", "instruction": "turn it"},
    ]
    opened = source("editing", write_lines(tmp_path / "x.jsonl", records), images=str(images), task="edit-real")
    assert opened[0].task == "edit-real" and said(opened[0]) == [("user", (0, "make it blue")), ("assistant", (1,))]
    assert said(opened[1]) == [("user", (2, "turn it")), ("assistant", (3,))] and "no target" in reason_of(opened, 2)
    (tmp_path / "t.txt").write_text("one\r\n\n  \n two\n[three]")
    texts = source("text", tmp_path / "t.txt")
    assert [said(texts[index])[0][1] for index in range(len(texts))] == [("one",), ("two",), ("[three]",)]
    assert texts.task == "text" and said(texts[0])[0][0] == "assistant"
    write_lines(tmp_path / "t.jsonl", [{"body": "a"}, {"text": "b"}])
    named = source("text", tmp_path / "t.jsonl", columns={"text": "body"}, prompt="Write.")
    assert said(named[0]) == [("user", ("Write.",)), ("assistant", ("a",))] and "no text (looked for body" in reason_of(named, 1)


# -- tables --------------------------------------------------------------------------------------------------------


class FakeParquetFile:
    """What `ParquetFiles` asks of pyarrow, on pickled row groups, where pyarrow is not installed."""

    reads: list[int] = []

    def __init__(self, path: str) -> None:
        try:
            self.groups = pickle.loads(Path(path).read_bytes())
        except pickle.UnpicklingError as error:
            raise ValueError("magic bytes not found") from error
        names = dict.fromkeys(name for group in self.groups for row in group for name in row)
        self.schema_arrow = types.SimpleNamespace(names=list(names))
        sizes = [types.SimpleNamespace(num_rows=len(group)) for group in self.groups]
        self.metadata = types.SimpleNamespace(num_row_groups=len(sizes), row_group=sizes.__getitem__)

    def read_row_group(self, number: int, columns: list[str], use_threads: bool) -> Any:
        FakeParquetFile.reads.append(number)
        rows = [{name: row.get(name) for name in columns} for row in self.groups[number]]
        return types.SimpleNamespace(
            slice=lambda start, size: types.SimpleNamespace(to_pylist=lambda: rows[start : start + size])
        )


def fake_pyarrow(monkeypatch: pytest.MonkeyPatch) -> None:
    package, module = types.ModuleType("pyarrow"), types.ModuleType("pyarrow.parquet")
    module.ParquetFile = FakeParquetFile  # type: ignore[attr-defined]
    package.parquet = module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyarrow", package)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", module)


def write_fake_parquet(path: Path, rows: list[dict[str, Any]], group: int) -> Path:
    path.write_bytes(pickle.dumps([rows[start : start + group] for start in range(0, len(rows), group)]))
    return path


def write_real_parquet(path: Path, rows: list[dict[str, Any]], group: int) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)
    return path


@pytest.mark.parametrize("is_real", [False, True])
def test_tables(tmp_path: Path, images: Path, is_real: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if is_real:
        pytest.importorskip("pyarrow")
    else:
        fake_pyarrow(monkeypatch)
    write = write_real_parquet if is_real else write_fake_parquet
    rows = [{"image": {"bytes": picture_bytes(n), "path": None}, "text": f"number {n}", "extra": 1} for n in range(25)]
    captions = write(tmp_path / "a-0.parquet", rows, 4)
    write(tmp_path / "a-1.parquet", rows[:3], 4)
    opened = source("parquet", tmp_path / "a-*.parquet")
    assert opened.task == "t2i" and opened.block_sizes == [4, 4, 4, 4, 4, 4, 1, 3] and len(opened) == 28
    for index in (27, 0, 24, 5):
        assert said(opened[index]) == [("user", (f"number {index % 25}",)), ("assistant", (index % 25,))]
    FakeParquetFile.reads.clear()
    fresh = pickle.loads(pickle.dumps(source("parquet", captions)))
    assert [said(fresh[index])[1][1] for index in range(25)] == [(n,) for n in range(25)]
    assert is_real or FakeParquetFile.reads == list(range(7))
    edits = [{"input_image": picture_bytes(1), "edit_prompt": "red", "edited_image": {"bytes": None, "path": "2.png"}}]
    edited = source("parquet", write(tmp_path / "e.parquet", edits, 2), images=str(images))
    assert edited.task == "edit" and said(edited[0]) == [("user", (1, "red")), ("assistant", (2,))]
    pages = [{"images": [None, picture_bytes(3)], "texts": ["a", None]}, {"images": [None], "texts": ["b"]}]
    document = source("parquet", write(tmp_path / "d.parquet", pages, 2))
    assert document.task == "story" and said(document[0])[1] == ("assistant", ("a", 3))
    assert source("parquet", write(tmp_path / "t.parquet", [{"text": "words"}], 2)).task == "text"
    bad = [{"image": b"", "caption": "x"}, {"image": b"a", "caption": ""}]
    broken = source("webdataset", write(tmp_path / "b.parquet", bad, 2))
    assert "b.parquet, row 0: picture of 0 bytes is damaged" in reason_of(broken, 0) and "row 1: empty" in reason_of(broken, 1)
    with pytest.raises(ValueError, match=r"columns words hold none of.*image \+ caption"):
        source("parquet", write(tmp_path / "w.parquet", [{"words": "x"}], 2))
    (tmp_path / "z.parquet").write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"z\.parquet cannot be read as parquet"):
        source("parquet", tmp_path / "z.parquet")


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"pip install 'orthus\[data\]'"):
        source("parquet", tmp_path / "x.parquet")


# -- settings and paths --------------------------------------------------------------------------------------------


def test_paths(tmp_path: Path) -> None:
    for name in ("s-008.tar", "s-009.tar", "s-010.tar", "sub/t.tar", "odd{1}[2].tar", "read.me"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def names(pattern: str) -> list[str]:
        return [os.path.relpath(file, tmp_path) for file in expand(str(tmp_path / pattern), (".tar",))]

    assert names("s-{008..010}.tar") == names("s-*.tar") == names("s-0{08,09,10}.tar") == ["s-008.tar", "s-009.tar", "s-010.tar"]
    assert names("") == ["odd{1}[2].tar", "s-008.tar", "s-009.tar", "s-010.tar", "sub/t.tar"]
    assert names("odd{1}[2].tar") == ["odd{1}[2].tar"] and names("{sub,s}*/*.tar") == ["sub/t.tar"]
    for pattern, message in (("q*.tar", "matches no file"), ("read.me", "does not end in .tar"), ("{3..1}.tar", "counts down")):
        with pytest.raises(ValueError, match=message):
            names(pattern)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no \.tar file"):
        names("empty")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "csv"}, "kind='csv'"), ({"path": ""}, "path is empty"), ({"weight": 0.0}, "weight=0.0"),
        ({"weight": float("nan")}, "weight=nan"), ({"columns": {"img": "x"}}, r"unknown fields \['img'\]"),
        ({"answer": "song"}, "answer='song'"), ({"allow_bad_shards": -1}, "allow_bad_shards=-1"),
        ({"prompt": ""}, "prompt is empty"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SourceSettings(**{"kind": "text", "path": "x", **options})


def test_settings_without_effect_are_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [{"text": "a"}])
    for kind, options in (("llava", {"prompt": "x"}), ("editing", {"answer": "text"})):
        with pytest.raises(ValueError, match=r"x\.jsonl: (prompt has no place in llava|answer='text' is for pictures)"):
            source(kind, path, **options)
    same = SourceSettings("text", str(path))
    with pytest.raises(ValueError, match=r"two sources are called 'text:x'"):
        open_mixture([same, same], seed=0)


def test_pictures_come_as_the_model_wants_them(tmp_path: Path, images: Path) -> None:
    (images / "thin.png").write_bytes(picture_bytes(1, (1, 3000)))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.new("RGB", (20, 10))
    turned.save(images / "turned.jpg", exif=exif)
    Image.new("F", (4, 4)).save(images / "float.tif")
    records = [{"image": name, "caption": "x"} for name in ("0.png", "thin.png", "turned.jpg", "float.tif")]
    write_lines(tmp_path / "x.jsonl", [{**record, "conversations": TURNS} for record in records])
    settings = SourceSettings("llava", str(tmp_path / "x.jsonl"), images=str(images))
    plain = open_source(settings)
    assert plain[2].turns[0].segments[0].size == (10, 20) and "mode 'F'" in reason_of(plain, 3)  # type: ignore[union-attr]
    prepared = open_source(settings, OrthusImageProcessor(size=256, max_pixels=100_000).prepare)
    assert prepared[0].turns[0].segments[0].size == (256, 256) and not prepared[0].turns[0].segments[0].info  # type: ignore[union-attr]
    assert "exceeds max_pixels" in reason_of(prepared, 1)


def test_sources_work_in_threads_and_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orthus.data.sources.files.OPEN_FILES", 2)
    for shard in range(6):
        files = {f"{n}.{e}": d for n in range(20) for e, d in (("png", picture_bytes(shard * 20 + n)), ("txt", b"t"))}
        write_tar(tmp_path / f"{shard}.tar", files)
    opened = source("webdataset", tmp_path)
    opened[0]
    clone = pickle.loads(pickle.dumps(opened))
    assert len(pickle.dumps(opened)) < 4000 and isinstance(clone._container, TarShards)
    wanted = np.random.default_rng(0).integers(0, 120, 400).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert [said(item)[1][1] for item in pool.map(clone.__getitem__, wanted)] == [(shade,) for shade in wanted]
    assert len(clone._container._read._open) <= 2 and len(clone._container._indices._recent) <= 2
    write_tar(tmp_path / "0.tar", {"0.png": picture_bytes(0), "0.txt": b"t"})
    assert "fewer than when it was opened" in reason_of(pickle.loads(pickle.dumps(opened)), 7)
    error = pickle.loads(pickle.dumps(BadItem("a", "b")))
    assert (error.source, error.reason) == ("a", "b") and isinstance(error, ValueError)
