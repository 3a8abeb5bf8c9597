"""The suites of public benchmarks: samples in exactly the layouts that the benchmarks' own scorers read.

Everything lies in STORAGE/evaluations/FINGERPRINT/BENCHMARK/FILE/layout/, FILE being the name of the prompt file. A
picture says in its own PNG what it was made from; one that is there and says the same isn't made again, and what an
earlier prompt file left is taken away, as a scorer counts whatever it finds. Generation has no score here: the scorer
gives it. A judge's scores are ours (see `benchmark_layouts.py` for its questions); with the published questions, or to
compare with published numbers, run the scorer on the layout. Multiple choice is scored by exact match.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
from PIL import Image

from nexusgen.config import Config
from nexusgen.errors import InputError, ModelError, SampleError
from nexusgen.images import decode_image, encode_picture
from nexusgen.model.manifest import Manifest
from nexusgen.model.weights import Model
from nexusgen.sampling import describe, edit_images, generate_images
from pipelines import judge, storage
from pipelines.benchmark_layouts import (
    LAYOUTS,
    METHOD,
    ROLLED,
    BenchmarkName,
    Item,
    Layout,
    find_letter,
    question_of,
    read_items,
    results_tsv,
)
from pipelines.sheets import Cell, draw_sheet, is_drawable
from pipelines.suites import ITEM_COLUMNS, Measures, Row, SuiteResult, Unit, cut, nested_scores, require_parts, to_png

SHEET_COLUMNS = 8
MAX_ANSWER_TOKENS = 32
PREVIEW_PX = 192  # longer side of a picture in a row; the picture itself is in the layout
QUESTIONS_AT_ONCE = 8  # to the judge
TEMPERATURES = (0.0, 0.5, 1.0)  # an answer without scores is asked for again
_TEXT, _BYTES = pa.string(), pa.binary()


class BenchmarkSuite(Config):
    """One public benchmark, from a file that the user gives.

    Picture k of prompt i is drawn from seed + i * pictures + k. A model without an editing decoder edits with its
    generation decoder.
    """

    name: ClassVar[str] = "benchmark"
    schema: ClassVar[pa.Schema] = pa.schema(
        [
            *ITEM_COLUMNS,
            *((name, _TEXT) for name in ("key", "prompt", "lang", "category")),
            ("path", _TEXT),  # of its first picture, below layout/
            ("num_pictures", pa.int32()),
            ("seed", pa.int64()),  # of the first
            ("expected", _TEXT),  # the right letter, or the explanation
            ("answer", _TEXT),  # of the model about a picture, or of the judge
            ("score", pa.float64()),  # 1 or 0 of an answer; of a judge on the benchmark's own scale
            ("unscored", pa.bool_()),  # the judge gave no scores: counted as its lowest
            *((name, _TEXT) for name in ("judge_model", "judge_fingerprint")),  # who answered
            ("png", _BYTES),  # a preview of the first picture, or of the one asked about
            ("source_png", _BYTES),  # edits only: of the picture before
        ]
    )

    benchmark: BenchmarkName
    storage: str
    prompts: str
    prompts_digest: str
    images: str | None
    seed: int
    steps: int | None
    num_pictures: int
    batch_size: int
    judge: str | None
    judge_model: str | None

    @property
    def path(self) -> str:
        """Each prompt file has its own results."""
        return f"{self.benchmark}/{_plain_name(Path(storage.name_of(self.prompts)).stem)}"

    @property
    def settings(self) -> dict[str, Any]:
        """All fields but the places; what the prompts are is told by their digest."""
        return self.model_dump(mode="json", exclude={"storage", "prompts", "images"})

    @property
    def layout(self) -> Layout:
        """How the benchmark is read and written."""
        return LAYOUTS[self.benchmark]

    def check(self, manifest: Manifest) -> None:
        """Raises: ModelError if the model lacks a part or draws no squares; InputError for a broken prompt file."""
        draws = self.layout.task != "understanding"
        require_parts(manifest, ("autoregressive", "generation_decoder", "vae") if draws else ("autoregressive",))
        items = self._items()
        height, width = manifest.image_size
        if len(items[0].files) < self.layout.pictures and draws and height != width:
            raise ModelError(
                f"the model draws {height}x{width} pixels; the scorer of {self.benchmark} cuts squares out of a grid"
            )

    def units(self) -> list[Unit]:
        """Batches of prompts, by the number of their pictures."""
        return cut(self.layout.task, len(self._items()), max(1, self.batch_size // self.layout.pictures))

    def worker(self, model: Model) -> Callable[[Unit], list[Row]]:
        """A function that draws, edits or answers what a unit says, and writes the pictures to the layout."""
        items = self._items()
        root = self._root(storage.join(self.storage, "evaluations", model.manifest.fingerprint, self.path))

        def work(unit: Unit) -> list[Row]:
            chosen = items[unit.first : unit.last]
            if self.layout.task == "understanding":
                return self._ask(model, chosen)
            return self._draw(model, chosen, unit.first, root)

        return work

    def finish(self, rows: Sequence[Row], folder: str) -> list[Row]:
        """Complete the layout in the suite's `folder`, once all rows are there, and have the judge score them.

        Raises: InputError or ResourceError if the judge refuses or is away; its answers so far are kept.
        """
        items, root = self._items(), self._root(folder)
        made: dict[str, bytes] = {}
        if self.layout.task == "understanding":
            name = f"{METHOD}_{Path(storage.name_of(self.prompts)).stem}.tsv"
            made[name] = results_tsv(items, [row["answer"] for row in rows])
        elif self.judge is not None:
            rows = self._judge(rows, items, folder)
            made = _records(self.benchmark, items, rows)
        for name, data in made.items():
            storage.write_bytes_atomic(storage.join(root, name), data)
        _tidy(root, {*made, *(name for item in items for name in _names(item))}, self.layout.files)
        return list(rows)

    def measures(self, rows: Sequence[Row]) -> Measures:
        """`overall` and by category, of rows with a score; GEdit's by language; MMBench's also of whole `circular`
        groups, all copies of a question right."""
        scored = [row for row in rows if row["score"] is not None]
        found: Measures = {}
        for lang in dict.fromkeys(row["lang"] for row in scored):
            of = [row for row in scored if row["lang"] == lang]
            prefix = f"{_plain_name(lang)}/" if lang else ""
            groups = _grouped(of, lambda row: _plain_name(row["category"]))
            found[f"{prefix}overall"] = list(groups.values()) if self.layout.by_category else [[r["score"] for r in of]]
            found |= {f"{prefix}{category}": [scores] for category, scores in groups.items() if category}
        if self.benchmark == "mmbench" and any(int(row["key"]) >= ROLLED for row in scored):
            turned = _grouped(scored, lambda row: str(int(row["key"]) % ROLLED))
            found["circular"] = [[min(scores) for scores in turned.values()]]
        return found

    def summarise(self, rows: Sequence[Row]) -> SuiteResult:
        """Scores as in `measures`, counts, and a sheet of the first prompts."""
        scores: dict[str, Any] = {"n": len(rows), **nested_scores(self.measures(rows))}
        if self.layout.task != "understanding":
            scores["num_pictures"] = sum(row["num_pictures"] for row in rows)
        if self.judge is not None:
            scores["unscored"] = sum(bool(row["unscored"]) for row in rows)
        cells = [_cell(row) for row in rows[: self.num_pictures]]
        return SuiteResult(scores, {"samples": draw_sheet(cells, SHEET_COLUMNS, f"{self.benchmark}, unpicked")})

    def _items(self) -> Sequence[Item]:
        return _cached_items(self.benchmark, self.prompts, self.images, self.prompts_digest)

    def _root(self, folder: str) -> str:
        return storage.join(folder, "layout")

    def _draw(self, model: Model, items: Sequence[Item], first: int, root: str) -> list[Row]:
        """Pictures of the items, those that the layout doesn't have yet, each written to its file."""
        sources = [_decode_source(item) for item in items]
        per_file = self.layout.pictures // len(items[0].files)
        files: list[tuple[int, str, dict[str, Any]]] = []  # (item, name, what it is made from)
        for number, item in enumerate(items):
            for place, name in enumerate(item.files):
                seed = self.seed + (first + number) * self.layout.pictures + place * per_file
                files.append((number, name, self._made(model, item, seed, sources[number])))
        pictures = {name: _kept(storage.join(root, name), made) for _, name, made in files}
        missing = [
            (number, made["seed"] + n) for number, name, made in files if not pictures[name] for n in range(per_file)
        ]
        drawn: list[Image.Image] = []
        for start in range(0, len(missing), self.batch_size):
            batch = missing[start : start + self.batch_size]
            prompts, seeds = [items[number].prompt for number, _ in batch], [seed for _, seed in batch]
            if self.layout.task == "generation":
                drawn += generate_images(model, prompts, seeds, self.steps)
            else:
                before = [_present(sources[number]) for number, _ in batch]
                drawn += edit_images(
                    model,
                    before,
                    prompts,
                    seeds,
                    self.steps,
                    decoder="generation" if model.editing_decoder is None else "editing",
                )
        for number, item in enumerate(items):
            source = sources[number]
            beside = dict(item.beside)
            if item.source_file is not None:
                beside[item.source_file] = to_png(_present(source))
            for name, data in beside.items():
                uri = storage.join(root, name)
                if not storage.exists(uri) or storage.read_bytes(uri) != data:
                    storage.write_bytes_atomic(uri, data)
        for _, name, made in files:
            if pictures[name] is None:
                parts, drawn = drawn[:per_file], drawn[per_file:]
                pictures[name] = _grid(parts)
                storage.write_bytes_atomic(storage.join(root, name), encode_picture(_present(pictures[name]), made))
        return [
            {
                **_EMPTY,
                "key": item.key,
                "prompt": item.prompt,
                "lang": item.lang,
                "category": item.category,
                "path": item.files[0],
                "num_pictures": self.layout.pictures,
                "seed": self.seed + (first + number) * self.layout.pictures,
                "expected": item.explanation or None,
                "png": _preview(_present(pictures[item.files[0]])),
                "source_png": source and _preview(source),
            }
            for number, (item, source) in enumerate(zip(items, sources, strict=True))
        ]

    def _made(self, model: Model, item: Item, seed: int, source: Image.Image | None) -> dict[str, Any]:
        """What a picture says of itself."""
        steps = self.steps if self.steps is not None else model.manifest.num_inference_steps
        made = {"fingerprint": model.manifest.fingerprint, "seed": seed, "steps": steps, "prompt": item.prompt}
        if source is not None:
            made["source"] = hashlib.sha256(source.tobytes()).hexdigest()
        return made

    def _ask(self, model: Model, items: Sequence[Item]) -> list[Row]:
        sources = [_present(_decode_source(item)) for item in items]
        answers = describe(model, sources, [question_of(item) for item in items], MAX_ANSWER_TOKENS)
        rows = []
        for item, source, answer in zip(items, sources, answers, strict=True):
            right = None if item.answer is None else float(find_letter(answer, item.options) == item.answer)
            known = {"key": item.key, "prompt": item.prompt, "lang": item.lang, "category": item.category}
            said = {"expected": item.answer, "answer": answer, "score": right, "png": _preview(source)}
            rows.append({**_EMPTY, **known, **said})
        return rows

    def _judge(self, rows: Sequence[Row], items: Sequence[Item], folder: str) -> list[Row]:
        """The rows with the judge's scores; its answers lie in folder/judge/, and aren't asked for again."""
        assert self.judge is not None
        assert self.judge_model is not None
        asked = judge.Judge(self.judge, self.judge_model)
        ask = functools.partial(_judge_row, asked, self.layout, folder, self._root(folder))
        judged: list[Row] = []
        with ThreadPoolExecutor(QUESTIONS_AT_ONCE) as threads:
            for row in threads.map(ask, rows, items):
                judged.append(row)
                if len(judged) % 50 == 0:
                    print(f"judge {self.path}: {len(judged)}/{len(rows)}", file=sys.stderr, flush=True)
        return judged


_EMPTY: Row = dict.fromkeys(name for name in BenchmarkSuite.schema.names if name not in ("kind", "index"))


@functools.lru_cache(maxsize=1)
def _cached_items(benchmark: BenchmarkName, prompts: str, images: str | None, digest: str) -> Sequence[Item]:
    return tuple(read_items(benchmark, prompts, images))


def judges_of(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Who answered as a judge, and how often: {"model", "system_fingerprint", "answers"}."""
    counts = Counter((row["judge_model"], row["judge_fingerprint"]) for row in rows if row.get("judge_model"))
    return [
        {"model": model, "system_fingerprint": fingerprint, "answers": number}
        for (model, fingerprint), number in counts.most_common()
    ]


# --- the layout -------------------------------------------------------------------------------------------------------


def _names(item: Item) -> list[str]:
    return [*item.files, *item.beside, *([item.source_file] if item.source_file else [])]


def _kept(uri: str, made: Mapping[str, Any]) -> Image.Image | None:
    """A picture of an earlier run, if it was made from the same."""
    if not storage.exists(uri):
        return None
    try:
        with Image.open(io.BytesIO(storage.read_bytes(uri))) as image:
            details = json.loads(image.info["nexusgen"])
            picture = image.convert("RGB")
    except (OSError, KeyError, ValueError, SyntaxError):  # PIL's errors among them: no picture of ours
        return None
    return picture if {name: details.get(name) for name in made} == made else None


def _grid(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures in rows of two; one alone is itself."""
    if len(pictures) == 1:
        return pictures[0]
    width, height = pictures[0].size
    grid = Image.new("RGB", (2 * width, -(-len(pictures) // 2) * height))
    for number, picture in enumerate(pictures):
        grid.paste(picture, (number % 2 * width, number // 2 * height))
    return grid


def _tidy(root: str, names: set[str], pattern: str) -> None:
    """Take away what a scorer would count beside `names`; what scorers have written themselves stays.

    Raises: InputError if one of `names` isn't there.
    """
    there = {uri.removeprefix(f"{root}/") for uri in storage.list_files(root, recursive=True)}
    if missing := sorted(names - there):
        raise InputError(
            f"{root} lacks {len(missing)} files, {missing[0]} among them, that an earlier run has written: "
            "delete the folder above it and start again"
        )
    for name in sorted(there - names, reverse=True):
        if not re.fullmatch(pattern, name):
            continue
        storage.delete(storage.join(root, name))
        if not storage.is_remote(root):
            top = storage.local_path(root)
            for folder in (top / name).parents[: name.count("/")]:
                if not any(folder.iterdir()):
                    folder.rmdir()


def _records(benchmark: BenchmarkName, items: Sequence[Item], rows: Sequence[Row]) -> dict[str, bytes]:
    """A judge's answers in the files that the benchmark's own steps to come read.

    WISE's Calculate.py reads what gpt_eval.py (117c25e) writes; ImgEdit's step1_get_avgscore.py (c14480a) reads lines
    that end in a colon and a number. GEdit's statistics are what `measures` gives.
    """
    if benchmark == "imgedit":
        answers = {item.key: row["answer"] for item, row in zip(items, rows, strict=True)}
        return {"result.json": json.dumps(answers, indent=4, ensure_ascii=False).encode()}
    if benchmark != "wise":
        return {}
    rubric = LAYOUTS["wise"].rubric
    assert rubric is not None
    lines, full = [], []
    for item, row in zip(items, rows, strict=True):
        found = judge.find_scores(row["answer"], rubric.criteria, rubric.lowest, rubric.highest)
        numbers = found if found is not None else [999.0] * len(rubric.criteria)  # how gpt_eval.py marks it
        scores = {name.lower().replace(" ", "_"): n for name, n in zip(rubric.criteria, numbers, strict=True)}
        known = {"prompt_id": int(item.key), "Subcategory": item.columns["Subcategory"]}
        lines.append(json.dumps({**known, **scores}, ensure_ascii=False) + "\n")
        full.append(
            {
                "prompt_id": int(item.key),
                "prompt": item.prompt,
                "key": item.explanation,
                "image_path": item.files[0],
                "evaluation": row["answer"],
            }
        )
    return {
        "scores_results.jsonl": "".join(lines).encode(),
        "full_results.json": json.dumps(full, indent=2, ensure_ascii=False).encode(),
    }


# --- pictures and answers ---------------------------------------------------------------------------------------------


def _decode_source(item: Item) -> Image.Image | None:
    if item.source is None:
        return None
    try:
        return decode_image(item.source())
    except SampleError as error:
        raise InputError(f"{item.where}: the picture can't be used: {error}") from None


def _present(picture: Image.Image | None) -> Image.Image:
    assert picture is not None
    return picture


def _preview(picture: Image.Image) -> bytes:
    small = picture.convert("RGB")
    small.thumbnail((PREVIEW_PX, PREVIEW_PX))
    return to_png(small)


def _judge_row(asked: judge.Judge, layout: Layout, folder: str, root: str, row: Row, item: Item) -> Row:
    """A row with the judge's scores, asked for or found from before."""
    rubric = layout.rubric
    assert rubric is not None
    pictures = [storage.read_bytes(storage.join(root, item.files[0]))]
    task = f"The picture was drawn from this prompt: {item.prompt}"
    if item.source is not None:
        pictures.insert(0, item.source())
        task = f"The second picture is the first one, edited by this instruction: {item.prompt}"
    if item.explanation:
        task += f"\nWhat it should show: {item.explanation}"
    question = judge.write_question(task, rubric.criteria, rubric.lowest, rubric.highest)
    digest = asked.digest(question, pictures)
    uri = storage.join(folder, "judge", f"{row['index']:06}.json")
    said = storage.find_json(uri)
    if said is None or said.get("digest") != digest:
        for temperature in TEMPERATURES:
            verdict = asked.ask(question, pictures, temperature)
            if judge.find_scores(verdict.text, rubric.criteria, rubric.lowest, rubric.highest) is not None:
                break
        said = {
            "digest": digest,
            "answer": verdict.text,
            "model": verdict.model,
            "system_fingerprint": verdict.system_fingerprint,
        }
        storage.write_json(uri, said)
    scores = judge.find_scores(said["answer"], rubric.criteria, rubric.lowest, rubric.highest)
    return {
        **row,
        "answer": said["answer"],
        "score": float(rubric.combine(scores or [float(rubric.lowest)] * len(rubric.criteria))),
        "unscored": scores is None,
        "judge_model": said["model"],
        "judge_fingerprint": said["system_fingerprint"],
    }


def _grouped(rows: Iterable[Row], name_of: Callable[[Row], str]) -> dict[str, list[float]]:
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(name_of(row), []).append(row["score"])
    return groups


def _plain_name(text: str) -> str:
    """A text as a part of a metric's name or of a path."""
    return re.sub(r"[^\w.-]", "_", text.strip())


def _cell(row: Row) -> Cell:
    text = row["prompt"] if is_drawable(row["prompt"]) else row["key"]
    shown = [row[name] for name in ("source_png", "png") if row[name] is not None]
    passed = None if row["score"] is None or row["judge_model"] else row["score"] == 1
    return Cell(tuple(Image.open(io.BytesIO(data)) for data in shown), text, passed)
