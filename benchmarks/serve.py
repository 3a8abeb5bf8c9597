"""Serving against its limit and a rival: the same model, work and threads, over HTTP, with closed-loop clients.

    ours     nexusgen serve: Ray Serve, one replica each of ar, generation_decoder and editing_decoder, a thread each
    rival    FastAPI and uvicorn with a lock around the same model, on as many threads as the machine has cores
    bare     the model called in process, one request after another: the limit of one stream

1, 4, 16 and 64 clients each send the next request of a fixed mixture as soon as the last one is answered: pictures of
texts, edits, questions about pictures. At 64 clients ours has room for 16: the others get 429 and come again after the
time that the answer names, as openai's clients do.

    python benchmarks/serve.py [--quick] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "pipelines")]

import aiohttp  # noqa: E402 (the project's own folders come first)
import httpx  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from servers import free_port  # noqa: E402

from benchmarks.report import Report  # noqa: E402
from nexusgen import shapes  # noqa: E402
from nexusgen.model.manifest import demo_base  # noqa: E402
from nexusgen.model.weights import load_model  # noqa: E402
from nexusgen.sampling import describe, edit_images, generate_images  # noqa: E402

CLIENTS = (1, 4, 16, 64)
QUEUE_SIZE = 16
STEPS = 8
KINDS = ("generate", "generate", "describe", "edit", "describe")  # the mixture, in this order again and again
PROMPTS = ("a red circle", "two blue squares", "a green star and a yellow cross", "three triangles")
QUESTIONS = ("How many things are there?", "What colour is the circle?")
INSTRUCTIONS = ("Remove the cross.", "Make the circle blue.")
MAX_TOKENS = 16  # of an answer to a question
START_S = 180


@dataclass(frozen=True)
class Work:
    """One request."""

    kind: str
    text: str
    seed: int


@dataclass
class Load:
    """What some clients saw: seconds of each accepted answer by kind, and how often each status came."""

    seconds: float = 0.0
    accepted: dict[str, list[float]] = field(default_factory=dict)
    statuses: Counter[int] = field(default_factory=Counter)

    @property
    def num_accepted(self) -> int:
        return sum(map(len, self.accepted.values()))

    @property
    def per_second(self) -> float:
        return self.num_accepted / self.seconds

    def quantile(self, q: float) -> float:
        """Of the accepted answers' seconds."""
        ordered = sorted(itertools.chain.from_iterable(self.accepted.values()))
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def works() -> Iterator[Work]:
    """The mixture, without end."""
    texts = {"generate": PROMPTS, "describe": QUESTIONS, "edit": INSTRUCTIONS}
    for number in itertools.count():
        kind = KINDS[number % len(KINDS)]
        yield Work(kind, texts[kind][number % len(texts[kind])], number)


def picture() -> Image.Image:
    """What is edited and asked about."""
    scene = shapes.Scene((shapes.Thing(0, "circle", "red"), shapes.Thing(8, "cross", "blue")))
    return Image.fromarray(shapes.draw(scene))


# --- clients ---


def body_of(work: Work, png: bytes) -> tuple[str, bytes, str]:
    """Path, body and media type of a request."""
    if work.kind == "generate":
        path, body = "/v1/images/generations", {"prompt": work.text, "seed": work.seed, "steps": STEPS}
        return path, json.dumps(body).encode(), "application/json"
    if work.kind == "edit":
        form = {"prompt": work.text, "seed": str(work.seed), "steps": str(STEPS)}
        request = httpx.Request("POST", "http://any", data=form, files={"image": ("a.png", png, "image/png")})
        return "/v1/images/edits", request.read(), request.headers["content-type"]
    url = "data:image/png;base64," + base64.b64encode(png).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": work.text}]
    body = {"model": "nexusgen", "max_tokens": MAX_TOKENS, "messages": [{"role": "user", "content": content}]}
    return "/v1/chat/completions", json.dumps(body).encode(), "application/json"


async def load(url: str, num_clients: int, seconds: float, png: bytes) -> Load:
    """Closed-loop clients for some seconds; those that are refused come again as they are told."""
    found, mixture = Load(), works()
    connector = aiohttp.TCPConnector(limit=num_clients)
    async with aiohttp.ClientSession(url, connector=connector, timeout=aiohttp.ClientTimeout(300)) as client:
        began = time.perf_counter()

        async def one() -> None:
            while time.perf_counter() - began < seconds:
                work = next(mixture)
                path, body, media_type = body_of(work, png)
                while True:
                    sent = time.perf_counter()
                    async with client.post(path, data=body, headers={"content-type": media_type}) as response:
                        await response.read()
                    found.statuses[response.status] += 1
                    if response.status != 429 or time.perf_counter() - began >= seconds:
                        break
                    await asyncio.sleep(float(response.headers["retry-after-ms"]) / 1000)
                # What comes later isn't counted: by then clients that wait to come again leave the server half idle.
                if response.status == 200 and time.perf_counter() - began <= seconds:
                    found.accepted.setdefault(work.kind, []).append(time.perf_counter() - sent)

        await asyncio.gather(*(one() for _ in range(num_clients)))
        found.seconds = seconds
    return found


# --- sides ---


def bare(folder: Path, count: int) -> dict[str, float]:
    """Median seconds of the model itself for each kind of request, on the threads that a replica has."""
    torch.set_num_threads(1)
    model, image = load_model(folder), picture()
    taken: dict[str, list[float]] = {}
    for work in itertools.islice(works(), count):
        began = time.perf_counter()
        if work.kind == "generate":
            made = generate_images(model, [work.text], [work.seed], steps=STEPS)
        elif work.kind == "edit":
            made = edit_images(model, [image], [work.text], [work.seed], steps=STEPS)
        else:
            made = []
            describe(model, [image], [work.text], max_new_tokens=MAX_TOKENS)
        for drawn in made:
            drawn.save(io.BytesIO(), "png")
        taken.setdefault(work.kind, []).append(time.perf_counter() - began)
    return {kind: statistics.median(seconds[1:]) for kind, seconds in taken.items()}


def run_rival(folder: str, port: str) -> None:
    """FastAPI in front of the model, one request at a time."""
    import uvicorn

    from benchmarks.local_backend import LocalBackend
    from pipelines.api import create_app

    torch.set_num_threads(os.cpu_count() or 1)
    app = create_app(LocalBackend(Path(folder)))
    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning")


@contextlib.contextmanager
def server(command: Sequence[str], url: str, log: Path) -> Iterator[None]:
    """A server of ours or the rival's until the block ends; it answers when the block begins."""
    with log.open("ab") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
    try:
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health", timeout=10).status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command} doesn't answer: {log.read_text()[-2000:]}")
            time.sleep(0.3)
        yield
    finally:
        process.terminate()
        process.wait(60)


def commands(folder: Path, scratch: Path, port: int) -> dict[str, list[str]]:
    """How each side is started."""
    config = str(ROOT / "jobs" / "configs" / "demo" / "serve.yaml")
    ours = [sys.executable, "-m", "jobs.cli", "serve", config, f"storage={scratch}/storage", f"model={folder}"]
    ours += [f"port={port}", f"queue_size={QUEUE_SIZE}"]
    return {"ours": ours, "rival": [sys.executable, __file__, "--rival", str(folder), str(port)]}


# --- the whole ---


def measure(report: Report, folder: Path, scratch: Path, quick: bool) -> None:
    """Run all sides in turn, tell."""
    rounds, seconds = (1, 6.0) if quick else (3, 20.0)
    image = io.BytesIO()
    picture().save(image, "png")
    loads: dict[tuple[str, int], list[Load]] = {}
    alone: list[dict[str, float]] = []
    for turn in range(rounds):
        alone.append(bare(folder, 20 if quick else 60))
        port = free_port()
        for side, command in commands(folder, scratch, port).items():
            with server(command, f"http://127.0.0.1:{port}", scratch / f"{side}.log"):
                url = f"http://127.0.0.1:{port}"
                asyncio.run(load(url, 2, seconds / 4, image.getvalue()))  # warm
                for num_clients in CLIENTS if side == "ours" else CLIENTS[:-1]:
                    found = asyncio.run(load(url, num_clients, seconds, image.getvalue()))
                    loads.setdefault((side, num_clients), []).append(found)
                    told = f"{found.per_second:.1f} answers/s, p50 {found.quantile(0.5):.3f} s, {dict(found.statuses)}"
                    print(f"round {turn + 1}, {side}, {num_clients} clients: {told}", file=sys.stderr, flush=True)
    tell(report, alone, loads)


def tell(report: Report, alone: Sequence[dict[str, float]], loads: dict[tuple[str, int], list[Load]]) -> None:
    """The figures over all rounds."""

    def rate(side: str, num_clients: int) -> float:
        return statistics.median(one.per_second for one in loads[side, num_clients])

    for kind in sorted(set(KINDS)):
        own = statistics.median(one[kind] for one in alone)
        served = statistics.median(statistics.median(one.accepted[kind]) for one in loads["ours", 1])
        report.tell(f"{kind}: the model's own time, ms", 1000 * own)
        report.at_most(f"{kind}, 1 client: p50 over the model's own time, ms", 1000 * (served - own), 15)
    for num_clients in CLIENTS[:-1]:
        report.tell(f"{num_clients} clients: ours, answers/s", rate("ours", num_clients))
        report.tell(f"{num_clients} clients: rival, answers/s", rate("rival", num_clients))
    report.at_least("16 clients: ours over the rival", rate("ours", 16) / rate("rival", 16), 2)
    crowd = loads["ours", 64]
    statuses = sum((one.statuses for one in crowd), Counter())
    report.tell("64 clients: refused with 429, share", statuses[429] / statuses.total())
    report.at_most("64 clients: other statuses than 200 and 429", statuses.total() - statuses[200] - statuses[429], 0)
    report.at_least("64 clients: accepted answers/s, over those at 16", rate("ours", 64) / rate("ours", 16), 0.9)
    # A request's service time is that of a lone client. (Of a full server's 1 / throughput, 16 times is by Little's law
    # the mean time of those inside, which no p99 can be below.)
    service_s = statistics.median(
        statistics.mean(itertools.chain.from_iterable(one.accepted.values())) for one in loads["ours", 1]
    )
    worst = statistics.median(one.quantile(0.99) for one in crowd)
    report.at_most("64 clients: accepted p99, in queue lengths x service time", worst / (QUEUE_SIZE * service_s), 1)
    usual = statistics.median(one.quantile(0.5) for one in crowd)
    report.tell("64 clients: accepted p50, in queue lengths x service time", usual / (QUEUE_SIZE * service_s))


def main() -> int:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one round, shorter")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--rival", nargs=2, help=argparse.SUPPRESS)  # run it: FOLDER PORT
    arguments = parser.parse_args()
    if arguments.rival:
        run_rival(*arguments.rival)
        return 0
    from served_versions import with_editing_decoder

    os.environ.pop("RAY_ADDRESS", None)
    report = Report()
    with tempfile.TemporaryDirectory(prefix="nexusgen-") as scratch:
        folder = with_editing_decoder(demo_base(), Path(scratch) / "model")
        measure(report, folder, Path(scratch), arguments.quick)
    return report.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
