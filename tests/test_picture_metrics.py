"""FID, KID and scores of pictures with prompts: the arithmetic against hand computations, folders, and what is refused."""

import ast
import importlib
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from eval import picture_engines as engines
from eval import picture_metrics
from eval.picture_folders import read_folder

FEW = "ignore:FID from"


def noise(seed: int, side: int = 12) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8))


def flat(folder: Path, num_pictures: int, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    for number in range(num_pictures):
        noise(seed + number).save(folder / f"{number:03d}.png")
    return folder


def geneval(folder: Path, counts: list[int]) -> Path:
    for number, count in enumerate(counts):
        flat(folder / f"{number:05d}" / "samples", count, 10 * number)
        (folder / f"{number:05d}" / "metadata.jsonl").write_text(json.dumps({"tag": "colors", "prompt": f"prompt {number}"}))
        noise(0).save(folder / f"{number:05d}" / "grid.png")
    return folder


class MeanColor(nn.Module):
    """Three features: the mean of each channel."""

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.float().mean((2, 3))


TINY = engines.Inception(MeanColor(), "mean colour")


# ---------------------------------------------------------------------- folders


def test_flat_folder_takes_prompts_in_name_order_or_by_name(tmp_path: Path) -> None:
    folder = flat(tmp_path / "flat", 2)
    (tmp_path / "lines.txt").write_text("first\nsecond\n")
    (tmp_path / "names.json").write_text(json.dumps({"001.png": "second", "000.png": "first"}))
    (folder / "results.json").write_text("{}")
    for prompts in ("lines.txt", "names.json"):
        found = read_folder(folder, tmp_path / prompts)
        assert [(file.path.name, file.prompt) for file in found] == [("000.png", "first"), ("001.png", "second")]
    assert [file.prompt for file in read_folder(folder)] == [None, None]


def test_geneval_layout_names_its_prompts(tmp_path: Path) -> None:
    found = read_folder(geneval(tmp_path / "run", [2, 2]))
    assert [file.prompt for file in found] == ["prompt 0", "prompt 0", "prompt 1", "prompt 1"]
    assert all(file.path.parent.name == "samples" for file in found), "grids are no samples"


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("one\n", "1 prompts for 2 pictures"),
        ("one\ntwo\nthree\n", "3 prompts for 2 pictures"),
        ("one\n\n", "line 2 is empty"),
        ('{"000.png": "one"}', "differ in 1 names, such as '001.png'"),
        ('{"000.png": "one", "001.png": "two", "x.png": "three"}', "such as 'x.png'"),
        ('["one", "two"]', "not a JSON object"),
    ],
)
def test_prompts_that_do_not_match_one_to_one_are_refused(tmp_path: Path, prompts: str, message: str) -> None:
    path = tmp_path / ("prompts.json" if prompts[0] in "{[" else "prompts.txt")
    path.write_text(prompts)
    with pytest.raises(ValueError, match=message):
        read_folder(flat(tmp_path / "flat", 2), path)


def test_folders_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        read_folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no picture"):
        read_folder(tmp_path / "empty")
    with pytest.raises(ValueError, match="different numbers of pictures"):
        read_folder(geneval(tmp_path / "uneven", [2, 1]))
    with pytest.raises(ValueError, match="names its prompts itself"):
        read_folder(geneval(tmp_path / "even", [1]), tmp_path / "prompts.txt")
    noise(0).save(tmp_path / "even" / "0.png")
    with pytest.raises(ValueError, match="one layout"):
        read_folder(tmp_path / "even")
    (tmp_path / "uneven" / "00001" / "metadata.jsonl").write_text('{"tag": "colors"}')
    with pytest.raises(ValueError, match='has no "prompt"'):
        read_folder(tmp_path / "uneven")
    (tmp_path / "uneven" / "00001" / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match=r"lacks metadata\.jsonl"):
        read_folder(tmp_path / "uneven")


def test_a_damaged_picture_stops_the_measurement(tmp_path: Path) -> None:
    folder = flat(tmp_path / "flat", 3)
    whole = (folder / "001.png").read_bytes()
    (folder / "001.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"001\.png.*another number"):
        picture_metrics.fid(str(folder), str(folder), TINY, "clean", 2)


# ---------------------------------------------------------------------- FID and KID


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """The formula of arXiv 1706.08500, with the root taken in the eigenbasis of one covariance."""
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(first)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * cross)


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared MMD with the kernel (x y / D + 1)^3 of arXiv 1801.01401."""

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def off_diagonal(x: np.ndarray) -> float:
        values = kernel(x, x)
        return (values.sum() - np.trace(values)) / (len(x) * (len(x) - 1))

    return float(off_diagonal(a) + off_diagonal(b) - 2 * kernel(a, b).mean())


@pytest.mark.filterwarnings(FEW)
def test_distances_are_those_of_their_formulas() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(40, 3)), rng.normal(0.5, 2.0, size=(40, 3))
    found = engines.distances(torch.tensor(a), torch.tensor(b), TINY, "clean")
    assert found["fid"] == pytest.approx(frechet(a, b), rel=1e-6)
    assert found["kid"] == pytest.approx(kernel_distance(a, b), rel=1e-6), "a subset of all pictures is exact"
    assert found["kid_subset_size"] == 40 and found["num_pictures"] == [40, 40]
    assert engines.distances(torch.tensor(a), torch.tensor(a), TINY, "clean")["fid"] == pytest.approx(0, abs=1e-6)


@pytest.mark.filterwarnings(FEW)
def test_fid_of_folders_and_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = flat(tmp_path / "a", 6), geneval(tmp_path / "b", [2, 2])
    monkeypatch.setattr(engines, "load_inception", lambda file, device: TINY)
    picture_metrics.main(["fid", str(a), str(b), "--resizer", "tf1", "--output", str(tmp_path / "out.json"), "--batch-size", "4"])
    result = json.loads((tmp_path / "out.json").read_text())
    means = [np.stack([np.asarray(file.open(), float).mean((0, 1)) for file in read_folder(folder)]) for folder in (a, b)]
    assert result["fid"] == pytest.approx(frechet(*means), rel=1e-3)
    assert result["network"] == "mean colour" and result["resizer"].startswith("tf1") and result["num_pictures"] == [6, 4]
    assert f"fid: {result['fid']}" in capsys.readouterr().out and "torch" in result["versions"]


def test_few_pictures_warn_and_one_is_refused() -> None:
    values = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="from 5 and 5 pictures: below 2048"):
        engines.distances(values, values, TINY, "clean")
    with pytest.raises(ValueError, match="at least two"):
        engines.distances(values[:1], values, TINY, "clean")
    with pytest.raises(ValueError, match="0 pictures"):
        engines.features([], TINY)


def test_clean_resizing_is_antialiased_and_features_do_not_depend_on_batches() -> None:
    stripes = np.zeros((600, 600, 3), np.uint8)
    stripes[::2] = 255
    assert np.asarray(engines.clean_resize(Image.fromarray(stripes)))[20:-20].std() < 5
    assert engines.clean_resize(noise(0)).size == (299, 299)
    images = [noise(seed, side) for seed, side in enumerate((12, 12, 20, 12))]
    for resizer in engines.RESIZERS:
        whole = engines.features(images, TINY, resizer, 4)
        assert torch.allclose(whole, engines.features(images, TINY, resizer, 1), atol=1e-4) and whole.shape == (4, 3)


@pytest.mark.filterwarnings("ignore")
def test_a_scripted_network_sees_scaled_pictures_of_299(tmp_path: Path) -> None:
    class Probe(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            return torch.stack(
                [pixels.amin((1, 2, 3)), pixels.amax((1, 2, 3)), pixels.new_full((len(pixels),), pixels.shape[-1])], 1
            )

    torch.jit.script(Probe()).save(str(tmp_path / "probe.pt"))
    inception = engines.load_inception(str(tmp_path / "probe.pt"))
    half = Image.fromarray(np.repeat(np.uint8([0, 255]), 32).reshape(8, 8)[..., None].repeat(3, 2))
    assert engines.features([half], inception, "tf1").tolist() == [[-1.0, 127 / 128, 299.0]]
    assert inception.name.startswith("probe.pt, sha256 ")
    with pytest.raises(FileNotFoundError, match="no Inception network"):
        engines.load_inception(str(tmp_path / "nothing.pt"))


def test_weights_that_cannot_be_fetched_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from urllib.error import URLError

    def offline(*arguments: Any) -> None:
        raise URLError("no route")

    module = SimpleNamespace(FeatureExtractorInceptionV3=offline)
    monkeypatch.setattr(engines, "engine", lambda name: module)
    with pytest.raises(OSError, match=r"no route.*--inception FILE"):
        engines.load_inception()


def test_a_missing_extra_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"pip install 'orthus\[metrics\]'"):
        engines.engine("torchmetrics.image")


def test_engines_are_not_imported_at_the_top() -> None:
    for module in (engines, picture_metrics):
        tree = ast.parse(Path(str(module.__file__)).read_text())
        tops = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
        tops |= {str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom)}
        assert not [
            name for name in tops if name.split(".")[0] in ("torchmetrics", "torch_fidelity", "open_clip", "transformers")
        ]


# ---------------------------------------------------------------------- CLIP and preference


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP of 12 tokens that reads letters."""
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    for letter in "abcdefghijklmnopqrstuvwxyz":
        vocab |= {letter: len(vocab), f"{letter}</w>": len(vocab) + 1}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(vocab), "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(text_config={**sizes, **text}, vision_config={**sizes, "image_size": 16, "patch_size": 8}, projection_dim=8)
    )
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    pictures = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    CLIPProcessor(pictures, CLIPTokenizer(vocab=vocab, merges=[])).save_pretrained(folder)
    return folder


def by_hand(folder: Path, image: Image.Image, prompt: str) -> float:
    """Cosine of the projected features of one picture and one prompt, without padding."""
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    with torch.no_grad():
        pixels = processor(images=[image], return_tensors="pt")
        words = processor(text=[prompt], return_tensors="pt")
        a = model.visual_projection(model.vision_model(**pixels).pooler_output)[0]
        b = model.text_projection(model.text_model(**words).pooler_output)[0]
    return float(a @ b / (a.norm() * b.norm()))


def test_clip_score_is_factor_times_cosine(tmp_path: Path, clip_folder: Path) -> None:
    folder = flat(tmp_path / "flat", 3)
    prompts = ["a cat", "dog", "a very long prompt"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    cosines = [by_hand(clip_folder, noise(n), prompt) for n, prompt in enumerate(prompts[:2])]
    for factor in ("100", "2.5"):
        arguments = ["clip", str(folder), "--prompts", str(tmp_path / "prompts.txt"), "--model", str(clip_folder)]
        picture_metrics.main([*arguments, "--factor", factor, "--batch-size", "2", "--output", str(tmp_path / "out.json")])
        result = json.loads((tmp_path / "out.json").read_text())
        assert result["formula"] == f"{factor} x max(cosine, 0)" and result["model"] == str(clip_folder)
        assert (result["num_pictures"], result["num_prompts"], result["num_prompts_cut"]) == (3, 3, 1)
        scorer = engines.load_clip(str(clip_folder), factor=float(factor))
        third = scorer.cosines([noise(2)], prompts[2:]).tolist()
        assert scorer.cosines([noise(0), noise(1)], prompts[:2]).tolist() == pytest.approx(cosines, abs=1e-5)
        expected = sum(max(value, 0) for value in (*cosines, *third)) / 3 * float(factor)
        assert result["score"]["value"] == pytest.approx(expected, abs=1e-4)


def test_pickscore_takes_the_models_own_scale(clip_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "PICKSCORE_PROCESSOR", str(clip_folder))
    scorer = picture_metrics.load_scorer("pickscore", str(clip_folder), "cpu")
    assert scorer.factor == pytest.approx(math.exp(CLIPModel.from_pretrained(clip_folder).logit_scale.item()))


def scorer_of(values: list[float]) -> engines.Scorer:
    """Gives the values in turn."""
    left = iter(values)
    return engines.Scorer("given", lambda images, prompts: torch.tensor([next(left) for _ in images]), 10.0, lambda prompt: False)


def test_scores_are_resampled_by_prompt_and_may_be_negative(tmp_path: Path) -> None:
    files = read_folder(geneval(tmp_path / "run", [2, 2]))
    result = picture_metrics.score(files, scorer_of([0.1, 0.3, -0.2, 0.2]), is_clipped=False, batch_size=3)
    assert result["score"]["value"] == pytest.approx(1.0) and result["score"]["n"] == 4
    assert result["score"]["low"] == pytest.approx(0.0, abs=1e-6) and result["score"]["high"] == pytest.approx(2.0)
    clipped = picture_metrics.score(files, scorer_of([0.1, 0.3, -0.2, 0.2]), is_clipped=True, batch_size=3)
    assert clipped["score"]["value"] == pytest.approx(1.5)


def test_pictures_without_prompts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"2 pictures have no prompt.*--prompts FILE"):
        picture_metrics.score(read_folder(flat(tmp_path / "flat", 2)), scorer_of([]), False, 2)


def test_hpsv2_loads_its_weights_into_the_tower_and_gives_cosines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3))

        def encode_image(self, pixels: Tensor) -> Tensor:
            return pixels.mean((2, 3)) * self.weight

        def encode_text(self, tokens: Tensor) -> Tensor:
            return tokens.float()

    def preprocess(image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()

    class Reader:
        context_length = 4

        def __call__(self, prompts: list[str]) -> Tensor:
            return torch.tensor([[len(prompt), 1, 0] for prompt in prompts])

        def encode(self, prompt: str) -> list[int]:
            return list(range(len(prompt)))

    made: dict[str, Any] = {}

    def create(name: str, **options: Any) -> tuple[nn.Module, None, Any]:
        made.update(options, name=name)
        return Tower(), None, preprocess

    fake = SimpleNamespace(create_model_and_transforms=create, get_tokenizer=lambda name: Reader())
    monkeypatch.setattr(engines, "engine", lambda name: fake)
    torch.save({"state_dict": {"weight": torch.tensor([1.0, 2.0, 0.0])}}, tmp_path / "HPS.pt")
    scorer = picture_metrics.load_scorer("hpsv2", str(tmp_path / "HPS.pt"), "cpu")
    image = Image.new("RGB", (4, 4), (3, 2, 9))  # embedded as (3, 4, 0)
    assert scorer.cosines([image], ["ab"]).item() == pytest.approx((3 * 2 + 4 * 1) / (5 * math.sqrt(5)))
    assert (made["name"], made["image_resize_mode"], scorer.factor) == ("ViT-H-14", "longest", 1.0)
    assert scorer.is_cut("abc") and not scorer.is_cut("ab")


def test_imagereward_names_what_can_score_it() -> None:
    with pytest.raises(NotImplementedError, match=r"evalscope\[aigc\]"):
        picture_metrics.load_scorer("imagereward", "", "cpu")
