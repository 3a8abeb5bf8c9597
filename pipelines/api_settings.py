"""What an operator sets of the door, and the limits that are the same for everybody."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

MIB = 1 << 20
MAX_JSON_BYTES = 1 * MIB
MAX_PICTURE_BYTES = 20 * MIB  # of a body that may hold pictures, and of all pictures of a request
BODY_TIMEOUT_S = 60.0  # for a body to arrive
FETCH_TIMEOUT_S = 10.0  # for a picture of another host, redirects included
HEALTH_TIMEOUT_S = 5.0
GRACE_S = 30.0  # beyond the request's time limit, for a client that reads slowly

MAX_CHOICES = 10  # OpenAI's limit on n
MAX_MESSAGES = 256
MAX_PARTS = 64  # of a message
MAX_GIVEN_IMAGES = 16  # of a request; OpenAI's limit for edits
MAX_STEPS = 200
MAX_SEED = 2**32 - 1
MAX_GUIDANCE = 20.0
MAX_PIXELS = 1792 * 1024  # the largest of OpenAI's sizes
MAX_SIDE = 4096
SIZE_MULTIPLE = 16  # pixels: 8 to a latent's side, two latents to a side of FLUX's patches

PAGE_FOLDER = Path(__file__).parent / "page"


@dataclass(frozen=True)
class ApiSettings:
    """Settings of `create_app`.

    `api_keys`: any of these opens `/v1` and `/metrics`; without any, they are open. `allowed_image_hosts`: `HOST` or
    `HOST:PORT` from which pictures of a chat may be fetched; an address that isn't public must be listed itself.
    `max_orders` answers are worked on at most at one time. `check_room` raises OverloadedError or UnavailableError
    while no request can be let in: asked before a body is read.
    `more_metrics` gives Prometheus text that `/metrics` appends to the door's own. `page_folder` holds `index.html`.
    """

    api_keys: tuple[str, ...] = field(default=(), repr=False)
    allowed_image_hosts: tuple[str, ...] = ()
    request_timeout_s: float = 300.0
    max_orders: int = MAX_CHOICES
    check_room: Callable[[], None] | None = None
    more_metrics: Callable[[], Awaitable[str]] | None = None
    page_folder: Path = PAGE_FOLDER
