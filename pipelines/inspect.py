"""What is in a set of tar shards, before anything is computed from it: counts, problems, sizes.

Runs in this process, without Ray: shards are read and their images decoded by a few threads.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from nexusgen import defaults
from nexusgen.errors import SampleError
from nexusgen.images import Geometry, decode_image, input_size
from nexusgen.prompts import image_roles
from nexusgen.schema import TASKS, QuarantineRow, Sample
from pipelines.shards import ReadOptions, ShardReader, list_shards

PROGRESS_S = 2.0
_BYTES_PER_NUMBER = 2  # bfloat16


@dataclass
class _Findings:
    """What one shard holds; those of several add up."""

    num_shards: int = 0
    num_bytes: int = 0
    num_ignored: int = 0
    num_images: int = 0
    tokens_of_inputs: int = 0
    num_outputs: int = 0
    multi_reference: int = 0
    tasks: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    licences: Counter[str] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    characters: Counter[int] = field(default_factory=Counter)
    contents: Counter[bytes] = field(default_factory=Counter)
    quarantined: list[QuarantineRow] = field(default_factory=list)

    def merge(self, other: _Findings) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def add(self, sample: Sample) -> None:
        """Count a sample whose images can all be decoded. Raises: SampleError for the first that can't."""
        geometry = Geometry()
        sizes = []
        for index, data in enumerate(sample.images):
            try:
                image = decode_image(data)
            except SampleError as error:
                raise SampleError(error.reason_code, f"image {index}: {error.reason}", error.member) from None
            sizes.append((image.height, image.width))
        speakers = image_roles(sample.messages)
        for size, speaker in zip(sizes, speakers, strict=True):
            if speaker == "assistant":
                self.num_outputs += 1
            else:
                height, width = input_size(size, geometry)
                self.tokens_of_inputs += (height // geometry.factor) * (width // geometry.factor)
        self.num_images += len(sizes)
        self.sizes.update(sizes)
        self.contents.update(hashlib.sha256(data).digest()[:16] for data in sample.images)
        self.tasks[sample.task] += 1
        self.languages[sample.lang] += 1
        self.multi_reference += sample.task == "editing" and speakers.count("user") > 1
        self.sources[_source_of(sample.meta)] += 1
        self.licences[_text_of(sample.meta, "license", "licence")] += 1
        self.characters[sum(len(message.content) for message in sample.messages)] += 1


def inspect(
    inputs: str | Sequence[str], pairs_as: Literal["generation", "understanding"] = "generation"
) -> dict[str, Any]:
    """Read every sample of the shards, decode every image, and count.

    `embedded_bytes_estimate` is the size of mode vision at the released model's sizes (roles input, target, crop).
    Raises: ConfigError or InputError if the inputs name no shard.
    """
    shards = list_shards(inputs)
    total = _Findings()
    shown = time.monotonic()
    with ThreadPoolExecutor(max_workers=min(len(shards), os.cpu_count() or 1)) as pool:
        # Decoding releases the interpreter lock, so threads use every core.
        for findings in pool.map(lambda shard: _inspect_shard(shard, ReadOptions(pairs_as=pairs_as)), shards):
            total.merge(findings)
            if time.monotonic() - shown >= PROGRESS_S:
                shown = time.monotonic()
                print(
                    f"inspect: {total.num_shards}/{len(shards)} shards, {total.tasks.total()} samples, "
                    f"{len(total.quarantined)} quarantined",
                    file=sys.stderr,
                    flush=True,
                )
    return _summary(total)


def _inspect_shard(shard: str, options: ReadOptions) -> _Findings:
    findings = _Findings(num_shards=1)
    reader = ShardReader(shard, options)
    for item in reader:
        if isinstance(item, QuarantineRow):
            findings.quarantined.append(item)
            continue
        try:
            findings.add(item)
        except SampleError as error:
            findings.quarantined.append(QuarantineRow(shard, item.key, error.member, error.reason_code, error.reason))
    findings.num_bytes = reader.num_bytes
    findings.num_ignored = reader.num_ignored
    return findings


def _summary(total: _Findings) -> dict[str, Any]:
    geometry = Geometry()
    tokens = total.tokens_of_inputs + 2 * total.num_outputs * geometry.num_target_tokens  # targets and crops
    return {
        "shards": total.num_shards,
        "samples": total.tasks.total(),
        "by_task": {task: total.tasks[task] for task in TASKS},
        "by_language": _by_count(total.languages),
        "quarantined": [asdict(row) for row in total.quarantined],
        "quarantined_by_code": _by_count(Counter(row.reason_code for row in total.quarantined)),
        "embedded_bytes_estimate": tokens * defaults.HIDDEN_SIZE * _BYTES_PER_NUMBER,
        "editing_multi_reference": total.multi_reference,
        "images": total.num_images,
        "duplicate_images": total.num_images - len(total.contents),
        "image_sizes": _image_sizes(total.sizes),
        "text_characters": _spread(total.characters),
        "by_source": _by_count(total.sources),
        "by_licence": _by_count(total.licences),
        "ignored_members": total.num_ignored,
        "bytes": total.num_bytes,
    }


def _by_count(counter: Counter[str]) -> dict[str, int]:
    return dict(sorted(counter.items(), key=lambda pair: (-pair[1], pair[0])))


def _spread(counter: Counter[int]) -> dict[str, float]:
    values = sorted(counter.elements())
    if not values:
        return {}
    return {"min": values[0], "median": statistics.median(values), "max": values[-1]}


def _image_sizes(sizes: Counter[tuple[int, int]]) -> dict[str, Any]:
    """Spread of heights and widths in pixels, and the most common sizes (height x width)."""
    heights: Counter[int] = Counter()
    widths: Counter[int] = Counter()
    for (height, width), count in sizes.items():
        heights[height] += count
        widths[width] += count
    common = {f"{height}x{width}": count for (height, width), count in sizes.most_common(5)}
    return {"height": _spread(heights), "width": _spread(widths), "most_common": common}


def _source_of(meta: dict[str, Any]) -> str:
    """Where a sample comes from: `origin`, or the place (without path) that `source` or `url` names."""
    origin = _text_of(meta, "origin", "source", "url")
    return origin.partition("@")[0].partition("?")[0][:80]


def _text_of(meta: dict[str, Any], *names: str) -> str:
    for name in names:
        value = meta.get(name)
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, str) and value:
            return value[:200]
    return "unknown"
