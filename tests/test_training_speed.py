"""`eval.training_speed` on the shipped checkpoint: what it counts is there."""

import json
from pathlib import Path

import pytest

from eval import training_speed
from eval.sampling_tables import speed_section

CHECKPOINT = Path(__file__).parent.parent / "checkpoints" / "orthus-small"


@pytest.mark.skipif(not CHECKPOINT.is_dir(), reason="no shipped checkpoint")
def test_a_short_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "speed.json"
    training_speed.main([f"model={CHECKPOINT}", f"json={path}", "rows_per_batch=2", "steps=2", "warm_up=0"])
    found = json.loads(path.read_text())
    assert found["real_share"]["packed"] >= 0.95 > found["real_share"]["padded"] > 0 and found["ratio"] > 0
    assert found["ratio"] == found["real_tokens_per_second"]["packed"] / found["real_tokens_per_second"]["padded"]
    assert f"packed is {found['ratio']:.2f} times as fast" in capsys.readouterr().out
    assert "| packed | " in "\n".join(speed_section("training", found))
    with pytest.raises(ValueError, match="steps=0; give at least 1"):
        training_speed.main([f"model={CHECKPOINT}", "steps=0"])
