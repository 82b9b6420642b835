"""MME's questions: the layouts in which they are kept give the same items, and what is wrong is named."""

import pytest
from PIL import Image

from eval.mme.__main__ import main
from eval.mme.items import Item, open_items, read_parquet, small_world_items, write_parquet

QUESTION = "Is there a dog in this image? Please answer yes or no."
TWO = f"{QUESTION}\tYes\n{QUESTION.replace('dog', 'cat')}\tNo\n"


def make_folder(root):
    """Both official layouts: apart (artwork), side by side (count, OCR)."""
    for subtask, pictures, questions in (
        ("artwork", "artwork/images", "artwork/questions_answers_YN"),
        ("count", "count", "count"),
        ("OCR", "OCR", "OCR"),
    ):
        for folder in (pictures, questions):
            (root / folder).mkdir(parents=True, exist_ok=True)
        for number, ending in enumerate((".jpg", ".png")):
            picture = Image.new("RGB", (8 + number, 6), (len(subtask) * 20, 0, 0))
            picture.save(root / pictures / f"{number}{ending}", quality=95)
            (root / questions / f"{number}.txt").write_text(TWO)
    return root


def keys(items):
    return [(item.picture_key, item.question, item.truth) for item in items]


def test_prompts_by_name():
    item = Item("count", "0.jpg", QUESTION, "Yes", lambda: Image.new("RGB", (1, 1)))
    stem = "Is there a dog in this image?"
    assert item.prompt("official") == QUESTION
    assert item.prompt("lmms") == f"{stem}\nAnswer the question using a single word or phrase."
    assert item.prompt("internvl") == f"{QUESTION} Answer the question using a single word or phrase."
    with pytest.raises(ValueError, match="unknown prompt style 'llava'; use one of official, lmms, internvl"):
        item.prompt("llava")


def test_layouts_agree(tmp_path):
    folder = make_folder(tmp_path / "mme")
    items = open_items(folder)
    assert [item.picture_key for item in items][::2] == [
        f"{s}/{f}" for s in ("count", "artwork", "OCR") for f in ("0.jpg", "1.png")
    ]
    assert items[1].truth == "No" and "cat" in items[1].question and items[2].picture().size == (9, 6)
    write_parquet(items, tmp_path / "one.parquet")
    write_parquet(items[:6], tmp_path / "shards/a.parquet")
    write_parquet(items[6:], tmp_path / "shards/b.parquet")
    for path in (tmp_path / "one.parquet", tmp_path / "shards"):
        copies = open_items(path)
        assert keys(copies) == keys(items)
        for copy, item in zip(copies, items, strict=True):
            assert copy.picture().tobytes() == item.picture().tobytes()
    templates = tmp_path / "eval_tool/Your_Results"
    templates.mkdir(parents=True)
    (templates / "count.txt").write_text("".join(f"{i.image_id}\t{i.question}\t{i.truth}\n" for i in reversed(items[:4])))
    assert keys(open_items(folder, templates)) == keys([items[3], items[2], items[1], items[0]])


def test_a_missing_shard_of_the_announced_number_is_named(tmp_path):
    items = small_world_items(2)
    for number in range(4):
        write_parquet(items[4 * number : 4 * number + 4], tmp_path / f"data/x-{number:05d}-of-00004.parquet")
    assert keys(open_items(tmp_path)) == keys(items)
    with pytest.raises(ValueError, match=r"x-00000-of-00004\.parquet lacks beside x-00001-of-00004\.parquet.*all 4 shards"):
        open_items(tmp_path / "data/x-00001-of-00004.parquet")
    (tmp_path / "data/x-00002-of-00004.parquet").unlink()
    with pytest.raises(ValueError, match=r"data/x-00002-of-00004\.parquet lacks"):
        open_items(tmp_path)


def test_parquet_opens_as_the_copies_on_the_hub(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    write_parquet(small_world_items(2), tmp_path / "small.parquet")
    table = pq.read_table(tmp_path / "small.parquet")
    assert set(table.column_names) == {"question_id", "image", "question", "answer", "category"}
    assert b'"image": {"_type": "Image"}' in table.schema.metadata[b"huggingface"]
    row = table.slice(0, 1).to_pylist()[0]
    assert row["question_id"] in ("existence/0000a.png", "existence/0000b.png")
    assert row["question_id"] == f"{row['category']}/{row['image']['path']}"
    assert row["image"]["bytes"].startswith(b"\x89PNG") and row["answer"] in ("yes", "no")


def test_export_command(tmp_path, capsys):
    assert main(["export", "small-world", "--num-images", "2", "--output", str(tmp_path / "x.parquet")]) == 0
    items = read_parquet([tmp_path / "x.parquet"])
    assert keys(items) == keys(small_world_items(2)) and len(items) == 16
    assert items[5].picture().tobytes() == small_world_items(2)[5].picture().tobytes()
    assert main(["export", str(tmp_path / "none"), "--output", str(tmp_path / "y.parquet")]) == 2
    assert "holds no question of MME" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"x.parquet"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (TWO.replace("\tNo", "\tYes"), r"count/0\.jpg has ground truths \['yes', 'yes'\]"),
        (TWO + TWO, r"count/0\.jpg has ground truths"),
        (TWO.split("\n")[0], r"count/0\.jpg has ground truths \['yes'\]"),
        (TWO.replace("\tNo", "\tperhaps"), "ground truth 'perhaps'"),
        (TWO.replace("\tNo", ""), r"0\.txt, line 2: 1 fields"),
    ],
)
def test_wrong_questions_name_the_picture(tmp_path, content, message):
    root = make_folder(tmp_path)
    (root / "count/0.txt").write_text(content)
    with pytest.raises(ValueError, match=message):
        open_items(root)


def test_pictures_that_are_missing_or_damaged_are_named(tmp_path):
    root = make_folder(tmp_path)
    (root / "count/0.jpg").write_bytes((root / "count/0.jpg").read_bytes()[:200])
    items = open_items(root)  # pictures are read when asked for
    with pytest.raises(ValueError, match=r"picture count/0\.jpg: "):
        items[0].picture()
    with pytest.raises(ValueError, match=r"picture count/0\.jpg: "):
        write_parquet(items, tmp_path / "out.parquet")
    assert not [path for path in tmp_path.iterdir() if "parquet" in path.name]
    (root / "count/1.png").unlink()
    with pytest.raises(ValueError, match=r"1\.txt has no picture 1 with one of \.jpg"):
        open_items(root)


def test_other_tables_are_refused(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"question": ["q"]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="lacks the columns answer, category, image, question_id"):
        open_items(tmp_path)
    row = {"question_id": "0.jpg", "image": {"bytes": b"", "path": ""}, "question": "q", "answer": "Yes", "category": "count"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"row 0: question_id '0\.jpg' is not of 'count'"):
        open_items(tmp_path)
