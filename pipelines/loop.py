"""The training loop that every worker runs: from the last checkpoint to the last step, the same on any number of ranks.

Losses, counts and gradients are summed over the ranks in one flat all-reduce each, so that results don't depend on how
gradients are bucketed. Rank 0 logs, validates and writes checkpoints. No Ray here.
"""

from __future__ import annotations

import contextlib
import functools
import math
import operator
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from nexusgen.errors import NexusgenError
from nexusgen.losses import total_loss
from nexusgen.model.manifest import Manifest, read_manifest
from pipelines import checkpoint, process_use, tracking
from pipelines.accounting import Account, account_uri
from pipelines.batches import Batch, Plan, iterate
from pipelines.checkpoint import Meta
from pipelines.flops import find_utilisation
from pipelines.follow import Follower, StepRecord, draw_pictures, forward_precision, validate
from pipelines.notices import BITS, STOPS, Notice, Notices
from pipelines.online import OnlineEncoder
from pipelines.parallel import local, recompute_activations, resolve_precision, set_last_backward, shard_module, whole
from pipelines.registry import resolve_model
from pipelines.stage_data import MAX_CACHE_BYTES, OnlineSource, StageData, StageSource, open_data
from pipelines.stages import STAGES, AnyStage, StepRandom, hollow_stage

if TYPE_CHECKING:
    from pipelines.train import TrainConfig

CPU = torch.device("cpu")
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
GUARD_WINDOW = 64  # steps whose gradients the guard compares a new one with
GUARD_WARMUP = 16  # steps before it does
MAX_SHOWN_KEYS = 12


@dataclass(frozen=True)
class Ranks:
    """This process among the workers, and where it computes."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = CPU

    def sum_(self, tensor: Shaped[Tensor, "..."]) -> None:
        """Replace a tensor by its sum over all ranks."""
        if self.world_size > 1:
            there = tensor.to(self.device)  # NCCL knows no other memory than a GPU's
            torch.distributed.all_reduce(there)
            tensor.copy_(there)


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine down to `final_lr_fraction` at the last step."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.num_steps - 1 - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return config.learning_rate * (config.final_lr_fraction + (1 - config.final_lr_fraction) * cosine)


def make_optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over what is trained, with weight decay on matrices only."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


class SpikeGuard:
    """Tells which steps to skip: those whose gradient isn't finite, or far larger than the ones before it.

    It remembers the norms of the last steps taken, and nothing else, so that a resumed training decides alike.
    """

    def __init__(self, ratio: float, norms: Sequence[float] = ()) -> None:
        """A step is skipped whose norm is more than `ratio` times the median of `norms`, once there are enough."""
        self.ratio = ratio
        self.norms = deque(norms, maxlen=GUARD_WINDOW)

    def accepts(self, loss: float, norm: float) -> bool:
        """Whether a step of this loss and gradient is to be taken."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return False
        if len(self.norms) >= GUARD_WARMUP and norm > self.ratio * statistics.median(self.norms):
            return False
        self.norms.append(norm)
        return True


class WeightAverage:
    """An exponential moving average of a module's weights, sharded as they are; fp32.

    Step n keeps min(decay, (1 + n) / (10 + n)) of it, so that the first weights are soon forgotten. Source: the warm-up
    of TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._decay = decay
        self.tensors = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights after a step into account."""
        kept = min(self._decay, (1 + step) / (10 + step))
        for name, parameter in self._parameters.items():
            local(self.tensors[name]).lerp_(local(parameter), 1 - kept)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The module has the averaged weights while the body runs."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            ours, theirs = local(self.tensors[name]), local(parameter)
            kept = theirs.clone()
            theirs.copy_(ours)
            ours.copy_(kept)


def training_steps(
    stage: AnyStage,
    batches: Iterator[Batch[Any]],
    plan: Plan,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    ranks: Ranks,
    guard: SpikeGuard,
    notices: Notices | None = None,
) -> Iterator[StepRecord]:
    """Take one optimizer step per batch. Losses and gradients are those of the whole step, whatever the ranks.

    A step that the guard refuses changes no weight. Records bear what `notices` of any rank ask for.
    """
    parameters = [parameter for parameter in stage.module.parameters() if parameter.requires_grad]
    stage.module.train()
    notices = notices or Notices()
    step_s = 0.0
    for batch in batches:
        started = time.perf_counter()
        step, rows = batch.planned.step, batch.planned.rows
        optimizer.zero_grad()
        means, asked = _accumulate_gradients(stage, batch, config, ranks, notices.asked(step_s))
        loss = sum(stage.weights[name] * mean for name, mean in means.items())
        if config.parallelism == "replicated":
            _sum_gradients(parameters, ranks)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        total_norm = nn.utils.get_total_norm(gradients, foreach=True)
        grad_norm = float(whole(total_norm))
        learning_rate = learning_rate_at(step, config)
        is_taken = guard.accepts(loss, grad_norm)
        if is_taken:
            nn.utils.clip_grads_with_norm_(parameters, config.gradient_clip, total_norm, foreach=True)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
        step_s = time.perf_counter() - started + batch.wait_s
        yield StepRecord(
            step=step,
            loss=loss,
            losses=means,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            num_samples=len(rows),
            num_tokens=plan.num_tokens(rows),
            seconds=step_s,
            wait_s=batch.wait_s,
            is_skipped=not is_taken,
            asked=asked,
        )


def _accumulate_gradients(
    stage: AnyStage, batch: Batch[Any], config: TrainConfig, ranks: Ranks, asked: Notice
) -> tuple[dict[str, float], Notice]:
    """Backward over this rank's micro-batches; gives the mean of each loss part over the whole step.

    Beside it, what any rank is asked to do after the step: that travels with the counts.
    Global: each part is divided by its terms in the whole step, on all ranks, so that a term weighs the same wherever
    it is. Per rank: by its terms in the micro-batch, and the means are averaged, as transformers' Trainer does it for
    the released model.
    """
    names = list(stage.weights)
    own = [
        {name: int(count * micro.weight) for name, count in stage.counts(micro.content).items()}
        for micro in batch.micro_batches
    ]
    totals = torch.tensor([[of_micro[name] for name in names] for of_micro in own]).sum(dim=0)
    totals = torch.cat([totals, torch.tensor([int(bit in asked) for bit in BITS])])
    ranks.sum_(totals)
    summed_counts = totals.tolist()
    counts = dict(zip(names, summed_counts[: len(names)], strict=True))
    bits = [bit for bit, is_asked in zip(BITS, summed_counts[len(names) :], strict=True) if is_asked]
    random = StepRandom(config.seed, batch.planned.step)
    sums = dict.fromkeys(names, 0.0)
    num_micro_batches = len(batch.micro_batches)
    for number, micro in enumerate(batch.micro_batches):
        set_last_backward(stage.module, number == num_micro_batches - 1)
        with forward_precision(config, ranks.device):
            parts = stage.loss(micro.content.to(ranks.device), random)
        if config.normalisation == "global":
            divisors = counts
        else:
            counted = stage.counts(micro.content).items()
            divisors = {name: count * config.num_micro_batches for name, count in counted}
        (total_loss(parts, stage.weights, divisors) * micro.weight).backward()
        for name, part in parts.items():
            sums[name] += float(part.sum.detach()) * micro.weight
    summed = torch.tensor([sums[name] for name in names], dtype=torch.float64)
    ranks.sum_(summed)
    means = {name: total / max(counts[name], 1) for name, total in zip(names, summed.tolist(), strict=True)}
    return means, functools.reduce(operator.or_, bits, Notice.NONE)


def _sum_gradients(parameters: Sequence[nn.Parameter], ranks: Ranks) -> None:
    """Sum gradients over ranks in one flat all-reduce; what the loss didn't touch gets zeros."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if ranks.world_size == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    ranks.sum_(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def run_training(
    config: TrainConfig, run_id: str, ranks: Ranks, run: tracking.Run | None, notices: Notices | None = None
) -> Notice:
    """Train from the last checkpoint, or the beginning, to the last step. Rank 0 may have a `run` to log into.

    A notice of any rank has all of them save after the step that is under way, without looking at held-out samples.
    Returns why it stopped before the last step, the same on all ranks, with the checkpoint in its place; else NONE.
    Raises: NexusgenError naming the samples if too many steps had to be skipped.
    """
    begun_s = time.monotonic()
    notices = notices or Notices()
    config = config.model_copy(update={"precision": resolve_precision(config.precision, ranks.device.type == "cuda")})
    folder = resolve_model(config.model, config.storage)
    manifest = read_manifest(folder)
    data, plan = open_training(config, manifest)
    torch.manual_seed(config.seed)
    stage = hollow_stage(
        config.stage,
        folder,
        config.levels,
        config.conditioning_dropout,
        config.lora,
        PRECISIONS[config.precision],
    )
    if config.activation_checkpointing:
        recompute_activations(stage.module, config.precision, ranks.device)
    if config.parallelism == "fsdp":
        shard_module(stage.module, ranks.world_size, ranks.device, PRECISIONS[config.precision])
    place = checkpoint.stage_folder(config.storage, config.name, config.stage)
    found = checkpoint.latest(place)
    stage.fill(ranks.device, skip_trained=found is not None)
    optimizer = make_optimizer(stage.module, config)
    average = WeightAverage(stage.module, config.ema_decay) if config.ema_decay else None
    meta = found.meta if found is not None else _first_meta(config, run_id, ranks, manifest, data, plan)
    if found is not None:
        averaged = checkpoint.load(found, stage.module, optimizer)
        if average is not None and averaged is not None:
            average.tensors = dict(averaged)
    guard = SpikeGuard(config.max_gradient_ratio, meta.gradient_norms)
    cache_bytes = max(MAX_CACHE_BYTES, 2 * plan.num_window_bytes)
    source: StageSource[Any, Any]
    if config.embeddings == "online":
        encoder = OnlineEncoder(folder, stage.roles["vision"], ranks.device, max(1, int(config.cpus_per_worker)))
        source = OnlineSource(data, stage, encoder, cache_bytes)
    else:
        source = StageSource(data, stage, cache_bytes)
    batches = iterate(plan, source, config.num_steps, meta.step, ranks.rank, ranks.world_size, config.num_micro_batches)
    utilisation = find_utilisation(stage.module, ranks.device, ranks.world_size, config.precision)
    follower = Follower(config, run, place, ranks.rank, ranks.world_size, utilisation)
    told = follower.show_checkpoint
    saver = checkpoint.Saver(place, ranks.rank, ranks.world_size, config.keep_checkpoints, told)
    account = _open_account(config, run_id, ranks, time.monotonic() - begun_s)
    _enter_use(account, ranks, 0)  # what it took to get here
    num_entered, steps_entered, started_s = meta.num_samples, meta.step, time.monotonic()
    stopped = Notice.NONE
    for record in training_steps(stage, batches, plan, optimizer, config, ranks, guard, notices):
        step = record.step + 1
        if average is not None and not record.is_skipped:
            average.update(record.step)
        meta = meta.model_copy(
            update={
                "step": step,
                "world_size": ranks.world_size,
                "num_samples": meta.num_samples + record.num_samples,
                "num_skipped": meta.num_skipped + record.is_skipped,
                "gradient_norms": tuple(guard.norms),
                "loss_first": record.loss if record.step == 0 and not record.is_skipped else meta.loss_first,
            }
        )
        if meta.num_skipped > config.max_skipped_steps:
            raise NexusgenError(_too_many_skipped(config, meta, record, source, plan))
        follower.follow(record, meta.num_skipped)
        is_due = step % config.checkpoint_every == 0 or step == config.num_steps
        if step % config.log_every == 0 or is_due or record.asked:
            done = ("steps", step - steps_entered, time.monotonic() - started_s)
            _enter_use(account, ranks, meta.num_samples - num_entered, done)
            num_entered, steps_entered, started_s = meta.num_samples, step, time.monotonic()
        if not is_due and not record.asked:
            continue
        started = time.monotonic()
        sheet = None
        meta = meta.model_copy(update={"validation": {}})
        if is_due and (ranks.rank == 0 or config.parallelism == "fsdp"):
            # Sharded weights come together on all ranks alone.
            with average.applied() if average is not None else contextlib.nullcontext():
                meta = meta.model_copy(update={"validation": validate(stage, data, source, config)})
                sheet = draw_pictures(stage, data, source)
        meta = meta.model_copy(update={"loss_last": follower.loss, "has_ema": average is not None})
        saver.save(stage.module, optimizer, average.tensors if average is not None else None, meta)
        if ranks.rank == 0 and is_due:
            follower.show_validation(step, meta.validation, sheet)
        if record.asked:
            saver.wait()
            notices.save_s = time.monotonic() - started
            follower.tell(step, record.asked)
            stopped = record.asked & STOPS if step < config.num_steps else Notice.NONE
        _enter_use(account, ranks, 0, ("checkpoints", 1, time.monotonic() - started_s))
        started_s = time.monotonic()
        if stopped:
            break
    saver.close()
    _enter_use(account, ranks, 0, is_last=True)
    cpu_seconds = torch.tensor([time.process_time()], dtype=torch.float64)
    ranks.sum_(cpu_seconds)
    if ranks.rank == 0 and not stopped:
        follower.finish(float(cpu_seconds))
    return stopped


def _open_account(config: TrainConfig, run_id: str, ranks: Ranks, for_s: float) -> Account | None:
    """The account of this attempt, which rank 0 keeps and whose work began `for_s` seconds ago.

    Since then its GPUs count: a worker's process may be older, and have served others.
    """
    if ranks.rank != 0:
        return None
    account = Account(account_uri(config.storage, "train", config.name, config.stage), run_id, run_id, config.prices)
    account.hold_gpus(ranks.world_size * config.gpus_per_worker, for_s)
    return account


def _enter_use(
    account: Account | None,
    ranks: Ranks,
    num_samples: int,
    done: tuple[str, int, float] | None = None,
    *,
    is_last: bool = False,
) -> None:
    """Add up what all ranks have used since they last met here, and enter it: `done` is a kind of work, how many units
    of it, and the wall seconds that they took."""
    names = ("cpu_seconds", "bytes_read", "bytes_written")
    own = process_use.report()
    used = torch.tensor([own[name] for name in names], dtype=torch.float64)
    ranks.sum_(used)
    if account is not None:
        cpu_seconds, num_read, num_written = used.tolist()
        of_all = {"cpu_seconds": cpu_seconds, "bytes_read": int(num_read), "bytes_written": int(num_written)}
        work = {done[0]: [float(done[1]), done[2], cpu_seconds]} if done is not None else {}
        account.add(num_samples, [own | of_all | {"work": work}])
        if is_last:
            account.write()


def _too_many_skipped(
    config: TrainConfig, meta: Meta, record: StepRecord, source: StageSource[Any, Any], plan: Plan
) -> str:
    planned = next(plan.steps(record.step))
    keys = source.keys(planned.rows)
    shown = ", ".join(keys[:MAX_SHOWN_KEYS]) + (
        f" and {len(keys) - MAX_SHOWN_KEYS} more" * (len(keys) > MAX_SHOWN_KEYS)
    )
    return (
        f"train {config.stage}: {meta.num_skipped} steps were skipped, max_skipped_steps allows "
        f"{config.max_skipped_steps}; at step {record.step} the loss is {record.loss:.4g} and the gradient's norm "
        f"{record.grad_norm:.4g}. Its samples: {shown}. Lower learning_rate, raise max_gradient_ratio "
        f"({config.max_gradient_ratio:g}), or look at these samples"
    )


def _first_meta(
    config: TrainConfig, run_id: str, ranks: Ranks, manifest: Manifest, data: StageData, plan: Plan
) -> Meta:
    return Meta(
        stage=config.stage,
        step=0,
        num_steps=config.num_steps,
        run_id=run_id,
        seed=config.seed,
        plan_digest=plan.digest,
        world_size=ranks.world_size,
        config=config.model_dump(mode="json"),
        base_fingerprint=manifest.fingerprint,
        inputs=data.inputs,
        num_samples=0,
        loss_first=0.0,
        loss_last=0.0,
        validation={},
    )


def open_training(config: TrainConfig, manifest: Manifest) -> tuple[StageData, Plan]:
    """The embedded data of a training, and its plan. Raises: as `open_data` and `Plan`."""
    stage = STAGES[config.stage]
    data = open_data(config.storage, config.data_names, stage, manifest, config.validation_fraction, config.embeddings)
    return data, Plan(data.train_table, config.batch_rule, config.seed, data.digest)
