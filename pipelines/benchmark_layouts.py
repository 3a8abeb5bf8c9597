"""Public benchmarks: what their prompt files look like, and under which names their own scorers look for pictures.

Facts read in the scorers themselves; nothing of theirs is copied. What a scorer would stumble over later is refused
here, by file, line, field, value found and value wanted.

| benchmark | prompts | pictures | what its scorer reads |
|---|---|---|---|
| geneval [1] | jsonl: tag, prompt, include, exclude | 4 | NNNNN/metadata.jsonl and NNNNN/samples/NNNN.png |
| dpg_bench [2] | a folder of ID.txt, or jsonl: id, prompt | 4 | ID.png: squares of one size, in rows of two |
| t2i_compbench [3] | CATEGORY_val.txt, or jsonl: category, prompt | 10 | CATEGORY/samples/PROMPT_NNNNNN.png |
| wise [4] | json: a list of Prompt, Explanation, Category, Subcategory, prompt_id | 1 | PROMPT_ID.png |
| imgedit [5] | json: KEY -> id (a picture's path), prompt, edit_type (Basic) | 1 | KEY.png |
| gedit [6] | Parquet of its data set | 1 | METHOD/fullset/TASK/LANGUAGE/KEY.png and KEY_SRCIMG.png |
| mmbench [7] | tsv: index, image (base64), question, hint, A, B, ..., answer, category | | MODEL_DATASET.tsv |

[1] djghosh13/geneval 16f1681, evaluation/evaluate_images.py: folders of digits, one json object in each metadata.jsonl,
    pictures named by digits.
[2] TencentQQGYLab/ELLA 025f650, dpg_bench/compute_dpg_bench.py: every file of the folder; what comes before the first
    dot of its name is the id; squares of --resolution are cut out left to right, top to bottom.
[3] Karine-Huang/T2I-CompBench 34134bd, BLIPvqa_eval/BLIP_vqa.py, UniDet_eval (7710d05), 3_in_1_eval (13c0bbc): each
    category is scored on its own; the prompt is what comes before the first `_` of a name, its number what follows;
    ten pictures of each prompt stand one after another.
[4] PKU-YuanGroup/WISE 117c25e, gpt_eval.py.
[5] PKU-YuanGroup/ImgEdit c14480a, Benchmark/Basic/basic_bench.py and Benchmark/UGE/UGE_bench.py.
[6] stepfun-ai/Step1X-Edit e78b811, GEdit-Bench/generate_image_example.py; test_gedit_score.py in the copy
    svjack/Step1X-Edit eda7f42.
[7] open-compass/VLMEvalKit: vlmeval/dataset/image_mcq.py (01424f9), utils/multiple_choice.py (028a6e7), smp/file.py
    (00fff54) with PRED_FORMAT=tsv. A row whose index is 1,000,000 k + i holds question i with its options turned.
"""

from __future__ import annotations

import base64
import binascii
import csv
import functools
import hashlib
import io
import json
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from nexusgen.errors import InputError
from pipelines import storage

BenchmarkName = Literal["geneval", "dpg_bench", "t2i_compbench", "wise", "imgedit", "gedit", "mmbench"]
Task = Literal["generation", "editing", "understanding"]
METHOD = "nexusgen"  # what scorers that ask for a model's name call us
ROLLED = 1_000_000  # an MMBench question's turned copies are this far apart
_MAX_NAME_BYTES = 255  # of a file's name on common file systems
_MAX_REFERENCE = 64  # an MMBench picture shorter than this is another row's index
_BETWEEN = re.compile(r"[\s,:]*")


@dataclass(frozen=True)
class Item:
    """One prompt, edit or question of a benchmark; paths are relative to the root of its layout."""

    where: str  # file and line, for messages
    key: str  # the benchmark's own name for it
    prompt: str
    files: tuple[str, ...] = ()  # of its pictures, in order
    category: str = ""
    lang: str | None = None  # of benchmarks that tell languages apart
    beside: Mapping[str, bytes] = field(default_factory=dict)  # other files that its scorer reads, and their contents
    source: Callable[[], bytes] | None = None  # the picture to edit or to ask about, compressed
    source_file: str | None = None  # where its scorer wants that picture, as PNG
    explanation: str = ""  # what the picture should show
    options: Mapping[str, str] = field(default_factory=dict)  # by letter
    answer: str | None = None  # the right letter, if it is known
    columns: Mapping[str, str] = field(default_factory=dict)  # its row as it came, without the picture


@dataclass(frozen=True)
class Rubric:
    """What a judge is asked: a whole number for each criterion, and what becomes of them."""

    criteria: Mapping[str, str]  # name -> what it says
    lowest: int
    highest: int
    combine: Callable[[Sequence[float]], float]


@dataclass(frozen=True)
class Layout:
    """How a benchmark is read, and what of each prompt is made."""

    task: Task
    prompts: str  # what the user's file is called in the benchmark's repository
    read: Callable[[str, str | None], list[Item]]  # (prompts, folder of the pictures to edit)
    files: str  # a pattern of what its scorer takes for ours: nothing that fits it may be left from other prompts
    pictures: int = 1  # of each prompt
    needs_images: bool = False  # the pictures to edit lie in a folder of their own
    rubric: Rubric | None = None  # None: a judge isn't how this benchmark is scored
    by_category: bool = False  # its overall score is the mean of its categories


def digest_prompts(uri: str) -> str:
    """SHA-256 of the prompt file, or of all files of a folder. Raises: InputError if there is none."""
    return hashlib.sha256(b"".join(storage.read_bytes(file) for file in _files(uri))).hexdigest()


def find_letter(answer: str, options: Mapping[str, str]) -> str | None:
    """The option that an answer names, by its letter or its whole text; None if that isn't clear."""
    text = answer.strip()
    named = [letter for letter, option in options.items() if _plain(option) == _plain(text)]
    if len(named) == 1:
        return named[0]
    leading = re.match(r"[(（]?([A-Z])(?:[)）.:：,，。、]|$)", text)
    if leading and leading[1] in options:
        return leading[1]
    # "A dog" begins with an article.
    alone = re.findall(r"(?<![A-Za-z'])(?!A (?!or |and )[a-z])([A-Z])(?![A-Za-z'])", text)
    found = {letter for letter in alone if letter in options}
    return found.pop() if len(found) == 1 else None


def question_of(item: Item) -> str:
    """A question with its options, as the model is asked it."""
    hint = item.columns.get("hint", "")
    lines = [f"Hint: {hint}"] if hint else []
    lines += [item.prompt, *(f"{letter}. {option}" for letter, option in item.options.items())]
    is_chinese = any("\u4e00" <= character <= "\u9fff" for character in item.prompt)
    return "\n".join([*lines, "只回答选项的字母。" if is_chinese else "Answer with the letter of the right option."])


def results_tsv(items: Sequence[Item], answers: Sequence[str]) -> bytes:
    """Rows of an MMBench file with the model's answers as `prediction`, without the pictures."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerow([*items[0].columns, "prediction"])
    writer.writerows([*item.columns.values(), answer] for item, answer in zip(items, answers, strict=True))
    return buffer.getvalue().encode()


# --- the files of the benchmarks --------------------------------------------------------------------------------------


def _read_geneval(uri: str, images: str | None) -> list[Item]:
    items = []
    for number, (where, row) in enumerate(_json_lines(uri)):
        _check_objects(where, row, "include", required=True)
        _check_objects(where, row, "exclude", required=False)
        folder = f"{number:05}"
        items.append(
            Item(
                where,
                folder,
                _text(where, row, "prompt"),
                tuple(f"{folder}/samples/{picture:04}.png" for picture in range(LAYOUTS["geneval"].pictures)),
                _text(where, row, "tag"),
                beside={f"{folder}/metadata.jsonl": json.dumps(row).encode() + b"\n"},
            )
        )
    return items


def _check_objects(where: str, row: Mapping[str, Any], name: str, required: bool) -> None:
    """GenEval's lists of objects: class and count, at will color, and position relative to one before it."""
    objects = row.get(name, None if required else [])
    if not isinstance(objects, list) or (required and not objects):
        _refuse(where, name, objects, "a list of objects with class and count")
    for number, one in enumerate(objects):
        inside = f"{name}[{number}]"
        if not isinstance(one, dict):
            _refuse(where, inside, one, "an object with class and count")
        if not isinstance(one.get("class"), str):
            _refuse(where, f"{inside}.class", one.get("class"), "the name of a kind of object")
        if type(one.get("count")) is not int or one["count"] < 1:
            _refuse(where, f"{inside}.count", one.get("count"), "a whole number of at least 1")
        if not isinstance(one.get("color", ""), str):
            _refuse(where, f"{inside}.color", one["color"], "the name of a colour")
        match one.get("position", ["", -1]):
            case [str(), int(target)] if target < number:
                pass
            case found:
                _refuse(
                    where, f"{inside}.position", found, 'such as ["left of", 0], with the number of an object before it'
                )


def _read_dpg(uri: str, images: str | None) -> list[Item]:
    if storage.is_folder(uri):
        rows = [
            (file, {"id": storage.name_of(file)[: -len(".txt")], "prompt": _read_text(file).strip()})
            for file in _files(uri)
            if file.endswith(".txt")
        ]
    else:
        rows = list(_json_lines(uri))
    items = []
    for where, row in rows:
        key = _file_name(where, row, "id")
        if "." in key:
            _refuse(where, "id", key, "a name without a dot: the scorer takes what comes before the first one")
        items.append(Item(where, key, _text(where, row, "prompt"), (f"{key}.png",)))
    return items


def _read_t2i_compbench(uri: str, images: str | None) -> list[Item]:
    if uri.endswith(".txt"):
        category = storage.name_of(uri)[: -len(".txt")].removesuffix("_val").removesuffix("_train")
        lines = enumerate(_read_text(uri).splitlines(), 1)
        rows = [
            (f"{uri}, line {line}", {"category": category, "prompt": text.split("\t")[0]})
            for line, text in lines
            if text.strip()
        ]
    else:
        rows = list(_json_lines(uri))
    counts: dict[str, int] = {}
    items = []
    for where, row in rows:
        prompt, category = _text(where, row, "prompt"), _file_name(where, row, "category")
        num_bytes = len(f"{prompt}_000000.png".encode())
        if "_" in prompt or "/" in prompt or num_bytes > _MAX_NAME_BYTES:
            wanted = f"a text without _ and / that leaves its file a name of at most {_MAX_NAME_BYTES} bytes"
            _refuse(where, "prompt", prompt, f"{wanted}, as the scorer reads prompts from names")
        number = counts.get(category, 0)
        counts[category] = number + 1
        pictures = LAYOUTS["t2i_compbench"].pictures
        numbers = range(number * pictures, (number + 1) * pictures)
        files = tuple(f"{category}/samples/{prompt}_{picture:06}.png" for picture in numbers)
        items.append(Item(where, f"{category}/{number}", prompt, files, category))
    return items


def _read_wise(uri: str, images: str | None) -> list[Item]:
    items = []
    for where, _, row in _json_entries(uri, "a list"):
        if type(row.get("prompt_id")) is not int:
            _refuse(where, "prompt_id", row.get("prompt_id"), "a whole number")
        key = str(row["prompt_id"])
        columns = {name: _text(where, row, name) for name in ("Category", "Subcategory")}
        items.append(
            Item(
                where,
                key,
                _text(where, row, "Prompt"),
                (f"{key}.png",),
                columns["Category"],
                explanation=_text(where, row, "Explanation"),
                columns=columns,
            )
        )
    return items


def _read_imgedit(uri: str, images: str | None) -> list[Item]:
    assert images is not None
    there = set(storage.list_files(images, recursive=True))
    items = []
    for where, key, row in _json_entries(uri, "an object"):
        _file_name(where, {"the key": key}, "the key")
        name = _text(where, row, "id")
        path = PurePosixPath(name)
        source = storage.join(images, str(path))
        if path.is_absolute() or ".." in path.parts or source not in there:
            _refuse(where, "id", name, f"the path of a picture below images={images}")
        category = _text(where, row, "edit_type") if "edit_type" in row else ""  # the part named UGE has none
        read = functools.partial(storage.read_bytes, source)
        items.append(Item(where, key, _text(where, row, "prompt"), (f"{key}.png",), category, source=read))
    return items


def _read_gedit(uri: str, images: str | None) -> list[Item]:
    wanted = ("key", "task_type", "instruction", "instruction_language")
    items = []
    for file in (file for file in _files(uri) if file.endswith(".parquet")):
        parquet = _open_parquet(file)
        missing = [name for name in (*wanted, "input_image") if name not in parquet.schema_arrow.names]
        if missing:
            raise InputError(f"{file}: no column {', '.join(missing)}; it has {', '.join(parquet.schema_arrow.names)}")
        for number, row in enumerate(parquet.read(list(wanted)).to_pylist()):
            where = f"{file}, row {number}"
            key, task, lang = (_file_name(where, row, name) for name in ("key", "task_type", "instruction_language"))
            path = f"{METHOD}/fullset/{task}/{lang}/{key}"
            items.append(
                Item(
                    where,
                    key,
                    _text(where, row, "instruction"),
                    (f"{path}.png",),
                    task,
                    lang,
                    source=functools.partial(_read_cell, file, number),
                    source_file=f"{path}_SRCIMG.png",
                )
            )
    return items


def _read_mmbench(uri: str, images: str | None) -> list[Item]:
    csv.field_size_limit(1 << 30)  # pictures stand in cells
    reader = csv.reader(io.StringIO(_read_text(uri)), delimiter="\t")
    header = next(reader, [])
    missing = [name for name in ("index", "image", "question", "A", "B") if name not in header]
    if missing:
        raise InputError(f"{uri}, line 1: no column {', '.join(missing)}; it has {', '.join(header)[:200] or 'none'}")
    rows, line = [], reader.line_num + 1
    for cells in reader:
        where, line = f"{uri}, line {line}", reader.line_num + 1
        if len(cells) != len(header):
            raise InputError(f"{where}: {len(cells)} cells; wanted {len(header)}, as in the first line")
        row = dict(zip(header, cells, strict=True))
        if not row["index"].isdecimal():
            _refuse(where, "index", row["index"], "a whole number")
        rows.append((where, row))
    pictures = {row["index"]: row["image"] for _, row in rows if len(row["image"]) > _MAX_REFERENCE}
    items = []
    for where, row in rows:
        picture = row["image"] if len(row["image"]) > _MAX_REFERENCE else pictures.get(row["image"], "")
        if not picture or not _is_base64(picture):
            _refuse(where, "image", row["image"], "a picture as base64, or the index of a row that has one")
        options = {letter: row[letter] for letter in string.ascii_uppercase if row.get(letter)}
        if len(options) < 2:
            _refuse(where, "A, B, ...", ", ".join(options), "at least two options")
        answer = row.get("answer") or None
        if answer is not None and answer not in options:
            _refuse(where, "answer", answer, f"one of {', '.join(options)}, or nothing")
        items.append(
            Item(
                where,
                row["index"],
                _text(where, row, "question"),
                category=row.get("category", ""),
                source=functools.partial(base64.b64decode, picture),
                options=options,
                answer=answer,
                columns={name: cell for name, cell in row.items() if name != "image"},
            )
        )
    return items


# --- what the readers share -------------------------------------------------------------------------------------------


def read_items(benchmark: BenchmarkName, uri: str, images: str | None = None) -> list[Item]:
    """All items of a benchmark's file, in order; `images` is the folder that ImgEdit's paths start from.

    Raises: InputError for a file or row that can't be used; ResourceError if no store answers.
    """
    if not storage.exists(uri):
        raise InputError(f"prompts={uri}: there is no such file; wanted {LAYOUTS[benchmark].prompts}")
    items = LAYOUTS[benchmark].read(uri, images)
    if not items:
        raise InputError(f"prompts={uri} holds no prompts; wanted {LAYOUTS[benchmark].prompts}")
    seen: dict[tuple[str, ...], str] = {}
    for item in items:
        first = seen.setdefault(item.files or (item.key,), item.where)
        if first != item.where:
            raise InputError(f"{item.where}: {item.key!r} comes again; it stands at {first}: leave one of them out")
    return items


def _files(uri: str) -> list[str]:
    return storage.list_files(uri) if storage.is_folder(uri) else [uri]


def _read_text(uri: str) -> str:
    try:
        return storage.read_bytes(uri).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{uri}: byte {error.start} isn't UTF-8; save the file as UTF-8 text") from None


def _json_lines(uri: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of each line that isn't empty."""
    for number, line in enumerate(_read_text(uri).split("\n"), 1):
        if line.strip():
            where = f"{uri}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{where}: not JSON ({error}); wanted one object a line") from None
            yield where, _as_object(where, row)


def _json_entries(uri: str, wanted: Literal["a list", "an object"]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(place, key, object) of each entry of one list, whose keys are empty, or one object."""
    text = _read_text(uri)
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{uri}, line {error.lineno}: not JSON ({error.msg}); wanted {wanted}") from None
    if not isinstance(whole, list if wanted == "a list" else dict):
        raise InputError(f"{uri}: holds a {type(whole).__name__}; wanted {wanted}")
    # Once more, now that it is known to be whole, for the lines: the parser doesn't tell them.
    decoder = json.JSONDecoder()
    position, line = text.index("[" if wanted == "a list" else "{") + 1, 1
    counted, key = 0, ""
    while text[position := _skip(text, position)] not in "]}":
        line, counted = line + text.count("\n", counted, position), position
        if wanted == "an object":
            key, position = decoder.raw_decode(text, position)
            position = _skip(text, position)
        row, position = decoder.raw_decode(text, position)
        where = f"{uri}, line {line}"
        yield where, key, _as_object(where, row)


def _skip(text: str, position: int) -> int:
    found = _BETWEEN.match(text, position)
    assert found is not None
    return found.end()


def _as_object(where: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InputError(f"{where}: {_short(row)}; wanted an object")
    return row


def _text(where: str, row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        _refuse(where, name, value, "a text")
    return value


def _file_name(where: str, row: Mapping[str, Any], name: str) -> str:
    """A field that becomes part of a file's name."""
    value = _text(where, row, name)
    if re.search(r"[/\\\0\n]", value) or value.startswith(".") or len(value.encode()) > _MAX_NAME_BYTES - 20:
        _refuse(where, name, value, "what a file can be called: no slash, no dot in front, not too long")
    return value


def _refuse(where: str, name: str, found: Any, wanted: str) -> NoReturn:
    is_missing = "is missing" if found is None else f"is {_short(found)}"
    raise InputError(f"{where}: field {name!r} {is_missing}; wanted {wanted}")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _plain(text: str) -> str:
    return text.strip().strip(".。").casefold()


def _is_base64(text: str) -> bool:
    try:
        base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return False
    return True


def _open_parquet(uri: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(storage.open_random(uri))
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{uri}: not a Parquet file ({error})") from None


def _read_cell(uri: str, number: int) -> bytes:
    """The picture of a row of GEdit's Parquet."""
    first = 0
    metadata = _open_parquet(uri).metadata
    for group in range(metadata.num_row_groups):
        if number < first + metadata.row_group(group).num_rows:
            cell = _read_group(uri, group)[number - first]
            data = cell.get("bytes") if isinstance(cell, dict) else cell
            if not data:
                _refuse(f"{uri}, row {number}", "input_image", None, "a picture's bytes")
            return bytes(data)
        first += metadata.row_group(group).num_rows
    raise IndexError(number)


@functools.lru_cache(maxsize=1)  # rows are read in order, and a group holds a hundred pictures
def _read_group(uri: str, group: int) -> list[Any]:
    cells: list[Any] = _open_parquet(uri).read_row_group(group, ["input_image"])["input_image"].to_pylist()
    return cells


# --- the table --------------------------------------------------------------------------------------------------------

# The criteria and their weights are the benchmarks' (WISE README 0382b25; ImgEdit basic_bench_readme.md 3760afd; GEdit
# calculate_statistics.py eda7f42), the words ours.
_WISE = Rubric(
    {
        "Consistency": "does it show what the prompt means, as the explanation tells",
        "Realism": "could it be real: bodies, light, materials, space",
        "Aesthetic Quality": "is it well composed and good to look at",
    },
    0,
    2,
    lambda scores: (7 * scores[0] + 2 * scores[1] + scores[2]) / 20,
)
_IMGEDIT = Rubric(
    {
        "Compliance": "is the instruction carried out, and nothing else",
        "Seamlessness": "does the change look natural, without traces",
        "Fidelity": "is everything that wasn't to change as it was, and physically right",
    },
    1,
    5,
    lambda scores: sum(scores) / len(scores),
)
_GEDIT = Rubric(
    {
        "Semantics": "is the instruction carried out, and the rest kept",
        "Quality": "does the picture look natural, without artefacts",
    },
    0,
    10,
    lambda scores: float((scores[0] * scores[1]) ** 0.5),
)

LAYOUTS: Mapping[BenchmarkName, Layout] = {
    "geneval": Layout(
        "generation",
        "evaluation_metadata.jsonl",
        _read_geneval,
        r"\d+/(metadata\.jsonl|samples/\d+\.png)",
        pictures=4,
    ),
    "dpg_bench": Layout(
        "generation", "the folder of its prompts, or jsonl of id and prompt", _read_dpg, r"[^/]+\.png", pictures=4
    ),
    "t2i_compbench": Layout(
        "generation",
        "CATEGORY_val.txt, or jsonl of category and prompt",
        _read_t2i_compbench,
        r"[^/]+/samples/[^/]+",
        pictures=10,
    ),
    "wise": Layout(
        "generation", "cultural_common_sense.json or one of its others", _read_wise, r"\d+\.png", rubric=_WISE
    ),
    "imgedit": Layout(
        "editing",
        "basic_edit.json or UGE_edit.json",
        _read_imgedit,
        r"[^/]+\.png",
        needs_images=True,
        rubric=_IMGEDIT,
    ),
    "gedit": Layout(
        "editing",
        "its Parquet, a file or a folder",
        _read_gedit,
        rf"{METHOD}/fullset/.+\.png",
        rubric=_GEDIT,
        by_category=True,
    ),
    "mmbench": Layout(
        "understanding", "MMBench_DEV_EN.tsv or another of its kind", _read_mmbench, rf"{METHOD}_.+\.tsv"
    ),
}
