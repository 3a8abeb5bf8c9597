"""Serving under fire: replicas and a node killed, versions swapped, a corrupt one published, clients that hang up.

A Ray of three nodes on this machine, a registry, two replicas of each computing deployment where there is room. Clients
ask without pause for pictures, edits and answers; every request is counted by what came back: 200, 429 (the queue was
full), 503 (its replica was killed), or anything else, of which there may be none. Afterwards nothing may wait, as many
replicas as before must be there, and their memory must be what it was.

    python benchmarks/chaos_serve.py [--quick] [--json] [--seed N]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "pipelines")]

import httpx  # noqa: E402 (the project's own folders come first)
import psutil  # noqa: E402
from served_versions import add_version, cut_short, move_alias, with_editing_decoder  # noqa: E402
from servers import free_port  # noqa: E402

from benchmarks.chaos_data import LocalCluster  # noqa: E402
from benchmarks.report import Report  # noqa: E402
from benchmarks.serve import body_of, picture, works  # noqa: E402
from nexusgen.model.manifest import demo_base  # noqa: E402
from pipelines import serve  # noqa: E402
from pipelines.serve import PartConfig, ServeConfig  # noqa: E402

NUM_CLIENTS = 8
QUEUE_SIZE = 32
NODE_CPUS = 4
PATIENCE_S = 120.0
SETTLE_S = 12.0  # between two disturbances
COMPUTING = ("ar", "generation_decoder", "editing_decoder")


class Fire:
    """Clients that ask without pause, and what came back."""

    def __init__(self, url: str, png: bytes) -> None:
        self.url, self.png = url, png
        self.statuses: Counter[str] = Counter()
        self.others: list[str] = []
        self.is_over = False

    async def client(self, number: int) -> None:
        """Send requests until the end; one connection for all."""
        mixture = works()
        for _ in range(number):
            next(mixture)
        async with httpx.AsyncClient(base_url=self.url, timeout=PATIENCE_S) as client:
            while not self.is_over:
                try:
                    path, body, media_type = body_of(next(mixture), self.png)
                    response = await client.post(path, content=body, headers={"content-type": media_type})
                except httpx.HTTPError as error:
                    self.count(type(error).__name__, str(error))
                    continue
                self.count(str(response.status_code), response.text)
                if response.status_code in (429, 503):
                    await asyncio.sleep(min(1.0, float(response.headers.get("retry-after", 1))))

    def count(self, status: str, text: str) -> None:
        """Note an outcome."""
        self.statuses[status] += 1
        if status not in ("200", "429", "503"):
            self.others.append(f"{status}: {text[:300]}")
            print(f"other: {self.others[-1]}", file=sys.stderr, flush=True)


def replicas() -> dict[str, list[psutil.Process]]:
    """Processes of the replicas by deployment."""
    found: dict[str, list[psutil.Process]] = {}
    for process in psutil.process_iter(["cmdline"]):
        title = " ".join(process.info["cmdline"] or [])
        for name in (*COMPUTING, "ingress", "versions"):
            if f"ServeReplica:{serve.APP_NAME}:{name}" in title:
                found.setdefault(name, []).append(process)
    return found


def memory_mb(parts: dict[str, list[psutil.Process]]) -> float:
    """Memory of the computing replicas that is their own."""
    return sum(process.memory_full_info().uss for name in COMPUTING for process in parts.get(name, [])) / 2**20


async def wait_until(is_so: Callable[[], Awaitable[bool]], what: str) -> None:
    """Raises: RuntimeError if it doesn't come about."""
    deadline = time.monotonic() + PATIENCE_S
    while not await is_so():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what}: not within {PATIENCE_S:g} s")
        await asyncio.sleep(0.3)


async def health(url: str) -> dict[str, Any]:
    """What /health says; empty where nothing answers."""
    with contextlib.suppress(httpx.HTTPError, ValueError):
        async with httpx.AsyncClient(timeout=10) as client:
            response = await client.get(f"{url}/health")
            return response.json() if response.status_code == 200 else {}
    return {}


async def hang_up(url: str, count: int, fire: Fire) -> None:
    """So many clients that go away in the middle of a stream."""

    async def one(number: int) -> None:
        body = {"prompt": "a red circle", "stream": True, "partial_images": 3, "steps": 60, "seed": number}
        if number % 2:
            body = {
                "model": "nexusgen",
                "stream": True,
                "modalities": ["text", "image"],
                "messages": [{"role": "user", "content": "Draw two blue squares."}],
            }
        path = "chat/completions" if number % 2 else "images/generations"
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) as client:
            try:
                async with client.stream("POST", f"/v1/{path}", json=body) as response:
                    if response.status_code != 200:
                        fire.count(str(response.status_code), (await response.aread()).decode())
                        return
                    fire.statuses["hung up"] += 1
                    async for _ in response.aiter_bytes():
                        return
            except httpx.HTTPError as error:
                fire.count(type(error).__name__, str(error))

    waiting = list(range(count))

    async def some() -> None:
        while waiting:
            await one(waiting.pop())

    await asyncio.gather(*(some() for _ in range(16)))


async def disturb(
    report: Report, config: ServeConfig, folders: list[Path], fire: Fire, nodes: Nodes, rng: random.Random, quick: bool
) -> None:
    """Everything that may go wrong, one thing after another."""
    url = config.url
    expected = {name: len(of_name) for name, of_name in replicas().items()}

    async def is_back() -> bool:
        found = {name: len(of_name) for name, of_name in replicas().items()}
        return bool(await health(url)) and all(found.get(name, 0) >= count for name, count in expected.items())

    for name in COMPUTING[: 1 if quick else 3]:
        victim = rng.choice(replicas()[name])
        print(f"kill a replica of {name}", file=sys.stderr, flush=True)
        victim.send_signal(signal.SIGKILL)
        await asyncio.sleep(SETTLE_S)
        await wait_until(is_back, f"a replica of {name}")
    if not quick:
        print("kill a node", file=sys.stderr, flush=True)
        nodes.kill_one()  # here, as Ray adds nodes in the main thread alone; clients wait meanwhile
        await asyncio.sleep(SETTLE_S)
        await wait_until(is_back, "replicas of the lost node")
    versions = [add_version(config.storage, folder, alias=None) for folder in folders[1:]]
    swaps = 2 if quick else 10
    for number in range(swaps):
        version = ["1", *versions][(number + 1) % 2]
        print(f"swap to version {version}", file=sys.stderr, flush=True)
        move_alias(config.storage, version)

        async def is_swapped(version: str = version) -> bool:
            return (await health(url)).get("version") == version

        await wait_until(is_swapped, f"version {version}")
    with tempfile.TemporaryDirectory() as scratch:
        corrupt = cut_short(with_editing_decoder(demo_base(), Path(scratch) / "corrupt", 9))
        print("publish a corrupt version", file=sys.stderr, flush=True)
        add_version(config.storage, corrupt)

        async def is_refused() -> bool:
            return bool((await health(url)).get("refused"))

        await wait_until(is_refused, "the refusal of a corrupt version")
        move_alias(config.storage, "1")

        async def is_well() -> bool:
            found = await health(url)
            return found.get("version") == "1" and not found.get("refused")

        await wait_until(is_well, "version 1")
    num_hang_ups = 20 if quick else 200
    print(f"{num_hang_ups} clients that hang up", file=sys.stderr, flush=True)
    await hang_up(url, num_hang_ups, fire)


async def run(report: Report, config: ServeConfig, folders: list[Path], nodes: Nodes, seed: int, quick: bool) -> None:
    """Warm up, disturb under load, let it settle, compare."""
    buffer = io.BytesIO()
    picture().save(buffer, "png")
    fire = Fire(config.url, buffer.getvalue())
    clients = [asyncio.create_task(fire.client(number)) for number in range(NUM_CLIENTS)]
    await asyncio.sleep(SETTLE_S)
    before = replicas()
    memory_before = memory_mb(before)
    rng = random.Random(seed)
    try:
        await disturb(report, config, folders, fire, nodes, rng, quick)
        await asyncio.sleep(SETTLE_S)
    finally:
        fire.is_over = True
        await asyncio.gather(*clients)
    after = replicas()
    statuses = fire.statuses
    report.tell("requests sent", statuses.total())
    for status in ("200", "429", "503", "hung up"):
        report.tell(f"of them: {status}", statuses[status])
    report.at_most("of them: other", len(fire.others), 0)
    async with httpx.AsyncClient(timeout=10) as client:
        text = (await client.get(f"{config.url}/metrics")).text
    inside = [
        float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith("nexusgen_requests_inside")
    ]
    report.at_most("afterwards: requests inside", sum(inside), 0)
    for name in (*COMPUTING, "ingress", "versions"):
        difference = abs(len(after.get(name, [])) - len(before.get(name, [])))
        report.at_most(f"afterwards: replicas of {name}, difference", difference, 0)
    report.tell("memory of the computing replicas before, MB", memory_before)
    report.at_most("memory afterwards over before", memory_mb(after) / memory_before, 1.05)


class Nodes:
    """The worker nodes of a cluster, to be killed."""

    def __init__(self, cluster: LocalCluster, rng: random.Random) -> None:
        self._cluster, self._rng = cluster, rng

    def kill_one(self) -> None:
        """One of them loses its power; another takes its place."""
        self._cluster.kill_node(self._rng.choice(sorted(self._cluster.raylets())))


@contextlib.contextmanager
def served(scratch: Path) -> Iterator[tuple[ServeConfig, list[Path], LocalCluster]]:
    """Three nodes, a registry with a version, and the API in front of them."""
    import ray

    folders = [with_editing_decoder(demo_base(), scratch / f"model-{seed}", seed) for seed in (0, 1)]
    storage = str(scratch / "storage")
    add_version(storage, folders[0])
    cluster = LocalCluster(scratch)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        pair = PartConfig(replicas=2, cpus=0.5)
        config = ServeConfig(
            storage=storage,
            model="models:/nexusgen@champion",
            port=free_port(),
            queue_size=QUEUE_SIZE,
            ar=pair,
            generation_decoder=pair,
            editing_decoder=PartConfig(cpus=0.5),
        )
        serve.start(config)
        yield config, folders, cluster
        serve.shutdown()
    finally:
        ray.shutdown()
        cluster.close()


def main() -> int:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer of everything, no node")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--seed", type=int, default=0, help="who is killed")
    arguments = parser.parse_args()
    for variable in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        os.environ.pop(variable, None)
    report = Report()
    with (
        tempfile.TemporaryDirectory(prefix="nexusgen-") as scratch,
        served(Path(scratch)) as (config, folders, cluster),
    ):
        nodes = Nodes(cluster, random.Random(arguments.seed))
        asyncio.run(run(report, config, folders, nodes, arguments.seed, arguments.quick))
    return report.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
