"""`nexusgen evaluate`: scores of a model folder or registered version, by batch inference on Ray Data.

Suites (see suites.py) cut their items into units of one batch each; actors that hold the model turn units into rows,
which are kept as they are made (unit_rows.py). Rows, contact sheets, scores and a report (evaluation_report.py) land in
STORAGE/evaluations/FINGERPRINT/SUITE/ together with the settings that they were made under: the same weights under the
same settings are not evaluated again. With `against`, another model is evaluated on the same items if it hasn't been
yet, and both are compared item by item (pairs.py). The gate reads `measures.json`, the items' own scores by metric (as
`EvaluationSuite.measures` gives them), and `scores.json`:

| key | what |
|---|---|
| fingerprint, suite, settings, run_id | of which weights, by which run |
| scores | numbers, nested by name |
| intervals | {flat name like generation/overall: {value, low, high, n}} of each score that is a mean over items |
| against | {other fingerprint: {model, differences, run_id}}; differences like intervals, ours - theirs item by item |
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal, Self

import torch
from PIL import Image
from pydantic import Field, model_validator

from nexusgen.config import Config, dump_config
from nexusgen.errors import UsageError
from nexusgen.model.decoder import ConditionerKind
from nexusgen.model.manifest import Manifest, read_manifest
from nexusgen.model.weights import DRAWING_PARTS, load_model
from nexusgen.statistics import Interval, mean_of_groups_interval
from pipelines import embedded, judge, pairs, process_use, registry, runtime, storage, tracking
from pipelines.accounting import Account, Prices, account_uri
from pipelines.benchmark_layouts import LAYOUTS, BenchmarkName, digest_prompts
from pipelines.evaluation_report import REPORT_NAME, report_page
from pipelines.evaluation_samples import DemoWorldSamples, StoredSamples
from pipelines.runtime import JobReport
from pipelines.suite_benchmarks import BenchmarkSuite, judges_of
from pipelines.suite_demo_world import DemoWorldSuite
from pipelines.suite_embedding_prediction import EmbeddingPredictionSuite
from pipelines.suite_held_out import HeldOutSuite
from pipelines.suite_reconstruction import ReconstructionSuite
from pipelines.suites import EvaluationSuite, Row, SuiteResult, Unit
from pipelines.unit_rows import UnitRows

SuiteName = Literal["demo_world", "reconstruction", "embedding_prediction", "held_out"] | BenchmarkName
EVALUATED_PARTS = (*DRAWING_PARTS, "editing_decoder")
READER_CPUS = 1.0  # Ray Data's own tasks, beside the actors


class EvaluateConfig(Config):
    """What to evaluate, on what, and how finely."""

    storage: str = Field(description="folder or s3:// URI that holds evaluations/, embedded/ and models/")
    name: str = Field(default="nexusgen", description="name of the project: the MLflow experiment")
    model: str = Field(description="demo-base, a model folder, models:/nexusgen@ALIAS or models:/nexusgen/VERSION")
    against: str | None = Field(default=None, description="another such model: compared with it item by item")
    suites: tuple[SuiteName, ...] = ("demo_world",)
    seed: Annotated[int, Field(ge=0)] = 0
    steps: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="denoising steps; None: the model's own"
    )
    per_category: Annotated[int, Field(ge=1)] = 24
    num_explicit: Annotated[int, Field(ge=0)] = 96
    num_questions: Annotated[int, Field(ge=0)] = 144
    num_edits: Annotated[int, Field(ge=0)] = 0
    data: str | None = Field(
        default=None,
        description="embedded data of mode vision, held out, for all suites but demo_world; None: scenes of that world",
    )
    max_samples: Annotated[int, Field(ge=2)] = Field(default=256, description="of these suites: the first so many")
    num_targets: Annotated[int, Field(ge=2)] = Field(default=64, description="held_out: targets to choose among")
    prompts: str | None = Field(default=None, description="public benchmarks: the benchmark's own file, see the README")
    images: str | None = Field(default=None, description="imgedit: the folder that its ids are paths below")
    judge: str | None = Field(default=None, description="wise, imgedit, gedit: base URL that speaks OpenAI's chat")
    judge_model: str | None = Field(default=None, description="what the judge's requests call its model")
    num_pictures: Annotated[int, Field(ge=0)] = Field(default=24, description="samples on a contact sheet")
    batch_size: Annotated[int, Field(ge=1)] = 24
    num_actors: Annotated[int, Field(ge=1)] = 2
    actor_cpus: Annotated[float, Field(gt=0)] = 1.0
    actor_gpus: Annotated[float, Field(ge=0)] = Field(default=0.0, description="more than 0: bfloat16 on a GPU")
    prices: Prices | None = Field(default=None, description="what an hour costs: then the job's run tells its cost")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if "held_out" in self.suites and self.data is None:
            raise ValueError("suite held_out needs data=NAME, the name of embedded data of mode vision")
        if not self.suites:
            raise ValueError("suites is empty: name at least one")
        self._check_benchmark()
        return self

    @property
    def benchmark(self) -> BenchmarkName | None:
        """The public benchmark among the suites."""
        return next((name for name in LAYOUTS if name in self.suites), None)

    def _check_benchmark(self) -> None:
        """Raises: ValueError for keys that are missing, or that no suite would use."""
        layout = LAYOUTS[self.benchmark] if self.benchmark is not None else None
        if sum(name in LAYOUTS for name in self.suites) > 1:
            raise ValueError("suites names several public benchmarks, but prompts is the file of one: one at a time")
        if layout is not None and self.prompts is None:
            raise ValueError(f"suite {self.benchmark} needs prompts=FILE: {layout.prompts}")
        if layout is not None and layout.needs_images and self.images is None:
            raise ValueError(f"suite {self.benchmark} needs images=FOLDER, which the paths in its file start from")
        if layout is None and self.prompts is not None:
            raise ValueError(f"prompts is for a public benchmark: name one of {', '.join(LAYOUTS)} in suites")
        if self.images is not None and (layout is None or not layout.needs_images):
            raise ValueError("images is for suite imgedit")
        if self.judge is None:
            return
        judge.check_url(self.judge)
        if self.judge_model is None:
            raise ValueError("judge needs judge_model=NAME, what its requests call the model")
        if layout is None or layout.rubric is None:
            able = ", ".join(name for name, one in LAYOUTS.items() if one.rubric is not None)
            raise ValueError(f"a judge is for the suites {able}; the others have scorers of their own")


def evaluate(config: EvaluateConfig, parent_run_id: str | None = None) -> JobReport:
    """Evaluate a model, suite by suite; scores go to the storage, to MLflow and to the version of these weights.

    A suite that was run on the same weights under the same settings is not run again; one that was killed goes on with
    the units that it hasn't finished.
    Raises: InputError or ModelError if there is no such model or data; FingerprintError if the data is of another
    encoder; ResourceError if too few CPUs are free; UsageError if `against` is the same model.
    """
    with runtime.CpuMeter() as meter, ExitStack() as cluster:
        model = _find_model(config.model, config)
        other = _find_model(config.against, config) if config.against is not None else None
        if other is not None and other.fingerprint == model.fingerprint:
            raise UsageError(
                f"model={config.model} and against={config.against} are the same weights ({model.fingerprint}): "
                "name another version or folder to compare with"
            )
        suites = _suites(config, [model.manifest] if other is None else [model.manifest, other.manifest])
        for suite in suites:
            for one in (model, other):
                if one is not None:
                    suite.check(one.manifest)
        theirs = _evaluate_suites(suites, other, config, parent_run_id, cluster) if other is not None else None
        ours = _evaluate_suites(suites, model, config, parent_run_id, cluster)
        if other is not None and theirs is not None:
            ours = _compare(ours, theirs, config, parent_run_id)
        is_reused = ours.is_reused and (theirs is None or theirs.is_reused)
        return _report(config, meter, ours, other, is_reused)


@dataclass(frozen=True)
class _Model:
    """A model to evaluate: a name that means the same everywhere and later, and what it is."""

    spec: str
    manifest: Manifest

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint


@dataclass(frozen=True)
class _Evaluated:
    """A model's evaluations: what each suite's file of scores holds."""

    model: _Model
    suites: Sequence[EvaluationSuite]
    contents: Mapping[str, dict[str, Any]]  # by the suites' paths
    num_made: int  # items; the others' rows were there
    is_reused: bool


def _find_model(spec: str, config: EvaluateConfig) -> _Model:
    pinned = registry.pin_model(spec, config.storage)
    return _Model(pinned, read_manifest(registry.resolve_model(pinned, config.storage)))


class SuiteActor:
    """One loaded model at work on a suite's units; an actor of Ray Data."""

    def __init__(
        self, suite: EvaluationSuite, model: str, storage_uri: str, kept: UnitRows, on_gpu: bool = False
    ) -> None:
        torch.set_num_threads(1)
        # Found here, not in the driver: on a cluster this may be another machine, with a cache of its own.
        folder = registry.resolve_model(model, storage_uri)
        process_use.count_read(sum(storage.list_sizes(str(folder), recursive=True).values()))
        self._kept = kept
        self._work = suite.worker(
            load_model(
                folder,
                [part for part in EVALUATED_PARTS if part in read_manifest(folder).parts],
                torch.bfloat16 if on_gpu else torch.float32,
                "cuda" if on_gpu else "cpu",
            )
        )

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Make and keep the rows of the units in the batch; gives the batch back, and what this process has used."""
        uses = []
        for kind, first, last in zip(batch["kind"], batch["first"], batch["last"], strict=True):
            unit = Unit(str(kind), int(first), int(last))
            started = process_use.clock()
            rows = [{"kind": unit.kind, "index": unit.first + i, **row} for i, row in enumerate(self._work(unit))]
            self._kept.write(unit, rows)
            work = process_use.work_since(started, unit.kind, unit.last - unit.first)
            uses.append(json.dumps(process_use.report(work)))
        return batch | {"use": uses}


def _suites(config: EvaluateConfig, manifests: Sequence[Manifest]) -> list[EvaluationSuite]:
    """The suites asked for, each with the settings that concern it. Raises: InputError if there is no such data."""
    drawn: dict[str, Any] = {
        "seed": config.seed,
        "steps": config.steps,
        "num_pictures": config.num_pictures,
        "batch_size": config.batch_size,
    }
    stored = _stored_samples(config) if set(config.suites) - {"demo_world"} else None
    samples = stored or DemoWorldSamples(seed=config.seed, max_samples=config.max_samples)
    decoders: tuple[ConditionerKind, ...] = tuple(
        kind for kind in ("generation", "editing") if all(f"{kind}_decoder" in found.parts for found in manifests)
    )
    suites: list[EvaluationSuite] = []
    for name in config.suites:
        if name == "demo_world":
            suites.append(
                DemoWorldSuite(
                    per_category=config.per_category,
                    num_explicit=config.num_explicit,
                    num_questions=config.num_questions,
                    num_edits=config.num_edits,
                    **drawn,
                )
            )
        elif name == "reconstruction":
            suites.append(ReconstructionSuite(samples=samples, decoders=decoders, **drawn))
        elif name == "embedding_prediction":
            suites.append(EmbeddingPredictionSuite(samples=samples, **drawn))
        elif name == "held_out":
            assert stored is not None
            suites.append(HeldOutSuite(samples=stored, num_targets=config.num_targets, **drawn))
        else:
            suites.append(_benchmark_suite(config, name, drawn))
    return suites


def _benchmark_suite(config: EvaluateConfig, benchmark: BenchmarkName, drawn: Mapping[str, Any]) -> BenchmarkSuite:
    assert config.prompts is not None
    prompts = storage.absolute(config.prompts)
    return BenchmarkSuite(
        benchmark=benchmark,
        storage=storage.absolute(config.storage),
        prompts=prompts,
        prompts_digest=digest_prompts(prompts),
        images=config.images and storage.absolute(config.images),
        judge=config.judge,
        judge_model=config.judge_model,
        **drawn,
    )


def _stored_samples(config: EvaluateConfig) -> StoredSamples | None:
    if config.data is None:
        return None
    return StoredSamples(
        storage=storage.absolute(config.storage),
        data=config.data,
        data_digest=embedded.read_manifest(config.storage, config.data, "vision").digest,
        max_samples=config.max_samples,
    )


def _evaluate_suites(
    suites: Sequence[EvaluationSuite],
    model: _Model,
    config: EvaluateConfig,
    parent_run_id: str | None,
    cluster: ExitStack,
) -> _Evaluated:
    """Run the suites that weren't yet, in one MLflow run. If Ray is started, it stays until `cluster` closes."""
    contents = {suite.path: _stored(config, suite, model.fingerprint) for suite in suites}
    todo = [suite for suite in suites if contents[suite.path] is None]
    num_made = 0
    if todo:
        cluster.enter_context(runtime.ray_cluster(config.num_actors * config.actor_cpus + READER_CPUS, "evaluate"))
        with runtime.CpuMeter() as meter, _open_run(config, model, parent_run_id) as run:
            uri = account_uri(config.storage, "evaluate", model.fingerprint)
            # Of all suites: a killed evaluation that is started again has fewer left to do, and is the same one.
            recipe = json.dumps({suite.path: suite.settings for suite in suites}, sort_keys=True)
            account = Account(uri, run.run_id, recipe, config.prices, meter, workers=config.num_actors)
            try:
                for suite in todo:
                    contents[suite.path], made = _run(suite, config, model, run, account)
                    num_made += made
            finally:
                account.write()
            run.log_metrics(account.finish().metrics())
            found = _Evaluated(model, suites, {k: v for k, v in contents.items() if v}, num_made, is_reused=False)
            run.log_report(_report(config, meter, found, None, is_reused=False))
    evaluated = _Evaluated(model, suites, {k: v for k, v in contents.items() if v}, num_made, is_reused=not todo)
    for name, content in evaluated.contents.items():
        registry.attach_scores(config.storage, model.fingerprint, name, content["scores"], content["run_id"])
    return evaluated


def _open_run(config: EvaluateConfig, model: _Model, parent_run_id: str | None) -> AbstractContextManager[tracking.Run]:
    tags = {tracking.TAG_FINGERPRINT: model.fingerprint}
    settings = dump_config(config.model_copy(update={"model": model.spec}))
    return tracking.job_run(config.storage, config.name, "evaluate", settings, parent=parent_run_id, tags=tags)


def _run(
    suite: EvaluationSuite, config: EvaluateConfig, model: _Model, run: tracking.Run, account: Account
) -> tuple[dict[str, Any], int]:
    """Evaluate, write rows, sheets and last the scores. Returns what the file of scores holds, and the items made."""
    folder = _folder(config, suite.path, model.fingerprint)
    kept = UnitRows.of(suite, folder)
    rows, num_made = _work_through(suite, config, model, kept, account)
    if isinstance(suite, BenchmarkSuite):
        rows = suite.finish(rows, folder)
    result = suite.summarise(rows)
    measures = suite.measures(rows)
    intervals = {name: mean_of_groups_interval(groups) for name, groups in measures.items()}
    kept.write_all(rows)
    storage.write_json(registry.measures_uri(config.storage, model.fingerprint, suite.path), measures)
    _write_sheets(result.sheets, suite, folder, run)
    storage.write_bytes_atomic(storage.join(folder, "config.yaml"), dump_config(config).encode())
    made_by = {"run_id": run.run_id, "inputs": [{"uri": model.spec, "digest": model.fingerprint}]}
    storage.write_json(storage.join(folder, "run.json"), {**made_by, "items": len(rows), "items_made": num_made})
    run.log_metrics({f"eval/{suite.path}/{name}": value for name, value in _flatten(result.scores)})
    run.log_metrics(_bounds(f"eval/{suite.path}", intervals))
    content: dict[str, Any] = {
        "fingerprint": model.fingerprint,
        "suite": suite.path,
        "settings": suite.settings,
        "scores": result.scores,
        "intervals": {name: interval.to_json() for name, interval in intervals.items()},
        "run_id": run.run_id,
    }
    if judges := judges_of(rows):
        content["judges"] = judges
        run.log_text(json.dumps(judges, indent=2), f"{suite.path}/judges.json")
    _write_report(folder, content, rows, result, {}, run)
    _write_scores(config, suite, content, run)
    kept.remove_parts()
    return content, num_made


def _work_through(
    suite: EvaluationSuite, config: EvaluateConfig, model: _Model, kept: UnitRows, account: Account
) -> tuple[list[Row], int]:
    """Every unit's rows, in order of the items, and how many items were made now, by a pool of actors."""
    units = suite.units()
    found = kept.finished(units)
    todo = [unit for unit in units if unit not in found]
    total, num_kept = (sum(unit.last - unit.first for unit in some) for some in (units, list(found)))
    if num_kept:
        print(f"evaluate {suite.path}: {num_kept}/{total} were made before", file=sys.stderr, flush=True)
    num_done = num_kept
    for unit in _make(suite, config, model, kept, todo, account):
        found[unit] = kept.read(unit)
        num_done += unit.last - unit.first
        print(f"evaluate {suite.path}: {num_done}/{total}", file=sys.stderr, flush=True)
    return [row for unit in units for row in found[unit]], total - num_kept


def _make(
    suite: EvaluationSuite,
    config: EvaluateConfig,
    model: _Model,
    kept: UnitRows,
    units: Sequence[Unit],
    account: Account,
) -> Iterator[Unit]:
    """Have units made; gives each when its rows are kept, and enters what it took."""
    if not units:
        return
    import ray.data

    arguments = (
        suite,
        model.spec,
        storage.absolute(config.storage),
        replace(kept, folder=storage.absolute(kept.folder)),
        config.actor_gpus > 0,
    )
    dataset = ray.data.from_items([asdict(unit) for unit in units], override_num_blocks=len(units)).map_batches(
        SuiteActor,
        fn_constructor_args=arguments,
        compute=ray.data.ActorPoolStrategy(size=min(config.num_actors, len(units))),
        batch_size=1,
        num_cpus=config.actor_cpus,
        num_gpus=config.actor_gpus or None,
    )
    with account.gpus(min(config.num_actors, len(units)) * config.actor_gpus):
        for row in dataset.iter_rows():
            account.add(row["last"] - row["first"], [json.loads(row["use"])])
            yield Unit(row["kind"], row["first"], row["last"])


def _compare(ours: _Evaluated, theirs: _Evaluated, config: EvaluateConfig, parent_run_id: str | None) -> _Evaluated:
    """Add to our files of scores what differs from theirs, unless it is there already."""
    key = theirs.model.fingerprint
    todo = [suite for suite in ours.suites if key not in ours.contents[suite.path].get("against", {})]
    if not todo:
        return ours
    contents = dict(ours.contents)
    with _open_run(config, ours.model, parent_run_id) as run:
        run.set_tags({tracking.TAG_AGAINST: key})
        for suite in todo:
            folder = _folder(config, suite.path, ours.model.fingerprint)
            own, others = (
                UnitRows.of(suite, _folder(config, suite.path, one.model.fingerprint)).read_all()
                for one in (ours, theirs)
            )
            assert own is not None
            assert others is not None
            found = pairs.differences(suite, own, others)
            run.log_metrics({f"against/{suite.path}/{name}": interval.value for name, interval in found.items()})
            run.log_metrics(_bounds(f"against/{suite.path}", found))
            names = (_short(ours.model), _short(theirs.model))
            sheets = pairs.draw_pairs(own, others, config.num_pictures, names)
            _write_sheets({f"against-{key}-{kind}": sheet for kind, sheet in sheets.items()}, suite, folder, run)
            entry = {
                "model": theirs.model.spec,
                "differences": {name: interval.to_json() for name, interval in found.items()},
                "run_id": run.run_id,
            }
            content = contents[suite.path]
            contents[suite.path] = {**content, "against": {**content.get("against", {}), key: entry}}
            _write_report(folder, contents[suite.path], own, suite.summarise(own), sheets, run)
            _write_scores(config, suite, contents[suite.path], run)
    return replace(ours, contents=contents, is_reused=False)


def _write_sheets(sheets: Mapping[str, Image.Image], suite: EvaluationSuite, folder: str, run: tracking.Run) -> None:
    for name, sheet in sheets.items():
        buffer = io.BytesIO()
        sheet.save(buffer, "PNG")
        storage.write_bytes_atomic(storage.join(folder, f"{name}.png"), buffer.getvalue())
        run.log_image(sheet, f"{suite.path}/{name}.png")


def _write_report(
    folder: str,
    content: Mapping[str, Any],
    rows: Sequence[Row],
    result: SuiteResult,
    sheets_of_pairs: Mapping[str, Image.Image],
    run: tracking.Run,
) -> None:
    """The suite's page, beside its rows and in MLflow."""
    page = report_page(content, rows, result.plots, sheets_of_pairs)
    storage.write_bytes_atomic(storage.join(folder, REPORT_NAME), page.encode())
    run.log_text(page, f"{content['suite']}/{REPORT_NAME}")


def _write_scores(
    config: EvaluateConfig, suite: EvaluationSuite, content: Mapping[str, Any], run: tracking.Run
) -> None:
    storage.write_json(registry.scores_uri(config.storage, content["fingerprint"], suite.path), content)
    run.log_text(json.dumps(content, indent=2), f"{suite.path}/scores.json")


def _stored(config: EvaluateConfig, suite: EvaluationSuite, fingerprint: str) -> dict[str, Any] | None:
    """What an earlier evaluation under the same settings left, if there is one, with its rows."""
    content = storage.find_json(registry.scores_uri(config.storage, fingerprint, suite.path))
    if content is None or content.get("settings") != suite.settings or "intervals" not in content:
        return None
    is_whole = UnitRows.of(suite, _folder(config, suite.path, fingerprint)).has_all()
    has_measures = storage.exists(registry.measures_uri(config.storage, fingerprint, suite.path))
    return content if is_whole and has_measures else None


def _folder(config: EvaluateConfig, suite: str, fingerprint: str) -> str:
    """Where a suite's rows, sheets and scores lie; `suite` is its path."""
    return storage.join(config.storage, "evaluations", fingerprint, suite)


def _report(
    config: EvaluateConfig, meter: runtime.CpuMeter, ours: _Evaluated, other: _Model | None, is_reused: bool
) -> JobReport:
    outputs: dict[str, Any] = {
        "model": ours.model.spec,
        "fingerprint": ours.model.fingerprint,
        "scores": {name: content["scores"] for name, content in ours.contents.items()},
        "intervals": {name: content["intervals"] for name, content in ours.contents.items()},
        "sheets": [_folder(config, name, ours.model.fingerprint) for name in ours.contents],
        "run_id": next(content["run_id"] for content in ours.contents.values()),
    }
    if other is not None:
        found = {name: content["against"][other.fingerprint] for name, content in ours.contents.items()}
        outputs["against"] = {
            "model": other.spec,
            "fingerprint": other.fingerprint,
            "differences": {name: entry["differences"] for name, entry in found.items()},
        }
    samples = sum(int(content["scores"]["n"]) for content in ours.contents.values())
    return JobReport("evaluate", meter.seconds, meter.cpu_seconds, samples=samples, outputs=outputs, reused=is_reused)


def _short(model: _Model) -> str:
    """A model's name on a sheet."""
    return (
        model.spec if model.spec.startswith("models:/") else f"{storage.name_of(model.spec)} ({model.fingerprint[:8]})"
    )


def _bounds(prefix: str, intervals: Mapping[str, Interval]) -> dict[str, float]:
    """Metrics of the bounds of scores and of the numbers of their items."""
    return {
        f"{prefix}/{name}.{bound}": float(getattr(interval, bound))
        for name, interval in intervals.items()
        for bound in ("low", "high", "n")
    }


def _flatten(scores: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in scores.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", float(value)
