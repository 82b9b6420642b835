"""Tokens, the chat template in its calling styles, and the way back to segments."""

import copy
import json
import pickle
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from orthus.data.schema import Turn
from orthus.image_processing import OrthusImageProcessor
from orthus.processing import OrthusProcessor, build_processor, build_tokenizer
from orthus.tokenization import SPECIAL_TOKENS

CORPUS = ["a photo of a red circle", "is there a blue star left of two green squares? yes", "Generate an image."] * 20
BOS, PAD, BOI, EOI, SEP, IMG = 0, 1, 4, 5, 6, 7
PUBLISHED = [
    "<s>",
    "<pad>",
    "</s>",
    "<unk>",
    "IMGIMGA",
    "IMGIMGB",
    "<eoss>",
    "<racm3:break>",
    "<reserved08706>",
    "<image>",
]


def picture(seed: int = 0, width: int = 16, height: int = 16, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    return Image.fromarray(pixels)


def red(*size: int) -> Image.Image:
    return Image.new("RGB", size, (200, 10, 30))


@pytest.fixture(scope="module")
def processor() -> OrthusProcessor:
    return build_processor(CORPUS, 400, image_size=16, num_image_tokens=4, unconditional_prompt="Generate an image.")


def save_published(folder: Path) -> None:
    """Files as in a published repository: byte-level tokenizer called LlamaTokenizer, Chameleon's processor files."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=330, special_tokens=PUBLISHED, initial_alphabet=alphabet, show_progress=False),
    )
    backend.save(str(folder / "tokenizer.json"))
    square = {"height": 512, "width": 512}
    files = {
        "tokenizer_config": {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "pad_token": "<pad>",
                             "eos_token": "</s>", "unk_token": "<unk>"},
        "processor_config": {"image_seq_length": 1024, "processor_class": "ChameleonProcessor"},
        "preprocessor_config": {
            "image_processor_type": "ChameleonImageProcessor", "size": {"shortest_edge": 512}, "crop_size": square,
            "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
            "image_mean": [1.0] * 3, "image_std": [1.0] * 3, "resample": 1, "rescale_factor": 0.0078,
        },
        "config": {"model_type": "chameleon"},
    }  # fmt: skip
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


# Tokenizer


def test_special_ids_come_first_and_words_are_single_tokens_everywhere() -> None:
    tokenizer = build_tokenizer(CORPUS, 500)
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(8))
    assert tokenizer("circle")["input_ids"] == tokenizer("a circle")["input_ids"][1:]
    assert len(tokenizer("a red circle")["input_ids"]) == 3
    assert tokenizer("")["input_ids"] == []
    assert build_tokenizer(CORPUS, 500).get_vocab() == tokenizer.get_vocab()


def test_every_unicode_text_survives_the_tokenizer(processor: OrthusProcessor) -> None:
    draw = random.Random(0)
    planes = [(0, 128), (0x80, 0xD800), (0x10000, 0x110000)]
    texts = ["".join(chr(draw.randrange(*draw.choice(planes))) for _ in range(20)) for _ in range(200)]
    for text in [*texts, " ", "  circle ", "\n\n", "a , b n't", "\x00", "🎉\u200d", "<s><image> <sep>", "é"]:
        ids = processor.encode_text(text)
        assert processor.tokenizer.decode(ids) == text and min(ids) >= len(SPECIAL_TOKENS)


def test_tokenizer_refuses_a_hopeless_corpus_or_size() -> None:
    with pytest.raises(ValueError, match="at least 264"):
        build_tokenizer(CORPUS, 100)
    with pytest.raises(ValueError, match="no text"):
        build_tokenizer(["", ""], 300)


# The chat template


def test_rendered_ids_and_labels_are_the_table_of_the_design(processor: OrthusProcessor) -> None:
    image = picture()
    ask, say = list(processor.encode_text("circle?")), list(processor.encode_text("a red circle"))
    rendered = processor.render([Turn("user", (image, "circle?")), Turn("assistant", ("a red circle", image))])
    block = [BOI, IMG, IMG, IMG, IMG, EOI]
    assert rendered.input_ids == [BOS, *block, *ask, SEP, *say, *block, SEP]
    ignored = [-100] * (1 + len(block) + len(ask) + 1)
    assert rendered.labels == [*ignored, *say, BOI, IMG, IMG, IMG, IMG, -100, SEP]
    assert rendered.images == [image, image]


def test_a_prompt_is_a_prefix_of_its_training_example(processor: OrthusProcessor) -> None:
    user, answer = Turn("user", ("a red circle", picture())), Turn("assistant", ("yes",))
    prompt = processor(turns=[user])["input_ids"][0].tolist()
    assert processor.render([user, answer]).input_ids[: len(prompt)] == prompt and prompt[-1] == SEP


def test_text_that_spells_control_tokens_stays_text(processor: OrthusProcessor) -> None:
    text = "<s><boi><image><eoi><sep></s><pad>"
    inputs = processor(segments=[text])["input_ids"][0].tolist()
    assert inputs[0] == BOS and inputs[-1] == SEP and min(inputs[1:-1]) >= 8
    assert processor.tokenizer.decode(inputs[1:-1]) == text


def test_control_tokens_that_a_tokenizer_fails_to_mark_as_special_stay_text_too() -> None:
    backend = Tokenizer.from_str(build_tokenizer(CORPUS, 400).backend_tokenizer.to_str())
    raw = json.loads(backend.to_str())
    for token in raw["added_tokens"]:
        token["special"] = False
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(raw)), bos_token="<s>", pad_token="<pad>", unk_token="<unk>"
    )
    names = {"boi_token": "<boi>", "eoi_token": "<eoi>", "separator_token": "<sep>"}
    processor = OrthusProcessor(OrthusImageProcessor(16), tokenizer, 4, **names)
    assert SEP in tokenizer("x<sep>y", split_special_tokens=True)["input_ids"]  # what must not reach the model
    assert min(processor.encode_text("x<sep>y<sep>")) >= 8


def test_calling_styles_agree(processor: OrthusProcessor, tmp_path: Path) -> None:
    first, second = picture(1), picture(2, 30, 20)
    second.save(tmp_path / "second.png")
    rows = [[first, "red circle"], ["a", second, "b"]]
    by_segments = processor(segments=rows)
    parts = [
        {"type": "text", "text": "a"},
        {"type": "image", "path": str(tmp_path / "second.png")},
        {"type": "text", "text": "b"},
    ]
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": first}, {"type": "text", "text": "red circle"}]}],
        [{"role": "user", "content": parts}],
    ]
    others = [
        processor(images=[first, second], text=["<image>red circle", "a<image>b"]),
        processor([[first], [second]], ["<image>red circle", "a<image>b"]),
        processor(turns=[[Turn("user", tuple(row))] for row in rows]),
        processor(segments=[[np.asarray(first), "red circle"], ["a", torch.from_numpy(np.array(second)), "b"]]),
        processor.apply_chat_template(chats),
    ]
    for other in others:
        assert sorted(other) == ["attention_mask", "input_ids", "pixel_values"]
        for name in other:
            # "<image>" at the ends of a text leaves empty strings, which add nothing
            assert torch.equal(other[name], by_segments[name]), name
    assert torch.equal(processor.apply_chat_template(chats[0], return_dict=False), processor(segments=rows[0])["input_ids"])
    assert by_segments["pixel_values"].shape == (2, 3, 16, 16)


def test_batches_are_padded_on_the_left(processor: OrthusProcessor) -> None:
    batch = processor(text=["red", "a photo of a red circle"])
    long, short = batch["attention_mask"].sum(1).tolist()[::-1]
    assert batch["input_ids"].shape == (2, long) and "pixel_values" not in batch
    assert batch["input_ids"][0].tolist() == [PAD] * (long - short) + processor(text="red")["input_ids"][0].tolist()
    assert batch["attention_mask"][0].tolist() == [0] * (long - short) + [1] * short


def test_a_chat_can_be_rendered_with_its_answers(processor: OrthusProcessor) -> None:
    chat = [{"role": "user", "content": "red?"}, {"role": "assistant", "content": "yes"}]
    ids = processor.apply_chat_template(chat, add_generation_prompt=False)["input_ids"][0].tolist()
    assert ids == processor.render([Turn("user", ("red?",)), Turn("assistant", ("yes",))]).input_ids
    with pytest.raises(ValueError, match="end with a user turn"):
        processor.apply_chat_template(chat)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one"),
        ({"text": "a", "segments": ["a"]}, "exactly one"),
        ({"segments": ["a"], "images": [red(4, 4)]}, "images goes with text"),
        ({"text": ""}, "empty prompt"),
        ({"text": []}, r"text = \[\]"),
        ({"text": 5}, "text = 5"),
        ({"text": "a<image>", "images": None}, "holds 1 <image> but there are 0 images"),
        ({"text": "a", "images": [red(4, 4), red(4, 4)]}, "holds 0 <image> but there are 2 images"),
        ({"text": ["<image>", "a"], "images": [[], [red(4, 4)]]}, r"\[1, 0\] <image> but images \[0, 1\]"),
        ({"segments": "a"}, "segments is a str"),
        ({"segments": []}, "empty prompt"),
        ({"segments": [""]}, "empty prompt"),
        ({"segments": [["a"], []]}, "empty prompt"),
        ({"segments": ["a", ["b"]]}, "mixes"),
        ({"segments": ["a", 3]}, "int"),
        ({"turns": []}, "empty prompt"),
        ({"turns": "a"}, "turns is a str"),
        ({"turns": [["a"]]}, "turns holds"),
        ({"turns": [Turn("assistant", ("a",))]}, "end with a user turn"),
        ({"text": "a", "return_tensors": "np"}, "only 'pt'"),
        ({"text": "a", "padding": "max_length"}, "padding = 'max_length'"),
        ({"text": ["a", "a red circle"], "padding": False}, "pass padding=True"),
        ({"text": "\ud800"}, "cannot tokenise"),
    ],
)
def test_bad_calls_are_named(processor: OrthusProcessor, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([], "empty prompt"),
        ("hello", "empty prompt"),
        ([["hello"]], "a message is a str"),
        ([{"role": "system", "content": "be brief"}], "role = 'system'"),
        ([{"role": "user", "content": ""}], "empty prompt"),
        ([{"role": "user", "content": []}], "empty prompt"),
        ([{"role": "user", "content": 3}], "content = 3"),
        ([{"role": "user", "content": [{"type": "video", "video": "x"}]}], "'video'"),
        ([{"role": "user", "content": [{"type": "image", "url": "http://x/y.png"}]}], "'image' with keys"),
    ],
)
def test_bad_chats_are_named(processor: OrthusProcessor, conversation: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template(conversation)


def test_the_template_is_not_a_string(processor: OrthusProcessor) -> None:
    with pytest.raises(ValueError, match="tokenize=False"):
        processor.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)


def test_unconditional_streams(processor: OrthusProcessor) -> None:
    image = picture(5)
    turns = [[Turn("user", (image, "make it red"))], [Turn("user", ("a", image))]]
    empty = processor.unconditional(turns)
    assert torch.equal(empty["input_ids"], processor(text=["Generate an image."] * 2)["input_ids"])
    assert "pixel_values" not in empty
    kept = processor.unconditional(turns, keep_images=True)
    assert torch.equal(kept["input_ids"], processor(segments=[[image], [image]])["input_ids"])
    assert kept["pixel_values"].shape[0] == 2
    other = processor.unconditional(turns[0], prompt="red circle")
    assert torch.equal(other["input_ids"], processor(text="red circle")["input_ids"])
    with pytest.raises(ValueError, match="prompt 0 has no picture"):
        processor.unconditional([Turn("user", ("a",))], keep_images=True)


# Back to segments


def test_guidance_follows_the_checkpoint(processor: OrthusProcessor, tmp_path: Path) -> None:
    """The published prompts and weights for published files, our own for what we build; what the caller says wins."""
    save_published(tmp_path)
    published = OrthusProcessor.from_pretrained(tmp_path)

    def stream(one: OrthusProcessor, **options) -> tuple[float, str]:
        streams = one.guidance_streams([], **options)
        return streams["guidance"], one.tokenizer.decode(streams["negative_input_ids"][0], skip_special_tokens=True).strip()

    assert stream(published)[0] == 5.0 and stream(published)[1].startswith("Generate an image.")
    assert stream(published, interleaved=True)[0] == 3.0 and stream(published, interleaved=True)[1].startswith("generate images")
    assert stream(processor) == stream(processor, interleaved=True) == (2.0, "Generate an image.")
    assert stream(published, guidance=1.5)[0] == 1.5
    changed = OrthusProcessor.from_pretrained(tmp_path, guidance=7.0)
    changed.save_pretrained(tmp_path / "saved")
    assert stream(OrthusProcessor.from_pretrained(tmp_path / "saved"))[0] == 7.0


def test_segments_survive_the_round_trip(processor: OrthusProcessor) -> None:
    image = picture(6)
    rows = [["red circle", image, "blue star"], [image, image], ["yes"]]
    ids = [processor.render([Turn("assistant", tuple(row))]).input_ids[1:] for row in rows]
    width = max(map(len, ids)) + 3
    sequences = torch.tensor([row + [PAD] * (width - len(row)) for row in ids])
    pixels = processor.image_processor.pixel_values([image])
    decoded = processor.decode_segments(
        SimpleNamespace(sequences=sequences, pixel_values=[pixels, pixels.repeat(2, 1, 1, 1), None])
    )
    assert [[type(part) is str for part in row] for row in decoded] == [[True, False, True], [False, False], [True]]
    assert decoded[0][::2] == ["red circle", "blue star"] and decoded[2] == ["yes"]
    difference = np.asarray(decoded[1][0]).astype(int) - np.asarray(image)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("num_pixels", [0, 1])
def test_a_picture_cut_short_is_dropped_with_a_warning(processor: OrthusProcessor, num_pixels: int, caplog) -> None:
    text = list(processor.encode_text("red circle"))
    output = SimpleNamespace(sequences=[[*text, BOI, IMG, IMG]], pixel_values=[torch.zeros(num_pixels, 3, 16, 16)])
    assert processor.decode_segments(output) == [["red circle"]]
    assert "cut short" in caplog.text


def test_a_picture_needs_no_end_token_to_be_whole(processor: OrthusProcessor) -> None:
    output = SimpleNamespace(sequences=[[BOI, IMG, IMG, IMG, IMG]], pixel_values=[torch.zeros(1, 3, 16, 16)])
    assert [len(row) for row in processor.decode_segments(output)] == [1]


def test_outputs_that_contradict_themselves_are_refused(processor: OrthusProcessor) -> None:
    whole = [BOI, IMG, IMG, IMG, IMG, EOI, SEP]
    for num_pixels in (0, 2):
        with pytest.raises(ValueError, match=f"1 whole pictures but its pixel_values {num_pixels}"):
            processor.decode_segments(SimpleNamespace(sequences=[whole], pixel_values=[torch.zeros(num_pixels, 3, 16, 16)]))
    with pytest.raises(ValueError, match="pass one each"):
        processor.decode_segments(SimpleNamespace(sequences=[whole], pixel_values=[]))


# Saving and loading


def test_saved_processor_comes_back_equal(processor: OrthusProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "orthus"}')  # the model lives in the same folder
    loaded = OrthusProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict() and loaded.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    for other in (loaded, pickle.loads(pickle.dumps(processor)), copy.deepcopy(processor)):
        for name, value in other(segments=["a red  circle", picture()]).items():
            assert torch.equal(value, processor(segments=["a red  circle", picture()])[name])
    assert OrthusProcessor.from_pretrained(tmp_path, num_image_tokens=9).num_image_tokens == 9
    assert OrthusImageProcessor.from_pretrained(tmp_path).to_dict() == processor.image_processor.to_dict()


def test_published_folder_is_read_as_it_is(tmp_path: Path) -> None:
    save_published(tmp_path)
    processor = OrthusProcessor.from_pretrained(tmp_path)
    assert (processor.num_image_tokens, processor.tokenizer.padding_side) == (1024, "left")
    assert processor.image_processor.crop_size == {"height": 512, "width": 512}
    text = " a red  circle\n<image> IMGIMGA</s>"  # trap: Llama's class would lose the spaces
    ids = processor.encode_text(text)
    assert processor.tokenizer.decode(ids) == text and min(ids) >= len(PUBLISHED)
    prompt = processor(text="<image>red?", images=red(600, 512))
    expected = ["<s>", "<racm3:break>", *["<image>"] * 1024, "<eoss>"]
    assert processor.tokenizer.convert_ids_to_tokens(prompt["input_ids"][0].tolist())[:1027] == expected
    assert prompt["input_ids"][0, -1] == PUBLISHED.index("<reserved08706>")


def test_a_processor_of_mismatched_parts_is_refused(processor: OrthusProcessor) -> None:
    with pytest.raises(ValueError, match="'<racm3:break>' is not in the tokenizer"):
        OrthusProcessor(OrthusImageProcessor(16), processor.tokenizer)
    with pytest.raises(ValueError, match="num_image_tokens = 0"):
        OrthusProcessor(OrthusImageProcessor(16), processor.tokenizer, 0)
