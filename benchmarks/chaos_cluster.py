"""A cluster under fire: the road as a submitted job, while worker nodes are killed, and the head.

Several Ray nodes on this machine, each by `ray start`, that ask for a token and hold the credentials; an S3; an MLflow
server on PostgreSQL. The same tars, some of whose samples are broken, are walked three times: undisturbed; with a
random worker node killed every minute (SIGKILL of all its processes, as if it lost power) and another started; and with
the head killed once in mid-training, started anew without memory, and the same command given again. What came out must
be what came out undisturbed: every row, every loss and every weight, bit for bit.

    python benchmarks/chaos_cluster.py [--quick] [--json] [--seed N] [--steps N] [--kill-every SECONDS]
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "pipelines")]

from cluster_site import BUCKET, SECRETS, Site, site  # noqa: E402 (the project's own folders come first)
from servers import free_port, mlflow_server, postgres_server  # noqa: E402

from benchmarks.chaos_data import environment_of, make_tars  # noqa: E402
from benchmarks.report import Report  # noqa: E402
from jobs.command import DEMO_CONFIGS  # noqa: E402
from pipelines import checkpoint, embedded, storage, tracking  # noqa: E402

NUM_WORKER_NODES = 2
NUM_VERSIONS = 2  # that a road registers: without an editing decoder, and with it
MODES = ("vision", "latents", "predicted")
STAGES = ("ar", "generation_decoder", "editing_decoder")
CHECKPOINT_EVERY = 10
MAX_KILLS = 100
# Jobs that are through when the head is killed in a stage.
FINISHED = {
    "ar": ("embed vision", "embed latents"),
    "editing_decoder": ("embed vision", "embed latents", "train ar", "train generation_decoder", "embed predicted"),
}
MAX_ATTEMPTS = 6
CLUSTER_PATIENCE_S = 300.0
POLL_S = 0.5
STALL_S = 8.0  # without a new step: longer than the 2 s between two notes of where a training is
WANTED_SHARE = 5.0  # per cent of a day, at one lost node an hour


def settings(name: str, num_steps: int) -> list[str]:
    """A road over the tars in the bucket; the model learns next to nothing, but every job does its real work."""
    values = [f"storage=s3://{BUCKET}/{name}", f"name={name}", f"input=s3://{BUCKET}/tars/*.tar"]
    values += [f"embed_{mode}.{key}" for mode in MODES for key in ("num_encoders=1", "slice_samples=16")]
    for stage in STAGES:
        values += [
            f"train_{stage}.{key}"
            for key in (
                *(f"num_steps={num_steps}", f"checkpoint_every={CHECKPOINT_EVERY}", "log_every=1", "batch_samples=8"),
                *("warmup_steps=1", "max_restarts=1000", f"num_workers={1 if stage == 'generation_decoder' else 2}"),
            )
        ]
    values += ["train_ar.batch_tokens=null", "train_ar.mixture=null", "train_editing_decoder.mixture=null"]
    values += ["evaluate.per_category=2", "evaluate.num_explicit=4", "evaluate.num_questions=4", "evaluate.num_edits=4"]
    values += ["evaluate.steps=2", "evaluate.num_actors=1", "promote.thresholds={}", "promote.understanding_drop=1"]
    return values


# ---- watching -------------------------------------------------------------------------------------------------------


@dataclass
class Watch:
    """Follows where the trainings of a project are, as they write it into the storage."""

    name: str
    seen: dict[str, list[tuple[float, int]]] = field(default_factory=lambda: {stage: [] for stage in STAGES})
    is_over: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        while not self.is_over.wait(POLL_S):
            for stage, events in self.seen.items():
                uri = storage.join(
                    checkpoint.stage_folder(f"s3://{BUCKET}/{self.name}", self.name, stage), "progress.json"
                )
                with contextlib.suppress(Exception):
                    progress = storage.find_json(uri)
                    if progress is not None and (not events or events[-1][1] != progress["step"]):
                        events.append((time.monotonic(), int(progress["step"])))

    def step(self, stage: str) -> int:
        """Where a stage is."""
        return self.seen[stage][-1][1] if self.seen[stage] else 0

    def stalls(self, kills: list[float]) -> list[float]:
        """Seconds from a kill until the first step that was not there before, of each training that a kill stopped."""
        found = []
        for events in self.seen.values():
            for killed in kills:
                before = [step for when, step in events if when <= killed]
                after = [when for when, step in events if when > killed and step > max(before, default=0)]
                if before and after and after[0] - killed > STALL_S:
                    found.append(after[0] - killed)
        return found


@contextlib.contextmanager
def watching(name: str) -> Iterator[Watch]:
    watch = Watch(name)
    thread = threading.Thread(target=watch.run, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        watch.is_over.set()
        thread.join()


class NodeKiller(threading.Thread):
    """Kills a worker node drawn from the seed every so often, and starts another in its place."""

    def __init__(
        self, place: Site, every_s: float, chance: random.Random, most: int, may_begin: Callable[[], bool]
    ) -> None:
        super().__init__(daemon=True)
        self.killed_at: list[float] = []
        self.is_over = threading.Event()
        self._place, self._every_s, self._chance, self._most = place, every_s, chance, most
        self._may_begin = may_begin

    def run(self) -> None:
        while not self._may_begin() and not self.is_over.wait(POLL_S):
            pass
        while len(self.killed_at) < self._most and not self.is_over.wait(self._every_s):
            nodes = self._place.nodes
            nodes.replace_ended()  # Ray gives up a start that takes 30 s, as one can on a busy machine
            self.killed_at.append(time.monotonic())
            nodes.kill_worker(self._chance.randrange(len(nodes.workers)))
            nodes.start_worker()
            print(f"killed worker node {len(self.killed_at)}, started another", file=sys.stderr, flush=True)


class HeadKiller(threading.Thread):
    """Kills the head when a stage is half-way, and starts it anew."""

    def __init__(self, place: Site, watch: Watch, stage: str, num_steps: int) -> None:
        super().__init__(daemon=True)
        self.stage = stage
        self.killed_at_step, self.saved_step = 0, 0  # what was trained by then, and what was in a checkpoint
        self._place, self._watch, self._num_steps = place, watch, num_steps

    def run(self) -> None:
        while not self._watch.is_over.wait(POLL_S):
            if self._watch.step(self.stage) >= self._num_steps // 2:
                break
        else:
            return
        nodes, name = self._place.nodes, self._watch.name
        nodes.kill_head()
        print("killed the head", file=sys.stderr, flush=True)
        found = checkpoint.latest(checkpoint.stage_folder(f"s3://{BUCKET}/{name}", name, self.stage))
        self.killed_at_step, self.saved_step = self._watch.step(self.stage), found.meta.step if found else 0
        while nodes.workers:  # without a head they would end by themselves a minute later
            nodes.kill_worker()
        nodes.start_head()
        for _ in range(NUM_WORKER_NODES):
            nodes.start_worker()
        print("started the head and its nodes anew", file=sys.stderr, flush=True)


# ---- walking --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Walk:
    """How a road went: attempts until it was through, and what each printed."""

    seconds: float
    logs: list[str]
    codes: list[int]


def walk(place: Site, name: str, num_steps: int) -> Walk:
    """Submit the road, and again if it fails, always with the same command."""
    started = time.monotonic()
    logs, codes = [], []
    while len(codes) < MAX_ATTEMPTS and (not codes or codes[-1]):
        deadline = time.monotonic() + CLUSTER_PATIENCE_S
        while place.nodes.num_alive() <= NUM_WORKER_NODES and time.monotonic() < deadline:
            place.nodes.replace_ended()
            time.sleep(POLL_S)  # a person would wait for the nodes, too
        code, made, log = place.submit("road", DEMO_CONFIGS / "road.yaml", *settings(name, num_steps))
        print(f"{name}: attempt {len(codes) + 1} ({made.get('id')}) ended with {code}", file=sys.stderr, flush=True)
        if code:
            print(log[-1500:], file=sys.stderr, flush=True)
        logs.append(log)
        codes.append(code)
    return Walk(time.monotonic() - started, logs, codes)


@dataclass(frozen=True)
class Result:
    """What a road left: of each mode (rows, quarantined, digest); losses of each stage by step; runs; fingerprints."""

    data: dict[str, tuple[int, int, str]]
    losses: dict[str, dict[int, list[float]]]
    runs: Counter[str]
    weights: set[str]

    @classmethod
    def read(cls, name: str) -> Result:
        uri = f"s3://{BUCKET}/{name}"
        client = tracking.connect(uri)
        data, losses = {}, {}
        for mode in MODES:
            manifest = embedded.read_manifest(uri, name, mode)
            num_rows = sum(shard.num_embedded for shard in manifest.shards)
            data[mode] = (num_rows, sum(shard.num_quarantined for shard in manifest.shards), manifest.digest)
        for stage in STAGES:
            found = checkpoint.latest(checkpoint.stage_folder(uri, name, stage))
            assert found is not None
            losses[stage] = {}
            for metric in client.get_metric_history(found.meta.run_id, "train/loss"):
                losses[stage].setdefault(metric.step, []).append(metric.value)
        experiment = client.get_experiment_by_name(name)
        assert experiment is not None
        found_runs = client.search_runs([experiment.experiment_id])
        runs = Counter(str(run.info.run_name) for run in found_runs)
        # By its run: weights that are registered already, as another road made them, are no new version.
        tags = [run.data.tags for run in found_runs if run.info.run_name == "register"]
        weights = {one[tracking.TAG_FINGERPRINT] for one in tags if tracking.TAG_FINGERPRINT in one}
        return cls(data, losses, runs, weights)


def compare(report: Report, what: str, calm: Result, found: Result) -> None:
    """The account of a disturbed road against the undisturbed one."""
    for mode in MODES:
        same = sum(ours == theirs for ours, theirs in zip(calm.data[mode], found.data[mode], strict=True))
        report.at_least(f"{what}: {mode} rows, quarantined rows and digest that are equal, of 3", same, 3)
    for stage in STAGES:
        expected = {step: values[0] for step, values in calm.losses[stage].items()}
        history = found.losses[stage]
        report.at_most(f"{what}: steps of {stage} whose loss is missing", len(expected.keys() - history.keys()), 0)
        differing = sum(any(value != expected.get(step) for value in values) for step, values in history.items())
        report.at_most(f"{what}: steps of {stage} whose loss differs in a bit", differing, 0)
        report.tell(f"{what}: steps of {stage} computed again", sum(len(values) - 1 for values in history.values()))
    same_weights = calm.weights == found.weights and len(calm.weights) == NUM_VERSIONS
    report.at_least(f"{what}: registered weights equal bit for bit", same_weights, 1)


# ---- the three walks ------------------------------------------------------------------------------------------------


def walk_calmly(report: Report, place: Site, num_steps: int) -> Result:
    made = walk(place, "calm", num_steps)
    report.tell("undisturbed: seconds", made.seconds)
    report.at_most("undisturbed: attempts", len(made.codes), 1)
    report.at_most("undisturbed: exit code", made.codes[-1], 0)
    result = Result.read("calm")
    rows, quarantined, _ = result.data["vision"]
    report.tell("rows embedded", rows)
    report.tell("rows in quarantine", quarantined)
    leaks = [path for path in place.nodes.ray_logs() if any(s.encode() in path.read_bytes() for s in SECRETS.values())]
    report.at_most("logs of Ray's that hold a credential", len(leaks), 0)
    return result


def walk_with_node_kills(report: Report, place: Site, num_steps: int, calm: Result, every_s: float, seed: int) -> None:
    """A worker node is killed every so often, from the beginning on."""
    with watching("nodes") as watch:
        killer = NodeKiller(place, every_s, random.Random(seed), MAX_KILLS, lambda: True)
        killer.start()
        made = walk(place, "nodes", num_steps)
        killer.is_over.set()
        killer.join()
    tell_walk(report, "nodes killed", made)
    compare(report, "nodes killed", calm, Result.read("nodes"))
    tell_node_kills(report, watch, killer)


def walk_with_a_head_kill(report: Report, place: Site, num_steps: int, calm: Result) -> None:
    """The head is killed while stage ar is trained."""
    with watching("head") as watch:
        killer = HeadKiller(place, watch, "ar", num_steps)
        killer.start()
        made = walk(place, "head", num_steps)
    killer.join()
    tell_walk(report, "head killed", made)
    result = Result.read("head")
    compare(report, "head killed", calm, result)
    tell_head_kill(report, killer, made, result)


def walk_with_both(report: Report, place: Site, num_steps: int, calm: Result, seed: int) -> None:
    """One worker node is killed while stage ar is trained, the head while the editing decoder is."""
    with watching("both") as watch:
        nodes = NodeKiller(place, 0.0, random.Random(seed), 1, lambda: watch.step("ar") > CHECKPOINT_EVERY)
        head = HeadKiller(place, watch, "editing_decoder", num_steps)
        nodes.start()
        head.start()
        made = walk(place, "both", num_steps)
        nodes.is_over.set()
    nodes.join()
    head.join()
    tell_walk(report, "a node and the head killed", made)
    result = Result.read("both")
    compare(report, "a node and the head killed", calm, result)
    tell_node_kills(report, watch, nodes)
    tell_head_kill(report, head, made, result)


def tell_walk(report: Report, what: str, made: Walk) -> None:
    report.tell(f"{what}: seconds", made.seconds)
    report.at_most(f"{what}: exit code", made.codes[-1], 0)
    report.tell(f"{what}: attempts of the same command", len(made.codes))


def tell_node_kills(report: Report, watch: Watch, killer: NodeKiller) -> None:
    """What a lost node costs a training."""
    report.at_least("worker nodes killed", len(killer.killed_at), 1)
    stalls = watch.stalls(killer.killed_at)
    report.tell("trainings that a killed node stopped", len(stalls))
    if stalls:
        report.tell("from a kill to the first new step: seconds, mean", sum(stalls) / len(stalls))
        report.tell("from a kill to the first new step: seconds, most", max(stalls))
        share = 100 * max(stalls) / 3600
        report.at_most("its share of a day at one lost node an hour, per cent", share, WANTED_SHARE)


def tell_head_kill(report: Report, killer: HeadKiller, made: Walk, result: Result) -> None:
    """What the next attempt did again."""
    report.at_least(f"head killed at a step of {killer.stage}", killer.killed_at_step, 1)
    report.tell("step of the last checkpoint then", killer.saved_step)
    history = result.losses[killer.stage]
    again = [step for step, values in history.items() if len(values) > 1 and step <= killer.saved_step]
    report.at_most("steps that were saved, yet computed again after it", len(again), 0)
    for done in FINISHED[killer.stage]:
        report.at_most(f"runs of {done}, which was finished", result.runs[done], 1)
        reused = sum(f"== {done}: re-used" in log for log in made.logs[1:])
        report.at_least(f"later attempts that re-used {done}", reused, len(made.codes) - 1)
    continued = f"train {killer.stage}"
    report.at_most(f"runs of {continued}, which was continued", result.runs[continued], 1)


@contextlib.contextmanager
def on_postgres(folder: Path, port: int) -> Iterator[None]:
    """An MLflow server with its database in PostgreSQL."""
    with postgres_server(free_port()) as database, mlflow_server(folder, port, database):
        yield


def main() -> int:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--quick", action="store_true", help="few steps, MLflow on sqlite; a node and the head killed in one walk"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument(
        "--kill-every", type=float, default=60.0, metavar="SECONDS", help="a worker node (default: %(default)g)"
    )
    parser.add_argument("--steps", type=int, default=300, help="of each training (default: %(default)s)")
    arguments = parser.parse_args()
    num_samples, num_steps = (80, 60) if arguments.quick else (480, arguments.steps)
    report = Report()
    server: Any = mlflow_server if arguments.quick else on_postgres
    with tempfile.TemporaryDirectory(prefix="nexusgen-chaos-") as name:
        folder = Path(name)
        tars = make_tars(folder, num_samples)
        with site(folder, NUM_WORKER_NODES, server) as place, environment_of({**place.environment, **SECRETS}):
            for tar in tars:
                storage.write_bytes_atomic(f"s3://{BUCKET}/tars/{tar.name}", tar.read_bytes())
            calm = walk_calmly(report, place, num_steps)
            if arguments.quick:
                walk_with_both(report, place, num_steps, calm, arguments.seed)
            else:
                walk_with_node_kills(report, place, num_steps, calm, arguments.kill_every, arguments.seed)
                walk_with_a_head_kill(report, place, num_steps, calm)
    return report.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
