"""From a road's configuration to what `plan` is made of; and the same road, small, walked to measure its rates."""

from __future__ import annotations

import io
import json
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import webdataset

from jobs.chain import RoadConfig, run_road
from nexusgen.errors import ConfigError, InputError, ModelError, UsageError
from nexusgen.schema import Sample, Task
from pipelines import registry
from pipelines.accounting import account_uri, read_attempts
from pipelines.pack_sources import PairsAs
from pipelines.plan import STAGE_JOBS, Request, Training
from pipelines.plan_rates import CPU, Calibration, Devices, calibrate, on_this_machine, read_assumptions
from pipelines.plan_sizes import RELEASED, ModelSizes, Shares, sizes_of
from pipelines.runtime import JobReport
from pipelines.shards import ReadOptions, ShardReader, list_shards
from pipelines.train import TrainConfig

SMALL = 0.1  # of samples, steps and items, at most
MIN_SAMPLES = 100  # of which a tenth can still be trained on
MODES = {"embed vision": "vision", "embed latents": "latents", "embed predicted": "predicted"}
# What suites make of each sample, by the kinds of their units.
SAMPLE_KINDS = {
    "reconstruction": ("generation", "editing", "autoencoder", "another"),
    "embedding_prediction": ("prediction",),
    "held_out": ("drawn", "answered"),
}
TRAININGS = ("ar", "generation_decoder", "editing_decoder")


def read_number(text: str) -> int:
    """The number of samples. Raises: UsageError."""
    digits = text.replace("_", "").replace(",", "")
    if not digits.isdecimal() or int(digits) == 0:
        raise UsageError(f"--samples {text}: wanted a whole number > 0, like 26300000")
    return int(digits)


def read_price(text: str | None) -> float | None:
    """US dollars of a GPU hour. Raises: UsageError."""
    if text is None:
        return None
    try:
        price = float(text)
    except ValueError:
        price = math.nan
    if not (math.isfinite(price) and price >= 0):
        raise UsageError(f"--price {text}: wanted US dollars of a GPU hour, a number >= 0, like 2.50")
    return price


def check_devices(devices: Devices, *, is_calibrated: bool) -> None:
    """Raises: UsageError if rates can't be measured here for these devices, or would have to be."""
    if devices.kind == CPU:
        if not is_calibrated:
            raise UsageError(
                "--gpus 1xCPU: rates of CPUs aren't known beforehand; add --calibrate to measure them here"
            )
        return
    if not is_calibrated:
        return
    import torch

    found = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    if len(found) < devices.number or not all(devices.kind in name for name in found[: devices.number]):
        raise UsageError(
            f"--gpus {devices} --calibrate: rates are measured on this machine, which has "
            f"{', '.join(found) or 'no GPU'}; leave out --calibrate for rates by arithmetic, or give what is here"
        )


def request_of(road: RoadConfig, samples: int, devices: Devices, price: float | None) -> Request:
    """What a road's configuration says of the plan. Raises: ConfigError for what no road can be walked with."""
    if road.train_ar.embeddings == "online":
        raise ConfigError(
            "train_ar.embeddings=online: a road embeds no pictures of mode images, so it can't be walked with it, nor "
            "planned; leave it out: the plan's line `stored or online` tells what it would add to each epoch"
        )
    if road.embed_vision.mode != "vision":
        raise ConfigError(
            f"embed_vision.mode={road.embed_vision.mode}: a road's decoders learn from embeddings, so it "
            "can't be walked with it, nor planned; leave it out"
        )
    assumptions = read_assumptions()
    weights, shares_from = _shares(road, assumptions.shares)
    sizes, sizes_from = _sizes(road)
    embeds = {mode: getattr(road, f"embed_{mode}") for mode in ("vision", "latents", "predicted")}
    return Request(
        samples=samples,
        shares=Shares.of(weights),
        shares_from=shares_from,
        sizes=sizes,
        sizes_from=sizes_from,
        devices=devices,
        price=price,
        is_packed=road.input is None,
        dtypes={mode: config.dtype for mode, config in embeds.items()},
        encoders={mode: config.num_encoders for mode, config in embeds.items()},
        trainings={stage: _training(getattr(road, f"train_{stage}")) for stage in TRAININGS},
        items=_items(road),
        assumptions=assumptions,
    )


def _shares(road: RoadConfig, published: Mapping[Task, float]) -> tuple[Mapping[Task, float], str]:
    if road.input is None:
        return road.pack.counts, "pack.counts"
    if road.train_ar.mixture is not None:
        return road.train_ar.mixture, "train_ar.mixture"
    return published, "as published for Nexus-Gen V2"


def _sizes(road: RoadConfig) -> tuple[ModelSizes, str]:
    """The model's sizes, or the released ones where it isn't at hand."""
    if not road.model.startswith("s3://"):
        try:
            return sizes_of(registry.resolve_model(road.model, road.storage)), road.model
        except (InputError, ModelError) as error:
            return RELEASED, f"the released model, as {road.model} isn't at hand ({error})"
    return RELEASED, f"the released model ({road.model} isn't read)"


def _training(config: TrainConfig) -> Training:
    return Training(
        num_steps=config.num_steps,
        batch_samples=config.batch_samples,
        batch_tokens=config.batch_tokens,
        recomputes=config.activation_checkpointing,
        checkpoint_every=config.checkpoint_every,
        keep_checkpoints=config.keep_checkpoints,
        virtual_streams=config.virtual_streams,
        sharded=config.parallelism == "fsdp",
        num_workers=config.max_workers,
        lora=config.lora,
        is_averaged=config.ema_decay > 0,
    )


def _items(road: RoadConfig) -> dict[str, int]:
    """Items of the evaluation by kind, as its account counts them; of samples the most that it may take."""
    config = road.evaluate
    items: dict[str, int] = {}
    if "demo_world" in config.suites:
        items |= {
            "generation": 6 * config.per_category,
            "explicit": config.num_explicit,
            "understanding": config.num_questions,
            "editing": config.num_edits,
        }
    for suite in config.suites:
        for kind in SAMPLE_KINDS.get(suite, () if suite == "demo_world" else (suite,)):
            items[kind] = items.get(kind, 0) + config.max_samples
    return items


# --- rates measured here ----------------------------------------------------------------------------------------------


def walk_small(road: RoadConfig, samples: int, tell: Callable[[str], None]) -> dict[str, Calibration]:
    """Walk the road with at most a tenth of its samples, steps and items, in a folder of its own; rates by job.

    Ray and MLflow are the folder's own, too. Raises: UsageError if a tenth is too little to train on; as `run_road`.
    """
    if samples < MIN_SAMPLES:
        raise UsageError(
            f"--samples {samples}: --calibrate takes a tenth of them, and needs {MIN_SAMPLES} or more to train on that"
        )
    with tempfile.TemporaryDirectory(prefix="nexusgen-plan-") as folder:
        small = small_road(road, samples, folder)
        tell(f"plan: the road at a tenth of its size or less, in {folder}")
        with on_this_machine():
            result = run_road(small)
        return calibrations_of(result.reports, str(small.storage), small.name)


def small_road(road: RoadConfig, samples: int, folder: str) -> RoadConfig:
    """The same road with at most a tenth of samples, steps and items, below another folder.

    Embedded data of other names isn't there: what reads such reads the road's own, of which there is as much.
    """
    storage = str(Path(folder) / "storage")
    name = road.name
    # A version's number means nothing in another registry.
    is_named = road.model.startswith("models:/")
    model = str(registry.resolve_model(road.model, road.storage)) if is_named else registry.pin_model(road.model)
    here: dict[str, Any] = {"storage": storage, "name": name}
    moved = here | {"model": model}
    if road.input is None:
        weights = road.pack.counts
        total = sum(weights.values())
        counts = {task: int(SMALL * samples * weight / total) for task, weight in weights.items()}
        tars = f"{storage}/tars/{name}"
        pack = road.pack.model_copy(update=here | {"counts": counts})
    else:
        tars = f"{folder}/small.tar"
        write_small_tar(road.input, int(SMALL * samples), Path(tars), road.embed_vision.pairs_as)
        pack = road.pack.model_copy(update=here)
    changed: dict[str, Any] = {"storage": storage, "model": model, "pack": pack}
    changed["input"] = None if road.input is None else tars
    for mode in ("vision", "latents", "predicted"):
        changed[f"embed_{mode}"] = getattr(road, f"embed_{mode}").model_copy(update=moved | {"input": tars})
    for stage in TRAININGS:
        config: TrainConfig = getattr(road, f"train_{stage}")
        steps = max(1, int(SMALL * config.num_steps))
        less = {"num_steps": steps, "warmup_steps": min(config.warmup_steps, steps), "data": None}
        changed[f"train_{stage}"] = config.model_copy(update=moved | less)
    evaluate = road.evaluate
    fewer: dict[str, int | str | None] = {
        "per_category": max(1, int(SMALL * evaluate.per_category)),
        "num_explicit": int(SMALL * evaluate.num_explicit),
        "num_questions": int(SMALL * evaluate.num_questions),
        "num_edits": int(SMALL * evaluate.num_edits),
        "max_samples": max(2, int(SMALL * evaluate.max_samples)),
        "num_pictures": 0,
        "data": None if evaluate.data is None else name,
    }
    changed["evaluate"] = evaluate.model_copy(update=moved | fewer)
    changed["promote"] = road.promote.model_copy(update={"storage": storage, "thresholds": {}})
    return road.model_copy(update=changed)


def write_small_tar(inputs: str | list[str], number: int, out: Path, pairs_as: PairsAs = "generation") -> int:
    """The first samples of some tars, evenly of all of them, as a tar; bad ones are left out. Gives their number.

    Raises: InputError if they hold none.
    """
    shards = list_shards(inputs)
    each = math.ceil(number / len(shards))
    written = 0
    with webdataset.TarWriter(str(out), encoder=False) as writer:
        for index, shard in enumerate(shards):
            taken = 0
            for item in ShardReader(shard, ReadOptions(pairs_as)):
                if taken >= each or written >= number:
                    break
                if isinstance(item, Sample):
                    writer.write(_members(item, f"{index:05d}-{taken:06d}"))
                    taken, written = taken + 1, written + 1
    if not written:
        raise InputError(f"input {inputs!r} holds no usable sample to measure rates on")
    return written


def _members(sample: Sample, key: str) -> dict[str, Any]:
    names = [f"{number}.img" for number in range(len(sample.images))]
    messages = [{"role": message.role, "content": message.content} for message in sample.messages]
    record = {"id": key, "images": names, "messages": messages, "lang": sample.lang}
    data = io.BytesIO(json.dumps(record, ensure_ascii=False).encode()).getvalue()
    return {"__key__": key, "json": data, **dict(zip(names, sample.images, strict=True))}


def calibrations_of(reports: tuple[JobReport, ...], storage: str, name: str) -> dict[str, Calibration]:
    """Rates of a road's jobs, from its reports and the accounts that it has left in its storage."""
    found = {}
    for report in reports:
        place: tuple[str, ...]
        if report.job in MODES:
            place = ("embed", name, MODES[report.job])
        elif report.job in STAGE_JOBS.values():
            place = ("train", name, report.job.removeprefix("train "))
        elif report.job.startswith("evaluate"):
            place = ("evaluate", report.outputs["fingerprint"])
        else:
            place = (report.job, name)
        attempts = read_attempts(account_uri(storage, *place)) if report.job != "promote" else []
        work = attempts if not report.job.startswith("register") else []
        found[report.job] = calibrate(work, report.seconds, report.cpu_seconds)
    return found
