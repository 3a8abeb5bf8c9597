"""Samples of public benchmarks: read the way their own scorers do, made once, judged by a server that is there."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from api_server import INFO, Painter, picture, serving
from benchmark_readers import (
    average_imgedit,
    read_dpg,
    read_gedit,
    read_geneval,
    read_imgedit,
    read_t2i_compbench,
    read_wise,
    read_wise_scores,
    score_mmbench,
)
from PIL import Image
from servers import free_port, s3_server
from test_benchmark_layouts import EDIT, GENEVAL, POSITION, QUESTION, WISE, encoded, lines, tsv

from nexusgen.base_training import IMAGE_SIZE
from nexusgen.config import parse_config
from nexusgen.errors import ConfigError, InputError, ResourceError
from nexusgen.model.weights import Model, load_model
from pipelines import judge, orders, registry, storage, suite_benchmarks, tracking
from pipelines.api_settings import ApiSettings
from pipelines.benchmark_layouts import LAYOUTS, BenchmarkName, digest_prompts
from pipelines.evaluate import EvaluateConfig, evaluate
from pipelines.suite_benchmarks import BenchmarkSuite

SIZE = IMAGE_SIZE[0]  # pixels of the tiny model's pictures
WISE_ROWS = [{**WISE, "prompt_id": n, "Subcategory": "Biology" if n % 2 else "Physics"} for n in (701, 702, 704)]
EDITS = {str(n): {**EDIT, "edit_type": "style" if n == 12 else "adjust"} for n in (7, 12, 3)}


@pytest.fixture(scope="module")
def loaded(model: Path) -> Model:
    return load_model(model)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with the picture that EDITS are of, wider than high."""
    path = tmp_path / "originals" / EDIT["id"]
    path.parent.mkdir(parents=True)
    path.write_bytes(picture("red", (96, 60)))
    return tmp_path / "originals"


def suite_of(tmp_path: Path, benchmark: BenchmarkName, prompts: Path | str, **changes: Any) -> BenchmarkSuite:
    values: dict[str, Any] = {"images": None, "seed": 5, "steps": 1, "num_pictures": 3, "batch_size": 8}
    values |= {"judge": None, "judge_model": None, "storage": str(tmp_path / "storage")}
    digest = digest_prompts(str(prompts))
    return BenchmarkSuite(benchmark=benchmark, prompts=str(prompts), prompts_digest=digest, **(values | changes))


def run(suite: BenchmarkSuite, model: Model) -> tuple[list[dict[str, Any]], Path]:
    """(rows, root of the layout) of a whole evaluation without Ray."""
    suite.check(model.manifest)
    work = suite.worker(model)
    rows = [
        {"kind": unit.kind, "index": unit.first + place, **row}
        for unit in suite.units()
        for place, row in enumerate(work(unit))
    ]
    folder = Path(suite.storage) / "evaluations" / model.manifest.fingerprint / suite.path
    rows = suite.finish(rows, str(folder))
    pa.Table.from_pylist(rows, schema=suite.schema)
    suite.summarise(rows)
    return rows, folder / "layout"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# --- layouts ----------------------------------------------------------------------------------------------------------


def test_geneval_is_read_by_its_scorer(ray_cluster: Any, model: Path, tmp_path: Path) -> None:
    excluding = {**GENEVAL, "exclude": [{"class": "dog", "count": 1}]}
    prompts = write(tmp_path / "evaluation_metadata.jsonl", lines(GENEVAL, excluding))
    check_geneval(model, tmp_path, prompts)


@pytest.mark.timeout(900)  # 1,152 pictures
def test_geneval_of_every_public_prompt_is_read_by_its_scorer(
    ray_cluster: Any, model: Path, tmp_path: Path, test_data: Path
) -> None:
    prompts = test_data / "data" / "bench" / "geneval_evaluation_metadata.jsonl"
    if not prompts.is_file():
        pytest.skip(f"no {prompts}")
    check_geneval(model, tmp_path, prompts)


def check_geneval(model: Path, tmp_path: Path, prompts: Path) -> None:
    config = EvaluateConfig(
        storage=str(tmp_path / "storage"),
        model=str(model),
        suites=("geneval",),
        prompts=str(prompts),
        steps=1,
        batch_size=64,
        actor_cpus=0.5,
    )
    report = evaluate(config)
    wanted = [json.loads(line) for line in prompts.read_text().splitlines()]
    (root,) = (Path(folder) / "layout" for folder in report.outputs["sheets"])
    found = read_geneval(root)
    assert [metadata for _, metadata, _ in found] == wanted
    assert [folder for folder, _, _ in found] == [f"{n:05}" for n in range(len(wanted))]
    assert {tuple(names) for _, _, names in found} == {("0000.png", "0001.png", "0002.png", "0003.png")}
    (scores,) = report.outputs["scores"].values()
    assert scores == {"n": len(wanted), "num_pictures": 4 * len(wanted)}
    assert evaluate(config).reused


def test_pictures_differ_and_say_what_they_were_made_from(loaded: Model, tmp_path: Path) -> None:
    rows, root = run(suite_of(tmp_path, "geneval", write(tmp_path / "g.jsonl", lines(GENEVAL, GENEVAL))), loaded)
    files = sorted(root.rglob("*.png"))
    assert len({path.read_bytes() for path in files}) == 8
    for number, path in enumerate(files):
        with Image.open(path) as image:
            details = json.loads(image.info["nexusgen"])
        assert details["seed"] == 5 + number
        assert (details["steps"], details["prompt"]) == (1, GENEVAL["prompt"])
    assert [row["seed"] for row in rows] == [5, 9]


def test_dpg_bench_is_a_grid_of_four_squares(loaded: Model, tmp_path: Path) -> None:
    prompts = write(tmp_path / "d.jsonl", lines(*({"id": f"whoops{n}", "prompt": f"red {n}"} for n in range(3))))
    _, root = run(suite_of(tmp_path, "dpg_bench", prompts), loaded)
    found = read_dpg(root, SIZE)
    assert set(found) == {"whoops0", "whoops1", "whoops2"}
    squares = [square.tobytes() for four in found.values() for square in four]
    assert len(squares) == len(set(squares)) == 12
    # The same picture as one of its own.
    alone = write(tmp_path / "a.jsonl", lines({**GENEVAL, "prompt": "red 0"}))
    _, single = run(suite_of(tmp_path, "geneval", alone), loaded)
    with Image.open(single / "00000" / "samples" / "0003.png") as image:
        difference = max(abs(a - b) for a, b in zip(image.tobytes(), found["whoops0"][3].tobytes(), strict=True))
    assert difference <= 1


def test_t2i_compbench_tells_prompt_and_number_by_name(loaded: Model, tmp_path: Path) -> None:
    rows = [{"category": "color", "prompt": "a red bench"}, {"category": "complex", "prompt": "A red bench."}]
    rows.append({"category": "color", "prompt": "a green star"})
    _, root = run(suite_of(tmp_path, "t2i_compbench", write(tmp_path / "t.jsonl", lines(*rows))), loaded)
    assert read_t2i_compbench(root) == {
        "color": [(n, "a red bench" if n < 10 else "a green star") for n in range(20)],
        "complex": [(n, "A red bench.") for n in range(10)],
    }


def test_wise_is_named_by_prompt_id(loaded: Model, tmp_path: Path) -> None:
    prompts = write(tmp_path / "natural_science.json", json.dumps(WISE_ROWS))
    _, root = run(suite_of(tmp_path, "wise", prompts), loaded)
    found = read_wise(root, prompts)
    assert {number: prompt for number, (prompt, _) in found.items()} == dict.fromkeys((701, 702, 704), WISE["Prompt"])
    assert {image.size for _, image in found.values()} == {(SIZE, SIZE)}


def test_imgedit_is_named_by_key(loaded: Model, tmp_path: Path, images: Path) -> None:
    prompts = write(tmp_path / "basic_edit.json", json.dumps(EDITS))
    rows, root = run(suite_of(tmp_path, "imgedit", prompts, images=str(images)), loaded)
    found = read_imgedit(root, prompts, images)
    assert {key: (before.size, after.size) for key, (before, after) in found.items()} == dict.fromkeys(
        EDITS, ((96, 60), (SIZE, SIZE))
    )
    assert [row["category"] for row in rows] == ["adjust", "style", "adjust"]


def gedit_rows() -> list[dict[str, Any]]:
    return [
        {
            "key": f"key{n}",
            "task_type": "ps_human" if n < 2 else "subject-add",
            "instruction": "Make it blue." if lang == "en" else "变成蓝色。",
            "instruction_language": lang,
            "input_image": {"bytes": picture("red", (96, 60), "JPEG"), "path": f"{n}.jpg"},
        }
        for n in range(3)
        for lang in ("en", "cn")
    ]


def test_gedit_lies_by_task_and_language_beside_its_source(loaded: Model, tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(gedit_rows()), tmp_path / "train.parquet")
    rows, root = run(suite_of(tmp_path, "gedit", tmp_path / "train.parquet"), loaded)
    found = read_gedit(root, gedit_rows())
    assert len(found) == 6
    assert all(source.size == edited.size == (96, 60) for source, edited in found.values())
    assert all(source.getpixel((3, 3))[0] > 250 for source, _ in found.values())
    assert [row["lang"] for row in rows] == ["en", "cn"] * 3


def test_mmbench_scores_as_exact_matching_does(loaded: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turned = {"A": "a dog", "B": "a cat", "answer": "A"}
    rows = [{**QUESTION, "index": str(n), "image": encoded("red"), "category": "kind (of it)"} for n in range(1, 5)]
    rows += [{**row, **turned, "index": str(1_000_000 + n), "image": str(n)} for n, row in enumerate(rows, 1)]
    prompts = tsv(rows, tmp_path / "MMBench_DEV_EN.tsv")
    _, root = run(suite_of(tmp_path, "mmbench", prompts, batch_size=3), loaded)  # what the tiny model babbles
    results = root / "nexusgen_MMBench_DEV_EN.tsv"
    assert score_mmbench(results, prompts, circular=False) == 0.0

    said = iter(["B", "B.", "A", "no\tidea\n", "A", "B", "A.", "A"])

    def describe(*arguments: Any) -> list[str]:
        return [next(said) for _ in arguments[1]]

    monkeypatch.setattr(suite_benchmarks, "describe", describe)
    suite = suite_of(tmp_path, "mmbench", prompts, batch_size=3)
    judged, _ = run(suite, loaded)
    scores = suite.summarise(judged).scores
    assert scores == {"n": 8, "overall": 5 / 8, "kind__of_it_": 5 / 8, "circular": 1 / 4}
    assert score_mmbench(results, prompts, circular=False) == 5 / 8
    assert score_mmbench(results, prompts, circular=True) == 1 / 4
    header = results.read_text().splitlines()[0]
    assert header == '"index"\t"question"\t"A"\t"B"\t"answer"\t"hint"\t"category"\t"prediction"'


# --- resuming ---------------------------------------------------------------------------------------------------------


def test_a_picture_that_is_there_is_not_made_again(
    loaded: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    draw = suite_benchmarks.generate_images

    def generate_images(model: Model, prompts: Sequence[str], seeds: Sequence[int], *others: Any) -> list[Image.Image]:
        drawn.extend(seeds)
        return draw(model, prompts, seeds, *others)

    monkeypatch.setattr(suite_benchmarks, "generate_images", generate_images)
    prompts = write(tmp_path / "g.jsonl", lines(GENEVAL, {**GENEVAL, "include": [*GENEVAL["include"], POSITION]}))
    suite = suite_of(tmp_path, "geneval", prompts)
    rows, root = run(suite, loaded)
    assert drawn == list(range(5, 13))
    whole = {path: path.read_bytes() for path in root.rglob("*.*")}

    drawn.clear()
    (root / "00000" / "samples" / "0002.png").unlink()  # as if killed before it
    (root / "00001" / "samples" / "0000.png").write_bytes(picture())  # no picture of ours
    (root / "00001" / "metadata.jsonl").unlink()
    again, _ = run(suite, loaded)
    assert drawn == [7, 9]
    assert {path: path.read_bytes() for path in root.rglob("*.*")}.keys() == whole.keys()
    assert [row["seed"] for row in again] == [row["seed"] for row in rows]

    drawn.clear()
    run(suite.model_copy(update={"steps": 2}), loaded)  # made from something else
    assert drawn == list(range(5, 13))


def test_what_a_longer_file_left_is_taken_away(loaded: Model, tmp_path: Path) -> None:
    prompts = write(tmp_path / "g.jsonl", lines(GENEVAL, GENEVAL))
    _, root = run(suite_of(tmp_path, "geneval", prompts), loaded)
    assert len(read_geneval(root)) == 2
    (root / "results.jsonl").write_text("a scorer's")
    prompts.write_text(lines(GENEVAL))
    run(suite_of(tmp_path, "geneval", prompts), loaded)
    assert len(read_geneval(root)) == 1
    assert {path.name for path in root.iterdir()} == {"00000", "results.jsonl"}


def test_prompts_and_layout_may_lie_on_s3(loaded: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "key")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    prompts = "s3://bucket/bench/g.jsonl"
    with s3_server(tmp_path, port, "bucket"):
        for number in (2, 1):  # the second time fewer
            storage.write_bytes_atomic(prompts, lines(*[GENEVAL] * number).encode())
            suite = suite_of(tmp_path, "geneval", prompts, storage="s3://bucket/runs")
            folder = storage.join("s3://bucket/runs/evaluations", loaded.manifest.fingerprint, suite.path)
            rows = [
                {"kind": "generation", "index": n, **row}
                for n, row in enumerate(suite.worker(loaded)(suite.units()[0]))
            ]
            suite.finish(rows, folder)
            names = [uri.partition("/layout/")[2] for uri in storage.list_files(folder, recursive=True)]
            assert len(names) == 5 * number
    assert names == [f"00000/{name}" for name in ("metadata.jsonl", *(f"samples/{n:04}.png" for n in range(4)))]


def test_a_layout_with_a_gap_is_told(loaded: Model, tmp_path: Path) -> None:
    suite = suite_of(tmp_path, "geneval", write(tmp_path / "g.jsonl", lines(GENEVAL)))
    rows, root = run(suite, loaded)
    (root / "00000" / "samples" / "0003.png").unlink()
    with pytest.raises(InputError, match=r"lacks 1 files, 00000/samples/0003\.png among them"):
        suite.finish(rows, str(root.parent))


# --- the judge --------------------------------------------------------------------------------------------------------


class Juror(Painter):
    """A backend that gives the next of its answers, the last for ever."""

    def __init__(self, *answers: str) -> None:
        super().__init__()
        self.answers = list(answers)

    async def chat(self, order: orders.ChatOrder) -> AsyncIterator[orders.ChatEvent]:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        events: list[orders.ChatEvent] = [orders.Text(answer)]
        events.append(orders.Finished("stop", INFO, orders.Usage(7, 3, 4)))
        async for event in self._say(order, events):
            yield event


GOOD = "Consistency: 2\n**Realism**: 1\nAesthetic Quality：0"


def test_a_judge_scores_wise_and_is_recorded(ray_cluster: Any, model: Path, tmp_path: Path) -> None:
    prompts = write(tmp_path / "natural_science.json", json.dumps(WISE_ROWS))
    juror = Juror(GOOD)
    with serving(juror) as url:
        config = EvaluateConfig(
            storage=str(tmp_path / "storage"),
            model=str(model),
            suites=("wise",),
            prompts=str(prompts),
            judge=f"{url}/v1",
            judge_model="nexusgen",
            steps=1,
            actor_cpus=0.5,
        )
        report = evaluate(config)
    (scores,) = report.outputs["scores"].values()
    assert scores == pytest.approx({"n": 3, "num_pictures": 3, "overall": 0.8, "Science": 0.8, "unscored": 0})
    (folder,) = map(Path, report.outputs["sheets"])
    recorded = json.loads((folder / "scores.json").read_text())
    assert recorded["judges"] == [{"model": "nexusgen", "system_fingerprint": INFO.fingerprint, "answers": 3}]
    assert recorded["settings"]["judge"] == f"{url}/v1"
    client = tracking.connect(config.storage)
    files = [file.path for file in client.list_artifacts(report.outputs["run_id"], f"wise/{prompts.stem}")]
    assert f"wise/{prompts.stem}/judges.json" in files
    assert read_wise_scores(folder / "layout" / "scores_results.jsonl") == {
        701: ("Biology", 0.8),
        702: ("Physics", 0.8),
        704: ("Physics", 0.8),
    }
    assert len(read_wise(folder / "layout", prompts)) == 3
    assert f"Judged by nexusgen ({INFO.fingerprint}): 3." in (folder / "report.html").read_text()

    (order, *_) = juror.orders
    assert len(order.images) == 1
    assert WISE["Prompt"] in order.messages[-1].content
    assert WISE["Explanation"] in order.messages[-1].content
    rows = pq.read_table(folder / "results.parquet").to_pylist()
    assert {row["judge_fingerprint"] for row in rows} == {INFO.fingerprint}
    assert registry.scores_uri(config.storage, recorded["fingerprint"], recorded["suite"]).startswith(str(folder))


def test_a_judge_sees_both_pictures_of_an_edit(loaded: Model, tmp_path: Path, images: Path) -> None:
    prompts = write(tmp_path / "basic_edit.json", json.dumps(EDITS))
    juror = Juror("Compliance: 5\nSeamlessness: 4\nFidelity: 3")
    with serving(juror) as url:
        suite = suite_of(tmp_path, "imgedit", prompts, images=str(images), judge=f"{url}/v1", judge_model="nexusgen")
        rows, root = run(suite, loaded)
    assert suite.summarise(rows).scores == {
        "n": 3,
        "num_pictures": 3,
        "unscored": 0,
        "overall": 4.0,
        "adjust": 4.0,
        "style": 4.0,
    }
    assert {order.images[0] for order in juror.orders} == {picture("red", (96, 60))}
    assert {order.images[1] for order in juror.orders} == {(root / f"{key}.png").read_bytes() for key in EDITS}
    assert average_imgedit(root / "result.json") == dict.fromkeys(EDITS, 4.0)


def test_gedit_is_the_mean_of_its_tasks_by_language(loaded: Model, tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(gedit_rows()), tmp_path / "train.parquet")
    with serving(Juror("Semantics: 4\nQuality: 9")) as url:
        suite = suite_of(tmp_path, "gedit", tmp_path / "train.parquet", judge=f"{url}/v1", judge_model="nexusgen")
        rows, _ = run(suite, loaded)
    one = {"overall": 6.0, "ps_human": 6.0, "subject-add": 6.0}
    assert suite.summarise(rows).scores == {"n": 6, "num_pictures": 6, "unscored": 0, "en": one, "cn": one}
    uneven = [{**row, "score": 9.0 if row["category"] == "subject-add" else 6.0} for row in rows]
    assert suite.measures(uneven)["en/overall"] == [[6.0, 6.0], [9.0]]


def test_answers_without_scores_are_asked_for_again_and_counted(loaded: Model, tmp_path: Path) -> None:
    prompts = write(tmp_path / "w.json", json.dumps(WISE_ROWS[:1]))
    juror = Juror("Lovely!", "Consistency: 3\nRealism: 1\nAesthetic Quality: 1", GOOD)
    with serving(juror) as url:
        changes = {"judge": f"{url}/v1", "judge_model": "nexusgen"}
        rows, _ = run(suite_of(tmp_path, "wise", prompts, **changes), loaded)
        assert [(row["score"], row["unscored"]) for row in rows] == [(0.8, False)]
        assert [order.temperature for order in juror.orders] == [0.0, 0.5, 1.0]
        run(suite_of(tmp_path, "wise", prompts, **changes), loaded)
        assert len(juror.orders) == 3  # the answer is kept
        juror.answers = ["Lovely!"]
        rows, root = run(suite_of(tmp_path, "wise", prompts, **changes, steps=2), loaded)  # of another picture it isn't
        assert [(row["score"], row["unscored"]) for row in rows] == [(0.0, True)]
        assert json.loads((root / "scores_results.jsonl").read_text())["realism"] == 999


def test_a_judge_that_refuses_or_is_away_is_told(
    loaded: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = write(tmp_path / "w.json", json.dumps(WISE_ROWS))
    juror = Juror(GOOD)
    monkeypatch.setattr(judge, "PAUSES_S", (0.01, 0.01))
    with serving(juror, ApiSettings(api_keys=("secret",))) as url:
        suite = suite_of(tmp_path, "wise", prompts, judge=f"{url}/v1", judge_model="nexusgen")
        with pytest.raises(InputError, match=r"status 401: .*the key is read from NEXUSGEN_JUDGE_API_KEY"):
            run(suite, loaded)
        monkeypatch.setenv(judge.KEY_VARIABLE, "secret")
        unknown = suite.model_copy(update={"judge_model": "other"})
        with pytest.raises(InputError, match=r"status 404: .*'other' does not exist"):
            run(unknown, loaded)
        rows, root = run(suite, loaded)
        assert [row["score"] for row in rows] == [0.8] * 3
    assert not any(b"secret" in path.read_bytes() for path in root.parent.rglob("*.json"))
    shutil.rmtree(root.parent / "judge")
    with pytest.raises(ResourceError, match=r"doesn't answer after 3 attempts .*what it has answered is kept"):
        run(suite, loaded)


# --- the configuration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"suites": ["geneval"]}, r"needs prompts=FILE: evaluation_metadata\.jsonl"),
        ({"suites": ["geneval", "wise"], "prompts": "a"}, "one at a time"),
        ({"suites": ["imgedit"], "prompts": "a"}, "needs images=FOLDER"),
        ({"suites": ["wise"], "prompts": "a", "images": "b"}, "images is for suite imgedit"),
        ({"prompts": "a"}, "prompts is for a public benchmark: name one of geneval, dpg_bench"),
        ({"suites": ["wise"], "prompts": "a", "judge": "http://x/v1"}, "judge needs judge_model=NAME"),
        (
            {"suites": ["geneval"], "prompts": "a", "judge": "http://x", "judge_model": "m"},
            "suites wise, imgedit, gedit",
        ),
        ({"suites": ["wise"], "prompts": "a", "judge": "x/v1", "judge_model": "m"}, "wanted a base URL such as https"),
        (
            {"suites": ["wise"], "prompts": "a", "judge": "http://u:p@x", "judge_model": "m"},
            "a URL without name, password",
        ),
    ],
)
def test_keys_that_dont_fit_a_suite_are_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse_config(EvaluateConfig, {"storage": "s", "model": "demo-base", **values}, "test")


def test_a_missing_file_is_told_before_anything_starts(model: Path, tmp_path: Path) -> None:
    config = EvaluateConfig(storage=str(tmp_path), model=str(model), suites=("geneval",), prompts=str(tmp_path / "no"))
    with pytest.raises(InputError, match="no"):
        evaluate(config)
    assert not (tmp_path / "mlflow.db").exists()


def test_every_benchmark_is_a_suite() -> None:
    for name, layout in LAYOUTS.items():
        images = "b" if layout.needs_images else None
        assert EvaluateConfig(storage="s", model="m", suites=(name,), prompts="a", images=images).benchmark == name
