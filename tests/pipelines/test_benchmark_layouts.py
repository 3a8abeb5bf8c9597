"""What is told of a benchmark's file that its scorer would stumble over, and how answers are read."""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from api_server import picture

from nexusgen.errors import InputError
from pipelines.benchmark_layouts import BenchmarkName, find_letter, question_of, read_items

GENEVAL = {"tag": "counting", "include": [{"class": "bench", "count": 2}], "prompt": "two benches"}
POSITION = {"class": "dog", "count": 1, "position": ["left of", 0]}
WISE = {"Prompt": "Newton's fruit", "Explanation": "An apple", "Category": "Science", "Subcategory": "Physics"}
EDIT = {"id": "animal/1.png", "prompt": "Make it blue.", "edit_type": "adjust"}
QUESTION = {"index": "3", "question": "What is it?", "A": "a cat", "B": "a dog", "answer": "B", "hint": ""}


def lines(*rows: Any) -> str:
    return "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)


def tsv(rows: Sequence[dict[str, str]], path: Path) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return path


def encoded(colour: str) -> str:
    return base64.b64encode(picture(colour)).decode()


@pytest.mark.parametrize(
    ("benchmark", "name", "content", "told"),
    [
        ("geneval", "g.jsonl", lines(GENEVAL, "{"), r"g\.jsonl, line 2: not JSON"),
        ("geneval", "g.jsonl", lines(GENEVAL, [1]), r"g\.jsonl, line 2: \[1\]; wanted an object"),
        ("geneval", "g.jsonl", "\n" + lines({**GENEVAL, "tag": 3}), r"line 2: field 'tag' is 3; wanted a text"),
        (
            "geneval",
            "g.jsonl",
            lines({"tag": "colors", "include": []}),
            r"line 1: field 'include' is \[\]; wanted a list",
        ),
        (
            "geneval",
            "g.jsonl",
            lines({**GENEVAL, "include": [{"class": "bench", "count": "2"}]}),
            r"line 1: field 'include\[0\]\.count' is \"2\"; wanted a whole number of at least 1",
        ),
        (
            "geneval",
            "g.jsonl",
            lines({**GENEVAL, "include": [POSITION]}),
            r"'include\[0\]\.position' is \[\"left of\", 0\]; wanted such as \[\"left of\", 0\], with the number of an",
        ),
        ("dpg_bench", "d.jsonl", lines({"prompt": "a"}), "line 1: field 'id' is missing; wanted a text"),
        ("dpg_bench", "d.jsonl", lines({"id": "a.1", "prompt": "a"}), "'id' is \"a.1\"; wanted a name without a dot"),
        ("dpg_bench", "d.jsonl", lines({"id": "../a", "prompt": "a"}), "wanted what a file can be called"),
        (
            "dpg_bench",
            "d.jsonl",
            lines(*[{"id": "a", "prompt": "a"}] * 2),
            "line 2: 'a' comes again; it stands at .* line 1",
        ),
        ("dpg_bench", "d.jsonl", "", r"d\.jsonl holds no prompts; wanted the folder of its prompts"),
        ("t2i_compbench", "t.jsonl", lines({"prompt": "a_b", "category": "c"}), "without _ and /"),
        ("t2i_compbench", "t_val.txt", "a red bench\n" + "long " * 60, "line 2: field 'prompt' .* at most 255 bytes"),
        (
            "wise",
            "w.json",
            "[\n" + json.dumps(WISE) + "]",
            "line 2: field 'prompt_id' is missing; wanted a whole number",
        ),
        ("wise", "w.json", '[\n{"prompt_id": 1}]', "line 2: field 'Category' is missing; wanted a text"),
        ("wise", "w.json", "[\n\n{]", r"w\.json, line 3: not JSON"),
        ("wise", "w.json", "{}", "holds a dict; wanted a list"),
        (
            "imgedit",
            "i.json",
            json.dumps({"7": EDIT, "8": {**EDIT, "id": "no.png"}}, indent=1),
            "line 7: field 'id' is \"no",
        ),
        (
            "imgedit",
            "i.json",
            json.dumps({"7": {**EDIT, "id": "../1.png"}}),
            "wanted the path of a picture below images=",
        ),
        ("imgedit", "i.json", '{"7": 1,\n"a/b": 2}', "line 1: 1; wanted an object"),
        ("mmbench", "m.tsv", "index\tquestion\n", "line 1: no column image, A, B; it has index, question"),
        ("mmbench", "m.tsv", "index\timage\tquestion\tA\tB\n1\t2\n", "line 2: 2 cells; wanted 5"),
        (
            "mmbench",
            "m.tsv",
            "index\timage\tquestion\tA\tB\nx\t\t\t\t\n",
            "line 2: field 'index' is \"x\"; wanted a whole",
        ),
        (
            "mmbench",
            "m.tsv",
            "index\timage\tquestion\tA\tB\n1\t9\tq\ta\tb\n",
            "'image' is \"9\"; wanted a picture as base64",
        ),
        ("mmbench", "m.tsv", b"\xff\xfe", "byte 0 isn't UTF-8"),
        ("gedit", "p.parquet", "no parquet", "not a Parquet file"),
    ],
)
def test_a_broken_row_is_told_by_file_line_and_field(
    tmp_path: Path, benchmark: BenchmarkName, name: str, content: str | bytes, told: str
) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    images = tmp_path / "images"
    (images / "animal").mkdir(parents=True)
    (images / "animal" / "1.png").write_bytes(picture())
    with pytest.raises(InputError, match=told) as caught:
        read_items(benchmark, str(tmp_path / name), str(images))
    assert name in str(caught.value)


def test_a_question_without_its_right_option_is_refused(tmp_path: Path) -> None:
    path = tsv([{**QUESTION, "image": encoded("red"), "answer": "C"}], tmp_path / "m.tsv")
    with pytest.raises(InputError, match="line 2: field 'answer' is \"C\"; wanted one of A, B, or nothing"):
        read_items("mmbench", str(path))


def test_geneval_keeps_each_row_as_it_came(tmp_path: Path) -> None:
    row = {**GENEVAL, "include": [*GENEVAL["include"], POSITION], "exclude": [{"class": "bench", "count": 3}]}
    (tmp_path / "g.jsonl").write_text(lines(GENEVAL, "", row))
    _, second = read_items("geneval", str(tmp_path / "g.jsonl"))
    assert second.files == tuple(f"00001/samples/{number:04}.png" for number in range(4))
    assert json.loads(second.beside["00001/metadata.jsonl"]) == row


def test_prompts_of_dpg_bench_may_lie_in_a_folder(tmp_path: Path) -> None:
    for name, text in (("0.txt", "a bench\n"), ("partiprompts1.txt", "a tree"), ("readme.md", "not one")):
        (tmp_path / name).write_text(text)
    items = read_items("dpg_bench", str(tmp_path))
    assert [(item.key, item.prompt, item.files) for item in items] == [
        ("0", "a bench", ("0.png",)),
        ("partiprompts1", "a tree", ("partiprompts1.png",)),
    ]


def test_pictures_of_t2i_compbench_are_numbered_by_category(tmp_path: Path) -> None:
    (tmp_path / "color_val.txt").write_text("a red bench\tseen\na blue tree.\n")
    items = read_items("t2i_compbench", str(tmp_path / "color_val.txt"))
    assert [item.files[0] for item in items] == [
        "color/samples/a red bench_000000.png",
        "color/samples/a blue tree._000010.png",
    ]
    (tmp_path / "all.jsonl").write_text(
        lines(*({"prompt": f"a {n}", "category": "c" if n % 2 else "d"} for n in range(4)))
    )
    assert [item.files[-1] for item in read_items("t2i_compbench", str(tmp_path / "all.jsonl"))] == [
        "d/samples/a 0_000009.png",
        "c/samples/a 1_000009.png",
        "d/samples/a 2_000019.png",
        "c/samples/a 3_000019.png",
    ]


def test_gedit_reads_pictures_of_any_row_group(tmp_path: Path) -> None:
    rows = [
        {
            "key": f"k{n}",
            "task_type": "ps_human",
            "instruction": "Smile.",
            "instruction_language": "en",
            "input_image": {"bytes": str(n).encode(), "path": None},
        }
        for n in range(5)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train-0.parquet", row_group_size=2)
    items = read_items("gedit", str(tmp_path))
    assert [item.source and item.source() for item in items] == [b"0", b"1", b"2", b"3", b"4"]
    assert items[4].files == ("nexusgen/fullset/ps_human/en/k4.png",)
    pq.write_table(pa.Table.from_pylist(rows).drop(["task_type"]), tmp_path / "train-0.parquet")
    with pytest.raises(InputError, match=r"train-0\.parquet: no column task_type; it has key"):
        read_items("gedit", str(tmp_path))


def test_a_turned_question_takes_the_picture_of_its_first_row(tmp_path: Path) -> None:
    rows = [{**QUESTION, "image": encoded("red")}, {**QUESTION, "index": "1000003", "image": "3", "hint": "Look."}]
    first, second = read_items("mmbench", str(tsv(rows, tmp_path / "m.tsv")))
    assert first.source is not None
    assert second.source is not None
    assert first.source() == second.source() == picture("red")
    assert question_of(second).splitlines()[:4] == ["Hint: Look.", "What is it?", "A. a cat", "B. a dog"]
    assert "image" not in second.columns


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B) a dog", "B"),
        ("a dog.", "B"),
        ("The answer is A.", "A"),
        ("答案是B。", "B"),
        ("A cat sits there", None),
        ("A or B", None),
        ("C", None),
        ("", None),
        ("Both", None),
    ],
)
def test_an_answer_names_an_option_or_none(answer: str, letter: str | None) -> None:
    assert find_letter(answer, {"A": "a cat", "B": "a dog"}) == letter
