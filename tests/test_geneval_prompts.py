"""The published prompt files, byte for byte: their sha256 were computed from what the published generator writes."""

import hashlib
import json

import pytest

from eval.geneval.__main__ import main
from eval.geneval.prompts import CLASSES, draw_prompts, lines_sha256, official_lines
from eval.geneval.summary import OFFICIAL

PUBLISHED = {  # (seed, draws): number of prompts, sha256 of evaluation_metadata.jsonl and generation_prompts.txt
    (43, 100): (
        553,
        "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13",
        "55b6e3650e980c13daf30569eb666e000faf19bfc2b7b4cbe999fcdb7aa9d680",
    ),
    (0, 0): (
        80,
        "ad4a9edfe022aa4cbbe1a3950ec85e6d61d9fd52d686f5ee43191f65e1b934a5",
        "1e58f6a460671d95450bfb37fa96f58f9f3b347ab88572b866b2f915ce88d38b",
    ),
    (7, 3): (
        95,
        "ffea4a41e732912bc89fec054a0c30f92591ad5933811a494120dde258d64794",
        "882e5d50cc325252a6e5c87d61d0cc3194e6aee7be24d0f77b1086c92c9df81a",
    ),
    (2**40 + 7, 250): (
        1188,
        "37996e4eda1ec0750b31fc814ed25720b37cc987d8c2eeac50cae436af6fa4be",
        "622678ab96a02efca9f8c4ca0995ec70af6de4539b8288f4f2feb73238010094",
    ),
}


@pytest.mark.parametrize(("seed", "draws"), PUBLISHED)
def test_files_are_the_published_ones(seed, draws, tmp_path, capsys):
    arguments = ["prompts", "--seed", str(seed), "--num-samples", str(draws), "--output", str(tmp_path / "new")]
    assert main(arguments) == 0
    number, *digests = PUBLISHED[seed, draws]
    names = ("evaluation_metadata.jsonl", "generation_prompts.txt")
    assert [hashlib.sha256((tmp_path / "new" / name).read_bytes()).hexdigest() for name in names] == digests
    assert f"{number} prompts" in capsys.readouterr().out


def test_the_official_set_is_seed_43_with_100_draws():
    items = [json.loads(line) for line in official_lines()]
    assert items == [json.loads(json.dumps(item)) for item in draw_prompts(43, 100)] and len(items) == 553
    for tag, number in OFFICIAL.prompts_per_tag.items():
        assert sum(item["tag"] == tag for item in items) == number
    assert len(set(CLASSES)) == 80 and lines_sha256(official_lines()) != lines_sha256(official_lines()[:-1])


def test_bad_numbers_are_named(tmp_path, capsys):
    assert main(["prompts", "--num-samples", "-1", "--output", str(tmp_path)]) == 2
    assert "-1 draws" in capsys.readouterr().err and not list(tmp_path.iterdir())
