"""What a training will take, told before it starts: parameters, memory of each device by part, steps, tokens, time.

Parameters, steps and tokens are counts, from the headers of the model's files and from the plan of the first epoch.
Activations and time are estimates; their assumptions stand beside them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nexusgen.memory import tensor_sizes, weight_bytes
from nexusgen.model.autoregressive import AutoregressiveModel
from nexusgen.model.decoder import make_conditioner
from nexusgen.model.manifest import Manifest, read_manifest
from nexusgen.model.weights import DECODER_FOLDERS, editing_decoder_config, read_autoregressive_config
from pipelines.loop import PRECISIONS, open_training
from pipelines.lora import LoraConfig, add_adapters
from pipelines.parallel import resolve_precision
from pipelines.registry import pin_model, resolve_model
from pipelines.stages import STAGES

if TYPE_CHECKING:
    from pipelines.train import TrainConfig

GB = 1e9
FP32_BYTES, BF16_BYTES = 4, 2
ACTIVATION_BYTES = 34  # of a layer in 16 bits, per token and hidden number, without squares of attention
GPU_PEAK_FLOPS = 989e12  # of an H100 or H200 in bf16, dense (NVIDIA's data sheets)
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
            speed = f"{GPU_UTILISATION:.0%} of {GPU_PEAK_FLOPS / 1e12:.0f} TFLOP/s"
            lines.append((f"hours, at {speed} per worker", f"{self.gpu_hours:,.1f}"))
        return lines

    def to_json(self) -> dict[str, Any]:
        """A mapping that `json.dumps` takes."""
        return asdict(self)


def plan_training(config: TrainConfig) -> TrainingPlan:
    """Plan a training without starting anything.

    Memory: weights, gradients and AdamW's two moments in fp32, divided by the workers that share them
    (the fewest, where their number may change). Activations are
    34 bytes per token, hidden number and layer (Korthikanti et al., arXiv 2205.05198, section 4, without the squares of
    attention), or 2 of them and one whole layer where they are computed again. A step takes 6 operations per parameter
    and computed token, 8 where activations are computed again; 2 less for a frozen one, which has no gradient. Frozen
    matrices are held in the forward's precision; adapters' activations, with those of the layers, aren't counted apart.
    Raises: as `train`, before it starts a worker.
    """
    model = pin_model(config.model, config.storage)
    folder = resolve_model(model, config.storage)
    manifest = read_manifest(folder)
    _, plan = open_training(config, manifest)
    hidden, num_layers, vocabulary = _shape(config, folder)
    planned = list(itertools.islice(plan.steps(), min(config.num_steps, MAX_PLANNED_STEPS)))
    real = sum(plan.num_tokens(step.rows) for step in planned)
    padded = [plan.num_padded_tokens(rows) for step in planned for rows in step.rows_of(0, 1, config.num_micro_batches)]
    largest = max(padded)

    sharing = config.min_workers if config.parallelism == "fsdp" else 1
    precision = resolve_precision(config.precision, config.gpus_per_worker > 0)
    if config.lora is None:
        parameters, frozen, frozen_bytes = num_trained(config, folder, manifest), 0, 0
    else:
        parameters, frozen, frozen_bytes = _count_adapted(config.lora, folder, manifest, PRECISIONS[precision])
    state = FP32_BYTES * parameters // sharing
    forward_bytes = BF16_BYTES if precision == "bf16" else FP32_BYTES
    of_layer = ACTIVATION_BYTES * largest * hidden * forward_bytes // BF16_BYTES
    kept = num_layers * largest * hidden * forward_bytes + of_layer
    memory = {"weights": state, "gradients": state, "optimizer": 2 * state}
    if frozen:
        memory["weights, frozen"] = frozen_bytes // sharing
    if config.ema_decay:
        memory["averaged weights"] = state
    if "vae" in STAGES[config.stage].parts:
        memory["autoencoder, frozen"] = weight_bytes(folder, "vae", torch.float32)
    if sharing > 1:
        memory["two gathered layers (estimate)"] = 2 * forward_bytes * (parameters + frozen) // num_layers
    memory["activations (estimate)"] = kept if config.activation_checkpointing else num_layers * of_layer
    if vocabulary:
        memory["logits and their gradients (estimate)"] = 2 * FP32_BYTES * largest * vocabulary

    share = config.num_steps / len(planned)
    computed = sum(padded) * share
    of_trained = 8 if config.activation_checkpointing else 6
    flops = (of_trained * parameters + (of_trained - 2) * frozen) * computed
    speed = config.max_workers * GPU_PEAK_FLOPS * GPU_UTILISATION
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


def num_trained(config: TrainConfig, folder: Path, manifest: Manifest) -> int:
    """Parameters that a stage trains in full, from the headers of the model's files."""
    if config.stage == "ar":
        return sum(count for name, count in tensor_sizes(folder, "autoregressive") if not name.startswith("visual."))
    if config.stage in manifest.parts:
        return sum(count for _, count in tensor_sizes(folder, config.stage))
    # An editing decoder that starts from the generation decoder's transformer, under a conditioner of its own.
    with torch.device("meta"):
        conditioner = make_conditioner(editing_decoder_config(folder, manifest))
    transformer = tensor_sizes(folder, "generation_decoder")
    return sum(count for name, count in transformer if name.startswith("transformer.")) + sum(
        parameter.numel() for parameter in conditioner.parameters()
    )


def _count_adapted(
    lora: LoraConfig, folder: Path, manifest: Manifest, frozen_dtype: torch.dtype
) -> tuple[int, int, int]:
    """Parameters of stage ar with adapters, trained and frozen, and bytes of the latter; nothing is loaded."""
    with torch.device("meta"):
        module = AutoregressiveModel(read_autoregressive_config(folder / "autoregressive"), manifest.geometry)
        module.qwen.model.visual = torch.nn.Identity()
        add_adapters(module, lora, frozen_dtype)
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
    return trained, sum(parameter.numel() for parameter in frozen), sum(parameter.nbytes for parameter in frozen)


def _shape(config: TrainConfig, folder: Path) -> tuple[int, int, int]:
    """Hidden size, number of layers, and vocabulary (0 where there is none)."""
    if config.stage == "ar":
        text = read_autoregressive_config(folder / "autoregressive").text_config
        return text.hidden_size, text.num_hidden_layers, text.vocab_size
    place = folder / DECODER_FOLDERS[config.stage]
    if not place.is_dir():
        place = folder / DECODER_FOLDERS["generation_decoder"]
    sizes = json.loads((place / "transformer" / "config.json").read_text(encoding="utf-8"))
    num_layers = sizes["num_layers"] + sizes["num_single_layers"]
    return sizes["num_attention_heads"] * sizes["attention_head_dim"], num_layers, 0
