"""What is in a set of tar shards, before anything is computed from it: counts, problems, sizes.

Runs in this process, without Ray: shards are read and their images decoded by a few threads. Memory stays bounded for
large inputs: contents are 8-byte digests, sizes and lengths are counters, pictures to show a fixed number per task.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
import threading
import time
from array import array
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
from PIL import Image

from nexusgen import defaults
from nexusgen.errors import SampleError
from nexusgen.geometry import Geometry
from nexusgen.images import decode_image, input_size
from nexusgen.messages import image_roles
from nexusgen.model.manifest import demo_base
from nexusgen.prompts import load_tokenizer
from nexusgen.schema import IMAGE_MARK, TASKS, Message, QuarantineRow, Sample
from pipelines.ahead import map_ahead
from pipelines.shards import ReadOptions, ShardReader, list_shards
from pipelines.sheets import PICTURE_PX

PROGRESS_S = 2.0
AHEAD_PER_THREAD = 2  # shards read while one before them isn't
MAX_NAMES = 1_000  # distinct sources or licences counted by name
MAX_SIZES = 20_000  # distinct image sizes counted
MAX_ROWS = 100_000  # quarantine rows listed; all are counted
MAX_GROUPS, MAX_PLACES = 20, 5  # groups of duplicates listed, and places of each
MAX_ODD_SHARDS = 20  # shards listed as of another convention
NUM_SHOWN = 24  # samples shown of each task
MAX_PICTURES = 4  # shown of one sample
TOKENIZER = "demo-base"
CONVENTIONS = ("nexus-gen", "img2dataset", "mixed")  # what the samples of a shard are
OTHERS = "(others)"

_BYTES_PER_NUMBER = 2  # bfloat16
_ROW_BITS = 32

HashableT = TypeVar("HashableT", bound=Hashable)


@dataclass(frozen=True)
class Shown:
    """A sample to look at: small pictures of it and its text. `rank` is its place in a draw that depends on its key."""

    rank: int
    shard: str
    key: str
    task: str
    lang: str
    messages: tuple[Message, ...]
    pictures: tuple[Image.Image, ...]
    num_images: int


@dataclass
class Found:
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
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # the most common; (height, width)
    heights: Counter[int] = field(default_factory=Counter)
    widths: Counter[int] = field(default_factory=Counter)
    characters: Counter[int] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)
    conventions: Counter[str] = field(default_factory=Counter)  # samples
    shards_by_convention: Counter[str] = field(default_factory=Counter)
    first_shards: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in CONVENTIONS})
    image_digests: array[int] = field(default_factory=lambda: array("Q"))
    image_places: array[int] = field(default_factory=lambda: array("Q"))  # of the shard, and row within it
    sample_digests: array[int] = field(default_factory=lambda: array("Q"))
    sample_places: array[int] = field(default_factory=lambda: array("Q"))
    codes: Counter[str] = field(default_factory=Counter)
    quarantined: list[QuarantineRow] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)

    def merge(self, other: Found) -> None:
        """Add what another shard holds, and forget what is too much to keep."""
        for name, value in vars(other).items():
            if isinstance(value, Counter):
                getattr(self, name).update(value)  # `+` would copy what has been found so far
            elif name == "first_shards":
                for convention, shards in value.items():
                    self.first_shards[convention] = (self.first_shards[convention] + shards)[:MAX_ODD_SHARDS]
            elif isinstance(value, list | array):
                getattr(self, name).extend(value)
            else:
                setattr(self, name, getattr(self, name) + value)
        del self.quarantined[MAX_ROWS:]
        self.shown = _drawn(self.shown)
        for names in (self.sources, self.licences, self.languages):
            _keep_common(names, MAX_NAMES, OTHERS)
        _keep_common(self.sizes, MAX_SIZES, None)

    def add(self, sample: Sample, shard_index: int, is_shown: bool) -> None:
        """Count a sample whose images can all be decoded. Raises: SampleError for the first that can't."""
        geometry = Geometry()
        rank = int.from_bytes(_digest(sample.key.encode("utf-8", "replace")))
        sizes: list[tuple[int, int]] = []
        pictures: list[Image.Image] = []
        for index, data in enumerate(sample.images):
            try:
                image = decode_image(data)
            except SampleError as error:
                raise SampleError(error.reason_code, f"image {index}: {error.reason}", error.member) from None
            sizes.append((image.height, image.width))
            if is_shown and index < MAX_PICTURES:
                image.thumbnail((PICTURE_PX, PICTURE_PX))
                pictures.append(image)
        speakers = image_roles(sample.messages)
        for size, speaker in zip(sizes, speakers, strict=True):
            if speaker == "assistant":
                self.num_outputs += 1
            else:
                height, width = input_size(size, geometry)
                self.tokens_of_inputs += (height // geometry.factor) * (width // geometry.factor)
        self.num_images += len(sizes)
        self.sizes.update(sizes)
        self.heights.update(height for height, _ in sizes)
        self.widths.update(width for _, width in sizes)
        place = shard_index << _ROW_BITS | sample.row
        digests = [_digest(data) for data in sample.images]
        self.image_digests.extend(map(int.from_bytes, digests))
        self.image_places.extend([place] * len(digests))
        texts = repr([(message.role, message.content) for message in sample.messages]).encode("utf-8", "replace")
        self.sample_digests.append(int.from_bytes(_digest(b"".join([*digests, texts]))))
        self.sample_places.append(place)
        self.tasks[sample.task] += 1
        self.languages[sample.lang] += 1
        self.multi_reference += sample.task == "editing" and speakers.count("user") > 1
        self.sources[_source_of(sample.meta)] += 1
        self.licences[_text_of(sample.meta, "license", "licence")] += 1
        self.characters[sum(len(message.content) for message in sample.messages)] += 1
        if is_shown:
            self.shown.append(
                Shown(
                    rank,
                    sample.shard,
                    sample.key,
                    sample.task,
                    sample.lang,
                    sample.messages,
                    tuple(pictures),
                    len(sample.images),
                )
            )
            if len(self.shown) > 2 * NUM_SHOWN * len(TASKS):
                self.shown = _drawn(self.shown)


class _TextLengths:
    """Lengths of texts in tokens; one thread at a time, as a tokenizer isn't made for several."""

    def __init__(self) -> None:
        self._tokenizer = load_tokenizer(demo_base() / "autoregressive")
        self._lock = threading.Lock()

    def __call__(self, texts: list[str]) -> Counter[int]:
        if not texts:
            return Counter()
        with self._lock:
            encoded: Any = self._tokenizer(texts, add_special_tokens=False, split_special_tokens=True)
        return Counter(map(len, encoded["input_ids"]))


def inspect(
    inputs: str | Sequence[str],
    pairs_as: Literal["generation", "understanding"] = "generation",
    *,
    shown: list[Shown] | None = None,
) -> dict[str, Any]:
    """Read every sample of the shards, decode every image, and count.

    `embedded_bytes_estimate` is the size of mode vision at the released model's sizes (roles input, target, crop).
    `shown`, an empty list, takes up to NUM_SHOWN samples of each task, drawn by their keys.
    Raises: ConfigError or InputError if the inputs name no shard.
    """
    shards = list_shards(inputs)
    options = ReadOptions(pairs_as=pairs_as)
    lengths = _TextLengths()
    total = Found()
    last = time.monotonic()

    def read(index: int) -> Found:
        return _read_shard(shards[index], index, options, lengths, shown is not None)

    num_threads = min(len(shards), os.cpu_count() or 1)
    with ThreadPoolExecutor(num_threads) as pool:
        # Decoding releases the interpreter lock, so threads use every core. A shard's pictures to show may take 28 MB.
        for found in map_ahead(pool, read, range(len(shards)), num_threads * AHEAD_PER_THREAD):
            total.merge(found)
            if time.monotonic() - last >= PROGRESS_S:
                last = time.monotonic()
                print(
                    f"inspect: {total.num_shards}/{len(shards)} shards, {total.tasks.total()} samples, "
                    f"{total.codes.total()} quarantined",
                    file=sys.stderr,
                    flush=True,
                )
    if shown is not None:
        shown.extend(total.shown)
    return _summary(total, shards, options)


def _read_shard(shard: str, index: int, options: ReadOptions, lengths: _TextLengths, is_shown: bool) -> Found:
    found = Found(num_shards=1)
    reader = ShardReader(shard, options)
    texts: list[str] = []
    for item in reader:
        row = item
        if isinstance(item, Sample):
            try:
                found.add(item, index, is_shown)
            except SampleError as error:
                row = QuarantineRow(shard, item.key, error.member, error.reason_code, error.reason)
            else:
                texts.append("\n".join(message.content.replace(IMAGE_MARK, "") for message in item.messages))
        if isinstance(row, QuarantineRow):
            found.codes[row.reason_code] += 1
            if len(found.quarantined) < MAX_ROWS:
                found.quarantined.append(row)
        if len(texts) >= 1_000:
            found.tokens += lengths(texts)
            texts = []
    found.tokens += lengths(texts)
    found.num_bytes = reader.num_bytes
    found.num_ignored = reader.num_ignored
    found.conventions = Counter({CONVENTIONS[0]: reader.num_conversations, CONVENTIONS[1]: reader.num_pairs})
    kinds = [name for name, count in found.conventions.items() if count]
    if kinds:
        convention = kinds[0] if len(kinds) == 1 else CONVENTIONS[2]
        found.shards_by_convention[convention] = 1
        found.first_shards[convention] = [shard]
    return found


def _summary(total: Found, shards: list[str], options: ReadOptions) -> dict[str, Any]:
    geometry = Geometry()
    tokens = total.tokens_of_inputs + 2 * total.num_outputs * geometry.num_target_tokens  # targets and crops
    num_images, image_groups = _duplicates(total.image_digests, total.image_places)
    num_samples, sample_groups = _duplicates(total.sample_digests, total.sample_places)
    names = _names_at({place for group in image_groups + sample_groups for place in group[1]}, shards, options)
    by_convention = {name: total.shards_by_convention[name] for name in CONVENTIONS}
    majority = max(CONVENTIONS[:2], key=lambda name: by_convention[name])
    odd = [(shard, name) for name in CONVENTIONS if name != majority for shard in total.first_shards[name]]
    return {
        "shards": total.num_shards,
        "samples": total.tasks.total(),
        "by_task": {task: total.tasks[task] for task in TASKS},
        "by_language": _by_count(total.languages),
        "quarantined": [asdict(row) for row in total.quarantined],
        "quarantined_total": total.codes.total(),
        "quarantined_by_code": _by_count(total.codes),
        "embedded_bytes_estimate": tokens * defaults.HIDDEN_SIZE * _BYTES_PER_NUMBER,
        "editing_multi_reference": total.multi_reference,
        "images": total.num_images,
        "duplicate_images": num_images,
        "duplicate_samples": num_samples,
        "duplicate_groups": {
            "images": _named_groups(image_groups, names),
            "samples": _named_groups(sample_groups, names),
        },
        "image_sizes": {
            "height": _spread(total.heights),
            "width": _spread(total.widths),
            "most_common": {f"{height}x{width}": count for (height, width), count in total.sizes.most_common(5)},
        },
        "text_characters": _spread(total.characters),
        "text_tokens": {"tokenizer": TOKENIZER, **_spread(total.tokens)},
        "by_source": _by_count(total.sources),
        "by_licence": _by_count(total.licences),
        "conventions": {
            "samples": dict(total.conventions),
            "shards": by_convention,
            "majority": majority if total.conventions.total() else "",
            "odd_shards": [{"shard": shard, "convention": name} for shard, name in odd],
        },
        "ignored_members": total.num_ignored,
        "bytes": total.num_bytes,
        "histograms": {
            "heights": _bins(total.heights),
            "widths": _bins(total.widths),
            "text_tokens": _bins(total.tokens),
        },
    }


# ---- duplicates -----------------------------------------------------------------------------------------------------


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=8).digest()


def _duplicates(digests: array[int], places: array[int]) -> tuple[int, list[tuple[int, list[int]]]]:
    """How many contents repeat an earlier one, and the first groups: (size, first places), in order of the input."""
    contents = np.frombuffer(digests, dtype=np.uint64) if digests else np.zeros(0, dtype=np.uint64)
    order = np.argsort(contents, kind="stable")
    borders = np.flatnonzero(np.diff(contents[order])) + 1
    starts = np.concatenate([[0], borders]) if len(contents) else borders
    counts = np.diff(np.concatenate([starts, [len(contents)]]))
    repeated = np.flatnonzero(counts > 1)
    first = repeated[np.argsort(order[starts[repeated]])][:MAX_GROUPS] if len(repeated) else repeated
    groups = []
    for group in first:
        start, count = int(starts[group]), int(counts[group])
        groups.append((count, [places[int(index)] for index in order[start : start + min(count, MAX_PLACES)]]))
    return len(contents) - len(starts), groups


def _names_at(places: set[int], shards: list[str], options: ReadOptions) -> dict[int, dict[str, str]]:
    """Shard and key of samples by place. Only their rows were kept: the shards in question are read again."""
    names: dict[int, dict[str, str]] = {}
    for index, grouped in itertools.groupby(sorted(places), key=lambda place: place >> _ROW_BITS):
        wanted = set(grouped)
        for item in ShardReader(shards[index], options):
            if isinstance(item, Sample) and (place := index << _ROW_BITS | item.row) in wanted:
                names[place] = {"shard": item.shard, "key": item.key}
                wanted.discard(place)
                if not wanted:
                    break
    return names


def _named_groups(groups: Iterable[tuple[int, list[int]]], names: dict[int, dict[str, str]]) -> list[dict[str, Any]]:
    return [
        {"count": count, "first": [names[place] for place in dict.fromkeys(places) if place in names]}
        for count, places in groups
    ]


# ---- counters -------------------------------------------------------------------------------------------------------


def _drawn(shown: list[Shown]) -> list[Shown]:
    """The NUM_SHOWN samples of each task with the lowest ranks: the same draw, in whatever order shards are read."""
    by_rank = sorted(shown, key=lambda sample: (sample.rank, sample.shard, sample.key))
    return [sample for task in TASKS for sample in [one for one in by_rank if one.task == task][:NUM_SHOWN]]


def _keep_common(counter: Counter[Any], limit: int, rest: str | None) -> None:
    """Once a counter has twice `limit` entries, drop the rarest half, counted as `rest` if that is a name."""
    if len(counter) <= 2 * limit:
        return
    kept = Counter(dict(counter.most_common(limit)))
    if rest is not None:
        kept[rest] += counter.total() - kept.total()
    counter.clear()
    counter.update(kept)


def _by_count(counter: Counter[str]) -> dict[str, int]:
    return dict(sorted(counter.items(), key=lambda pair: (-pair[1], pair[0])))


def _spread(counter: Counter[int]) -> dict[str, float]:
    """Least, median, mean, 95th percentile and greatest of the counted values; nothing if there are none."""
    if not counter:
        return {}
    values = np.array(sorted(counter), dtype=np.int64)
    ends = np.cumsum([counter[int(value)] for value in values])
    num_values = int(ends[-1])

    def at(index: int) -> int:
        return int(values[np.searchsorted(ends, index, side="right")])

    median = (at((num_values - 1) // 2) + at(num_values // 2)) / 2
    mean = sum(value * count for value, count in counter.items()) / num_values
    return {
        "min": at(0),
        "median": median,
        "mean": round(mean, 1),
        "p95": at(min(num_values - 1, int(0.95 * num_values))),
        "max": at(num_values - 1),
    }


def _bins(counter: Counter[int]) -> list[tuple[int, int, int]]:
    """Counts in up to 40 bins of equal width: (first value, last value, count). The last bin takes the topmost 1 %."""
    if not counter:
        return []
    spread = np.array(sorted(counter), dtype=np.int64)
    ends = np.cumsum([counter[int(value)] for value in spread])
    low = int(spread[0])
    high = int(spread[np.searchsorted(ends, 0.99 * ends[-1])])
    width = max(1, -(-(high - low + 1) // 40))
    bins: Counter[int] = Counter()
    for value, count in counter.items():
        bins[min(value - low, high - low) // width] += count
    top = int(spread[-1])
    last = (high - low) // width
    return [
        (low + index * width, top if index == last else low + (index + 1) * width - 1, bins[index])
        for index in range(last + 1)
    ]


def _source_of(meta: dict[str, Any]) -> str:
    """Where a sample comes from: `origin`, or the place (without path) that `source` or `url` names."""
    origin = _text_of(meta, "origin", "source", "url")
    scheme, mark, rest = origin.partition("://")
    place = rest.partition("/")[0] if mark and scheme.isalnum() else origin
    return place.partition("@")[0].partition("?")[0][:80] or "unknown"


def _text_of(meta: dict[str, Any], *names: str) -> str:
    for name in names:
        value = meta.get(name)
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, str) and value:
            return value[:200].encode("utf-8", "replace").decode()
    return "unknown"
