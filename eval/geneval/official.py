"""The `official` grader: the published script, run in an environment and a checkout that the user names."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from eval.commands import shard
from eval.geneval.folders import PictureFolder, check_pictures
from eval.geneval.grading import RESULTS, check_results, claim_output, folder_identity
from eval.geneval.records import Record, write_results


@dataclass(frozen=True)
class OfficialScorer:
    """`python` of the environment with mmdet 2.x, the checkout `repo`, the folder `model_path` with the detector's weights."""

    python: str
    repo: Path
    model_path: Path
    model_config: Path | None = None
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def script(self) -> Path:
        return self.repo / "evaluation" / "evaluate_images.py"

    def command(self, folder: Path, results: Path) -> list[str]:
        python = os.path.abspath(self.python) if os.sep in self.python else self.python  # it starts in another folder
        words = [python, str(self.script.resolve()), str(folder), "--outfile", str(results)]
        words += ["--model-path", str(self.model_path.resolve())]
        if self.model_config is not None:
            words += ["--model-config", str(self.model_config.resolve())]
        if self.options:
            words += ["--options", *(f"{name}={value}" for name, value in self.options.items())]
        return words

    def score(self, folder: PictureFolder) -> list[Record]:
        """Results of all pictures. Raises `ValueError` when the script fails or leaves pictures out."""
        if not self.script.is_file():
            raise ValueError(f"{self.script} is missing; give a checkout of the published scorer as --official-repo")
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / RESULTS
            # Without torchrun's variables: the script is one process.
            environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
            command = self.command(folder.path.resolve(), path)
            try:
                done = subprocess.run(command, cwd=self.repo, env=environment, capture_output=True, text=True, check=False)
            except OSError as error:
                raise ValueError(f"{self.python} cannot be started ({error}); give --official-python") from error
            if done.returncode != 0 or not path.exists():
                raise ValueError(f"the published scorer ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
            return check_results(path, folder.pictures)


def grade_officially(folder: PictureFolder, scorer: OfficialScorer, output: Path) -> bool:
    """Grade `folder` with the published script; its results stay as it wrote them, in the order of the pictures."""
    if shard()[1] > 1:
        raise ValueError("the official scorer is one process; start it without torchrun")
    check_pictures(folder.pictures)
    results = scorer.score(folder)
    claim_output(output, {"grader": "official", "options": dict(scorer.options), **folder_identity(folder)}, folder.path)
    order = {str(picture.path.resolve()): number for number, picture in enumerate(folder.pictures)}
    results.sort(key=lambda result: order[str(Path(result["filename"]).resolve())])
    write_results(output / RESULTS, results)
    return True
