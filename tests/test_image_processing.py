"""Pictures to pixel values and back: equal to the published processor, and strict about what is not a picture."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from orthus.image_processing import OrthusImageProcessor, load_image, to_rgb


def picture(seed: int = 0, width: int = 16, height: int = 16, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    return Image.fromarray(pixels)


def red(*size: int) -> Image.Image:
    return Image.new("RGB", size, (200, 10, 30))


def test_pixels_follow_the_formula_with_any_mean_and_deviation() -> None:
    image, mean, std = picture(1), [0.5, 1.0, 0.25], [0.5, 1.0, 2.0]
    processor = OrthusImageProcessor(16, rescale_factor=1 / 255, image_mean=mean, image_std=std)
    expected = (np.asarray(image) / 255 - mean) / std
    pixels = processor(image)["pixel_values"]
    np.testing.assert_allclose(pixels[0].permute(1, 2, 0).numpy(), expected, atol=1e-6)
    back = np.asarray(processor.postprocess(pixels)[0]).astype(int)
    assert np.abs(back - np.asarray(image)).max() <= 1  # truncated, not rounded


def test_fast_path_for_pictures_of_the_right_size_equals_the_slow_one() -> None:
    processor, image = OrthusImageProcessor(16), picture(2)
    slow = image.copy()
    slow.info["comment"] = "not just pixels"
    assert processor.prepare(image) is image
    assert torch.equal(processor.pixel_values([image]), processor.pixel_values([slow]))


def test_all_input_types_give_the_same_pixels(tmp_path: Path) -> None:
    processor, image = OrthusImageProcessor(16), picture(3, 40, 20)
    image.save(tmp_path / "image.png")
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy())
    inputs = [image, array, tensor, tensor.permute(2, 0, 1), load_image(tmp_path / "image.png")]
    pixels = processor([inputs[:2], inputs[2:]])["pixel_values"]
    assert pixels.shape == (5, 3, 16, 16) and (pixels == pixels[:1]).all()
    assert torch.equal(processor(np.stack([array, array]))["pixel_values"], pixels[:2])
    assert processor.pixel_values([]).shape == (0, 3, 16, 16)


def test_transparency_is_blended_on_white_in_every_mode() -> None:
    clear = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    palette = red(8, 8).quantize(4)
    palette.info["transparency"] = bytes([0] * 4)
    keyed = red(8, 8)
    keyed.info["transparency"] = (200, 10, 30)
    grey = Image.new("L", (8, 8), 9)
    grey.info["transparency"] = 9
    for image in (
        clear,
        clear.convert("LA"),
        clear.convert("RGBa"),
        clear.convert("LA").convert("La"),
        palette,
        keyed,
        grey,
    ):
        assert to_rgb(image).getpixel((0, 0)) == (255, 255, 255), image.mode
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    assert to_rgb(half).getpixel((0, 0)) == (126, 126, 126) or to_rgb(half).getpixel((0, 0)) == (127, 127, 127)


def test_other_modes_become_rgb() -> None:
    assert to_rgb(Image.new("L", (2, 2), 77)).getpixel((0, 0)) == (77, 77, 77)
    assert to_rgb(Image.new("1", (2, 2), 1)).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("CMYK", (2, 2), (0, 255, 255, 0))).getpixel((0, 0)) == (255, 0, 0)
    assert to_rgb(red(8, 8).quantize(4)).getpixel((0, 0)) == (200, 10, 30)
    deep = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
    assert [to_rgb(deep).getpixel((x, 0))[0] for x in range(3)] == [0, 100, 255]
    assert to_rgb(Image.fromarray(np.array([[257 * 7]], dtype=np.int32))).getpixel((0, 0)) == (7, 7, 7)
    with pytest.raises(ValueError, match="'F' has no defined conversion"):
        to_rgb(Image.new("F", (2, 2)))
    with pytest.raises(ValueError, match="-5"):
        to_rgb(Image.fromarray(np.array([[-5]], dtype=np.int32)))


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (16, 16), "white")
    image.paste((255, 0, 0), (0, 0, 16, 8))  # red on top
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    image.save(tmp_path / "turned.png", exif=exif)
    upright = OrthusImageProcessor(16).prepare(load_image(tmp_path / "turned.png"))
    assert upright.getpixel((15, 8)) == (255, 0, 0) and upright.getpixel((0, 8)) == (255, 255, 255)


def test_damaged_and_oversized_files_are_refused(tmp_path: Path) -> None:
    good = io.BytesIO()
    picture(4, 64, 64).save(good, "PNG")
    for name, content in {"cut.png": good.getvalue()[:2000], "empty.png": b"", "text.jpg": b"no image"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="corrupt|cannot read"):
            load_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="missing"):
        load_image(tmp_path / "missing.png")
    (tmp_path / "good.png").write_bytes(good.getvalue())
    with pytest.raises(ValueError, match="4096 pixels exceeds max_pixels = 4000"):
        load_image(tmp_path / "good.png", max_pixels=4000)
    lazy = Image.open(tmp_path / "cut.png")
    with pytest.raises(ValueError, match="truncated or corrupt"):
        OrthusImageProcessor(16)(lazy)


def test_size_guard_comes_before_decoding_and_before_enlarging() -> None:
    stream = io.BytesIO()
    Image.new("1", (3000, 3000)).save(stream, "PNG")
    image = Image.open(stream)
    with pytest.raises(ValueError, match="exceeds max_pixels"):
        OrthusImageProcessor(16, max_pixels=8_000_000)(image)
    assert not getattr(image, "_im", None)  # never decoded
    with pytest.raises(ValueError, match="512 x 5120000 = .* exceeds max_pixels"):
        OrthusImageProcessor(512)(red(1, 10000))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("picture.png", r"load_image\(path\)"),
        (Path("picture.png"), r"load_image\(path\)"),
        (7, "not int"),
        (None, "not NoneType"),
        (np.zeros((8, 8, 3), np.float32), "dtype float32"),
        (torch.zeros(3, 8, 8), "dtype torch.float32"),
        (np.zeros((8, 8, 2), np.uint8), r"\(8, 8, 2\)"),
        (np.zeros((0, 8, 3), np.uint8), "empty"),
        (Image.new("RGB", (0, 4)), "0 x 4 pixels is empty"),
    ],
)
def test_unusable_pictures_are_named(image: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OrthusImageProcessor(16)(image)


@pytest.mark.parametrize(
    "arguments",
    [{"size": 0}, {"size": {"height": 4}}, {"crop_size": 32}, {"crop_size": {"height": 8}}, {"do_resize": False},
     {"rescale_factor": 0.0}, {"image_std": [1.0]}, {"image_std": [0.0] * 3}, {"resample": 99}],
)  # fmt: skip
def test_impossible_image_settings_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError):
        OrthusImageProcessor(**{"size": 16, **arguments})


def test_postprocess_clips_and_refuses_what_is_not_a_picture() -> None:
    processor = OrthusImageProcessor(16)
    values = torch.stack([torch.full((3, 4, 4), -9.0), torch.full((3, 4, 4), 9.0)]).bfloat16().requires_grad_()
    assert [image.getpixel((0, 0)) for image in processor.postprocess(values)] == [(0, 0, 0), (255, 255, 255)]
    with pytest.raises(ValueError, match="NaN"):
        processor.postprocess(torch.full((3, 4, 4), float("nan")))
    with pytest.raises(ValueError, match=r"\(4, 4\)"):
        processor.postprocess(torch.zeros(4, 4))
