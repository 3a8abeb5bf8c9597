"""Equality of both vision decoders with the reference: conditioner, prediction, training step and Euler sampling.

The README of a golden set gives the mathematics. A set may hold any subset of the cases, at any sizes that its files
state; every tensor that it holds, and every number of its training steps, is compared.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Shaped
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from nexusgen import flow_matching
from nexusgen.comparison import (
    BF16_TOLERANCE,
    FP32_TOLERANCE,
    GRADIENT_TOLERANCE,
    Case,
    compare,
    compare_exact,
    compare_l2,
    computed,
    not_compared,
    read_expected,
    say_nothing,
)
from nexusgen.errors import InputError
from nexusgen.losses import total_loss
from nexusgen.model.conditioners import MergerConfig
from nexusgen.model.decoder import ConditionerKind, VisionDecoder, load_decoder
from nexusgen.model.decoder_keys import RELEASED_CONDITIONERS, to_released
from nexusgen.model.released import import_model
from nexusgen.model.tensors import iterate_file
from nexusgen.model.weights import DECODER_FOLDERS
from nexusgen.positions import flux_image_ids, merger_positions

Recorded = Mapping[str, Shaped[Tensor, "..."]]


# The file of weights that makes a folder a golden set, and the kind of decoder it holds.
DECODER_FILES: Mapping[str, ConditionerKind] = {"generation_decoder.bin": "generation", "edit_decoder.bin": "editing"}


# Tensors of io.safetensors that nothing is compared with; all others must be.
_INPUTS = {"embeds", "ref_embeds", "pooled_clip", "neg_prompt_emb", "pred.latents", "pred.timestep", "train.latents"}
_INPUTS |= {"train.noise", "euler.start_noise_seed42", "odd.embeds", "odd.ref_embeds"}
_CASE_NAMES = {"train.text_ids": "text_ids", "train.image_ids": "image_ids"}


class _Transformer(BaseModel):
    axes: tuple[int, int, int]


class _RopeScaling(BaseModel):
    mrope_section: tuple[int, int, int]


class _Merger(BaseModel):
    intermediate_size: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: _RopeScaling


class _TrainingStep(BaseModel):
    """`timestep_id` is the row of the table of 1000 noise levels; what else it says is compared."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float]

    timestep_id: int = Field(ge=0, lt=1000)


class _Sampling(BaseModel):
    cfg_scale: float
    num_inference_steps: int = Field(gt=0)


class _Expected(BaseModel):
    """What `expected.json` states. Its runs of the sampler stand beside the rest, under names that begin with euler."""

    model_config = ConfigDict(extra="allow")

    dit: _Transformer
    embedded_guidance: float | None = None
    train: tuple[_TrainingStep, ...] = ()
    merger_config: _Merger | None = None
    expand_ratio: int = 4


@dataclass(frozen=True)
class _GoldenSet:
    """One golden set of a decoder: its tensors and sizes, and the decoder that the released file makes."""

    folder: Path
    kind: ConditionerKind
    expected: _Expected
    recorded: Recorded
    decoder: VisionDecoder

    def name(self, case: str) -> str:
        return f"{self.kind}_decoder.{case}"

    def has(self, *names: str) -> bool:
        return all(name in self.recorded for name in names)

    @property
    def reference(self) -> Tensor | None:
        return self.recorded.get("ref_embeds")


def verify_decoder(folder: Path, skipped: Callable[[str], None] = say_nothing) -> Iterator[Case]:
    """Run every case of a golden set of a decoder; `skipped` is told each case in `expected.json` without tensors.

    Raises: InputError if `expected.json` can't be used; ModelError if weights or tensors can't be loaded.
    """
    for kind in [kind for name, kind in DECODER_FILES.items() if (folder / name).is_file()]:
        yield from _verify_kind(folder, kind, skipped)


def _verify_kind(folder: Path, kind: ConditionerKind, skipped: Callable[[str], None]) -> Iterator[Case]:
    expected = read_expected(folder, _Expected)
    recorded = dict(iterate_file(folder / "io.safetensors"))
    golden = _GoldenSet(folder, kind, expected, recorded, golden_decoder(folder, kind, torch.float32))
    compared = set()
    for case in _cases(golden):
        compared.add(case.name.partition(" (")[0].removeprefix(golden.name("")))
        yield case
    outputs = {_CASE_NAMES.get(name, name) for name in golden.recorded if name not in _INPUTS}
    for name in sorted(outputs - compared):
        yield not_compared(golden.name(name), "a tensor that it is computed from is missing, or the name is unknown")
    for name in [*(f"train{index}" for index in range(len(expected.train))), *_sampling_runs(golden)]:
        if not any(case.startswith(f"{name}.") for case in compared):
            skipped(f"{golden.name(name)}: its tensors aren't in this set")


def _cases(golden: _GoldenSet) -> Iterator[Case]:
    steps = [(f"train{i}", _training_step(golden, f"train{i}", s)) for i, s in enumerate(golden.expected.train)]
    runs = [(name, _sampling(golden, name, run)) for name, run in _sampling_runs(golden).items()]
    for name, cases in (
        ("weights", _weights(golden)),
        ("context", _context(golden)),
        ("pred", _prediction(golden)),
        ("sched", _schedule(golden)),
        *steps,
        *runs,
        ("euler.noref2", _sampling_without_reference(golden)),
    ):
        yield from computed(golden.name(name), cases)


def _sampling_runs(golden: _GoldenSet) -> dict[str, _Sampling]:
    """Raises: InputError naming a run that says too little."""
    runs = {}
    for name, values in (golden.expected.model_extra or {}).items():
        if name.startswith("euler."):
            try:
                runs[name] = _Sampling.model_validate(values)
            except ValidationError as error:
                reason = f"{name}: {error.errors(include_url=False)[0]['msg']}"
                raise InputError(f"{golden.folder / 'expected.json'}: {reason}") from None
    return runs


def golden_decoder(folder: Path, kind: ConditionerKind, dtype: torch.dtype) -> VisionDecoder:
    """The decoder of a golden set: its released file imported, at the sizes that the set states, and loaded."""
    expected = read_expected(folder, _Expected)
    path = next(folder / name for name, of_kind in DECODER_FILES.items() if of_kind == kind)
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        import_model(
            model,
            generation_decoder=path if kind == "generation" else None,
            editing_decoder=path if kind == "editing" else None,
            axes_dims_rope=expected.dit.axes,
            merger=_merger_config(folder, expected) if kind == "editing" else None,
        )
        decoder = load_decoder(model / DECODER_FOLDERS[f"{kind}_decoder"], dtype)
    if expected.embedded_guidance is not None:
        decoder.config = decoder.config.model_copy(update={"guidance_scale": expected.embedded_guidance})
    return decoder


def _merger_config(folder: Path, expected: _Expected) -> MergerConfig:
    sizes = expected.merger_config
    if sizes is None:
        raise InputError(f"{folder / 'expected.json'}: merger_config is missing, which an editing decoder needs")
    return MergerConfig(
        intermediate_size=sizes.intermediate_size,
        num_attention_heads=sizes.num_attention_heads,
        num_key_value_heads=sizes.num_key_value_heads,
        rms_norm_eps=sizes.rms_norm_eps,
        rope_theta=sizes.rope_theta,
        mrope_section=sizes.rope_scaling.mrope_section,
        expand_ratio=expected.expand_ratio,
    )


def _weights(golden: _GoldenSet) -> Iterator[Case]:
    """Released names to ours and back must give the file again, bit for bit."""
    if not (golden.folder / "weights.safetensors").is_file():
        return
    exported = to_released(golden.decoder.state_dict(), golden.kind)
    want = dict(iterate_file(golden.folder / "weights.safetensors"))
    names = sorted(want)
    complete = torch.tensor(float(names == sorted(exported)))
    yield compare_exact(golden.name("weights.names"), complete, torch.ones(()))
    same = [name in exported and torch.equal(exported[name], want[name]) for name in names]
    yield compare_exact(golden.name("weights.tensors"), torch.tensor(same).float(), torch.ones(len(names)))


@torch.no_grad()
def _context(golden: _GoldenSet) -> Iterator[Case]:
    recorded, decoder = golden.recorded, golden.decoder
    if golden.has("embeds", "context"):
        context = decoder.context(recorded["embeds"], golden.reference)
        yield compare(golden.name("context"), context, recorded["context"], FP32_TOLERANCE)
    if golden.has("embeds", "context_without_ref"):
        context = decoder.context(recorded["embeds"])
        yield compare(golden.name("context_without_ref"), context, recorded["context_without_ref"], FP32_TOLERANCE)
    if golden.has("merger_position_ids"):
        want = recorded["merger_position_ids"]
        got = merger_positions([decoder.config.token_grid, decoder.reference_grid])[:, None].expand(want.shape)
        yield compare(golden.name("merger_position_ids"), got, want, FP32_TOLERANCE)
    if golden.has("odd.embeds", "odd.ref_embeds", "odd.position_ids", "odd.context"):
        want = recorded["odd.position_ids"]
        lengths = recorded["odd.embeds"].shape[1], recorded["odd.ref_embeds"].shape[1]
        target, reference = (_grid(part) for part in want[:, 0].split(lengths, dim=1))
        got = merger_positions([target, reference])[:, None]
        yield compare(golden.name("odd.position_ids"), got, want, FP32_TOLERANCE)
        context = decoder.conditioner(recorded["odd.embeds"], target, recorded["odd.ref_embeds"], reference)
        yield compare(golden.name("odd.context"), context, recorded["odd.context"], FP32_TOLERANCE)


def _grid(positions: Float[Tensor, "3 tokens"]) -> tuple[int, int]:
    """The token grid that recorded positions are of: the set states it in no other way that a program can read."""
    return len(positions[1].unique()), len(positions[2].unique())


@torch.no_grad()
def _prediction(golden: _GoldenSet) -> Iterator[Case]:
    recorded, decoder = golden.recorded, golden.decoder
    latents = recorded.get("pred.latents", recorded.get("train.latents"))
    if latents is None:
        return
    token_ids = decoder.token_ids(latents, golden.reference is not None)
    if golden.has("train.image_ids"):
        image_ids = flux_image_ids((latents.shape[-2], latents.shape[-1]))
        yield compare_exact(golden.name("image_ids"), image_ids, recorded["train.image_ids"][0])
    if golden.has("train.text_ids"):
        yield compare(golden.name("text_ids"), token_ids, recorded["train.text_ids"][0], FP32_TOLERANCE)
    if golden.has("pred.latents", "pred.timestep", "context", "pooled_clip"):
        timestep = recorded["pred.timestep"].expand(len(latents))
        conditions = recorded["context"], recorded["pooled_clip"]
        if golden.has("pred.out"):
            got = decoder.velocity(latents, timestep, *conditions, token_ids)
            yield compare(golden.name("pred.out"), got, recorded["pred.out"], FP32_TOLERANCE)
        if golden.has("pred.out_bf16"):
            in_bf16 = golden_decoder(golden.folder, golden.kind, torch.bfloat16)
            got = in_bf16.velocity(latents, timestep, *conditions, token_ids)
            yield compare_l2(golden.name("pred.out_bf16"), got, recorded["pred.out_bf16"], BF16_TOLERANCE)


def _schedule(golden: _GoldenSet) -> Iterator[Case]:
    scheduler = flow_matching.make_scheduler()
    table = flow_matching.training_table(scheduler)
    for name, got in (
        ("sched1000.timesteps", table.timesteps),
        ("sched1000.weights", table.weights),
        ("sched50.sigmas", flow_matching.inference_sigmas(scheduler, 50)[:-1]),
        ("sched50.timesteps", flow_matching.inference_sigmas(scheduler, 50)[:-1] * 1000),
    ):
        if golden.has(name):
            yield compare(golden.name(name), got, golden.recorded[name], FP32_TOLERANCE)


def _training_step(golden: _GoldenSet, name: str, step: _TrainingStep) -> Iterator[Case]:
    recorded, decoder = golden.recorded, golden.decoder
    if not golden.has("train.latents", "train.noise", "embeds", "pooled_clip"):
        return
    clean, noise = recorded["train.latents"], recorded["train.noise"]
    table = flow_matching.training_table(flow_matching.make_scheduler())
    levels = torch.full((len(clean),), step.timestep_id)
    noisy = flow_matching.interpolate(clean, noise, table.sigmas[levels])
    decoder.zero_grad()
    prediction = decoder(noisy, table.timesteps[levels], recorded["embeds"], recorded["pooled_clip"], golden.reference)
    target = flow_matching.velocity_target(clean, noise)
    parts = flow_matching.flow_loss(prediction, target, table.weights[levels])
    loss = total_loss(parts, flow_matching.FLOW_WEIGHTS)
    for part, got in (("noisy", noisy), ("pred", prediction), ("loss", loss.reshape(1))):
        if golden.has(f"{name}.{part}"):
            yield compare(golden.name(f"{name}.{part}"), got, recorded[f"{name}.{part}"], FP32_TOLERANCE)

    loss.backward()
    gradients = to_released({key: p.grad for key, p in decoder.named_parameters() if p.grad is not None}, golden.kind)
    prefix = f"{name}.grad."
    for key in sorted(key for key in recorded if key.startswith(prefix)):
        gradient = gradients.get(key.removeprefix(prefix), torch.empty(0))
        yield compare(golden.name(key), gradient, recorded[key], GRADIENT_TOLERANCE)
    level = {"timestep": table.timesteps, "sigma": table.sigmas, "weight": table.weights}
    numbers = {key: values[step.timestep_id] for key, values in level.items()}
    numbers |= {"loss": loss, "mse": (prediction - target).square().mean()}
    conditioner = RELEASED_CONDITIONERS[golden.kind]
    numbers |= {
        "grad_norm_dit": _norm(gradients, "pipe.dit."),
        f"grad_norm_{conditioner.rstrip('.')}": _norm(gradients, conditioner),
    }
    for key, stated in step.__pydantic_extra__.items():
        case = golden.name(f"{name}.expected.{key}")
        if key in numbers:
            tolerance = GRADIENT_TOLERANCE if key.startswith("grad_norm") else FP32_TOLERANCE
            yield compare(case, numbers[key].detach(), torch.tensor(stated), tolerance)
        else:
            yield not_compared(case, "a number of an unknown name in expected.json")


def _norm(gradients: Recorded, prefix: str) -> Float[Tensor, ""]:
    """Of all gradients whose names begin so, as one vector."""
    squares = [gradient.double().square().sum() for name, gradient in gradients.items() if name.startswith(prefix)]
    return torch.stack(squares).sum().sqrt()


@torch.no_grad()
def _sampling(golden: _GoldenSet, name: str, run: _Sampling) -> Iterator[Case]:
    recorded, decoder = golden.recorded, golden.decoder
    scheduler, num_steps = flow_matching.make_scheduler(), run.num_inference_steps
    sigmas = flow_matching.inference_sigmas(scheduler, num_steps)
    if golden.has(f"{name}.sigmas"):
        yield compare(golden.name(f"{name}.sigmas"), sigmas, recorded[f"{name}.sigmas"], FP32_TOLERANCE)
    if golden.has(f"{name}.timesteps"):
        yield compare(
            golden.name(f"{name}.timesteps"), sigmas[:-1] * 1000, recorded[f"{name}.timesteps"], FP32_TOLERANCE
        )
    if not golden.has("euler.start_noise_seed42", "embeds", "pooled_clip"):
        return
    if not any(golden.has(f"{name}.{part}") for part in ("trajectory", "final")):
        return
    if run.cfg_scale != 1.0 and not golden.has("neg_prompt_emb"):
        return
    start = recorded["euler.start_noise_seed42"]
    noise = flow_matching.initial_noise([42], tuple(start.shape[1:]))
    yield compare_exact(golden.name(f"{name}.start_noise"), noise, start)

    reference = golden.reference[:1] if golden.reference is not None else None
    velocity = decoder.velocity_function(
        decoder.context(recorded["embeds"][:1], reference),
        recorded["pooled_clip"],
        recorded.get("neg_prompt_emb"),
        run.cfg_scale,
        has_reference=reference is not None,
    )
    trajectory: list[Tensor] = []
    final = flow_matching.euler_sample(velocity, noise, scheduler, num_steps, lambda _, x: trajectory.append(x))
    for part, got in (("trajectory", torch.cat(trajectory)), ("final", final)):
        if golden.has(f"{name}.{part}"):
            yield compare(golden.name(f"{name}.{part}"), got, recorded[f"{name}.{part}"], FP32_TOLERANCE)


@torch.no_grad()
def _sampling_without_reference(golden: _GoldenSet) -> Iterator[Case]:
    """Two steps of the editing decoder on target embeddings alone."""
    recorded, decoder = golden.recorded, golden.decoder
    if not golden.has("euler.noref2.final", "euler.start_noise_seed42", "embeds", "pooled_clip"):
        return
    velocity = decoder.velocity_function(decoder.context(recorded["embeds"][:1]), recorded["pooled_clip"])
    noise = recorded["euler.start_noise_seed42"]
    final = flow_matching.euler_sample(velocity, noise, flow_matching.make_scheduler(), 2)
    yield compare(golden.name("euler.noref2.final"), final, recorded["euler.noref2.final"], FP32_TOLERANCE)
