"""What feeding costs training: our loop against a bare PyTorch loop over batches that lie ready in memory.

Stage ar on the demo base and demo-world data, one thread a process; both sides have the same model, batches and
precision, and run in turn, each in a process of its own. Figures are medians of rounds.

    in memory: a few epochs of data that is kept once it was read and tokenised
    from disk: more data than may be kept, so that every slice is read again in each epoch, a window of them at a time

`data wait` is the time that the loop spends in asking for its next batch, over the time of its steps; the first batch
of a training is told apart. `gap between epochs` is the wait for the first batch of an epoch, in usual steps. `feeding`
is the CPU time of all threads but the one that trains, over the CPU time of that one, so that other work on the machine
doesn't make it look small; `its reading` is what pyarrow takes, measured alone, to read the same columns as often.

Padding is that of the batches as they are made, of a fixed number of samples and of a budget of tokens; of emoji and
photos if NEXUSGEN_TEST_DATA names a folder with their tars in `data/emoji` and `data/photos`.

At last, the same steps on stored embeddings and with the frozen vision tower in the loop; pictures lie ready as
patches, so that nothing is read or decoded. Memory is the peak of the steps.

    python benchmarks/train.py [--quick] [--json]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402 (the project's own folder comes first)
import torch  # noqa: E402
from torch import nn  # noqa: E402

from benchmarks.report import Report  # noqa: E402
from nexusgen.config import load_config  # noqa: E402
from nexusgen.images import decode_image  # noqa: E402
from nexusgen.losses import total_loss  # noqa: E402
from nexusgen.messages import image_roles  # noqa: E402
from nexusgen.model.autoregressive import ConversationBatch, collate_conversations  # noqa: E402
from nexusgen.model.manifest import demo_base, read_manifest  # noqa: E402
from nexusgen.model.weights import load_model  # noqa: E402
from nexusgen.prompts import Conversation, encode_conversation  # noqa: E402
from nexusgen.schema import Sample  # noqa: E402
from pipelines import stage_data  # noqa: E402
from pipelines.batches import Batch, BatchRule, Plan, iterate  # noqa: E402
from pipelines.encoders import Picture, VisionEncoder  # noqa: E402
from pipelines.follow import forward_precision  # noqa: E402
from pipelines.loop import CPU, Ranks, SpikeGuard, make_optimizer, open_training, training_steps  # noqa: E402
from pipelines.parallel import resolve_precision  # noqa: E402
from pipelines.shards import ShardReader  # noqa: E402
from pipelines.stage_data import StageSource  # noqa: E402
from pipelines.stages import AnyStage, StepRandom, build_stage  # noqa: E402
from pipelines.train import TrainConfig  # noqa: E402

CONFIGS = ROOT / "jobs" / "configs" / "demo"
BATCH_SAMPLES = 24
MAX_STEP_MS = 100.0  # longer steps would hide more of the feeding
KEPT_BYTES = 27_000_000  # of data from disk: a window of slices, as read and prepared, not two of them
TOWER_STEPS = 8  # whose batches lie ready
TASKS = (("generation", 0.6), ("editing", 0.1), ("understanding", 0.3))


@dataclass(frozen=True)
class Fed:
    """What our loop did over some steps."""

    first_batch_s: float
    step_ms: float  # median, waiting included
    step_cpu_ms: float  # of the thread that trains, mean
    wait: float  # share
    worst_wait: float  # share, of the worst 10 seconds' steps
    gaps: list[float]  # in steps
    feeding: float  # cores
    reading: float  # cores
    slices_read: int


# --- the sides; each runs in a process of its own ---


def open_side(storage: str, data: str, num_steps: int) -> tuple[TrainConfig, AnyStage, StageSource[Any, Any], Plan]:
    """The demo's training of stage ar on some embedded data."""
    torch.set_num_threads(1)
    settings = [f"storage={storage}", f"data={data}", f"num_steps={num_steps}", f"batch_samples={BATCH_SAMPLES}"]
    config = load_config(TrainConfig, CONFIGS / "train_ar.yaml", [*settings, "mixture=null"])
    config = config.model_copy(update={"precision": resolve_precision(config.precision, False)})
    opened, plan = open_training(config, read_manifest(demo_base()))
    torch.manual_seed(config.seed)
    stage = build_stage("ar", demo_base(), config.levels)
    return config, stage, StageSource(opened, stage, KEPT_BYTES if data == "large" else None), plan


def run_ours(storage: str, data: str, num_steps: int) -> Fed:
    """Our loop with its plan, its thread that makes batches, its guard."""
    config, stage, source, plan = open_side(storage, data, num_steps)
    read = CountedReads()
    optimizer = make_optimizer(stage.module, config)
    ends, waits, epochs = [time.perf_counter()], [], []

    def clocked(batches: Iterator[Batch[Any]]) -> Iterator[Batch[Any]]:
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            waits.append(time.perf_counter() - started)
            epochs.append(batch.planned.epoch)
            yield batch

    training_before, all_before = time.thread_time(), time.process_time()
    batches = clocked(iterate(plan, source, num_steps, 0, 0, 1))
    for _ in training_steps(stage, batches, plan, optimizer, config, Ranks(), SpikeGuard(config.max_gradient_ratio)):
        ends.append(time.perf_counter())
    training = time.thread_time() - training_before
    feeding = time.process_time() - all_before - training
    seconds = np.diff(ends)
    usual = float(np.median(seconds[1:]))
    gaps = [waits[i] / usual for i in range(1, num_steps) if epochs[i] != epochs[i - 1]]
    per_window = max(1, round(10 / usual))
    shares = [
        sum(waits[i : i + per_window]) / seconds[i : i + per_window].sum()
        for i in range(1, max(2, num_steps - per_window))
    ]
    reading = read.cpu_seconds_of_reading_again()
    return Fed(
        first_batch_s=waits[0],
        step_ms=1000 * usual,
        step_cpu_ms=1000 * training / num_steps,
        wait=sum(waits[1:]) / float(seconds[1:].sum()),
        worst_wait=float(max(shares)),
        gaps=gaps,
        feeding=feeding / training,
        reading=reading / training,
        slices_read=len(read.slices),
    )


class CountedReads:
    """Notes which columns of which slices the data reads from now on."""

    def __init__(self) -> None:
        self.slices: list[tuple[Any, list[str]]] = []
        plain = stage_data.embedded.read_slice

        def counted(info: Any, columns: Sequence[str] | None = None, row_groups: Any = None) -> Any:
            self.slices.append((info, list(columns or ())))
            return plain(info, columns, row_groups)

        stage_data.embedded.read_slice = counted  # type: ignore[assignment]
        self._plain = plain

    def cpu_seconds_of_reading_again(self) -> float:
        """CPU of all threads in reading the same, and doing nothing with it."""
        before = time.process_time()
        for info, columns in self.slices:
            self._plain(info, columns)
        return time.process_time() - before


def run_bare(storage: str, data: str, num_steps: int) -> dict[str, float]:
    """Milliseconds of a step, by the clock and of CPU, of a plain loop over the same batches, which lie ready."""
    config, stage, source, plan = open_side(storage, data, num_steps)
    batches = [source.batch(step.rows_of(0, 1)[0]) for step in itertools.islice(plan.steps(), num_steps)]
    before = time.thread_time()
    milliseconds = bare_steps(config, stage, batches, lambda batch: batch)
    return {"ms": statistics.median(milliseconds), "cpu_ms": 1000 * (time.thread_time() - before) / num_steps}


def bare_steps(
    config: TrainConfig, stage: Any, batches: Sequence[Any], ready: Callable[[Any], ConversationBatch]
) -> list[float]:
    """Forward, backward, clip and step for each of the batches, once `ready` has made one a batch of the stage's."""
    optimizer = make_optimizer(stage.module, config)
    parameters = [parameter for parameter in stage.module.parameters() if parameter.requires_grad]
    stage.module.train()
    milliseconds = []
    for number, item in enumerate(batches):
        started = time.perf_counter()
        batch = ready(item)
        optimizer.zero_grad()
        with forward_precision(config, CPU):
            parts = stage.loss(batch, StepRandom(config.seed, number))
        counts = {name: part.count for name, part in parts.items()}
        loss = total_loss(parts, stage.weights, counts)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, config.gradient_clip, foreach=True)
        optimizer.step()
        loss.item()
        milliseconds.append(1000 * (time.perf_counter() - started))
    return milliseconds[1:]


def run_tower(storage: str, data: str, num_steps: int, stored: bool) -> dict[str, float]:
    """Milliseconds of a step and peak memory, on stored embeddings or with the vision tower in the loop."""
    config, stage, _, _ = open_side(storage, "small", num_steps)
    loaded = load_model(demo_base(), ["autoregressive"])
    assert loaded.autoregressive is not None
    assert loaded.tokenizer is not None
    encoder = VisionEncoder(loaded.autoregressive, 2048)
    tokenizer = loaded.tokenizer
    pad = int(tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    del loaded
    tar = sorted((Path(storage) / "tars" / data).glob("*.tar"))[0]
    samples = [item for item in ShardReader(str(tar)) if isinstance(item, Sample)]
    order = np.random.default_rng(0).permutation(len(samples))[: TOWER_STEPS * BATCH_SAMPLES]
    ready: list[Any] = []
    for start in range(0, len(order), BATCH_SAMPLES):
        taken = [samples[i] for i in order[start : start + BATCH_SAMPLES]]
        conversations, pictures = zip(*(prepare(sample, encoder, tokenizer) for sample in taken), strict=True)
        shown = [picture for of_sample in pictures for picture, role in of_sample if role == "user"]
        drawn = [picture for of_sample in pictures for picture, role in of_sample if role != "user"]
        ready.append((conversations, shown, drawn))
    del samples

    def encoded(item: Any) -> ConversationBatch:
        conversations, shown, drawn = item
        parts = [one.array for one in encoder.encode([*shown, *drawn])]
        nothing = torch.zeros(0, encoder.model.hidden_size)
        inputs, targets = torch.cat([nothing, *parts[: len(shown)]]), torch.cat([nothing, *parts[len(shown) :]])
        return collate_conversations(conversations, inputs, targets, pad)

    def as_it_is(batch: ConversationBatch) -> ConversationBatch:
        return batch

    prepare_batch = encoded
    if stored:
        ready, prepare_batch = [encoded(item) for item in ready], as_it_is
        del encoder, encoded
    bare_steps(config, stage, ready[:2], prepare_batch)  # warm
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    milliseconds = bare_steps(config, stage, [ready[i % len(ready)] for i in range(num_steps)], prepare_batch)
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return {"ms": statistics.median(milliseconds), "mb": int(found[1]) / 1024}


def prepare(sample: Sample, encoder: VisionEncoder, tokenizer: Any) -> tuple[Conversation, list[tuple[Picture, str]]]:
    """A sample's conversation, and its pictures with who shows them."""
    roles = image_roles(sample.messages)
    pictures = [
        encoder.picture(decode_image(data), "input" if role == "user" else "target")
        for data, role in zip(sample.images, roles, strict=True)
    ]
    conversation = encode_conversation(tokenizer, sample.messages, [picture.grid for picture in pictures])
    return conversation, list(zip(pictures, roles, strict=True))


def run_padding(storage: str, data: str, num_steps: int) -> dict[str, float]:
    """Share of padding in the batches of an epoch, by a fixed number of samples and by a budget of tokens."""
    config, _, source, _ = open_side(storage, data, num_steps)
    opened, _ = open_training(config, read_manifest(demo_base()))
    table = opened.train_table
    budget = round(BATCH_SAMPLES * float(table.lengths.mean()))
    found: dict[str, float] = {"samples": len(table), "shortest": int(table.lengths.min())}
    found |= {"longest": int(table.lengths.max()), "budget": budget}
    for name, rule in (("fixed", BatchRule(samples=BATCH_SAMPLES)), ("budget", BatchRule(tokens=budget))):
        real = padded = 0
        for step in Plan(table, rule, config.seed, opened.digest).steps():
            if step.epoch:
                break
            mask = source.batch(step.rows).attention_mask
            real, padded = real + int(mask.sum()), padded + mask.numel()
        found[f"{name}_share"] = 1 - real / padded
    return found


SIDES: Mapping[str, Callable[[str, str, int], Any]] = {
    "ours": lambda *arguments: asdict(run_ours(*arguments)),
    "bare": run_bare,
    "stored": lambda *arguments: run_tower(*arguments, stored=True),
    "tower": lambda *arguments: run_tower(*arguments, stored=False),
    "padding": run_padding,
}


def run_side(side: str, storage: Path, data: str, num_steps: int) -> Any:
    """What a side measured, in a process of its own."""
    command = [sys.executable, __file__, "--side", side, str(storage), data, str(num_steps)]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(printed.splitlines()[-1])


# --- the whole ---


def run_job(*arguments: str) -> None:
    """A job on the command line."""
    subprocess.run([sys.executable, "-m", "jobs.cli", *arguments], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)


def make_world(storage: Path, name: str, num_samples: int, start: int) -> None:
    """Pack and embed a part of the demo world."""
    counts = ", ".join(f"{task}: {round(share * num_samples)}" for task, share in TASKS)
    common = (f"storage={storage}", f"name={name}")
    run_job("pack", str(CONFIGS / "pack.yaml"), *common, f"counts={{{counts}}}", f"start={start}")
    run_job("embed", str(CONFIGS / "embed_vision.yaml"), *common, f"input={storage}/tars/{name}")


def embed_real(storage: Path) -> str | None:
    """Embed emoji and photos; gives the reason if there are none."""
    folder = os.environ.get("NEXUSGEN_TEST_DATA")
    if not folder:
        return "NEXUSGEN_TEST_DATA is unset: no padding of emoji and photos"
    data = Path(folder).resolve() / "data"
    tars = sorted([*data.glob("emoji/*-train-*.tar"), *data.glob("photos/*-train-*.tar")])
    if not tars:
        return f"{data} holds no emoji/*-train-*.tar or photos/*-train-*.tar: no padding of emoji and photos"
    names = f"input=[{', '.join(map(str, tars))}]"
    run_job("embed", str(CONFIGS / "embed_vision.yaml"), f"storage={storage}", "name=real", names)
    return None


def tell_feeding(report: Report, name: str, fed: Sequence[Fed], bare: Sequence[Mapping[str, float]]) -> None:
    """The figures of one way of feeding, over rounds."""
    gaps = [gap for one in fed for gap in one.gaps]
    beyond = statistics.median(one.feeding - one.reading for one in fed)
    report.at_most(f"{name}: a bare step, ms", statistics.median(one["ms"] for one in bare), MAX_STEP_MS)
    report.tell(f"{name}: our step, ms", statistics.median(one.step_ms for one in fed))
    ratios = (one.step_ms / other["ms"] for one, other in zip(fed, bare, strict=True))
    report.tell(f"{name}: our step over the bare one of its round", statistics.median(ratios))
    ratios = (one.step_cpu_ms / other["cpu_ms"] for one, other in zip(fed, bare, strict=True))
    report.tell(f"{name}: the same by CPU time of the thread that trains", statistics.median(ratios))
    report.tell(f"{name}: seconds to the first batch", statistics.median(one.first_batch_s for one in fed))
    report.at_most(f"{name}: data wait, share of the step", statistics.median(one.wait for one in fed), 0.05)
    report.tell(f"{name}: the same, in the worst 10 s", statistics.median(one.worst_wait for one in fed))
    report.at_most(f"{name}: gap between epochs, steps", statistics.median(gaps), 1.0)
    report.tell(f"{name}: the longest of {len(gaps)} gaps, steps", max(gaps))
    report.tell(f"{name}: slices read", statistics.median(one.slices_read for one in fed))
    report.tell(f"{name}: feeding, cores", statistics.median(one.feeding for one in fed))
    report.tell(f"{name}: its reading, cores", statistics.median(one.reading for one in fed))
    report.at_most(f"{name}: feeding beyond its reading, cores", beyond, 0.15)


def tell_padding(report: Report, name: str, found: Mapping[str, float]) -> None:
    """The figures of one data set."""
    lengths = f"{found['samples']:.0f} samples of {found['shortest']:.0f} to {found['longest']:.0f} tokens"
    report.tell(f"{name}, {lengths}: padding of {BATCH_SAMPLES} samples a step", found["fixed_share"])
    report.at_most(f"{name}: padding at {found['budget']:.0f} tokens a step", found["budget_share"], 0.08)


def measure(report: Report, storage: Path, quick: bool) -> None:
    """Make the data, run all sides in turn, tell."""
    rounds = 1 if quick else 3
    sizes = {"small": 480, "large": 5000} if quick else {"small": 1200, "large": 9000}
    epochs = {"small": 4.0, "large": 1.2}
    for number, (data, size) in enumerate(sizes.items()):
        make_world(storage, data, size, 100_000 * number)
    why_not = embed_real(storage)
    steps = {data: round(epochs[data] * size / BATCH_SAMPLES) for data, size in sizes.items()}
    fed: dict[str, list[Fed]] = {data: [] for data in sizes}
    bare: dict[str, list[dict[str, float]]] = {data: [] for data in sizes}
    towers: dict[str, list[dict[str, float]]] = {"stored": [], "tower": []}
    for turn in range(rounds):
        for data in sizes:
            bare[data].append(run_side("bare", storage, data, min(steps[data], 100)))
            fed[data].append(Fed(**run_side("ours", storage, data, steps[data])))
            print(f"round {turn + 1}, {data}: bare {bare[data][-1]}, ours {fed[data][-1]}", file=sys.stderr)
        for side, found in towers.items():
            found.append(run_side(side, storage, "small", 20 if quick else 60))
            print(f"round {turn + 1}, {side}: {found[-1]}", file=sys.stderr)
    tell_feeding(report, "in memory", fed["small"], bare["small"])
    tell_feeding(report, "from disk", fed["large"], bare["large"])
    tell_padding(report, "demo world", run_side("padding", storage, "small", 1))
    if why_not is None:
        tell_padding(report, "emoji and photos", run_side("padding", storage, "real", 1))
    else:
        print(f"skipped: {why_not}", file=sys.stderr)
    ms, mb = ({side: statistics.median(one[key] for one in towers[side]) for side in towers} for key in ("ms", "mb"))
    for side, label in (("stored", "stored embeddings"), ("tower", "vision tower in the loop")):
        report.tell(f"{label}: a step, ms", ms[side])
        report.tell(f"{label}: peak memory, MB", mb[side])
    report.tell("stored embeddings: time saved, share of the step", 1 - ms["stored"] / ms["tower"])
    report.tell("stored embeddings: memory saved, MB", mb["tower"] - mb["stored"])


def main() -> int:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="less data, one round")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--side", nargs=4, help=argparse.SUPPRESS)  # run one side: its name, STORAGE DATA STEPS
    arguments = parser.parse_args()
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    if arguments.side:
        side, storage, data, num_steps = arguments.side
        print(json.dumps(SIDES[side](storage, data, int(num_steps))))
        return 0
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        measure(report, Path(folder), arguments.quick)
    return report.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
