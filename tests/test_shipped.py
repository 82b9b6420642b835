"""What the README promises: the YAML files load, its Python runs, the shipped checkpoint works, `demo.sample` leaves its page."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from demo import sample

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "checkpoints" / "orthus-small"
needs_checkpoint = pytest.mark.skipif(not CHECKPOINT.is_dir(), reason="no shipped checkpoint yet")


def test_make_targets_and_files_of_the_readme_exist() -> None:
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", readme, flags=re.M):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
    for path in re.findall(r"\]\((?!http)([\w./-]+)\)", readme) + re.findall(r"configs/[\w/]+\.yaml", readme):
        assert (ROOT / path).exists(), path


@needs_checkpoint
def test_python_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert block
    shown: list[Image.Image] = []
    monkeypatch.setattr(Image.Image, "show", lambda picture: shown.append(picture))
    monkeypatch.chdir(ROOT)
    exec(block[1], {})
    assert len(shown) == 2 and all(picture.size == (64, 64) for picture in shown)


@needs_checkpoint
def test_sample_leaves_pictures_and_a_page(tmp_path: Path) -> None:
    sample.main([str(CHECKPOINT), "--output", str(tmp_path)])
    page = (tmp_path / "index.html").read_text()
    assert page.count("data:image/png;base64,") >= len(list(tmp_path.glob("*.png"))) >= 13
    assert "http" not in page.replace("http-equiv", "")


@needs_checkpoint
def test_sample_draws_the_users_own_prompt(tmp_path: Path) -> None:
    sample.main([str(CHECKPOINT), "--output", str(tmp_path), "--prompt", "a photo of a <sep> red circle", "--num", "2"])
    assert len(list(tmp_path.glob("drawing-*.png"))) == 2


@needs_checkpoint
def test_sample_refuses_a_missing_or_broken_picture(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        sample.main([str(CHECKPOINT), "--picture", "nowhere.png"])
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(ValueError, match=r"broken\.png"):
        sample.main([str(CHECKPOINT), "--picture", str(tmp_path / "broken.png")])


@needs_checkpoint
def test_shipped_scores_belong_to_the_shipped_weights() -> None:
    from eval.provenance import weights_hash

    results = json.loads((CHECKPOINT / "results.json").read_text())
    assert results["weights_sha256"] == weights_hash(CHECKPOINT)
    page, readme = ((ROOT / name).read_text() for name in ("docs/small-world.md", "README.md"))
    for section in ("small_geneval", "small_geneval_direct", "small_mme", "describing", "editing", "interleaved"):
        cell = results[section]["overall"]
        assert f"{cell['value']:.2f} [{cell['low']:.2f}, {cell['high']:.2f}]" in page, section
    for section in ("small_geneval", "small_mme", "editing", "interleaved"):  # the front page has the main ones
        assert f"{results[section]['overall']['value']:.2f}" in readme, section
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= 20_000_000
