"""Pictures that join and leave a running batch, against those that are drawn alone."""

from __future__ import annotations

import gc
import itertools
import math
import random
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torch import Tensor

from nexusgen import denoising, sampling
from nexusgen.denoising import DenoisingEngine, DenoisingRequest, FinishedPicture, PartialPicture, partial_steps
from nexusgen.errors import ConfigError, InputError, ModelError, ShapeError
from nexusgen.images import from_pixels
from nexusgen.model.decoder import ConditionerKind, save_decoder
from nexusgen.model.manifest import demo_base, read_manifest
from nexusgen.model.weights import Model, load_model, start_editing_decoder, write_manifest
from nexusgen.sampling import decode_embeddings

PARTS = ("generation_decoder", "editing_decoder", "vae")
SIZES = (None, (48, 96), (64, 64))
GEOMETRY = read_manifest(demo_base()).geometry
HIDDEN_SIZE = 128
KINDS: tuple[ConditionerKind, ...] = ("generation", "editing")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's base with the editing decoder that its training starts from."""
    made: Path = shutil.copytree(demo_base(), tmp_path_factory.mktemp("denoising") / "model")
    decoder = start_editing_decoder(made).editing_decoder
    assert decoder is not None
    save_decoder(decoder, made / "decoders" / "editing", torch.float32)
    values = read_manifest(made).model_dump(exclude={"version", "parts", "fingerprints", "fingerprint"})
    write_manifest(made, **values)
    return made


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load_model(folder, PARTS)


def embeddings(seed: int, tokens: int = GEOMETRY.num_target_tokens) -> Tensor:
    return torch.randn(tokens, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed))


def references(seed: int) -> Tensor:
    return embeddings(10_000 + seed, math.prod(GEOMETRY.reference_grid))


def request(seed: int, **values: object) -> DenoisingRequest:
    return DenoisingRequest(embeddings(seed), seed, **values)  # type: ignore[arg-type]


def random_requests(count: int, decoder: ConditionerKind, seed: int = 0) -> list[DenoisingRequest]:
    rng = random.Random(seed)
    return [
        request(
            number,
            steps=rng.choice([None, 1, 2, 5]),
            size=rng.choice(SIZES),
            true_cfg_scale=rng.choice([None, 1.0, 3.0, 1.7]),
            reference=references(number) if decoder == "editing" and rng.random() < 0.6 else None,
            num_partial=rng.choice([0, 0, 2]),
        )
        for number in range(count)
    ]


def alone(model: Model, one: DenoisingRequest, decoder: ConditionerKind = "generation") -> np.ndarray:
    reference = one.reference[None] if one.reference is not None else None
    images = decode_embeddings(
        model, one.embeddings[None], [one.seed], one.steps, one.size, one.true_cfg_scale, decoder, reference
    )
    return np.asarray(images[0])


def finish(engine: DenoisingEngine) -> Iterator[FinishedPicture | PartialPicture]:
    while engine.num_waiting + engine.num_running:
        yield from engine.step()


def pictures(events: Iterable[FinishedPicture | PartialPicture]) -> dict[int, np.ndarray]:
    return {event.ticket: np.asarray(event.image) for event in events if isinstance(event, FinishedPicture)}


def in_company(
    engine: DenoisingEngine, requests: Sequence[DenoisingRequest], seed: int
) -> tuple[list[np.ndarray], list[int]]:
    """Each request's picture, all joining in random order at random steps; and how many samples each step took."""
    rng = random.Random(seed)
    left = list(enumerate(requests))
    rng.shuffle(left)
    tickets: dict[int, int] = {}
    made: dict[int, np.ndarray] = {}
    batches = []
    while left or engine.num_waiting or engine.num_running:
        for _ in range(min(len(left), rng.choice([0, 1, 2, 8]))):
            number, one = left.pop()
            tickets[number] = engine.join(one)
        batches.append(len(engine.next_tickets))
        made |= pictures(engine.step())
    return [made[tickets[number]] for number in range(len(requests))], [size for size in batches if size]


def difference(one: np.ndarray, other: np.ndarray) -> int:
    """In steps of 1/255."""
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other).max())


@pytest.mark.parametrize("decoder", KINDS)
@pytest.mark.parametrize(
    ("dtype", "numerics"), [(torch.float32, "reference"), (torch.bfloat16, "reference"), (torch.bfloat16, "exact")]
)
def test_alone_it_is_the_picture_of_decode_embeddings_to_the_bit(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    decoder: ConditionerKind,
    dtype: torch.dtype,
    numerics: str,
) -> None:
    latents: list[Tensor] = []
    decode = sampling.decode_latents

    def seen(autoencoder: object, given: Tensor) -> Tensor:
        latents.append(given)
        return decode(autoencoder, given)  # type: ignore[arg-type]

    monkeypatch.setattr(sampling, "decode_latents", seen)
    monkeypatch.setattr(denoising, "decode_latents", seen)
    model = load_model(folder, PARTS, dtype, numerics=numerics)  # type: ignore[arg-type]
    engine = DenoisingEngine(model, decoder, max_batch=4)
    for one in random_requests(8, decoder, seed=1):
        want = alone(model, one, decoder)
        ticket = engine.join(one)
        got = pictures(finish(engine))[ticket]
        assert torch.equal(latents[-1], latents[0])
        assert latents[-1].dtype == (torch.float32 if numerics == "exact" else dtype)
        assert np.array_equal(got, want)
        latents.clear()


@pytest.mark.parametrize("decoder", KINDS)
def test_in_random_company_pictures_are_within_one_step_of_those_alone(model: Model, decoder: ConditionerKind) -> None:
    requests = random_requests(48, decoder)
    got, batches = in_company(DenoisingEngine(model, decoder, max_batch=8), requests, seed=2)
    errors = [difference(picture, alone(model, one, decoder)) for picture, one in zip(got, requests, strict=True)]
    assert max(errors) <= 1
    assert max(batches) <= 8
    assert sum(batches) / len(batches) >= 3
    distinct = {picture.tobytes() for picture in got}
    assert len(distinct) == len(requests)


def unrounded(pixels: Tensor) -> list[Image.Image]:
    """Pictures of mode F: 256 values would hide most differences."""
    return [Image.fromarray(row.float().flatten(0, 1).numpy()) for row in pixels]


@pytest.mark.parametrize("decoder", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic_pictures_are_the_same_bits_alone_and_in_any_company(
    folder: Path, monkeypatch: pytest.MonkeyPatch, decoder: ConditionerKind, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(denoising, "from_pixels", unrounded)
    model = load_model(folder, PARTS, dtype)
    requests = random_requests(24, decoder, seed=3)

    def engine() -> DenoisingEngine:
        return DenoisingEngine(model, decoder, max_batch=4, deterministic=True)

    by_itself = engine()
    want = []
    for one in requests:
        ticket = by_itself.join(one)
        want.append(pictures(finish(by_itself))[ticket])
    for seed in (4, 5):
        got, batches = in_company(engine(), requests, seed)
        assert sum(batches) / len(batches) >= 1.5
        assert all(np.array_equal(one, other) for one, other in zip(got, want, strict=True))
    if dtype == torch.float32:
        for one, pixels in zip(requests, want, strict=True):
            rounded = from_pixels(torch.tensor(pixels).unflatten(0, (3, -1))[None])[0]
            assert difference(alone(model, one, decoder), np.asarray(rounded)) <= 1


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_deterministic_pictures_are_the_same_bits_in_every_place_of_a_batch_of_several_threads(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(denoising, "from_pixels", unrounded)
    max_batch = 5
    for size in ((16, 16), (48, 48)):
        made = []
        for place in range(max_batch):
            engine = DenoisingEngine(model, "generation", max_batch, deterministic=True)
            numbers = [1 + number for number in range(max_batch)]
            numbers.insert(place, 0)
            tickets = [engine.join(request(n, steps=1, size=size, true_cfg_scale=3.0)) for n in numbers[:max_batch]]
            made.append(pictures(engine.step())[tickets[place]])
        assert all(np.array_equal(picture, made[0]) for picture in made)
    assert torch.get_num_threads() == 3


def test_requests_of_any_step_number_of_steps_and_guidance_share_a_batch(model: Model) -> None:
    engine = DenoisingEngine(model, "generation", max_batch=4)
    first = engine.join(request(1, steps=6))
    engine.step()
    assert (engine.num_waiting, engine.num_running) == (0, 1)
    others = [engine.join(request(2, steps=3, true_cfg_scale=3.0)), engine.join(request(3, steps=4))]
    other_size = engine.join(request(4, steps=1, size=(48, 48)))
    assert engine.next_tickets == (first, *others)
    engine.step()
    assert (engine.num_waiting, engine.num_running) == (1, 3)
    assert engine.next_tickets == (other_size,)
    assert pictures(engine.step()).keys() == {other_size}
    engine.step()
    assert pictures(engine.step()).keys() == {others[0]}  # its third step
    assert pictures(finish(engine)).keys() == {first, others[1]}
    assert engine.step() == []


def test_whoever_leaves_is_drawn_no_further_and_makes_room(model: Model) -> None:
    engine = DenoisingEngine(model, "generation", max_batch=2)
    running, stays, waiting, next_one = (engine.join(request(number, steps=4)) for number in range(4))
    lone = engine.join(request(9, size=(48, 48)))
    engine.step()
    for ticket in (running, waiting, lone, lone, 99):
        engine.leave(ticket)
    assert (engine.num_waiting, engine.num_running) == (1, 1)
    assert engine.next_tickets == (stays, next_one)
    got = pictures(finish(engine))
    assert got.keys() == {stays, next_one}
    assert difference(got[next_one], alone(model, request(3, steps=4))) <= 1
    engine.leave(stays)
    assert engine.num_running == 0


def test_requests_join_and_leave_while_a_step_runs(model: Model) -> None:
    engine = DenoisingEngine(model, "generation", max_batch=4)
    requests = [request(number, steps=2, size=SIZES[number % 2]) for number in range(24)]
    tickets: dict[int, int] = {}
    made: dict[int, np.ndarray] = {}
    stop = threading.Event()

    def draw() -> None:
        while not stop.is_set() or engine.num_waiting + engine.num_running:
            made.update(pictures(engine.step()))

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        for number, one in enumerate(requests):
            tickets[number] = engine.join(one)
            if number % 3 == 0:
                engine.leave(tickets[number])
    finally:
        stop.set()
        thread.join()
    stayed = [number for number in range(len(requests)) if number % 3]
    assert {tickets[number] for number in stayed} <= made.keys()
    assert all(difference(made[tickets[n]], alone(model, requests[n])) <= 1 for n in stayed)


def test_of_a_step_during_which_a_request_leaves_it_gets_nothing(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = DenoisingEngine(model, "generation", max_batch=2)
    leaves, stays = (engine.join(request(number, steps=1)) for number in range(2))
    decode = denoising.decode_latents

    def left_meanwhile(autoencoder: object, latents: Tensor) -> Tensor:
        engine.leave(leaves)
        return decode(autoencoder, latents)  # type: ignore[arg-type]

    monkeypatch.setattr(denoising, "decode_latents", left_meanwhile)
    assert [event.ticket for event in engine.step()] == [stays]
    assert engine.num_running == 0


def test_a_step_that_raises_takes_nobody_further_and_can_be_tried_again(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = DenoisingEngine(model, "generation", max_batch=2)
    one = request(1, steps=3)
    ticket = engine.join(one)
    engine.step()

    def full(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(denoising, "euler_step", full)
        with pytest.raises(torch.OutOfMemoryError):
            engine.step()
    assert engine.next_tickets == (ticket,)
    assert np.array_equal(pictures(finish(engine))[ticket], alone(model, one))


def test_partial_pictures_divide_the_steps_evenly() -> None:
    assert partial_steps(3, 8) == [2, 4, 6]
    assert partial_steps(1, 50) == [25]
    assert partial_steps(2, 4) == [1, 2]
    assert partial_steps(3, 3) == [1, 2]  # one a step, before the last
    assert partial_steps(5, 1) == partial_steps(0, 8) == []
    for number in range(12):
        for steps in range(1, 30):
            made = partial_steps(number, steps)
            assert len(made) == len(set(made)) == min(number, steps - 1)
            assert all(1 <= step < steps for step in made)


def test_partial_pictures_come_in_order_and_approach_the_last_one(model: Model) -> None:
    engine = DenoisingEngine(model, "generation", max_batch=4)
    shown = engine.join(request(1, steps=8, num_partial=3))
    plain = engine.join(request(2, steps=8))
    events: list[FinishedPicture | PartialPicture] = []
    counts = []
    for _ in range(8):
        made = engine.step()
        counts.append(len(made))
        events += made
    assert counts == [0, 1, 0, 1, 0, 1, 0, 2]
    assert [event.ticket for event in events] == [shown] * 4 + [plain]
    partial = [event for event in events if isinstance(event, PartialPicture)]
    assert [event.number for event in partial] == [0, 1, 2]
    last = np.asarray(events[3].image, dtype=float)
    errors = [np.square(np.asarray(event.image, dtype=float) - last).mean() for event in partial]
    assert errors[0] > errors[1] > errors[2] > 0
    noise_too = np.square(128 - last).mean()
    assert errors[0] < noise_too  # the prediction of the clean picture, not the noisy one


def test_what_cannot_be_drawn_is_refused_by_name_and_changes_nothing(model: Model) -> None:
    engine = DenoisingEngine(model, "generation", max_batch=2)
    editing = DenoisingEngine(model, "editing", max_batch=2)
    refused: list[tuple[DenoisingEngine, DenoisingRequest, type[Exception], str]] = [
        (engine, request(1, size=(40, 96)), InputError, "size 40x96.*multiples of 16"),
        (engine, request(1, steps=0), InputError, "steps 0"),
        (engine, request(1, num_partial=-1), InputError, "num_partial -1"),
        (engine, request(1, reference=references(1)), ModelError, "use the editing decoder"),
        (engine, DenoisingRequest(embeddings(1, tokens=5), 1), ShapeError, "3x3 tokens of 128"),
        (editing, request(1, reference=embeddings(1)), ShapeError, "6x6 tokens of 128"),
    ]
    for which, one, error, message in refused:
        with pytest.raises(error, match=message):
            which.join(one)
        if "num_partial" not in message:
            with pytest.raises(error, match=message):
                alone(model, one, "generation" if which is engine else "editing")
        assert which.num_waiting == which.num_running == 0
        assert which.step() == []
    with pytest.raises(ConfigError, match="max_batch 0"):
        DenoisingEngine(model, "generation", max_batch=0)
    without = load_model(demo_base(), ("generation_decoder", "vae"))
    with pytest.raises(ModelError, match="no editing decoder"):
        DenoisingEngine(without, "editing", max_batch=1)
    without.negative_context = None
    engine = DenoisingEngine(without, "generation", max_batch=1)
    with pytest.raises(ModelError, match=r"true_cfg_scale 2.0 needs the model's negative context"):
        engine.join(request(1, true_cfg_scale=2.0))
    assert engine.num_waiting == 0
    one = request(1, steps=2, true_cfg_scale=1.0)
    ticket = engine.join(one)
    assert np.array_equal(pictures(finish(engine))[ticket], alone(without, one))


def test_a_lone_large_picture_among_a_stream_of_small_ones_ends_after_as_many_rounds_as_it_has_steps(
    model: Model,
) -> None:
    engine = DenoisingEngine(model, "generation", max_batch=2)
    small = (request(number, steps=1 + number % 3, size=(48, 48)) for number in itertools.count())
    for _ in range(6):
        engine.join(next(small))
    engine.step()
    large = engine.join(request(1, steps=5, size=(144, 144)))
    finished_small = num_steps = 0
    made: dict[int, np.ndarray] = {}
    while large not in made:
        while engine.num_waiting < 6:  # more than can be drawn
            engine.join(next(small))
        made = pictures(engine.step())
        finished_small += len(made.keys() - {large})
        num_steps += 1
        assert num_steps <= 2 * 5  # two groups, five steps
    assert finished_small >= 2  # the others went on meanwhile


def test_first_come_is_first_drawn_within_a_size_and_groups_take_turns(model: Model) -> None:
    engine = DenoisingEngine(model, "generation", max_batch=2)
    sizes = [(48, 48), (48, 96), (96, 48)]
    tickets = {size: [engine.join(request(n, steps=2, size=size)) for n in range(5)] for size in sizes}
    turns = []
    ended: dict[tuple[int, int], list[int]] = {size: [] for size in sizes}
    while engine.num_waiting + engine.num_running:
        size = next(size for size, mine in tickets.items() if engine.next_tickets[0] in mine)
        turns.append(size)
        ended[size] += pictures(engine.step())
    assert turns == sizes * 6  # three batches of each, two steps a batch
    assert ended == tickets


def test_an_offloaded_model_draws_the_same_between_other_work(folder: Path, model: Model) -> None:
    offloaded = load_model(folder, ("autoregressive", *PARTS), offload=True)
    engine = DenoisingEngine(offloaded, "generation", max_batch=2)
    one = request(1, steps=2)
    ticket = engine.join(one)
    engine.step()
    offloaded.use("autoregressive")
    assert np.array_equal(pictures(engine.step())[ticket], alone(model, one))


def test_memory_is_flat_over_hundreds_of_requests(model: Model) -> None:
    engine = DenoisingEngine(model, "generation", max_batch=8)
    process = psutil.Process()

    def serve(first: int, count: int) -> tuple[int, int]:
        """Live tensors and resident bytes after `count` requests, of which every fifth leaves."""
        for number in range(first, first + count):
            ticket = engine.join(request(number, steps=2, size=SIZES[number % 3]))
            if number % 5 == 0:
                engine.leave(ticket)
            if number % 8 == 0:
                engine.step()
        assert sum(1 for _ in finish(engine)) > 0
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()), process.memory_info().rss

    serve(0, 100)
    tensors, resident = serve(100, 100)
    tensors_after, resident_after = serve(200, 300)
    assert tensors_after == tensors
    assert resident_after - resident < 20 * 2**20
