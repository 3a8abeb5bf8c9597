"""The layouts of public benchmarks, read the way their own scorers read them.

Written from what the scorers do, not from our writer: which folders and names they look at, how they cut names and
grids. Where a scorer would raise or skip, these raise. The sources stand in `pipelines/benchmark_layouts.py`.
"""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

from PIL import Image


def read_geneval(root: Path) -> list[tuple[str, dict[str, Any], list[str]]]:
    """(folder, metadata, names of pictures) of each numbered folder, as evaluate_images.py walks them."""
    found = []
    for folder in _names(root):
        if not (root / folder).is_dir() or not folder.isdigit():
            continue
        metadata = json.loads((root / folder / "metadata.jsonl").read_text())
        for wanted in metadata["include"]:
            assert wanted["class"]
            assert wanted["count"] > 0
        assert metadata["tag"]
        assert metadata["prompt"]
        names = [name for name in _names(root / folder / "samples") if re.match(r"\d+\.png", name)]
        for name in names:
            _open(root / folder / "samples" / name)
        found.append((folder, metadata, names))
    return found


def read_dpg(root: Path, resolution: int, num_pictures: int = 4) -> dict[str, list[Image.Image]]:
    """The squares of each file by what comes before the first dot of its name; it takes every file that is there."""
    corners = [(0, 0), (resolution, 0), (0, resolution), (resolution, resolution)][:num_pictures]
    found = {}
    for name in _names(root):
        image = _open(root / name)
        assert image.size == (2 * resolution, 2 * resolution)
        found[name.split(".")[0]] = [image.crop((x, y, x + resolution, y + resolution)) for x, y in corners]
    return found


def read_t2i_compbench(root: Path) -> dict[str, list[tuple[int, str]]]:
    """(number, prompt) of each picture in order, by category: BLIP, UniDet and CLIP take both from names."""
    found = {}
    for category in _names(root):
        names = _names(root / category / "samples")
        names.sort(key=lambda name: int(name.split("_")[-1].split(".")[0]))
        for name in names:
            assert int(name.split("_")[1].split(".")[0]) == int(name.split("_")[-1].split(".")[0])  # UniDet's own way
            _open(root / category / "samples" / name)
        found[category] = [(int(name.split("_")[-1].split(".")[0]), name.split("_")[0]) for name in names]
    return found


def read_wise(root: Path, prompts: Path) -> dict[int, tuple[str, Image.Image]]:
    """(prompt, picture) by prompt_id, as gpt_eval.py looks for them; a picture that is missing raises."""
    entries = {entry["prompt_id"]: entry for entry in json.loads(prompts.read_text())}
    return {number: (entry["Prompt"], _open(root / f"{number}.png")) for number, entry in entries.items()}


def read_imgedit(root: Path, prompts: Path, images: Path) -> dict[str, tuple[Image.Image, Image.Image]]:
    """(original, edited) by key, as basic_bench.py opens them."""
    entries = json.loads(prompts.read_text())
    return {key: (_open(images / row["id"]), _open(root / f"{key}.png")) for key, row in entries.items()}


def average_imgedit(result: Path) -> dict[str, float]:
    """Mean score by key, as step1_get_avgscore.py takes it from a judge's lines; those without any are left out."""
    averages = {}
    for key, text in json.loads(result.read_text()).items():
        lines = [line.strip().split(": ") for line in text.splitlines()]
        scores = [int(parts[1]) for parts in lines if len(parts) == 2 and parts[1].isdigit()]
        if scores:
            averages[key] = round(sum(scores) / len(scores), 2)
    return averages


def read_gedit(root: Path, rows: list[dict[str, Any]]) -> dict[tuple[str, str, str], tuple[Image.Image, Image.Image]]:
    """(source, edited at the source's size) by task, language and key, as test_gedit_score.py opens them."""
    found = {}
    for row in rows:
        task, lang, key = row["task_type"], row["instruction_language"], row["key"]
        source = _open(root / "nexusgen" / "fullset" / task / lang / f"{key}_SRCIMG.png")
        edited = _open(root / "nexusgen" / "fullset" / task / lang / f"{key}.png")
        found[task, lang, key] = (source, edited.resize(source.size))
    return found


def read_wise_scores(path: Path) -> dict[int, tuple[str, float]]:
    """(subcategory, WiScore) by prompt_id from the scores that gpt_eval.py leaves for Calculate.py."""
    found = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        assert row["consistency"] <= 2  # 999: the judge gave none
        score = (0.7 * row["consistency"] + 0.2 * row["realism"] + 0.1 * row["aesthetic_quality"]) / 2
        found[row["prompt_id"]] = (row["Subcategory"], round(score, 6))
    return found


def score_mmbench(results: Path, prompts: Path, circular: bool) -> float:
    """Accuracy by exact match of letters, as VLMEvalKit computes it from a result file in tsv.

    A question's turned copies count as one if `circular`, and only if all are right.
    """
    csv.field_size_limit(1 << 30)
    given, meta = ({row["index"]: row for row in _rows(path)} for path in (results, prompts))
    assert all(row["question"] == meta[index]["question"] for index, row in given.items())
    hits: dict[int, list[bool]] = {}
    for index, row in given.items():
        options = [letter for letter in "ABCDEFG" if row.get(letter)]
        words = re.sub(r"[.()\[\],:;!*#{}]", " ", row["prediction"]).split()
        named = [letter for letter in options if letter in words]
        group = int(index) % 1_000_000 if circular else int(index)
        hits.setdefault(group, []).append(named == [meta[index]["answer"]])
    return sum(all(group) for group in hits.values()) / len(hits)


def _rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text()), delimiter="\t"))


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")
