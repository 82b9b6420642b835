"""Grade a folder: detections of each picture are appended as they come, results are written when all pictures have theirs.

Under `torchrun` process r of w takes pictures r, r + w, ...; a run that was stopped goes on with any number of processes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval.commands import shard
from eval.geneval.detectors import Grader, describe_picture, load_picture
from eval.geneval.folders import Picture, PictureFolder, check_pictures
from eval.geneval.records import Record, judge_record, read_lines, result_of, write_results
from eval.whole_files import write_lines

IDENTITY, RESULTS, DETECTIONS = "grading.json", "results.jsonl", "detections.jsonl"
PICTURES = "pictures"  # in grading.json: their folder, from there


def claim_output(output: Path, identity: Mapping[str, Any], pictures: Path) -> None:
    """Write `grading.json`, which also says where the pictures are, or raise `ValueError` where `output` holds the results of
    another grader or other pictures."""
    path = output / IDENTITY
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        differing = sorted(name for name in {*before, *identity} - {PICTURES} if before.get(name) != identity.get(name))
        if differing:
            name = differing[0]
            raise ValueError(
                f"{output} belongs to another grading: {name} is {before.get(name)!r} there, {identity.get(name)!r} here; "
                "give another --output"
            )
    elif (output / RESULTS).exists():
        raise ValueError(f"{output / RESULTS} exists, but no {IDENTITY} says who graded it; give another --output")
    else:
        write_lines(path, [{**identity, PICTURES: os.path.relpath(pictures, output)}])


def grade_folder(folder: PictureFolder, grader: Grader, output: Path) -> bool:
    """Grade this process's share. True when the results are complete and written.

    Raises `ValueError` before anything is written for damaged pictures, for another grader's output, and for pictures that
    changed after their detections were stored.
    """
    rank, num_processes = shard()
    own = folder.pictures[rank::num_processes]
    digests = check_pictures(own)
    identity = {**grader.identity, "options": dict(grader.options), **folder_identity(folder)}
    claim_output(output, identity, folder.path)
    known = read_detections(output)
    changed = [key for key, digest in digests.items() if key in known and known[key]["sha256"] != digest]
    if changed:
        raise ValueError(f"{changed[0]} changed after its detections were stored in {output}; give another --output")
    own_shard = output / f"detections.rank{rank}.jsonl"
    drop_unfinished_line(own_shard)
    lacking = [picture for picture in own if picture.key not in known]
    with own_shard.open("a", encoding="utf-8") as file:
        for picture in tqdm(lacking, desc="grade", unit="picture", disable=rank > 0):
            record = picture_record(picture, digests[picture.key], grader)
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
    return write_graded(folder.pictures, output)


def folder_identity(folder: PictureFolder) -> dict[str, Any]:
    return {"prompt_set": folder.prompt_set, "prompts_sha256": folder.prompts_sha256, "num_samples": folder.num_samples}


def picture_record(picture: Picture, digest: str, grader: Grader) -> Record:
    described = describe_picture(grader, load_picture(picture.path), picture.metadata)
    head = {"id": picture.key, "filename": str(picture.path), "sha256": digest}
    return {**head, "options": dict(grader.options), "metadata": picture.metadata, **described}


def read_detections(output: Path) -> dict[str, Record]:
    """Stored records of all processes by picture. A last line without its end is still being written, or never was."""
    records: dict[str, Record] = {}
    for path in sorted(output.glob("detections.rank*.jsonl")):
        text = path.read_text(encoding="utf-8")
        for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
            try:
                record = json.loads(line)
                records[record["id"]] = record
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: {error!r}; delete the file to detect its pictures again") from error
    return records


def drop_unfinished_line(path: Path) -> None:
    """Cut a file after its last line end: a killed process may have left half a line."""
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)


def write_graded(pictures: Sequence[Picture], output: Path) -> bool:
    """Detections and results in the order of the pictures, once all have their record."""
    known = read_detections(output)
    if any(picture.key not in known for picture in pictures):
        return False
    records = [known[picture.key] for picture in pictures]
    results = [result_of(record["filename"], record["metadata"], judge_record(record)) for record in records]
    write_lines(output / DETECTIONS, records)
    write_results(output / RESULTS, results)
    return True


def check_results(path: Path, pictures: Sequence[Picture]) -> list[Record]:
    """Results of another program for exactly these pictures. Raises `ValueError` otherwise."""
    results = read_lines(path, dict)
    names = sorted(str(Path(result.get("filename", "")).resolve()) for result in results)
    expected = sorted(str(picture.path.resolve()) for picture in pictures)
    if names != expected:
        raise ValueError(f"{path} holds {len(results)} results that are not those of the {len(expected)} pictures")
    return results
