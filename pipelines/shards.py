"""Tar shards: named by paths, globs, brace ranges, folders, lists or S3; streamed into samples or quarantine rows.

A shard is read once, from front to back, by content and never by name; nothing is extracted, no link followed, nothing
unpickled. Whatever is wrong with its content becomes a `QuarantineRow`; reading never raises for it.

Policies, where the contract leaves a choice:
- Members of a sample may come in any order and interleaved with other samples: a sample to which more may belong waits
  while the next `MAX_OPEN_SAMPLES` begin or `MAX_OPEN_BYTES` gather. Nothing more is awaited by a conversation with all
  its images, and by an image with both txt and json: a text may yet follow a json with a caption, and metadata a text.
  Samples come out in the order of their first members.
- A key that occurs again later in the shard: the first sample counts, the second is `key_duplicate`. Keys differ by
  case, extensions don't, as in WebDataset: `k.0.PNG` beside `k.0.png` is `member_duplicate`, `K.json` another sample.
- After a damaged header nothing more is read: sizes and borders can't be trusted. Samples complete by then count, the
  one that was cut gets a row of its own. So does what a damaged gzip stream (`tar_unreadable`) or a file cut short
  (`tar_truncated`) leaves; where only the end-of-archive mark is missing, nothing is reported.
- Tars may be concatenated, gzip streams too. Other bytes after the end of an archive are ignored.
- Absolute member names and names with `..` are refused (`member_unsafe`), as are links, devices, sparse files and the
  rest of a file that began in another volume.
- json may start with a byte-order mark; `NaN`, infinities and numbers beyond a float's range are read as null. json and
  text larger than `MAX_TEXT_BYTES` aren't parsed (`member_too_large`), longer conversations than a prompt may be are
  `text_too_long`.
- Control tokens of the chat template in a text are plain text; NUL, right-to-left and zero-width characters are kept.
- Pictures of one pixel are used; what else `nexusgen.images` refuses is reported when the picture is decoded.
- Junk of archivers and file systems (`._X`, `.DS_Store`, `__MACOSX/`, ...) and names without extension are ignored and
  counted.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import math
import os
import re
import tarfile
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, BinaryIO, Literal, Protocol, cast

from nexusgen.errors import ConfigError, InputError, SampleError
from nexusgen.messages import (
    MAX_PROMPT_CHARACTERS,
    generation_messages,
    task_of,
    understanding_messages,
    validate_messages,
)
from nexusgen.schema import Message, QuarantineRow, Sample
from pipelines import process_use, storage

MAX_MEMBER_BYTES = 256 << 20
MAX_TEXT_BYTES = 4 << 20  # of a json or text member: room for the longest conversation and much metadata
MAX_TEXT_CHARACTERS = MAX_PROMPT_CHARACTERS  # a conversation's whole text
MAX_SAMPLE_BYTES = 512 << 20  # all members of one key
MAX_SAMPLE_MEMBERS = 1024  # of one key; names with dots before the number make one key of a whole shard
MAX_IMAGES = 64  # of one sample; 81 tokens each, more doesn't fit the model's context beside text
MAX_OPEN_SAMPLES = 4096
MAX_OPEN_BYTES = 64 << 20
MAX_TRAILING_BYTES = 64 << 20  # looked through for another tar after the end of one
MAX_SHARDS = 2_000_000  # that one range may name

SHARD_ENDINGS = (".tar", ".tar.gz", ".tgz")
LIST_ENDINGS = (".txt", ".list")
IMAGE_EXTENSIONS = frozenset(
    (
        "jpg",
        "jpeg",
        "jpe",
        "jfif",
        "png",
        "webp",
        "gif",
        "apng",
        "mpo",
        "bmp",
        "dib",
        "tif",
        "tiff",
        "avif",
        "heic",
        "heif",
        "jxl",
        "jp2",
        "j2k",
        "jpx",
        "pnm",
        "pbm",
        "pgm",
        "ppm",
        "ico",
        "qoi",
    )
)

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_EXTENSION_TYPES = frozenset(
    (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
)
_DEVICE_TYPES = frozenset((tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE))
_DATALESS_TYPES = _DEVICE_TYPES | {tarfile.DIRTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE}
_VOLUME_LABEL, _VOLUME_PIECE, _FOLDER_DUMP = b"V", b"M", b"D"  # GNU's own: multi-volume and incremental archives
_SPARSE = "GNU.sparse"  # in an extended header: the data are a map and pieces, not the file
_OTHER_FORMATS = {
    b"PK": "a zip",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ": "compressed with xz",
    b"\x28\xb5\x2f\xfd": "compressed with zstandard",
    b"7z\xbc\xaf": "a 7z archive",
    b"PAR1": "a Parquet file",
    b"version https://git-lfs": "a pointer of Git LFS: fetch the file itself",
}
_JUNK_NAMES = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})
_IMAGE_FIELDS = ("images", "messages")
_TEXT_EXTENSIONS = frozenset({"json", "txt"})
_RANGE = re.compile(r"\{[^}]*\.\.[^}]*\}")
_PAX_RECORD = re.compile(rb"(\d{1,10}) ([^=]+)=")


# ---- naming shards --------------------------------------------------------------------------------------------------


def list_shards(inputs: str | Sequence[str], endings: tuple[str, ...] = SHARD_ENDINGS) -> list[str]:
    """URIs of the shards that paths, globs, `{000..099}` ranges, folders, list files or S3 URIs name; each once.

    Local paths come out absolute and normalised; links to one file are as many names. Order: as named; folders and
    globs by name. `endings` are those taken from a folder.
    Raises: ConfigError for no input or a malformed range; InputError for names that match nothing.
    """
    names = [inputs] if isinstance(inputs, str) else list(inputs)
    if not names or not all(names):
        kinds = "tar shards" if endings is SHARD_ENDINGS else f"{', '.join(endings)} files"
        raise ConfigError(f"no input: name {kinds} by path, glob, range {{000..099}}, folder, list file or s3:// URI")
    shards: dict[str, None] = {}
    for name in names:
        found = _expand(name, endings)
        if not found:
            raise InputError(f"input {name!r} matches no file")
        shards.update(dict.fromkeys(map(_normalised, found)))
    return list(shards)


def _normalised(shard: str) -> str:
    """A local path without `.`, `..` and doubled slashes; where `..` leads back from a link, the path stays."""
    if storage.is_remote(shard):
        return shard
    path = os.path.normpath(shard)
    is_safe = "/../" not in shard or (os.path.exists(path) and os.path.samefile(path, shard))  # noqa: PTH110, PTH121
    return path if is_safe else shard


def _expand(name: str, endings: tuple[str, ...]) -> list[str]:
    if _RANGE.search(name):
        if storage.is_remote(name):
            return expand_braces(name)  # asking S3 about 100,000 names takes hours; the reader reports absent ones
        return _expand_local(name, endings)
    if any(mark in name for mark in "*?["):
        return _glob(name)
    if not storage.exists(name):
        raise InputError(f"input {name!r} doesn't exist")
    if storage.is_folder(name):
        files = storage.list_files(name, recursive=True)
        shards = [file for file in files if file.lower().endswith(endings)]
        if not shards:
            raise InputError(f"the folder {name!r} holds no {', '.join(endings)} file")
        return shards
    if name.lower().endswith(LIST_ENDINGS):
        return _read_list(name, endings)
    return [name if storage.is_remote(name) else str(storage.local_path(name))]


def _expand_local(name: str, endings: tuple[str, ...]) -> list[str]:
    """A range of local names: each folder is listed once instead of asking about every name in it."""
    expanded = expand_braces(str(storage.local_path(name)))
    if any(mark in name for mark in "*?["):
        return [shard for pattern in expanded for shard in _expand(pattern, endings)]
    files: dict[str, set[str]] = {}
    shards: list[str] = []
    missing: list[str] = []
    for path in expanded:
        folder, _, base = path.rpartition("/")
        if folder not in files:
            files[folder] = _names_of_files(folder or "/")
        if base in files[folder] and not base.lower().endswith(LIST_ENDINGS):
            shards.append(path)
        elif storage.exists(path):
            shards += _expand(path, endings)  # a folder or a list
        else:
            missing.append(path)
    if missing:
        raise InputError(f"input {name!r}: {len(missing)} of {len(expanded)} shards are missing, first {missing[0]}")
    return shards


def _names_of_files(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except OSError:
        return set()  # the caller reports what it misses


def expand_braces(name: str) -> list[str]:
    """Every name that the numeric ranges `{A..B}` in `name` stand for; zeros in front are kept. Raises: ConfigError."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", name)
    if match is None:
        if _RANGE.search(name):
            raise ConfigError(f"input {name!r}: expected a range of two numbers such as {{000..099}}")
        return [name]
    first, last = match.groups()
    if int(last) < int(first):
        raise ConfigError(f"input {name!r}: the range {match.group()} runs backwards")
    tails = expand_braces(name[match.end() :])
    if (int(last) - int(first) + 1) * len(tails) > MAX_SHARDS:
        raise ConfigError(f"input {name!r}: the range names more than {MAX_SHARDS:,} shards")
    heads = (f"{name[: match.start()]}{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))
    return [head + tail for head in heads for tail in tails]


def _glob(pattern: str) -> list[str]:
    if not storage.is_remote(pattern):
        path = str(storage.local_path(pattern))
        # A file whose own name holds such marks is meant by it. No Paths: 100,000 of them cost a second.
        found = [path] if os.path.lexists(path) else glob.glob(path, recursive=True)  # noqa: PTH207
        return [path for path in sorted(found) if os.path.isfile(path)]  # noqa: PTH113
    folder = re.split(r"[*?\[]", pattern, maxsplit=1)[0].rpartition("/")[0]
    return [file for file in storage.list_files(folder, recursive=True) if fnmatchcase(file, pattern)]


def _read_list(name: str, endings: tuple[str, ...]) -> list[str]:
    text = storage.read_bytes(name).decode("utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines()]
    entries = [line for line in lines if line and not line.startswith("#")]
    if not entries:
        raise InputError(f"the list {name!r} names no shard")
    folder = "" if storage.is_remote(name) else str(storage.local_path(name).parent)
    shards: list[str] = []
    for entry in entries:
        if entry.lower().endswith(LIST_ENDINGS):
            raise InputError(f"the list {name!r} names another list, {entry!r}; expected shards")
        is_relative = folder and not storage.is_remote(entry) and not entry.startswith(("/", "~"))
        shards += _expand(f"{folder}/{entry}" if is_relative else entry, endings)
    return shards


def stem_of(shard: str) -> str:
    """A shard's file name without its ending, safe in any file name: `STEM` of the embedded slices."""
    name = storage.name_of(shard)
    ending = next((e for e in sorted(SHARD_ENDINGS, key=len, reverse=True) if name.lower().endswith(e)), "")
    stem = name[: len(name) - len(ending)] if ending else name
    return re.sub(r"[^A-Za-z0-9._-]", "_", stem)[:80] or "shard"


# ---- streaming a tar ------------------------------------------------------------------------------------------------


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _TarDamageError(Exception):
    """The stream can't be read on as a tar; becomes a quarantine row of the shard."""

    def __init__(
        self,
        reason_code: str,
        reason: str,
        member: str = "",
        *,
        is_tolerable: bool = False,
        is_garbage: bool = False,
    ) -> None:
        super().__init__(reason_code, reason, member)
        self.reason_code, self.reason, self.member = reason_code, reason, member
        self.is_tolerable = is_tolerable  # no harm, unless it cut a sample
        self.is_garbage = is_garbage  # bytes of another kind after a whole gzip stream


@dataclass(frozen=True)
class _Member:
    """A regular file of the tar; `problem` says why its bytes weren't taken."""

    name: str
    data: bytes
    problem: tuple[str, str] | None = None


class _HashingStream:
    """Bytes of a file, digested as they pass; one block can be looked at ahead."""

    def __init__(self, raw: _Readable) -> None:
        self._raw = raw
        self._hash = hashlib.sha256()
        self._ahead = b""
        self.num_bytes = 0

    def peek(self, size: int) -> bytes:
        if len(self._ahead) < size:
            self._ahead += self._take(size - len(self._ahead))
        return self._ahead[:size]

    def read(self, size: int = -1, /) -> bytes:
        if size < 0:
            raise ValueError("read a bounded number of bytes")
        ahead, self._ahead = self._ahead[:size], self._ahead[size:]
        return ahead + (self._take(size - len(ahead)) if len(ahead) < size else b"")

    def drain(self) -> str:
        """Read what is left and give the digest of the whole file."""
        while self._take(1 << 20):
            pass
        return self._hash.hexdigest()

    def _take(self, size: int) -> bytes:
        data = self._raw.read(size)
        self._hash.update(data)
        self.num_bytes += len(data)
        return data


def _open_tar(stream: _HashingStream) -> _Readable:
    """The tar inside: gzip is known by its first bytes, not by a name."""
    if stream.peek(2) == b"\x1f\x8b":
        return cast(_Readable, gzip.GzipFile(fileobj=cast(BinaryIO, stream), mode="rb"))
    return stream


def _read_exactly(stream: _Readable, size: int) -> bytes:
    """As many of `size` bytes as there are. Raises: _TarDamageError for a damaged gzip stream."""
    chunks = []
    while size > 0:
        try:
            chunk = stream.read(min(size, 1 << 20))
        except EOFError:
            break  # gzip's word for a stream cut short; the caller sees too few bytes
        except (gzip.BadGzipFile, zlib.error) as error:
            # What follows a whole stream may be anything; the checksum of the stream itself must be right.
            is_garbage = str(error).startswith("Not a gzipped file")
            reason = f"the gzip stream is damaged: {error}"
            raise _TarDamageError("tar_unreadable", reason, is_garbage=is_garbage) from None
        if not chunk:
            break
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)


def _iterate_members(stream: _Readable) -> Iterator[_Member]:
    """Every member that isn't a folder. Raises: _TarDamageError where the stream can't be read on."""
    offset = 0
    has_ended = False
    num_trailing = 0
    extended: dict[str, str] = {}  # what pax and GNU headers say about the next member
    while True:
        try:
            block = _read_exactly(stream, _BLOCK)
        except _TarDamageError as damage:
            if has_ended and damage.is_garbage:
                return
            raise
        where = f"at byte {offset:,}"
        if not block or (has_ended and len(block) < _BLOCK):
            if offset == 0:
                raise _TarDamageError("tar_not_a_tar", "the file is empty")
            if has_ended:
                return
            raise _TarDamageError("tar_truncated", "the end-of-archive mark is missing", is_tolerable=True)
        if len(block) < _BLOCK:
            if offset:
                raise _TarDamageError("tar_truncated", f"the file ends inside a header {where}")
            raise _not_a_tar(block, f"the file has {len(block)} bytes; a tar has at least {_BLOCK}")
        offset += _BLOCK
        if block == _ZEROS:
            has_ended = True  # tars may be concatenated: look on for another header
            num_trailing += _BLOCK
            if num_trailing > MAX_TRAILING_BYTES:
                return  # compressed zeros could go on for hours
            continue
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            if has_ended:
                return  # bytes after the end of the archive
            if offset == _BLOCK:
                raise _not_a_tar(block, f"no tar header in the first {_BLOCK} bytes: {error}") from None
            raise _TarDamageError("tar_header", f"the header {where} is damaged: {error}") from None
        has_ended = False
        num_trailing = 0
        name = _clean_name(extended.get("path") or info.name)
        size = _size_of(extended, info.size)
        if info.type in _DATALESS_TYPES:
            size = 0  # whatever their size field says
        if size < 0:
            raise _TarDamageError("tar_header", f"the header {where} declares no valid size", name)
        padded = -(-size // _BLOCK) * _BLOCK
        is_extension = info.type in _EXTENSION_TYPES
        if is_extension and size > 1 << 20:
            raise _TarDamageError("tar_header", f"an extended header of {size:,} bytes {where}")
        if info.type == tarfile.GNUTYPE_SPARSE:
            # The map of a sparse file goes on in further header blocks; a byte in each says whether another follows.
            is_continued = block[482]
            while is_continued:
                block = _read_exactly(stream, _BLOCK).ljust(_BLOCK, b"\0")
                offset += _BLOCK
                is_continued = block[504]
        is_sparse = info.type == tarfile.GNUTYPE_SPARSE or _SPARSE in extended
        is_text = split_name(name)[1].lower() in _TEXT_EXTENSIONS
        limit = MAX_TEXT_BYTES if is_text and not is_extension else MAX_MEMBER_BYTES
        is_taken = size <= limit and not is_sparse
        data = b""
        if is_taken:
            data = _read_exactly(stream, padded)
            num_read, data = len(data), data[:size]
        else:
            num_read = _skip(stream, padded)
        if num_read < size:
            reason = f"the file ends after {num_read:,} of the {size:,} bytes of a member"
            raise _TarDamageError("tar_truncated", reason, "" if is_extension else name)
        offset += padded
        if is_extension:
            extended = {**extended, **_read_extension(info.type, data)}
            continue
        extended = {}
        is_folder = info.type == tarfile.DIRTYPE or (info.type == tarfile.AREGTYPE and name.endswith("/"))
        if is_folder or info.type in (_VOLUME_LABEL, _FOLDER_DUMP):
            continue
        problem = None
        if not is_taken:
            problem = ("member_too_large", f"{size:,} bytes; at most {limit:,} are read")
        if info.type in (tarfile.LNKTYPE, tarfile.SYMTYPE):
            problem = ("member_unsafe", "a link; links are never followed")
        elif info.type in _DEVICE_TYPES or is_sparse:
            problem = ("member_unsafe", "a device, pipe or sparse file")
        elif info.type == _VOLUME_PIECE:
            problem = ("member_unsafe", "a piece of a file that began in another volume")
        elif _is_unsafe(name):
            problem = ("member_unsafe", "the name is absolute or climbs out of the shard")
        yield _Member(name, b"" if problem else data, problem)
        if num_read < padded:
            raise _TarDamageError("tar_truncated", f"the file ends in the padding after {name!r}"[:300])


def _skip(stream: _Readable, size: int) -> int:
    skipped = 0
    while skipped < size:
        num_read = len(_read_exactly(stream, min(size - skipped, 1 << 20)))
        if not num_read:
            break
        skipped += num_read
    return skipped


def _not_a_tar(start: bytes, reason: str) -> _TarDamageError:
    kind = next((kind for magic, kind in _OTHER_FORMATS.items() if start.startswith(magic)), None)
    return _TarDamageError("tar_not_a_tar", f"{reason} (the file is {kind})" if kind else reason)


def _size_of(extended: dict[str, str], size: int) -> int:
    """A member's size: an extended header's before the header's own; -1 if it isn't a number."""
    text = extended.get("size") or str(size)
    return int(text) if text.isascii() and text.isdigit() and len(text.lstrip("0")) < 20 else -1


def _read_extension(kind: bytes, data: bytes) -> dict[str, str]:
    """Path and size out of a pax or GNU extension, and whether the file is sparse; the rest doesn't concern us."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.partition(b"\0")[0].decode("utf-8", "surrogateescape")}
    if kind not in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
        return {}
    found: dict[str, str] = {}
    start = 0
    while match := _PAX_RECORD.match(data, start):
        end = start + int(match.group(1))
        if end <= match.end():
            break
        keyword = match.group(2).decode("utf-8", "replace")
        if keyword in ("path", "size"):
            found[keyword] = data[match.end() : end - 1].decode("utf-8", "surrogateescape")
        elif keyword.startswith(f"{_SPARSE}."):
            found[_SPARSE] = keyword
        start = end
    return found


def _clean_name(name: str) -> str:
    """A member's name as valid Unicode, without a leading `./`."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    while text.startswith("./"):
        text = text[2:]
    return text


def _is_unsafe(name: str) -> bool:
    parts = re.split(r"[/\\]", name)
    return (
        name.startswith(("/", "\\")) or ".." in parts or "\0" in name or re.match(r"[A-Za-z]:[/\\]", name) is not None
    )


def split_name(name: str) -> tuple[str, str]:
    """A member's key and extension: the key ends before the first dot of the base name; the folder stays in it."""
    start = max(name.rfind("/"), name.rfind("\\") if _is_unsafe(name) else -1) + 1
    base, dot, extension = name[start:].partition(".")
    return name[:start] + base, extension if dot else ""


def _is_junk(name: str) -> bool:
    folder, _, base = name.rpartition("/")
    key, extension = split_name(name)
    if _is_unsafe(name):
        return False  # reported, not ignored
    if base.startswith(".") or base in _JUNK_NAMES or "__MACOSX" in folder.split("/") or not extension:
        return True
    stem = key.rpartition("/")[2]
    return stem.startswith("__") and stem.endswith("__")  # WebDataset's own records, as `__info__.json`


# ---- grouping members into samples ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReadOptions:
    """How a shard is read. `pairs_as` says which task an image with a text (img2dataset's style) becomes."""

    pairs_as: Literal["generation", "understanding"] = "generation"


@dataclass
class _Group:
    """The members of one key, as far as they have come."""

    key: str
    row: int
    members: dict[str, bytes] = field(default_factory=dict)  # by extension, in lower case
    problem: SampleError | None = None
    record: dict[str, Any] | None = None  # KEY.json, parsed
    num_bytes: int = 0
    is_over: bool = False  # its key has begun anew

    def add(self, member: _Member, extension: str) -> None:
        """Take a member; once the sample has a problem, only its members' names are kept."""
        extension = extension.lower()
        if member.problem is not None:
            self.fail(*member.problem, member.name)
        elif extension in self.members:
            self.fail("member_duplicate", "the sample holds this name twice", member.name)
        elif len(self.members) >= MAX_SAMPLE_MEMBERS:
            self.fail("sample_unknown", f"more than {MAX_SAMPLE_MEMBERS:,} members; a key ends at the name's first dot")
        elif self.num_bytes + len(member.data) > MAX_SAMPLE_BYTES:
            self.fail("member_too_large", f"the sample has more than {MAX_SAMPLE_BYTES:,} bytes", member.name)
        elif self.problem is not None:
            self.members[extension] = b""
        else:
            self.members[extension] = member.data
            self.num_bytes += len(member.data)
            if extension == "json":
                try:
                    self.record = parse_record(member.data)
                except SampleError as error:
                    self.fail(error.reason_code, error.reason, member.name)

    def fail(self, reason_code: str, reason: str, member: str = "") -> None:
        if self.problem is None:
            self.problem = SampleError(reason_code, reason, member)
            self.members = dict.fromkeys(self.members, b"")
            self.record = None
            self.num_bytes = 0

    @property
    def is_conversation(self) -> bool:
        """Whether the json is Nexus-Gen's; a sample without one must be an image with a text."""
        return self.record is not None and any(name in self.record for name in _IMAGE_FIELDS)

    @property
    def is_complete(self) -> bool:
        """Whether nothing more is needed to judge the sample."""
        if self.problem is not None:
            return True
        if self.is_conversation:
            names = cast(dict[str, Any], self.record).get("images", [])
            if not isinstance(names, list) or len(names) > MAX_IMAGES:
                return True
            return all(self.find(name) is not None for name in names)
        has_text = "txt" in self.members or (self.record is not None and "caption" in self.record)
        return has_text and bool(self.image_extensions())

    @property
    def is_full(self) -> bool:
        """Whether nothing of the sample can follow. Of one with a problem it may: it mustn't be counted twice."""
        if self.is_over:
            return True
        if self.is_conversation:
            return self.is_complete
        return self.members.keys() >= _TEXT_EXTENSIONS and bool(self.image_extensions())

    def image_extensions(self) -> list[str]:
        return [extension for extension in self.members if extension in IMAGE_EXTENSIONS]

    def find(self, name: object) -> bytes | None:
        """The member that a name in `images` means: an extension, or a member's full or base name."""
        if not isinstance(name, str):
            return None
        if (found := self.members.get(name.lower())) is not None:
            return found
        name = _clean_name(name)
        base = self.key.rpartition("/")[2]
        is_full = name.startswith((f"{self.key}.", f"{base}."))
        return self.members.get(split_name(name)[1].lower()) if is_full else None


class ShardReader:
    """One pass over a shard: yields its samples and quarantine rows in tar order.

    After the pass: `digest` (sha256 of the file), `num_bytes`, `num_groups` (keys seen), `num_ignored` (junk), and how
    many samples were of each convention: `num_conversations` (Nexus-Gen's) and `num_pairs` (img2dataset's).
    """

    def __init__(self, shard: str, options: ReadOptions | None = None) -> None:
        self.shard = shard
        self.options = options or ReadOptions()
        self.digest = ""
        self.num_bytes = 0
        self.num_groups = 0
        self.num_ignored = 0
        self.num_conversations = 0
        self.num_pairs = 0

    def __iter__(self) -> Iterator[Sample | QuarantineRow]:
        try:
            with storage.open_input(self.shard) as raw:
                stream = _HashingStream(raw)
                yield from self._read(_open_tar(stream))
                self.digest = stream.drain()
                self.num_bytes = stream.num_bytes
                process_use.count_read(stream.num_bytes)
        except (OSError, InputError, UnicodeError) as error:  # the last for a file's name that isn't UTF-8
            yield self._row("tar_unreadable", str(error))

    def _read(self, tar: _Readable) -> Iterator[Sample | QuarantineRow]:
        waiting: deque[_Group] = deque()  # in the order of their first members
        open_groups: dict[str, _Group] = {}  # those of them that take more members, by key
        closed: set[str] = set()
        current = ""
        side_by_side: set[str] = set()  # extensions of the current key since another key came
        num_bytes = 0  # of all that wait
        try:
            for member in _iterate_members(tar):
                if _is_junk(member.name):
                    self.num_ignored += 1
                    continue
                key, extension = split_name(member.name)
                if key != current:
                    side_by_side = set()
                group = open_groups.get(key)
                if group is not None and extension.lower() in group.members.keys() - side_by_side:
                    # The key begins anew: what came before must stand on its own.
                    group.is_over = True
                    closed.add(key)
                    group = None
                if group is None:
                    group = open_groups[key] = _Group(key, self.num_groups)
                    waiting.append(group)
                    self.num_groups += 1
                    if key in closed:
                        group.fail("key_duplicate", "the key occurred earlier in this shard; the first sample counts")
                num_bytes -= group.num_bytes
                group.add(member, extension)
                num_bytes += group.num_bytes
                side_by_side.add(extension.lower())
                current = key
                while self._is_due(waiting[0], group, len(waiting), num_bytes):
                    done = waiting.popleft()
                    num_bytes -= done.num_bytes
                    if not done.is_over:
                        del open_groups[done.key]
                        closed.add(done.key)
                    yield self._close(done)
        except _TarDamageError as damage:
            yield from self._close_at_damage(waiting, damage)
            return
        for group in waiting:
            yield self._close(group)
        if not self.num_groups:
            yield self._row("tar_empty", f"the tar holds no sample ({self.num_ignored} members ignored)")

    @staticmethod
    def _is_due(oldest: _Group, current: _Group, num_waiting: int, num_bytes: int) -> bool:
        """Whether the oldest sample should come out now: it is full, or has waited for long enough."""
        if oldest is current:
            return False  # more of its members may follow
        return num_waiting > MAX_OPEN_SAMPLES or num_bytes > MAX_OPEN_BYTES or oldest.is_full

    def _close(self, group: _Group) -> Sample | QuarantineRow:
        try:
            if group.problem is not None:
                raise group.problem
            sample = _build_sample(self.shard, group, self.options)
        except SampleError as error:
            return self._row(error.reason_code, error.reason, group.key, error.member)
        self.num_conversations += group.is_conversation
        self.num_pairs += not group.is_conversation
        return sample

    def _close_at_damage(self, waiting: Iterable[_Group], damage: _TarDamageError) -> Iterator[Sample | QuarantineRow]:
        """What can be saved where a tar breaks off, and one row for each sample that it cut."""
        cut_key = split_name(damage.member)[0] if damage.member and not _is_junk(damage.member) else ""
        for group in waiting:
            if group.key == cut_key and not group.is_over:
                continue
            result = self._close(group)
            if isinstance(result, QuarantineRow) and group.problem is None and not group.is_complete:
                result = self._row(damage.reason_code, f"cut off: {result.reason}", group.key, result.member)
            yield result
        if not damage.is_tolerable:
            yield self._row(damage.reason_code, damage.reason, cut_key, damage.member)
        elif not self.num_groups:
            yield self._row("tar_empty", f"the tar holds no sample ({self.num_ignored} members ignored)")

    def _row(self, reason_code: str, reason: str, key: str = "", member: str = "") -> QuarantineRow:
        texts = (self.shard, key, member, reason_code, reason[:500])
        return QuarantineRow(*(text.encode("utf-8", "backslashreplace").decode() for text in texts))


# ---- reading one sample ---------------------------------------------------------------------------------------------


def parse_record(data: bytes) -> dict[str, Any]:
    """A sample's json as a mapping; what is no finite number is null. Raises: SampleError `json_invalid`."""
    try:
        record = json.loads(data.decode("utf-8-sig"), parse_constant=lambda _: None, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise SampleError("json_invalid", f"{type(error).__name__}: {error}"[:300]) from None
    if not isinstance(record, dict):
        raise SampleError("json_invalid", f"expected an object, found a {type(record).__name__}")
    return record


def _finite(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None


def parse_sample(key: str, members: Mapping[str, bytes]) -> Sample:
    """Members, by extension, as the reader will judge them; the shard's name stays empty. Raises: SampleError."""
    group = _Group(key, 0)
    for extension, data in members.items():
        if extension.lower() in _TEXT_EXTENSIONS and len(data) > MAX_TEXT_BYTES:
            group.fail("member_too_large", f"{len(data):,} bytes; at most {MAX_TEXT_BYTES:,} are read", extension)
        group.add(_Member(f"{key}.{extension}", data), extension)
    if group.problem is not None:
        raise group.problem
    return _build_sample("", group, ReadOptions())


def guess_language(messages: Sequence[Message]) -> str:
    """`zh` where at least one letter in ten is a CJK ideograph, else `en`."""
    text = "".join(message.content for message in messages)
    num_letters = sum(character.isalpha() for character in text)
    num_ideographs = sum("\u3400" <= character <= "\u9fff" for character in text)
    return "zh" if num_ideographs * 10 >= max(num_letters, 1) else "en"


def _build_sample(shard: str, group: _Group, options: ReadOptions) -> Sample:
    record = group.record or {}
    if group.is_conversation:
        messages, images = _parse_conversation(group, record)
    else:
        messages, images = _parse_pair(group, record, options)
    num_characters = sum(len(message.content) for message in messages)
    if num_characters > MAX_TEXT_CHARACTERS:
        raise SampleError("text_too_long", f"{num_characters:,} characters; at most {MAX_TEXT_CHARACTERS:,}")
    validate_messages(messages, len(images))
    meta = {name: value for name, value in record.items() if name not in _IMAGE_FIELDS}
    lang = _stated_language(record) or guess_language(messages)
    return Sample(group.key, shard, group.row, task_of(messages), lang, messages, images, meta)


def _stated_language(record: dict[str, Any]) -> str:
    """What `lang` says, if that can be the name of a language; else nothing."""
    stated = record.get("lang")
    return stated if isinstance(stated, str) and re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,15}", stated) else ""


def _parse_conversation(group: _Group, record: dict[str, Any]) -> tuple[tuple[Message, ...], tuple[bytes, ...]]:
    """Nexus-Gen's style: messages and image names in the json."""
    names = record.get("images", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SampleError("json_invalid", "`images` isn't a list of names")
    if len(names) > MAX_IMAGES:
        raise SampleError("messages_invalid", f"{len(names):,} images; at most {MAX_IMAGES} are used")
    turns = record.get("messages")
    if not isinstance(turns, list) or not turns:
        raise SampleError("messages_invalid", "`messages` isn't a list of at least one message")
    messages = []
    for index, turn in enumerate(turns):
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise SampleError("messages_invalid", f"message {index} has no known role with a text")
        messages.append(Message(role, content))
    images = []
    for name in names:
        data = group.find(name)
        if data is None:
            raise SampleError("member_missing", f"the json names {name[:200]!r}, which is not in the shard", name[:200])
        images.append(data)
    return tuple(messages), tuple(images)


def _parse_pair(
    group: _Group, record: dict[str, Any], options: ReadOptions
) -> tuple[tuple[Message, ...], tuple[bytes, ...]]:
    """img2dataset's style: one image with a text, put into the paper's templates."""
    names = group.image_extensions()
    has_text = "txt" in group.members or "caption" in record
    if len(names) != 1 or not has_text:
        found = ", ".join(sorted(group.members)) or "nothing"
        raise SampleError(
            "sample_unknown", f"neither json with messages nor one image with a text; members: {found}"[:300]
        )
    if "txt" in group.members:
        try:
            caption = group.members["txt"].decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise SampleError("text_invalid", f"the text isn't UTF-8: {error.reason}", f"{group.key}.txt") from None
    else:
        caption = record["caption"].strip() if isinstance(record["caption"], str) else ""
    if not caption:
        raise SampleError("text_invalid", "the caption is empty")
    lang = _stated_language(record) or guess_language([Message("user", caption)])
    build = generation_messages if options.pairs_as == "generation" else understanding_messages
    return build(caption, lang), (group.members[names[0]],)
