"""What running jobs tell Prometheus: metrics that go to MLflow, through the agent that Ray has on each node.

Ray puts `ray_` before the names, and serves them at the node's metrics port (`ray start --metrics-export-port`). Agents
collect every 10 s, so the last seconds of a job may be missing; MLflow has them. A job without Ray tells nothing.

Every series bears `name`, the project's, and `stage`, a training's stage or what a data job makes. Counters begin at
what is done already: at the step of a resumed training, at the samples of slices that are kept.

| MLflow | Prometheus (after `ray_`) | labels | |
|---|---|---|---|
| data/samples | nexusgen_data_samples_total | | samples read, good and bad |
| data/embedded | nexusgen_data_embedded_samples_total | | samples embedded |
| data/quarantine/CODE | nexusgen_data_quarantined_samples_total | code | samples not used, by reason |
| train/PART | nexusgen_train_loss | part | `loss`, the weighted sum, and its parts: ce, mse, cosine, flow |
| eval/validation/loss | nexusgen_validation_loss | | the same on held-out samples |
| train/grad_norm | nexusgen_train_gradient_norm | | before clipping |
| its step | nexusgen_train_steps_total | | steps made |
| train/skipped_steps | nexusgen_train_skipped_steps_total | | steps that changed no weight |
| train/samples_per_s | nexusgen_train_samples_per_second | | all ranks |
| train/tokens_per_s | nexusgen_train_tokens_per_second | | all ranks |
| train/data_wait_fraction | nexusgen_train_data_wait_ratio | | share of a step's time spent waiting for data |
| train/mfu | nexusgen_train_mfu_ratio | | share of the GPUs' peak; only where that is known |
| train/checkpoint_s | nexusgen_train_checkpoint_seconds | | a histogram; Ray makes its sum of the middles of buckets |
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.runtime import is_ray_initialised

_LABELS = ("name", "stage")
_LOSSES = ("loss", "ce", "mse", "cosine", "flow")
_QUARANTINE = "data/quarantine/"
_SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


@dataclass(frozen=True)
class Exported:
    """One metric of Prometheus: `kind` is counter, gauge or histogram; `label` one that it has beside _LABELS."""

    name: str
    kind: str
    what: str
    label: str = ""


STEPS = Exported("nexusgen_train_steps_total", "counter", "Steps made")
QUARANTINED = Exported("nexusgen_data_quarantined_samples_total", "counter", "Samples not used, by reason", "code")
LOSS = Exported("nexusgen_train_loss", "gauge", "Weighted sum of losses (part=loss), and its parts", "part")
EXPORTED = {
    "data/samples": Exported("nexusgen_data_samples_total", "counter", "Samples read, good and bad"),
    "data/embedded": Exported("nexusgen_data_embedded_samples_total", "counter", "Samples embedded"),
    "eval/validation/loss": Exported("nexusgen_validation_loss", "gauge", "Loss of held-out samples"),
    "train/grad_norm": Exported("nexusgen_train_gradient_norm", "gauge", "Norm of the gradient before clipping"),
    "train/skipped_steps": Exported("nexusgen_train_skipped_steps_total", "counter", "Steps that changed no weight"),
    "train/samples_per_s": Exported("nexusgen_train_samples_per_second", "gauge", "Samples per second, all ranks"),
    "train/tokens_per_s": Exported("nexusgen_train_tokens_per_second", "gauge", "Tokens per second, all ranks"),
    "train/data_wait_fraction": Exported("nexusgen_train_data_wait_ratio", "gauge", "Share of time waiting for data"),
    "train/mfu": Exported("nexusgen_train_mfu_ratio", "gauge", "Share of the GPUs' peak arithmetic that is used"),
    "train/checkpoint_s": Exported("nexusgen_train_checkpoint_seconds", "histogram", "Time to store a checkpoint"),
}
ALL = (STEPS, QUARANTINED, LOSS, *EXPORTED.values())


class Exporter:
    """Tells what one run logs, under the labels of that run."""

    def __init__(self, name: str, stage: str) -> None:
        self._labels = {"name": name, "stage": stage}
        self._counted: dict[tuple[str, str], float] = {}

    def export(self, metrics: Mapping[str, float], step: int) -> None:
        """Tell those of `metrics`, by MLflow's names, that are in the table; nothing where Ray doesn't run."""
        if not is_ray_initialised():
            return
        for name, value in metrics.items():
            kind, _, last = name.rpartition("/")
            if name in EXPORTED:
                self._tell(EXPORTED[name], value)
            elif name.startswith(_QUARANTINE):
                self._tell(QUARANTINED, value, last)
            elif kind == "train" and last in _LOSSES:
                self._tell(LOSS, value, last)
        if "train/loss" in metrics:
            self._tell(STEPS, step)

    def _tell(self, exported: Exported, value: float, label: str = "") -> None:
        metric = _ray_metric(exported)
        labels = {**self._labels, exported.label: label} if exported.label else self._labels
        if exported.kind == "gauge":
            metric.set(value, labels)
        elif exported.kind == "histogram":
            metric.observe(value, labels)
        else:
            key = (exported.name, label)
            grown = value - self._counted.get(key, 0.0)  # MLflow is told totals
            if grown > 0:
                metric.inc(grown, labels)
                self._counted[key] = value


@functools.cache
def _ray_metric(exported: Exported) -> Any:
    """Ray's object, one for each name and process."""
    from ray.util import metrics

    keys = (*_LABELS, exported.label) if exported.label else _LABELS
    if exported.kind == "histogram":
        return metrics.Histogram(exported.name, exported.what, boundaries=list(_SECONDS), tag_keys=keys)
    return {"counter": metrics.Counter, "gauge": metrics.Gauge}[exported.kind](exported.name, exported.what, keys)
