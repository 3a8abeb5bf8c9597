"""Vision decoders under load: pictures that join and leave one running batch between any two denoising steps.

Pictures of one size share a batch whatever their seed, step, number of steps or guidance: each has its own noise
levels. What can't share one (another size, or another length of context) is another group; groups take turns, one step
each, so that a lone picture among many of another size ends after as many rounds as it has steps. Within a group the
first come are drawn first, `max_batch` at a time, and whoever waits takes the place of one that is finished or left.

A picture is that of `sampling.decode_embeddings`: bit for bit while it is alone in its batch; in company, where matrix
products have another number of rows and round otherwise, within 1/255 in fp32. In bf16 with two-pass guidance it may be
another by more than that, as it may in a batch of `decode_embeddings`. `deterministic` has every pass made at
`max_batch` rows and, on a CPU, by one thread: then a picture has the same bits alone and in any company, in either
dtype.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from nexusgen.errors import ConfigError, InputError
from nexusgen.flow_matching import (
    VelocityFunction,
    euler_step,
    guide,
    inference_sigmas,
    initial_noise,
    timesteps_at,
)
from nexusgen.images import from_pixels
from nexusgen.model.autoencoder import decode_latents, latent_shape
from nexusgen.model.decoder import ConditionerKind, check_guidance
from nexusgen.model.weights import Model
from nexusgen.sampling import DrawingParts, drawing_parts, drawing_settings

_ONE_THREAD = threading.Lock()  # held by who has set the process's number of threads to 1


@dataclass(frozen=True, eq=False)
class DenoisingRequest:
    """One picture to draw from image embeddings; the fields are the arguments of `sampling.decode_embeddings`.

    `size` is (height, width) in pixels; None leaves a setting to the model. `num_partial` pictures are shown on the
    way: see `partial_steps`.
    """

    embeddings: Float[Tensor, "tokens hidden"]
    seed: int
    steps: int | None = None
    size: tuple[int, int] | None = None
    true_cfg_scale: float | None = None
    reference: Float[Tensor, "reference_tokens hidden"] | None = None
    num_partial: int = 0


@dataclass(frozen=True)
class FinishedPicture:
    """The picture of a request, which has left the engine with it."""

    ticket: int
    image: Image.Image


@dataclass(frozen=True)
class PartialPicture:
    """What a request's picture would be by the prediction of one of its steps; `number` counts from 0."""

    ticket: int
    image: Image.Image
    number: int


class _Kind(NamedTuple):
    """What samples must have in common to share a batch."""

    latent_shape: tuple[int, int, int]
    context_tokens: int
    has_reference: bool


@dataclass(eq=False)
class _Sample:
    """A request on its way. `shows` says after how many steps which partial picture is due."""

    ticket: int
    latents: Float[Tensor, "channels height width"]
    context: Float[Tensor, "tokens context"]
    sigmas: Float[Tensor, " levels"]
    true_cfg_scale: float
    shows: dict[int, int]
    steps_made: int = 0

    @property
    def is_last_step(self) -> bool:
        return self.steps_made + 2 == len(self.sigmas)


class DenoisingEngine:
    """Draws the requests that have joined, a step of one group at a time.

    `join` and `leave` may be called from other threads while a step runs; steps are made by one thread at a time. On a
    CPU a deterministic engine's `join` waits for the running step. An offloaded model's drawing half is loaded when it
    is needed.
    """

    def __init__(self, model: Model, decoder: ConditionerKind, max_batch: int, *, deterministic: bool = False) -> None:
        """Raises: ModelError if the model has no such decoder; ConfigError for a `max_batch` below 1."""
        if max_batch < 1:
            raise ConfigError(f"max_batch {max_batch}: must be at least 1")
        on_cpu = drawing_parts(model, decoder).pooled_prompt.device.type == "cpu"
        self._model = model
        self._decoder: ConditionerKind = decoder
        self._max_batch = max_batch
        self._num_rows = max_batch if deterministic else 0  # of a pass, at least
        self._needs_one_thread = deterministic and on_cpu
        self._tickets = itertools.count()
        # Samples by ticket, the first come first; the group whose turn is next stands first.
        self._groups: dict[_Kind, dict[int, _Sample]] = {}
        self._lock = threading.Lock()  # of the groups; nothing is computed under it

    @property
    def num_waiting(self) -> int:
        """Requests that have joined and haven't made a step."""
        return sum(not sample.steps_made for sample in self._samples())

    @property
    def num_running(self) -> int:
        """Requests that have made a step and aren't finished."""
        return sum(sample.steps_made > 0 for sample in self._samples())

    @property
    def next_tickets(self) -> tuple[int, ...]:
        """Tickets of the requests that the next step takes further, if nobody joins or leaves before."""
        return tuple(sample.ticket for sample in self._next()[1])

    @torch.no_grad()
    def join(self, request: DenoisingRequest) -> int:
        """Have a picture drawn by the steps to come; gives its ticket. Its context is computed here, once.

        Raises: as `sampling.decode_embeddings`; InputError for a negative `num_partial`. Nothing has changed then.
        """
        parts = drawing_parts(self._model, self._decoder)
        settings = drawing_settings(
            self._model.manifest, self._decoder, request.steps, request.size, request.true_cfg_scale
        )
        check_guidance(settings.true_cfg_scale, parts.negative_context)
        shows = {made: number for number, made in enumerate(partial_steps(request.num_partial, settings.steps))}
        device = parts.pooled_prompt.device
        reference = request.reference[None].to(device) if request.reference is not None else None
        with self._threads():
            context = parts.decoder.context(request.embeddings[None].to(device), reference)[0]
        shape = latent_shape(parts.autoencoder, settings.size)
        noise = initial_noise([request.seed], shape)[0].to(device, parts.latents_dtype)
        sigmas = inference_sigmas(parts.scheduler, settings.steps)
        with self._lock:
            ticket = next(self._tickets)
            sample = _Sample(ticket, noise, context, sigmas, settings.true_cfg_scale, shows)
            self._groups.setdefault(_Kind(shape, len(context), reference is not None), {})[ticket] = sample
        return ticket

    def leave(self, ticket: int) -> None:
        """Draw a request no further; of the step that runs it is given nothing. One that is finished is none."""
        with self._lock:
            for kind, group in self._groups.items():
                if group.pop(ticket, None) is not None:
                    if not group:
                        del self._groups[kind]
                    return

    @torch.no_grad()
    def step(self) -> list[FinishedPicture | PartialPicture]:
        """One denoising step of the group whose turn it is; gives what its pictures have come to, by ticket.

        Nobody is taken further by a step that raises: it would be tried again next. `next_tickets` are those to drop.
        """
        kind, batch = self._next()
        if kind is None:
            return []
        with self._threads():
            moved, images = self._compute(kind, batch)
        return self._commit(kind, batch, moved, images)

    def _compute(
        self, kind: _Kind, batch: Sequence[_Sample]
    ) -> tuple[Float[Tensor, "batch channels height width"], dict[int, Image.Image]]:
        """Latents after a step of each sample, and by their rows the pictures that are due then."""
        parts = drawing_parts(self._model, self._decoder)
        latents = torch.stack([sample.latents for sample in batch])
        here, there = (
            torch.stack([sample.sigmas[sample.steps_made + ahead] for sample in batch]).to(latents.device)
            for ahead in (0, 1)
        )
        velocity = self._velocity(parts, kind, batch)(latents, timesteps_at(parts.scheduler, here))
        moved = euler_step(latents, velocity, here, there)
        shown = [i for i, sample in enumerate(batch) if sample.is_last_step or sample.steps_made + 1 in sample.shows]
        images: dict[int, Image.Image] = {}
        if shown:
            # The last step goes to level 0 anyhow.
            rows = torch.tensor(shown, device=latents.device)
            clean = euler_step(latents[rows], velocity[rows], here[rows], torch.zeros_like(here[rows]))
            pixels = decode_latents(parts.autoencoder, _pad(clean, self._num_rows))
            images = dict(zip(shown, from_pixels(pixels[: len(shown)]), strict=True))
        return moved, images

    def _velocity(self, parts: DrawingParts, kind: _Kind, batch: Sequence[_Sample]) -> VelocityFunction:
        """Of all samples of a batch, each under its own context and guidance."""
        contexts = _pad(torch.stack([sample.context for sample in batch]), self._num_rows)
        conditional = parts.decoder.conditional(contexts, parts.pooled_prompt, kind.has_reference)
        conditional = _padded(conditional, self._num_rows)
        if parts.negative_context is None:
            return conditional
        unconditional = parts.decoder.unconditional(parts.negative_context, parts.pooled_prompt)
        scales = torch.tensor([sample.true_cfg_scale for sample in batch])
        return guide(conditional, _padded(unconditional, self._num_rows), scales)

    def _next(self) -> tuple[_Kind | None, list[_Sample]]:
        with self._lock:
            for kind, group in self._groups.items():
                return kind, list(itertools.islice(group.values(), self._max_batch))
        return None, []

    def _commit(
        self,
        kind: _Kind,
        batch: Sequence[_Sample],
        latents: Float[Tensor, "batch channels height width"],
        images: dict[int, Image.Image],
    ) -> list[FinishedPicture | PartialPicture]:
        """Take a batch one step further, and its group to the end of the line."""
        events: list[FinishedPicture | PartialPicture] = []
        with self._lock:
            group = self._groups.pop(kind, {})  # with whoever joined meanwhile, without whoever left
            for i, sample in enumerate(batch):
                if sample.ticket not in group:
                    continue
                if sample.is_last_step:
                    del group[sample.ticket]
                    events.append(FinishedPicture(sample.ticket, images[i]))
                    continue
                sample.latents = latents[i]
                sample.steps_made += 1
                if i in images:
                    events.append(PartialPicture(sample.ticket, images[i], sample.shows[sample.steps_made]))
            if group:
                self._groups[kind] = group
        return events

    def _threads(self) -> contextlib.AbstractContextManager[None]:
        return _one_thread() if self._needs_one_thread else contextlib.nullcontext()

    def _samples(self) -> list[_Sample]:
        with self._lock:
            return [sample for group in self._groups.values() for sample in group.values()]


def partial_steps(num_partial: int, steps: int) -> list[int]:
    """After how many steps the partial pictures are shown: picture k of n after floor((k + 1) steps / (n + 1)).

    They divide the steps evenly, before the last one. There is at most one a step, so no more than steps - 1. Each is
    decoded from the clean latents that its step predicts, x - sigma v, not from the noisy ones that it leads to.
    Raises: InputError for a negative number.
    """
    if num_partial < 0:
        raise InputError(f"num_partial {num_partial}: must be 0, for none, or more")
    count = min(num_partial, steps - 1)
    return [(number + 1) * steps // (count + 1) for number in range(count)]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Has everything computed by one thread.

    Threads divide the rows of a matrix product, and a row left over from whole blocks is rounded otherwise than one in
    a block: with several threads a sample's bits depend on its place in the batch.
    """
    with _ONE_THREAD:
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(num_threads)


def _padded(velocity: VelocityFunction, num_rows: int) -> VelocityFunction:
    """A velocity that is always computed of at least `num_rows` samples."""

    def of_padded(latents: Tensor, timesteps: Tensor) -> Tensor:
        return velocity(_pad(latents, num_rows), _pad(timesteps, num_rows))[: len(latents)]

    return of_padded


def _pad(values: Float[Tensor, "batch *rest"], num_rows: int) -> Float[Tensor, "rows *rest"]:
    """At least `num_rows` rows: the last one is repeated, so that all are of a kind that the model knows."""
    missing = num_rows - len(values)
    return torch.cat([values, values[-1:].expand(missing, *values.shape[1:])]) if missing > 0 else values
