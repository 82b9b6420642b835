"""Training on data of one's own, from files to `final/`, through the commands that users call."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from orthus.autoencoder_loading import load_autoencoder
from orthus.training.metrics import read_metrics
from train import autoencoder, posttrain, pretrain

CHECKPOINT = Path(__file__).parent.parent / "checkpoints" / "orthus-small"
pytestmark = pytest.mark.skipif(not CHECKPOINT.is_dir(), reason="no shipped checkpoint")


def write_data(folder: Path, broken: int = 0) -> list[str]:
    """Overrides for a tar of captioned pictures and a file of texts."""
    folder.mkdir()
    with tarfile.open(folder / "00.tar", "w") as tar:
        for number in range(60):
            picture = io.BytesIO()
            Image.new("RGB", (40, 30), (number, 255 - number, 7)).save(picture, format="PNG")
            data = picture.getvalue()[: 20 if number < broken else None]
            for name, content in ((f"{number:03d}.png", data), (f"{number:03d}.txt", b"a photo of a red circle")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": f"red circle {number}"}) for number in range(40)))
    pictures = {"kind": "webdataset", "path": str(folder / "*.tar"), "weight": 3.0}
    sources = [pictures, {"kind": "text", "path": f"{folder}/texts.jsonl"}]
    return [f"data.sources={json.dumps(sources)}", "data.drop={t2i: 0.3}", "data.rows_per_batch=2", "data.row_length=96"]


def test_post_training_on_tar_shards_and_texts(tmp_path: Path) -> None:
    (tmp_path / "stage.yaml").write_text(f"model: {CHECKPOINT}\nattention: eager\ndata: {{num_threads: 2}}\nfrozen: [backbone]\n")
    run = [f"run.output_dir={tmp_path / 'out'}", "run.num_steps=3", "run.lanes=2", "run.log_every=1", "run.num_threads=1"]
    posttrain.main([str(tmp_path / "stage.yaml"), *write_data(tmp_path / "data"), *run])
    records = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3] and all(record["loss/image"] > 0 for record in records)
    assert records[-1]["data/t2i"] > records[-1]["data/text"] > 0 and 0.5 < records[-1]["data/fill"] <= 1
    assert (tmp_path / "out" / "final" / "model.safetensors").exists()


def test_an_autoencoder_on_tar_shards_resumes(tmp_path: Path) -> None:
    sources = write_data(tmp_path / "data")[0].removeprefix("data.").replace("}, {", "}|{").split("|")[0] + "]"
    (tmp_path / "stage.yaml").write_text("model: {patch_size: 8, latent_dim: 4, hidden_dim: 16, num_layers: 1}\nimage_size: 32\n")
    changes = [sources, "batch_size=4", "run.lanes=2", "run.log_every=1", "run.save_every=2", "run.num_threads=1"]
    for name, lengths in (("whole", (5,)), ("broken", (2, 5))):
        for num_steps in lengths:
            run = [f"run.output_dir={tmp_path / name}", f"run.num_steps={num_steps}", "optim.decay_fraction=0.0"]
            autoencoder.main([str(tmp_path / "stage.yaml"), *changes, *run])
    losses = [[record["loss"] for record in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("whole", "broken")]
    assert losses[0] == losses[1] and len(losses[0]) == 5
    model = load_autoencoder(tmp_path / "whole" / "final")
    assert model.config.image_size == 32 and bool((model.latent_std != 1).all())  # calibrated on the same pictures
    (tmp_path / "other.yaml").write_text("image_size: 32\nrun: {output_dir: x, num_steps: 1}\n")
    with pytest.raises(ValueError, match=r"image_size=32 is of sources, and there are none; set world.image_size"):
        autoencoder.main([str(tmp_path / "other.yaml")])


def test_too_many_damaged_pictures_end_the_run_and_say_where(tmp_path: Path) -> None:
    (tmp_path / "stage.yaml").write_text(f"model: {CHECKPOINT}\n")
    run = [f"run.output_dir={tmp_path / 'out'}", "run.num_steps=3"]
    with (
        pytest.warns(UserWarning, match=r"source 'webdataset:\*': .*00.tar.*dropped"),
        pytest.raises(ValueError, match=r"dropped 2 of .*'bad in webdataset:\*': 2.*repair the source"),
    ):
        posttrain.main([str(tmp_path / "stage.yaml"), *write_data(tmp_path / "data", broken=30), *run])
    with pytest.raises(ValueError, match="neither tasks of the small world nor sources"):
        posttrain.main([str(tmp_path / "stage.yaml"), "data.tasks={}", *run])


def test_a_new_model_from_sources_alone(tmp_path: Path) -> None:
    """Tokenizer, codebook and weights come from the data; the autoencoder is the shipped one."""
    sizes = "{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 2}"
    (tmp_path / "stage.yaml").write_text(
        f"autoencoder: {CHECKPOINT}\nbackbone: {{model_type: llama, max_position_embeddings: 128, "
        f"{sizes[1:-1]}}}\nhead: {{width: 16, num_blocks: 1, objective: flow_matching}}\noptions: {{num_codes: 16}}\n"
        "tokenizer_vocab_size: 300\ntokenizer_examples: 50\n"
    )
    run = [f"run.output_dir={tmp_path / 'out'}", "run.num_steps=2", "run.log_every=1", "run.num_threads=1"]
    pretrain.main([str(tmp_path / "stage.yaml"), *write_data(tmp_path / "data"), *run])
    assert len(read_metrics(tmp_path / "out" / "metrics.jsonl")) == 2
