"""What a road will take, before it is walked: storage by kind, hours and cost by job, workers, goodput.

Pure functions of a request: what is asked for, the model's sizes, rates measured or assumed. Every figure comes with
the formula that made it, values put in. How a request is made of a road's configuration: `jobs/plan.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from nexusgen.schema import StoredDtype
from pipelines.lora import LoraConfig
from pipelines.plan_goodput import Failures
from pipelines.plan_rates import Assumptions, Calibration, Devices
from pipelines.plan_sizes import BF16_BYTES, FP32_BYTES, STATE_NUMBERS, ModelSizes, Shares

HOUR_S = 3600.0
HOURS_PER_MONTH = 730.0
STAGE_JOBS = {stage: f"train {stage}" for stage in ("ar", "generation_decoder", "editing_decoder")}
NOT_DRAWN = {"understanding", "answered", "prediction", "autoencoder", "another"}  # items of an evaluation
NUM_VERSIONS = 2  # that a road registers


@dataclass(frozen=True)
class Training:
    """What a plan needs to know of a training's configuration."""

    num_steps: int
    batch_samples: int | None  # of a step; None: as many as fit batch_tokens
    batch_tokens: int | None
    recomputes: bool
    checkpoint_every: int
    keep_checkpoints: int
    virtual_streams: int
    sharded: bool
    num_workers: int  # of the configuration
    lora: LoraConfig | None = None
    is_averaged: bool = False  # an average of the weights is kept, in each checkpoint

    @property
    def state_numbers(self) -> int:
        """In a checkpoint, for each trained parameter."""
        return STATE_NUMBERS + self.is_averaged


@dataclass(frozen=True)
class Request:
    """What is asked for. `calibrations` are those of the jobs at small size, by the names of the road's jobs."""

    samples: int
    shares: Shares
    shares_from: str
    sizes: ModelSizes
    sizes_from: str
    devices: Devices
    price: float | None  # US dollars of a GPU hour
    is_packed: bool  # by the road itself
    dtypes: Mapping[str, StoredDtype]  # by mode of embedding
    encoders: Mapping[str, int]  # by mode, of the configuration
    trainings: Mapping[str, Training]  # by stage
    items: Mapping[str, int]  # of an evaluation, by kind
    assumptions: Assumptions
    calibrations: Mapping[str, Calibration] | None = None


@dataclass(frozen=True)
class StorageRow:
    """Room for one kind of thing: `count` of them, `bytes_each`."""

    kind: str
    count: float
    bytes_each: float
    formula: str

    @property
    def bytes(self) -> float:
        return self.count * self.bytes_each


@dataclass(frozen=True)
class JobRow:
    """One job. Hours of GPUs and cost are None on CPUs; CPU seconds where nothing was measured."""

    job: str
    workers: int
    seconds: float | None  # by the wall; None where neither measured nor computed
    cpu_seconds: float | None
    gpu_hours: float | None
    cost_usd: float | None
    formula: str


@dataclass(frozen=True)
class Plan:
    """The whole plan."""

    request: Request
    storage: Sequence[StorageRow]
    jobs: Sequence[JobRow]
    bottleneck: str
    workers: Mapping[str, str]
    online: Mapping[str, Any]
    goodput: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by stage

    def to_json(self) -> dict[str, Any]:
        """A mapping that `json.dumps` takes."""
        request = self.request
        return {
            "samples": request.samples,
            "shares": asdict(request.shares),
            "shares_from": request.shares_from,
            "sizes_from": request.sizes_from,
            "gpus": str(request.devices),
            "price": request.price,
            "calibrated": request.calibrations is not None,
            "storage": [asdict(row) | {"bytes": row.bytes} for row in self.storage],
            "storage_bytes": sum(row.bytes for row in self.storage),
            "jobs": [asdict(row) for row in self.jobs],
            "seconds": sum(row.seconds or 0.0 for row in self.jobs),
            "gpu_hours": _total(row.gpu_hours for row in self.jobs),
            "cost_usd": _total(row.cost_usd for row in self.jobs),
            "bottleneck": self.bottleneck,
            "workers": dict(self.workers),
            "stored_or_online": dict(self.online),
            "goodput": {stage: dict(found) for stage, found in self.goodput.items()},
            "assumptions": request.assumptions.model_dump(),
        }


def make_plan(request: Request) -> Plan:
    """Plan a road."""
    storage = plan_storage(request)
    jobs = (
        [_calibrated_row(request, job, found) for job, found in request.calibrations.items()]
        if (request.calibrations is not None)
        else plan_jobs(request)
    )
    timed = [row for row in jobs if row.seconds is not None]
    slowest = max(timed, key=lambda row: row.seconds or 0.0)
    total = sum(row.seconds or 0.0 for row in timed)
    bottleneck = f"{slowest.job}: {_hours(slowest.seconds or 0.0)} of {_hours(total)}"
    goodput = {stage: _goodput(request, stage) for stage in request.trainings} if request.devices.peak else {}
    return Plan(request, storage, jobs, bottleneck, _workers(request), _stored_or_online(request, storage), goodput)


# --- storage ----------------------------------------------------------------------------------------------------------


def plan_storage(request: Request) -> list[StorageRow]:
    """Room for everything that a road leaves behind. Pictures of users count as if all were as large as allowed."""
    sizes, shares, samples = request.sizes, request.shares, request.samples
    assumed = request.assumptions.picture_bytes
    drawn, shown, edits = samples * shares.drawn, samples * shares.shown, samples * shares.editing
    pictures = drawn + shown
    rows = [StorageRow("tars", pictures, assumed, f"{pictures:,.0f} pictures x {assumed:,.0f} B (assumed)")]

    def embeddings(mode: str, role: str, count: float, tokens: int) -> StorageRow:
        dtype = request.dtypes[mode]
        each = sizes.array_bytes(tokens, dtype)
        number = f"{sizes.hidden:,} B + {FP32_BYTES} B" if dtype == "int8" else f"{sizes.hidden:,} x {BF16_BYTES} B"
        formula = f"{count:,.0f} x {tokens} tokens x {number if dtype != 'int8' else f'({number})'}"
        return StorageRow(f"{mode}/{role}", count, each, formula)

    rows += [
        embeddings("vision", "input", shown, sizes.max_input_tokens),
        embeddings("vision", "target", drawn, sizes.target_tokens),
        embeddings("vision", "crop", drawn, sizes.target_tokens),
    ]
    channels, height, width = sizes.latents
    formula = f"{drawn:,.0f} x {channels} x {height} x {width} x {BF16_BYTES} B"
    rows.append(StorageRow("latents", drawn, sizes.latent_numbers * BF16_BYTES, formula))
    rows += [
        embeddings("predicted", "reference", edits, sizes.reference_tokens),
        embeddings("predicted", "predicted", edits, sizes.target_tokens),
    ]
    for stage, training in request.trainings.items():
        parameters = sizes.trained_parameters(stage, training.lora)
        count = training.keep_checkpoints + 1  # and the best
        kept = "two moments and an average" if training.is_averaged else "two moments"
        formula = f"{count} x {parameters:,} weights{_lora(training)}, with {kept} each, x {FP32_BYTES} B"
        rows.append(StorageRow(f"checkpoints/{stage}", count, state_bytes(request, stage), formula))
    formula = f"{NUM_VERSIONS} versions x {sizes.model_bytes:,} B"
    rows.append(StorageRow("models", NUM_VERSIONS, sizes.model_bytes, formula))
    return rows


def state_bytes(request: Request, stage: str) -> float:
    """Of a checkpoint: what is trained, its moments and its average."""
    training = request.trainings[stage]
    return request.sizes.trained_parameters(stage, training.lora) * training.state_numbers * FP32_BYTES


# --- jobs -------------------------------------------------------------------------------------------------------------


def plan_jobs(request: Request) -> list[JobRow]:
    """Hours by arithmetic: operations / (peak x share of it that is put to use)."""
    sizes, shares, samples = request.sizes, request.shares, request.samples
    drawn, shown, edits = samples * shares.drawn, samples * shares.shown, samples * shares.editing
    encoding = request.assumptions.encoding_utilisation
    number = request.devices.number
    rows = []
    if request.is_packed:
        rows.append(JobRow("pack", 1, None, None, 0.0, _cost(0.0, request), "no GPU; one process writes the tars"))
    tokens = 2 * drawn * sizes.target_tokens + shown * sizes.max_input_tokens
    told = f"({2 * drawn:,.0f} x {sizes.target_tokens} + {shown:,.0f} x {sizes.max_input_tokens}) tokens"
    per_token = sizes.tower_flops(1)
    rows.append(_row(request, "embed vision", number, tokens * per_token, encoding, f"{told} x {_si(per_token)}FLOP"))
    each = sizes.autoencoder_flops
    rows.append(
        _row(request, "embed latents", number, drawn * each, encoding, f"{drawn:,.0f} pictures x {_si(each)}FLOP")
    )
    for stage in ("ar", "generation_decoder"):
        rows.append(_training_row(request, stage))
    length = request.assumptions.text_tokens + sizes.max_input_tokens + sizes.target_tokens
    forward = sizes.autoregressive.flops(length, 1) / 3  # a step is 3 forwards
    shown_tokens = sizes.max_input_tokens + sizes.reference_tokens
    each = forward + sizes.tower_flops(shown_tokens)
    formula = f"{edits:,.0f} edits x ({_si(forward)}FLOP of the language model over {length:,.0f} tokens + "
    formula += f"{_si(each - forward)}FLOP of the tower over {shown_tokens})"
    rows.append(_row(request, "embed predicted", number, edits * each, encoding, formula))
    rows.append(_training_row(request, "editing_decoder"))
    pictures = sum(count for kind, count in request.items.items() if kind not in NOT_DRAWN)
    per_step = sizes.decoder.flops(sizes.latent_tokens + sizes.target_tokens, 1) / 3
    flops = pictures * sizes.steps * sizes.passes * per_step
    formula = f"{pictures:,} pictures x {sizes.steps} steps x {sizes.passes} passes x {_si(per_step)}FLOP"
    rows.append(_row(request, "evaluate", number, flops, encoding, formula))
    return rows


def samples_of_step(request: Request, stage: str) -> float:
    """Samples of an optimizer step."""
    training = request.trainings[stage]
    if training.batch_tokens is not None:
        return training.batch_tokens / tokens_of_sample(request, stage)
    assert training.batch_samples is not None
    return training.batch_samples


def tokens_of_sample(request: Request, stage: str) -> float:
    """Mean length of a stage's samples, padding left out."""
    sizes, shares = request.sizes, request.shares
    if stage == "ar":
        pictures = shares.shown * sizes.max_input_tokens + shares.drawn * sizes.target_tokens
        return request.assumptions.text_tokens + pictures
    references = sizes.reference_tokens if stage == "editing_decoder" else 0
    return sizes.latent_tokens + sizes.target_tokens + references


def step_flops(request: Request, stage: str) -> float:
    """Operations of an optimizer step."""
    training = request.trainings[stage]
    samples, tokens = samples_of_step(request, stage), tokens_of_sample(request, stage)
    work = request.sizes.work(stage, training.lora)
    return work.flops(samples * tokens, samples, recomputes=training.recomputes)


def training_workers(training: Training, number: int) -> int:
    """The most workers that so many GPUs and the virtual streams allow: their number divides that of the streams."""
    return max(w for w in range(1, min(number, training.virtual_streams) + 1) if training.virtual_streams % w == 0)


def _training_row(request: Request, stage: str) -> JobRow:
    training = request.trainings[stage]
    samples, tokens, flops = (f(request, stage) for f in (samples_of_step, tokens_of_sample, step_flops))
    epochs = training.num_steps * samples / max(1.0, request.samples * _part(request, stage))
    formula = (
        f"{training.num_steps:,} steps x {samples:,.1f} samples x {tokens:,.0f} tokens "
        f"({epochs:.2f} epochs) x {_si(flops / samples / tokens)}FLOP"
    )
    if training.lora is not None:
        trained = request.sizes.work(stage, training.lora).trained
        formula += f", {trained:,} of the parameters trained{_lora(training)}"
    workers = training_workers(training, request.devices.number)
    total = training.num_steps * flops
    return _row(request, STAGE_JOBS[stage], workers, total, request.assumptions.training_utilisation, formula)


def _part(request: Request, stage: str) -> float:
    """The share of the samples that a stage trains on."""
    shares = request.shares
    return {"ar": 1.0, "generation_decoder": shares.drawn, "editing_decoder": shares.editing}[stage]


def _row(request: Request, job: str, workers: int, flops: float, utilisation: float, formula: str) -> JobRow:
    """A job of so many operations on GPUs."""
    devices = request.devices
    assert devices.peak is not None
    hours = flops / (devices.peak * utilisation) / HOUR_S
    told = f"{formula} / ({devices.peak / 1e12:,.0f} TFLOP/s x {utilisation:.2f}) = {hours:,.1f} GPU hours"
    return JobRow(job, workers, hours * HOUR_S / workers, None, hours, _cost(hours, request), told)


def _cost(gpu_hours: float, request: Request) -> float | None:
    return None if request.price is None else gpu_hours * request.price


def units_of(request: Request, job: str) -> dict[str, float]:
    """The units of each kind of work of one of the road's jobs at full size, as its account counts them."""
    stage = next((stage for stage, name in STAGE_JOBS.items() if name == job), None)
    if stage is not None:
        training = request.trainings[stage]
        num_checkpoints = math.ceil(training.num_steps / training.checkpoint_every)
        return {"steps": float(training.num_steps), "checkpoints": float(num_checkpoints)}
    if job.startswith("evaluate"):
        return {kind: float(count) for kind, count in request.items.items()}
    return {"samples": float(request.samples)} if job.startswith(("pack", "embed")) else {}


def _calibrated_row(request: Request, job: str, found: Calibration) -> JobRow:
    units = {kind: number for kind, number in units_of(request, job).items() if kind in found.rates}
    seconds, cpu_seconds = found.predict(units)
    parts = [f"{found.fixed_seconds:.1f} s"]
    parts += [f"{number:,.0f} {kind} x {1e3 * found.rates[kind].seconds:,.3f} ms" for kind, number in units.items()]
    if request.devices.peak is None:
        hours = cost = None
        workers = 1
    else:
        workers = request.devices.number
        hours = seconds * workers / HOUR_S if job.startswith(("embed", "train", "evaluate")) else 0.0
        cost = _cost(hours, request)
    formula = f"{' + '.join(parts)} = {seconds:,.1f} s"
    return JobRow(job, workers, seconds, cpu_seconds, hours, cost, formula)


# --- workers, embeddings, goodput -------------------------------------------------------------------------------------


def _workers(request: Request) -> dict[str, str]:
    """How many of each, and why."""
    if request.devices.peak is None:
        told = {f"embed {mode}": f"{number} encoders, as configured" for mode, number in request.encoders.items()}
        return told | {
            STAGE_JOBS[stage]: f"{training.num_workers} workers, as configured"
            for stage, training in request.trainings.items()
        }
    number, sizes = request.devices.number, request.sizes
    decoded = request.assumptions.decoded_images_per_core_s
    speed = request.devices.peak * request.assumptions.encoding_utilisation
    told = {}
    for mode, flops in (
        ("vision", sizes.tower_flops(2 * sizes.target_tokens)),
        ("latents", sizes.autoencoder_flops),
    ):
        images = speed / flops
        threads = math.ceil(images / decoded)
        told[f"embed {mode}"] = (
            f"num_encoders={number} gpus_per_encoder=1 decode_threads={threads} ({speed / 1e12:,.0f} TFLOP/s / "
            f"{_si(flops)}FLOP = {images:,.0f} pictures/s of a GPU, {decoded:,.0f} decoded by a core)"
        )
    for stage, training in request.trainings.items():
        workers = training_workers(training, number)
        idle = f"; {number - workers} GPUs idle" if workers < number else ""
        told[STAGE_JOBS[stage]] = f"num_workers={workers} (divides virtual_streams={training.virtual_streams}{idle})"
    return told


def _stored_or_online(request: Request, storage: Sequence[StorageRow]) -> dict[str, Any]:
    """Stage ar's embeddings: stored once, or made in every epoch."""
    sizes, shares, training = request.sizes, request.shares, request.trainings["ar"]
    tokens = request.samples * (shares.shown * sizes.max_input_tokens + shares.drawn * sizes.target_tokens)
    flops = sizes.tower_flops(tokens)
    epochs = training.num_steps * samples_of_step(request, "ar") / request.samples
    stored_bytes = sum(row.bytes for row in storage if row.kind in ("vision/input", "vision/target"))
    result: dict[str, Any] = {"epochs": epochs, "stored_bytes": stored_bytes, "tower_flops_of_an_epoch": flops}
    share = flops / request.samples / (step_flops(request, "ar") / samples_of_step(request, "ar"))
    result["online_adds_to_a_step"] = share
    result["measured_on_a_cpu"] = request.assumptions.online_share_of_step
    if request.devices.peak is None:
        result["formula"] = f"online makes {_si(flops)}FLOP in each of {epochs:.2f} epochs, stored makes them once"
        return result
    hours = flops / (request.devices.peak * request.assumptions.encoding_utilisation) / HOUR_S
    result |= {"gpu_hours_of_an_epoch": hours, "online_gpu_hours": epochs * hours, "stored_gpu_hours": hours}
    formula = f"stored: {hours:,.1f} GPU hours once and {_bytes(stored_bytes)}; "
    formula += f"online: {epochs:.2f} epochs x {hours:,.1f} = {epochs * hours:,.1f} GPU hours"
    if request.price is not None:
        workers = training_workers(training, request.devices.number)
        train_hours = (
            training.num_steps
            * step_flops(request, "ar")
            / (request.devices.peak * request.assumptions.training_utilisation * workers * HOUR_S)
        )
        months = train_hours / HOURS_PER_MONTH
        room = stored_bytes / 1e9 * request.assumptions.usd_per_gb_month * months
        stored_cost, online_cost = hours * request.price + room, epochs * hours * request.price
        break_even = 1 + room / (hours * request.price) if request.price else math.inf
        cheaper = "stored" if stored_cost < online_cost else "online"
        result |= {
            "stored_usd": stored_cost,
            "online_usd": online_cost,
            "break_even_epochs": break_even,
            "cheaper": cheaper,
        }
        formula += (
            f"; {_bytes(stored_bytes)} x {request.assumptions.usd_per_gb_month} USD/GB/month x {months:.2f} months = "
            f"{room:,.0f} USD; stored {stored_cost:,.0f} USD, online {online_cost:,.0f} USD: {cheaper} is cheaper; "
            f"break-even at 1 + {room:,.0f} / ({hours:,.1f} x {request.price:g}) = {break_even:.2f} epochs"
        )
    result["formula"] = formula
    return result


def _goodput(request: Request, stage: str) -> dict[str, Any]:
    """The best checkpoint interval of a training, and the share of time that trains, there and as configured."""
    training, assumed = request.trainings[stage], request.assumptions
    workers = training_workers(training, request.devices.number)
    assert request.devices.peak is not None
    step_s = step_flops(request, stage) / (workers * request.devices.peak * assumed.training_utilisation)
    state = state_bytes(request, stage)
    writers = workers if training.sharded else 1
    failures = Failures(
        mean_s=assumed.gpu_hours_between_failures * HOUR_S / workers,
        checkpoint_s=state / (writers * assumed.checkpoint_gb_per_s_per_worker * 1e9),
        restart_s=assumed.restart_seconds,
    )
    best_s = failures.best_interval_s
    configured_s = training.checkpoint_every * step_s
    formula = (
        f"M = {assumed.gpu_hours_between_failures:,.0f} h / {workers} = {failures.mean_s / HOUR_S:,.0f} h; "
        f"C = {_bytes(state)} / ({writers} x {assumed.checkpoint_gb_per_s_per_worker:g} GB/s) = "
        f"{failures.checkpoint_s:.1f} s; Young: sqrt(2 C M) = {failures.young_interval_s:,.0f} s; "
        f"Daly: {best_s:,.0f} s = {max(1, round(best_s / step_s)):,} steps of {step_s:.2f} s"
    )
    return {
        "mean_s_between_failures": failures.mean_s,
        "checkpoint_s": failures.checkpoint_s,
        "restart_s": failures.restart_s,
        "step_s": step_s,
        "young_interval_s": failures.young_interval_s,
        "best_interval_s": best_s,
        "best_checkpoint_every": max(1, round(best_s / step_s)),
        "goodput": failures.goodput(best_s),
        "configured_checkpoint_every": training.checkpoint_every,
        "configured_goodput": failures.goodput(configured_s),
        "formula": formula,
    }


# --- words ------------------------------------------------------------------------------------------------------------


def _lora(training: Training) -> str:
    """What is told beside a number of parameters that are trained."""
    return "" if training.lora is None else f" (LoRA of rank {training.lora.rank})"


def _total(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _si(number: float) -> str:
    """A number with its prefix, ready for a unit."""
    for prefix, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {prefix}"
    return f"{number:.3g} "


def _bytes(number: float) -> str:
    return f"{_si(number)}B"


def _hours(seconds: float) -> str:
    return f"{seconds / HOUR_S:,.1f} h" if seconds >= HOUR_S else f"{seconds:,.1f} s"
