"""The contract between jobs: what a sample is, the columns of embedded data, quarantine rows and reason codes.

One place for every column: name, dtype, shape, unit, who writes it and who reads it.

| column | dtype | what | written by | read by |
|---|---|---|---|---|
| key, shard, row | string, string, int64 | the sample's name, its tar's URI, its place in the tar | embed | all |
| task, lang | string | understanding, generation or editing; `en`, `zh`, ... | embed | train, evaluate |
| messages | list<struct<role, content>> | the conversation, `<image>` marks each image in order | embed | train |
| meta | string | every other field of the sample's json, as json | embed | inspect, evaluate |
| num_tokens | int32 | tokens of the conversation as stage ar sees it, images included | embed | train |
| images | list<binary> | mode images: the sample's pictures as they came, still compressed | embed | train |
| R_index | list<int16> | which of the sample's images the role's entries are | embed | train |
| R_grid | list<int16> | h, w pairs in tokens (latents: in latent pixels), one pair per entry | embed | train |
| R_dtype | string | `bfloat16`, `float32` or `int8` (or empty where the role has no entry) | embed | train |
| R_data | list<binary> | raw little-endian array per entry: [h*w, hidden]; latents [channels, h, w] | embed | train |
| R_scale | list<binary> | of `int8`: a float32 per token, to multiply its numbers by; else empty | embed | train |

Roles R by mode: vision has `input`, `target`, `crop`; latents `latents`; predicted `reference` and `predicted`; images
has none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa

Task = Literal["understanding", "generation", "editing"]
TASKS: tuple[Task, ...] = ("understanding", "generation", "editing")

EmbedMode = Literal["vision", "latents", "predicted", "images"]
StoredDtype = Literal["bfloat16", "int8"]  # of arrays that `embed` writes
ROLE_PARTS = ("index", "grid", "dtype", "data", "scale")  # columns of a role R: R_index, R_grid, ...
VISION_ROLES = ("input", "target", "crop", "reference")
IMAGE_MARK = "<image>"
MANIFEST_NAME = "nexusgen.json"  # of a model folder; who finds it finds a whole model

REASON_CODES = {
    "tar_not_a_tar": "the shard is neither a plain nor a gzip-compressed tar",
    "tar_truncated": "the shard ends in the middle of a member or header",
    "tar_header": "a member's header is damaged",
    "tar_empty": "the shard holds no sample",
    "tar_unreadable": "the shard can't be opened or read",
    "member_missing": "the sample names a member that is not in the shard",
    "member_duplicate": "the sample holds one member name twice",
    "member_unsafe": "a member's name climbs out of the shard, or it is a link or device",
    "member_too_large": "a member is larger than the limit",
    "key_duplicate": "the key occurred earlier in the same shard",
    "json_invalid": "the sample's json can't be parsed, or isn't an object",
    "messages_invalid": "messages are missing, empty or out of order, or image marks and images don't match",
    "image_undecodable": "the image's bytes aren't a picture that we can read",
    "image_truncated": "the image's data ends early",
    "image_too_large": "the image has more pixels than the limit",
    "image_shape": "the image's aspect ratio or size is out of range",
    "text_invalid": "a text is empty or isn't valid Unicode",
    "text_too_long": "the conversation is longer than the limit",
    "taken_down": "the sample was embedded or would have been, and was dropped by its key on request",
    "sample_unknown": "the members of this key aren't a sample of a known convention",
}


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `content` holds `<image>` at each of its images."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Sample:
    """One good sample as read from a tar shard: images still compressed, task computed."""

    key: str
    shard: str
    row: int
    task: Task
    lang: str
    messages: tuple[Message, ...]
    images: tuple[bytes, ...]
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class QuarantineRow:
    """One sample (or shard, with an empty key) that was not used, and why."""

    shard: str
    key: str
    member: str
    reason_code: str
    reason: str


QUARANTINE_SCHEMA = pa.schema([(name, pa.string()) for name in ("shard", "key", "member", "reason_code", "reason")])

_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])


def embedded_schema(roles: tuple[str, ...]) -> pa.Schema:
    """Columns of embedded data for the given roles (`latents` is the only role of mode latents; images has none)."""
    columns: list[tuple[str, pa.DataType]] = [
        ("key", pa.string()),
        ("shard", pa.string()),
        ("row", pa.int64()),
        ("task", pa.string()),
        ("lang", pa.string()),
        ("messages", pa.list_(_MESSAGE)),
        ("meta", pa.string()),
        ("num_tokens", pa.int32()),
    ]
    if not roles:
        columns.append(("images", pa.list_(pa.binary())))
    for role in roles:
        columns += [
            (f"{role}_index", pa.list_(pa.int16())),
            (f"{role}_grid", pa.list_(pa.int16())),
            (f"{role}_dtype", pa.string()),
            (f"{role}_data", pa.list_(pa.binary())),
            (f"{role}_scale", pa.list_(pa.binary())),
        ]
    return pa.schema(columns)
