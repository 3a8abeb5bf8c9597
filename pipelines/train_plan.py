"""What a training will take, told before it starts: parameters, memory of each device by part, steps, tokens, time.

Parameters, steps and tokens are counts, from the model's configuration and from the plan of the first epoch.
Activations and time are estimates; their assumptions stand beside them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nexusgen.errors import ModelError, ResourceError
from nexusgen.memory import weight_bytes
from nexusgen.model.autoregressive import AutoregressiveModel
from nexusgen.model.decoder import VisionDecoder
from nexusgen.model.manifest import Manifest, read_manifest
from nexusgen.model.weights import hollow_part
from pipelines import storage
from pipelines.flops import peak_flops, work_of
from pipelines.loop import PRECISIONS, open_training
from pipelines.lora import add_adapters
from pipelines.parallel import resolve_precision
from pipelines.registry import pin_model, resolve_model
from pipelines.stages import STAGES

if TYPE_CHECKING:
    from pipelines.train import TrainConfig

GB = 1e9
FP32_BYTES, BF16_BYTES = 4, 2
ACTIVATION_BYTES = 34  # of a layer in 16 bits, per token and hidden number, without squares of attention
GPU = "H100"  # whose time is told; an H200's is the same
GPU_UTILISATION = 0.4  # assumed share of it
MAX_PLANNED_STEPS = 2000  # whose tokens are counted; the rest is taken to be like them


@dataclass(frozen=True)
class TrainingPlan:
    """Numbers of a training; `memory` in bytes of one device, by part."""

    parameters: int  # that are trained
    memory: Mapping[str, int]
    num_steps: int
    tokens: int  # of all steps, padding not included
    padding_fraction: float  # of the tokens that are computed
    flops: float  # of all steps
    gpu_hours: float | None  # with the most workers at work; None on CPUs
    frozen: int = 0  # parameters of the module that aren't trained

    def rows(self) -> list[tuple[str, str]]:
        """The plan as lines of a table."""
        lines = [("parameters that are trained", f"{self.parameters:,}")]
        if self.frozen:
            lines.append(("parameters that are frozen", f"{self.frozen:,}"))
        lines += [(f"GB of a device: {part}", f"{size / GB:.3f}") for part, size in self.memory.items()]
        lines += [
            ("GB of a device, in all", f"{sum(self.memory.values()) / GB:.3f}"),
            ("steps", f"{self.num_steps:,}"),
            ("tokens", f"{self.tokens:,}"),
            ("padding, share of what is computed", f"{self.padding_fraction:.3f}"),
            ("PFLOP", f"{self.flops / 1e15:,.3f}"),
        ]
        if self.gpu_hours is not None:
            speed = f"{GPU_UTILISATION:.0%} of an {GPU}'s {_gpu_peak() / 1e12:.0f} TFLOP/s"
            lines.append((f"hours, at {speed} per worker", f"{self.gpu_hours:,.1f}"))
        return lines

    def to_json(self) -> dict[str, Any]:
        """A mapping that `json.dumps` takes."""
        return asdict(self)


def plan_training(config: TrainConfig) -> TrainingPlan:
    """Plan a training without starting anything.

    Memory: weights, gradients and AdamW's two moments in fp32, divided by the workers that share them (the fewest,
    where their number may change). Activations are 34 bytes per token, hidden number and layer (Korthikanti et al.,
    arXiv 2205.05198, section 4, without the squares of attention), or 2 of them and one whole layer where they are
    computed again. Operations are those of `ModelWork.flops` for the tokens that are computed, padding among them.
    Frozen matrices are held in the forward's precision; adapters' activations, with those of the layers, aren't counted
    apart. Of embeddings made online the tower's memory is told, and its time isn't.
    Raises: as `train`, before it starts a worker; ResourceError at once if a store doesn't answer.
    """
    try:
        with storage.impatient():
            model = pin_model(config.model, config.storage)
            folder = resolve_model(model, config.storage)
            manifest = read_manifest(folder)
            _, plan = open_training(config, manifest)
    except ResourceError as error:
        raise ResourceError(
            f"dry_run reads the sizes of model={config.model} and the lengths of the data in storage={config.storage}, "
            f"and a store didn't answer: {error}; name a model and a storage that can be read, or check AWS_*"
        ) from None
    precision = resolve_precision(config.precision, config.gpus_per_worker > 0)
    module = _module_of(config, folder, manifest, PRECISIONS[precision])
    work = work_of(module)
    hidden, num_layers = work.hidden, work.num_layers
    vocabulary = module.text_config.vocab_size if isinstance(module, AutoregressiveModel) else 0
    planned = list(itertools.islice(plan.steps(), min(config.num_steps, MAX_PLANNED_STEPS)))
    real = sum(plan.num_tokens(step.rows) for step in planned)
    micro_batches = [rows for step in planned for rows in step.rows_of(0, 1, config.num_micro_batches)]
    padded = [plan.num_padded_tokens(rows) for rows in micro_batches]
    largest = max(padded)

    sharing = config.min_workers if config.parallelism == "fsdp" else 1
    parameters = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    of_frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
    frozen = sum(parameter.numel() for parameter in of_frozen)
    frozen_bytes = sum(parameter.nbytes for parameter in of_frozen)
    state = FP32_BYTES * parameters // sharing
    forward_bytes = BF16_BYTES if precision == "bf16" else FP32_BYTES
    of_layer = ACTIVATION_BYTES * largest * hidden * forward_bytes // BF16_BYTES
    kept = num_layers * largest * hidden * forward_bytes + of_layer
    memory = {"weights": state, "gradients": state, "optimizer": 2 * state}
    if frozen:
        memory["weights, frozen"] = frozen_bytes // sharing
    if config.ema_decay:
        memory["averaged weights"] = state
    if config.embeddings == "online":
        tower = hollow_part(folder, manifest, "autoregressive")
        assert isinstance(tower, AutoregressiveModel)
        num_parameters = sum(parameter.numel() for parameter in tower.qwen.model.visual.parameters())
        memory["vision tower, frozen"] = num_parameters * (BF16_BYTES if config.gpus_per_worker else FP32_BYTES)
    if "vae" in STAGES[config.stage].parts:
        memory["autoencoder, frozen"] = weight_bytes(folder, "vae", torch.float32)
    if sharing > 1:
        memory["two gathered layers (estimate)"] = 2 * forward_bytes * (parameters + frozen) // num_layers
    memory["activations (estimate)"] = kept if config.activation_checkpointing else num_layers * of_layer
    if vocabulary:
        memory["logits and their gradients (estimate)"] = 2 * FP32_BYTES * largest * vocabulary

    share = config.num_steps / len(planned)
    computed = sum(padded) * share
    num_samples = sum(len(rows) for rows in micro_batches) * share
    flops = work.flops(computed, num_samples, recomputes=config.activation_checkpointing)
    speed = config.max_workers * _gpu_peak() * GPU_UTILISATION
    return TrainingPlan(
        parameters=parameters,
        memory=memory,
        num_steps=config.num_steps,
        tokens=round(real * share),
        padding_fraction=1 - real * share / computed,
        flops=flops,
        gpu_hours=flops / speed / 3600 if config.gpus_per_worker else None,
        frozen=frozen,
    )


def _module_of(
    config: TrainConfig, folder: Path, manifest: Manifest, frozen_dtype: torch.dtype
) -> AutoregressiveModel | VisionDecoder:
    """The module that a stage trains, on meta. Raises: ModelError if the folder lacks a part that the stage needs."""
    stage = STAGES[config.stage]
    missing = stage.missing_parts(manifest.parts)
    if missing:
        raise ModelError(f"model={config.model} lacks {', '.join(missing)}, which stage {config.stage} trains")
    module = hollow_part(folder, manifest, stage.parts[0])
    if isinstance(module, AutoregressiveModel):
        module.qwen.model.visual = nn.Identity()
        if config.lora is not None:
            add_adapters(module, config.lora, frozen_dtype)
    return module


def _gpu_peak() -> float:
    peak = peak_flops(GPU)
    assert peak is not None
    return peak
