"""`nexusgen reproduce`: the paper's claims, tried on the demo's model: arms that differ in one thing, several seeds.

| experiment | arms | what they are measured by |
|---|---|---|
| prefill-ablation | query embeddings, or embeddings themselves, at image positions | errors by position, scores |
| loss-weights | both parts of the image loss, or one of them | the same |
| decoder-inputs | the decoder learns from the encoder's embeddings, or from predicted ones | scores |

All draw on one pool of trials (`trials.py`), so that experiments share the arms that they have in common, and one that
is started again goes on where it stopped. A seed decides the order of the data and the noise that a decoder learns
from; all trials of a kind start from the same base. Tables and figures are made by `trial_report.py`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from nexusgen.config import Config
from nexusgen.model.manifest import read_manifest
from nexusgen.model.weights import DRAWING_PARTS, Model, load_model, load_trained
from nexusgen.replies import ImageMode
from nexusgen.schema import EmbedMode
from pipelines import embedded, storage
from pipelines.arms import AR_ARMS, PredictedInputsStage, PrefilledArm
from pipelines.embed import EmbedConfig, embed
from pipelines.loaded_slice import LoadedSlice, columns_of
from pipelines.loop import open_training
from pipelines.pack import PackConfig, pack
from pipelines.parallel import resolve_precision
from pipelines.registry import resolve_model
from pipelines.runtime import ray_cluster
from pipelines.stages import AnyStage, GenerationDecoderStage
from pipelines.train import TrainConfig
from pipelines.trial_measures import BATCH_SIZE, measure_errors, score_predictions, score_true_embeddings
from pipelines.trials import Trial, digest_of, keep, tell, train_trial

Experiment = Literal["prefill-ablation", "loss-weights", "decoder-inputs"]
ARMS: Mapping[Experiment, tuple[str, ...]] = {
    "prefill-ablation": ("prefilled", "naive", "naive-longer"),
    "loss-weights": ("prefilled", "without-mse", "without-cosine"),
    "decoder-inputs": ("encoder", "predicted"),
}
NO_SPIKES = 1e9  # max_gradient_ratio of arms that take every step
# What a training's configuration says about where and when, not about what is computed.
_IDLE_KEYS = {
    "storage", "name", "model", "data", "dry_run", "fresh", "log_every", "checkpoint_every", "keep_checkpoints",
    "max_restarts", "max_skipped_steps", "cpus_per_worker", "threads_per_worker", "gpus_per_worker",
}  # fmt: skip


class ReproduceConfig(Config):
    """How large the experiments are; each job has its own settings, as in the demo's road."""

    storage: str = Field(description="folder for data, trials and reports")
    name: str
    model: str = Field(description="the base that every trial starts from")
    num_seeds: int = Field(default=3, ge=1, description="trials of each arm: seeds 0 to num_seeds - 1")

    pack: PackConfig
    embed_vision: EmbedConfig
    embed_latents: EmbedConfig
    train_ar: TrainConfig
    train_generation_decoder: TrainConfig

    num_samples: int = Field(default=256, ge=1, description="held-out samples of each task whose errors are measured")
    per_category: int = Field(default=24, ge=1, description="held-out short prompts of each of the six categories")
    num_explicit: int = Field(default=96, ge=1, description="held-out explicit captions")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if storage.is_remote(self.storage):
            raise ValueError(f"storage {self.storage}: an experiment is kept in a local folder; name one")
        if not self.train_ar.validation_fraction:
            raise ValueError("train_ar.validation_fraction is 0: errors are measured on held-out samples")
        return self


@dataclass(frozen=True)
class Result:
    """What came of an experiment: of each arm its trials, in order of the seeds.

    A trial is {"training": as `train_trial`, "errors": as `measure_errors`, "scores": as `score_predictions`}; of
    decoder-inputs it has no errors, but "scores_of_true", as `score_true_embeddings`.
    """

    experiment: Experiment
    trials: Mapping[str, list[dict[str, Any]]]
    decoder: dict[str, Any] | None  # the one that all of ar's arms are drawn with: "training", "scores_of_true"
    seconds: Mapping[str, float]  # of the data's preparation and of the whole, in this call


def reproduce(config: ReproduceConfig, experiment: Experiment) -> Result:
    """Make the data, train and measure every arm with every seed; what is finished is kept.

    Raises: as `pack`, `embed` and `train_trial`; ModelError if there is no such model.
    """
    started = time.monotonic()
    config = config.model_copy(update={"storage": storage.absolute(config.storage)})
    _make_data(config)
    prepared = time.monotonic() - started
    with _one_thread():
        laboratory = _Laboratory(config)
        seeds = range(config.num_seeds)
        decoder = None
        if experiment == "decoder-inputs":
            work = laboratory.compare_decoder
        else:
            decoder = laboratory.shared_decoder()
            work = laboratory.compare_ar
        trials: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS[experiment]}
        for seed in seeds:  # in turn, so that whatever else the machine does meets all arms alike
            for arm in ARMS[experiment]:
                trials[arm].append(work(arm, seed))
    return Result(experiment, trials, decoder, {"data": prepared, "total": time.monotonic() - started})


def _make_data(config: ReproduceConfig) -> None:
    """Tars and embeddings, on one Ray cluster, if any are missing."""
    pack(config.pack)
    jobs = (config.embed_vision, config.embed_latents)
    places = [embedded.folder_of(job.storage, job.name, job.mode) for job in jobs]
    is_there = all(storage.exists(storage.join(place, embedded.MANIFEST_NAME)) for place in places)
    with nullcontext() if is_there else ray_cluster(max(job.num_encoders for job in jobs), "the experiment's data"):
        for job in jobs:
            embed(job)


@contextmanager
def _one_thread() -> Iterator[None]:
    """As in a worker of `train`: sums in another order would change last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Laboratory:
    """Trials on one set of data, trained and measured as they are asked for."""

    def __init__(self, config: ReproduceConfig) -> None:
        self._config = config
        self._folder = resolve_model(config.model, config.storage)
        self._base = read_manifest(self._folder).fingerprint

    def compare_ar(self, arm: str, seed: int) -> dict[str, Any]:
        """A trial of an arm of stage ar, its errors and scores."""
        trial = self._ar_trial(arm, seed)
        training = self._train_ar(trial)
        decoder = self._decoder_trial("encoder", 0)
        settings = {
            "trial": digest_of(trial.settings),
            "decoder": digest_of(decoder.settings),
            "num_samples": self._config.num_samples,
            **self._prompts,
        }

        def measure() -> dict[str, Any]:
            tell(trial, "measured")
            started, cpu_started = time.monotonic(), time.process_time()
            stage = self._trained_arm(trial)
            data, _ = open_training(trial.config, read_manifest(self._folder))
            errors = measure_errors(stage, data, self._config.num_samples)
            scores = score_predictions(self._model(trial, decoder), stage.image_mode, **self._prompts)
            return {
                "errors": errors,
                "scores": scores,
                "seconds": time.monotonic() - started,
                "cpu_seconds": time.process_time() - cpu_started,
            }

        return {"training": training, **keep(trial.folder / "measured.json", settings, measure)}

    def compare_decoder(self, arm: str, seed: int) -> dict[str, Any]:
        """A trial of the generation decoder, and its scores: on predictions of the language model of the same seed,
        whose predictions the arm `predicted` has learned from, and on true embeddings."""
        predictor, trial = self._ar_trial("prefilled", seed), self._decoder_trial(arm, seed)
        self._train_ar(predictor)
        training = self._train_decoder(trial)
        settings = {"trial": digest_of(trial.settings), "predictor": digest_of(predictor.settings), **self._prompts}

        def measure() -> dict[str, Any]:
            tell(trial, "measured")
            model = self._model(predictor, trial)
            return {
                "scores": score_predictions(model, ImageMode.ONE_PASS, **self._prompts),
                "scores_of_true": score_true_embeddings(model, **self._prompts),
            }

        return {"training": training, **keep(trial.folder / "measured.json", settings, measure)}

    def shared_decoder(self) -> dict[str, Any]:
        """The decoder that every arm of stage ar is drawn with: trained as in the demo, with seed 0."""
        trial = self._decoder_trial("encoder", 0)
        training = self._train_decoder(trial)
        settings = {"trial": digest_of(trial.settings), **self._prompts}

        def measure() -> dict[str, Any]:
            model = self._model(None, trial)
            return {"scores_of_true": score_true_embeddings(model, **self._prompts)}

        return {"training": training, **keep(trial.folder / "ceiling.json", settings, measure)}

    @property
    def _prompts(self) -> dict[str, int]:
        return {"per_category": self._config.per_category, "num_explicit": self._config.num_explicit}

    # --- trials ---

    def _ar_trial(self, arm: str, seed: int) -> Trial:
        config = self._config.train_ar
        of_arm = AR_ARMS[arm]
        changes: dict[str, Any] = {"num_steps": round(config.num_steps * of_arm.steps_factor)}
        if not of_arm.skips_spikes:
            changes["max_gradient_ratio"] = NO_SPIKES
        return self._trial("ar", arm, seed, config.model_copy(update=changes), {})

    def _decoder_trial(self, arm: str, seed: int) -> Trial:
        inputs = {"predictor": digest_of(self._ar_trial("prefilled", seed).settings)} if arm == "predicted" else {}
        return self._trial("decoder", arm, seed, self._config.train_generation_decoder, inputs)

    def _trial(self, kind: str, arm: str, seed: int, config: TrainConfig, inputs: Mapping[str, Any]) -> Trial:
        precision = resolve_precision(config.precision, on_gpu=False)
        config = config.model_copy(update={"seed": seed, "precision": precision, "storage": self._config.storage})
        modes: tuple[EmbedMode, ...] = ("vision",) if kind == "ar" else ("vision", "latents")
        settings = {
            "arm": arm,
            "base": self._base,
            "data": [embedded.read_manifest(config.storage, config.name, mode).digest for mode in modes],
            "training": config.model_dump(mode="json", exclude=_IDLE_KEYS),
            **inputs,
        }
        return Trial(config.storage, kind, arm, seed, config, settings)

    def _train_ar(self, trial: Trial) -> dict[str, Any]:
        return train_trial(trial, AR_ARMS[trial.arm])

    def _train_decoder(self, trial: Trial) -> dict[str, Any]:
        config = trial.config

        def make_stage(folder: Path) -> AnyStage:
            if trial.arm == "encoder":
                return GenerationDecoderStage(folder, config.levels, config.conditioning_dropout)
            predictions = self._predict_all(self._ar_trial("prefilled", trial.seed))
            return PredictedInputsStage(folder, config.levels, config.conditioning_dropout, predictions)

        return train_trial(trial, make_stage)

    # --- trained models ---

    def _trained_arm(self, trial: Trial) -> PrefilledArm:
        stage = AR_ARMS[trial.arm](self._folder)
        stage.fill(torch.device("cpu"))
        load_trained(stage.module, trial.weights)
        stage.module.eval()
        return stage

    def _model(self, ar: Trial | None, decoder: Trial) -> Model:
        """The base with a trial's language model (None: the base's own) and a trial's decoder, for inference."""
        model = load_model(self._folder, DRAWING_PARTS)
        assert model.autoregressive is not None
        assert model.generation_decoder is not None
        if ar is not None:
            load_trained(model.autoregressive, ar.weights)
        load_trained(model.generation_decoder, decoder.weights)
        return model

    @torch.no_grad()
    def _predict_all(self, trial: Trial) -> dict[str, Float[Tensor, "tokens hidden"]]:
        """What a trained language model predicts for the last picture of every sample that draws, by key."""
        tell(trial, "predicts all pictures")
        stage = self._trained_arm(trial)
        count = stage.module.geometry.num_target_tokens
        found: dict[str, Float[Tensor, "tokens hidden"]] = {}
        for info in embedded.list_slices(trial.config.storage, trial.config.name, "vision"):
            table = embedded.read_slice(info, columns_of(stage, "vision"))
            loaded = LoadedSlice({"vision": table}, stage, info.uri)
            samples = {key: loaded.prepared(place) for place, key in enumerate(loaded.keys)}
            drawn = [(key, sample) for key, sample in samples.items() if len(sample.targets)]
            for first in range(0, len(drawn), BATCH_SIZE):
                keys, batch = zip(*drawn[first : first + BATCH_SIZE], strict=True)
                predictions = stage.module.predict_targets(stage.collate(batch))
                by_sample = predictions.split([len(sample.targets) for sample in batch])
                found |= {key: of_sample[-count:] for key, of_sample in zip(keys, by_sample, strict=True)}
        return found
