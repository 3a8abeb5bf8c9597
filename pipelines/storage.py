"""Files by URI: a folder's path or `s3://bucket/prefix`, read and written the same way; every write is atomic.

Addresses and credentials of S3 come from the environment (`AWS_*`), as pyarrow reads them. A write to a folder goes to
a temporary name, onto the disk, and is then renamed: after a power loss no empty file bears the name of a finished one.
That costs 3 ms a file (300 of 1 KB: 1.0 s instead of 0.1). An object of S3 appears whole when it is closed.

What passes on S3 (500, 503 SlowDown, silence, a connection that breaks, a body cut short) is tried again. The AWS SDK
below pyarrow repeats a single request, be it a part of an upload, a page of a listing or a range of a file; it knows no
budget, and it can't be interrupted, so it does so `REQUEST_ATTEMPTS` times only. `_retry` repeats the whole operation
on top of that, with exponential backoff, jitter and a budget of seconds. What doesn't pass (a missing object, a refused
key) is told at once. A job that gives up ends with a ResourceError: an outage is never taken for bad data.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import io
import itertools
import json
import logging
import os
import random
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow import fs

from nexusgen.errors import InputError, ResourceError
from nexusgen.schema import MANIFEST_NAME
from pipelines import process_use

log = logging.getLogger(__name__)

READ_BUFFER_BYTES = 8 << 20  # S3 answers a few large ranged reads faster than many small ones
RANDOM_BUFFER_BYTES = 1 << 20  # Parquet asks for many small pieces that lie side by side
NUM_PARALLEL_FILES = 8  # sent at a time: one connection to S3 gives a tenth of a fast network
NUM_PARALLEL_RANGES = 16  # of files, fetched at a time, each through a buffer of READ_BUFFER_BYTES
RANGE_BYTES = 64 << 20  # of a file, that one connection fetches: small enough that all end at about the same time

RETRY_BUDGET_S = 300.0  # a store that restarts or throttles is back within minutes; a day's job should outlive that
MAX_ATTEMPTS = 40  # where failures come at once: what 300 s leave room for, with MAX_DELAY_S between them on average
FIRST_DELAY_S = 0.5
MAX_DELAY_S = 20.0
REQUEST_ATTEMPTS = 3  # of the SDK, per request: a lost answer in twenty mustn't start an upload of 100 parts anew
REQUEST_TIMEOUT_S = 10.0  # without a byte; the SDK's own 3 s are less than a throttled store may take
CONNECT_TIMEOUT_S = 5.0  # the SDK's own 1 s is less than a machine with busy cores may take

_TEMPORARY = re.compile(r"\..*\.tmp-[0-9a-f]{12}")
_S3 = "s3://"
# In pyarrow's words, which has no classes for them. NO_SUCH_UPLOAD: an upload was completed, but the answer got lost.
_PASSING = re.compile(
    r"AWS Error (INTERNAL_FAILURE|SERVICE_UNAVAILABLE|SLOW_DOWN|THROTTLING|REQUEST_TIMEOUT|NETWORK_CONNECTION"
    r"|NO_SUCH_UPLOAD)|HTTP status (5\d\d|408|429|-1)"  # -1: half an answer, which is no XML
)
_jitter = random.SystemRandom()  # workers that failed together mustn't come back together

_T = TypeVar("_T")
_budget_s: float | None = None  # in place of RETRY_BUDGET_S, while somebody waits for an answer


@dataclass(frozen=True)
class FileStat:
    """What tells that a file has changed without reading it."""

    size: int
    mtime_ns: int


def is_remote(uri: str) -> bool:
    """Whether the URI names an object store rather than a local path."""
    return "://" in uri and not uri.startswith("file://")


def local_path(uri: str) -> Path:
    """The local path of a URI that isn't remote, absolute."""
    return Path(uri.removeprefix("file://")).expanduser().absolute()


def absolute(uri: str) -> str:
    """The URI as it means the same to a worker, which has another working directory."""
    return uri if is_remote(uri) else str(local_path(uri))


def open_filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """The filesystem that a URI lives on, and its path there. Raises: InputError for an unknown or unusable scheme."""
    if not is_remote(uri):
        return fs.LocalFileSystem(), str(local_path(uri))
    try:
        if uri.startswith(_S3):
            path = uri.removeprefix(_S3).rstrip("/")
            bucket = path.partition("/")[0]
            if not bucket or "@" in bucket:
                raise ValueError("no bucket is named, or credentials, which belong into AWS_* of the environment")
            endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
            return _open_s3(endpoint, None if endpoint else bucket), path
        filesystem, path = fs.FileSystem.from_uri(uri)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"cannot open {uri}: {error}; expected a path or s3://bucket/prefix") from None
    return filesystem, path


@functools.lru_cache(maxsize=64)
def _open_s3(endpoint: str | None, bucket: str | None) -> fs.FileSystem:
    """S3 at an endpoint, or Amazon's in the region of a bucket. Kept, as making one takes a tenth of a second."""
    region = None
    if bucket:
        region = _retry(f"cannot find the region of bucket {bucket}", lambda: fs.resolve_s3_region(bucket))
    return fs.S3FileSystem(
        endpoint_override=endpoint,
        region=region,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=REQUEST_ATTEMPTS),
        request_timeout=REQUEST_TIMEOUT_S,
        connect_timeout=CONNECT_TIMEOUT_S,
        allow_delayed_open=True,  # a small object is one request instead of the three of an upload in parts
        background_writes=False,  # they would hold a copy of all that isn't sent yet
    )


def _retry(failure: str, call: Callable[[], _T]) -> _T:
    """What `call` gives, tried again while it fails for a reason that passes; `failure` begins what is said then.

    Raises: ResourceError when attempts or budget are used up; OSError, as it came, for what doesn't pass.
    """
    started = time.monotonic()
    for attempt in itertools.count(1):
        try:
            return call()
        except OSError as error:
            if not (isinstance(error, _ShortBodyError) or _PASSING.search(str(error))):
                raise
            spent = time.monotonic() - started
            delay = _jitter.uniform(0, min(MAX_DELAY_S, FIRST_DELAY_S * 2 ** min(attempt, 30)))
            if attempt >= MAX_ATTEMPTS or spent + delay > (RETRY_BUDGET_S if _budget_s is None else _budget_s):
                attempts = f"{attempt} attempt{'s' * (attempt > 1)}"
                raise ResourceError(
                    f"{failure}: {error}; gave up after {attempts} in {spent:.1f} s: start the job again when "
                    f"the store answers"
                ) from None
            log.warning("%s: %s; attempt %d failed, the next one comes in %.1f s", failure, error, attempt, delay)
        time.sleep(delay)
    raise AssertionError("unreachable")


@contextmanager
def impatient() -> Iterator[None]:
    """What the body asks of a store isn't tried again by `_retry`: it is for somebody who waits, not for a long job."""
    global _budget_s
    before, _budget_s = _budget_s, 0.0
    try:
        yield
    finally:
        _budget_s = before


class _ShortBodyError(OSError):
    """Fewer bytes came than were asked for, and than the object holds."""


class _RemoteFile(io.RawIOBase):
    """A remote file as a raw stream with a position: a read that fails is repeated from where it began.

    Raises: ResourceError or OSError, as `_retry`.
    """

    def __init__(self, uri: str) -> None:
        self._failure = f"cannot read {uri}"
        filesystem, path = open_filesystem(uri)
        self._file = _retry(self._failure, lambda: filesystem.open_input_file(path))
        self._size = int(self._file.size())
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        """Fill the buffer as far as the file goes: fewer bytes than fit mean its end, and nothing else does."""
        view = memoryview(buffer)[: max(self._size - self._position, 0)]
        if view:
            _retry(self._failure, lambda: self._fill(view, self._position))
            self._position += len(view)
        return len(view)

    def readall(self) -> bytes:
        """What is left; Python's own takes 8 KB at a time."""
        data = bytearray(max(self._size - self._position, 0))
        for start in range(0, len(data), READ_BUFFER_BYTES):
            self.readinto(memoryview(data)[start : start + READ_BUFFER_BYTES])
        return bytes(data)

    def _fill(self, view: memoryview, position: int) -> None:
        """One ranged read. Raises: _ShortBodyError if the answer's body was cut.

        pyarrow trusts the answer's Content-Length. Of a body without one that breaks off, or whose length was cut with
        it, it tells the full length and leaves the rest of the buffer as it was (25.0). So the last byte is marked
        before: a byte that looks the same afterwards is, but for one in 256, one that never came, and is asked for.
        """
        mark = _jitter.randrange(256)
        view[-1] = mark
        num_bytes = self._read_at(view, position)
        if num_bytes == len(view) and view[-1] == mark:
            last = bytearray([mark ^ 0xFF])
            num_bytes -= self._read_at(memoryview(last), position + len(view) - 1) != 1 or last[0] != mark
        if num_bytes != len(view):
            end = position + len(view)
            raise _ShortBodyError(f"a body was cut short: bytes {position} to {end} of {self._size} didn't all come")

    def _read_at(self, view: memoryview, position: int) -> int:
        self._file.seek(position)
        return int(self._file.readinto(view))

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def join(uri: str, *parts: str) -> str:
    """A URI below another."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def name_of(uri: str) -> str:
    """The last part of a URI."""
    return uri.rstrip("/").rpartition("/")[2]


def exists(uri: str) -> bool:
    """Whether a file or folder of this name exists."""
    return _info(uri).type != fs.FileType.NotFound


def is_folder(uri: str) -> bool:
    """Whether the URI is a folder (or, on S3, a prefix that holds something)."""
    return _info(uri).type == fs.FileType.Directory


def stat(uri: str) -> FileStat:
    """Size and time of change of a file. Raises: InputError if there is none."""
    info = _info(uri)
    if info.type != fs.FileType.File:
        raise InputError(f"{uri} is not a file")
    return FileStat(int(info.size or 0), int(info.mtime_ns or 0))


def open_input(uri: str) -> Any:
    """A file as a stream of bytes. Raises: OSError; ResourceError, also during a read, if the store doesn't answer."""
    if is_remote(uri):
        return io.BufferedReader(_RemoteFile(uri), READ_BUFFER_BYTES)
    filesystem, path = open_filesystem(uri)
    return filesystem.open_input_stream(path, compression=None, buffer_size=READ_BUFFER_BYTES)


def open_random(uri: str) -> pa.NativeFile:
    """A file for reading at any place, as Parquet wants it.

    Raises: InputError if it can't be opened; ResourceError, also while it is read, if the store doesn't answer.
    """
    try:
        if is_remote(uri):
            return pa.PythonFile(io.BufferedReader(_RemoteFile(uri), RANDOM_BUFFER_BYTES), mode="r")
        filesystem, path = open_filesystem(uri)
        return filesystem.open_input_file(path)
    except OSError as error:
        raise InputError(f"cannot read {uri}: {error}") from None


def read_bytes(uri: str) -> bytes:
    """The whole content of a file. Raises: InputError if it can't be read; ResourceError if no store answers."""
    try:
        with open_input(uri) as stream:
            data = bytes(stream.read())
    except OSError as error:
        raise InputError(f"cannot read {uri}: {error}") from None
    process_use.count_read(len(data))
    return data


def write_bytes_atomic(uri: str, data: bytes | pa.Buffer) -> None:
    """Write a file that is seen whole or not at all; its folder is made. Raises: ResourceError if that fails."""
    try:
        if is_remote(uri):
            _retry(f"cannot write {uri}", lambda: _put(uri, data))
            process_use.count_written(_num_bytes(data))
            return
        target = local_path(uri)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(_temporary_name(target.name))
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        process_use.count_written(_num_bytes(data))
    except OSError as error:
        raise ResourceError(
            f"cannot write {uri}: {error.strerror or error}; check the path, its rights and the space"
        ) from (error)


def _num_bytes(data: bytes | pa.Buffer) -> int:
    return data.size if isinstance(data, pa.Buffer) else len(data)


def write_json(uri: str, value: Mapping[str, Any]) -> None:
    """Write a small JSON file, seen whole or not at all. Raises: ResourceError if that fails."""
    write_bytes_atomic(uri, (json.dumps(value, indent=2) + "\n").encode())


def find_json(uri: str) -> dict[str, Any] | None:
    """The object in a small JSON file; None where there is none that can be read."""
    if not exists(uri):
        return None
    try:
        value = json.loads(read_bytes(uri))
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def list_files(uri: str, *, recursive: bool = False) -> list[str]:
    """URIs of the files in a folder by name; none if there is no such folder. Temporary files are left out.

    Raises: as `list_sizes`.
    """
    return list(list_sizes(uri, recursive=recursive))


def list_sizes(uri: str, *, recursive: bool = False) -> dict[str, int]:
    """The same files with their sizes in bytes, which a listing tells without asking about each.

    Raises: InputError if the folder can't be listed; ResourceError if the store doesn't answer.
    """
    filesystem, path = open_filesystem(uri)
    selector = fs.FileSelector(path, allow_not_found=True, recursive=recursive)
    try:
        infos = _retry(f"cannot list {uri}", lambda: filesystem.get_file_info(selector))
    except OSError as error:
        raise InputError(f"cannot list {uri}: {error}") from None
    sizes = {info.path: int(info.size or 0) for info in infos if info.type == fs.FileType.File}
    prefix = f"{uri.partition('://')[0]}://" if is_remote(uri) else ""
    return {prefix + path: sizes[path] for path in sorted(sizes) if not _TEMPORARY.fullmatch(name_of(path))}


def list_stats(uri: str) -> dict[str, FileStat]:
    """All files below a folder with size and time of change, temporary ones among them; none if there is no folder.

    Raises: as `list_sizes`.
    """
    filesystem, path = open_filesystem(uri)
    selector = fs.FileSelector(path, allow_not_found=True, recursive=True)
    try:
        infos = _retry(f"cannot list {uri}", lambda: filesystem.get_file_info(selector))
    except OSError as error:
        raise InputError(f"cannot list {uri}: {error}") from None
    prefix = f"{uri.partition('://')[0]}://" if is_remote(uri) else ""
    return {
        prefix + info.path: FileStat(int(info.size or 0), int(info.mtime_ns or 0))
        for info in sorted(infos, key=lambda info: info.path)
        if info.type == fs.FileType.File
    }


def is_temporary(uri: str) -> bool:
    """Whether a file bears the name of a write that is under way, or was when its process died."""
    return _TEMPORARY.fullmatch(name_of(uri)) is not None


def remove_temporary(uri: str, before_ns: int) -> None:
    """Remove the temporary files of a folder that nobody has written to since `before_ns`: those of killed writes.

    A write that is under way stays if it began later. An object store keeps nothing of a killed write that has a name.
    Raises: ResourceError if that fails.
    """
    if is_remote(uri):
        return
    try:
        for path in local_path(uri).glob(".*"):
            with suppress(FileNotFoundError):  # its writer may just be done
                if _TEMPORARY.fullmatch(path.name) and path.stat().st_mtime_ns < before_ns:
                    path.unlink()
    except OSError as error:
        raise ResourceError(f"cannot remove temporary files in {uri}: {error}; check its rights") from None


def delete(uri: str) -> None:
    """Delete a file; it may be absent. Raises: ResourceError if that fails."""
    filesystem, path = open_filesystem(uri)

    def attempt() -> None:
        if filesystem.get_file_info(path).type == fs.FileType.File:
            # Absent by now: another process was faster, or an earlier attempt whose answer got lost.
            with suppress(FileNotFoundError):
                filesystem.delete_file(path)

    try:
        _retry(f"cannot delete {uri}", attempt)
    except OSError as error:
        raise ResourceError(f"cannot delete {uri}: {error}") from None


def fetch_folder(uri: str, check: Callable[[Path], None] | None = None) -> Path:
    """A model folder as a local path: a local one as it is, a remote one copied once for each content of its manifest.

    Files are read in ranges, many at a time. Of several processes on this machine that want the same folder one copies
    it, and the others wait for it. It has its name when it is whole, on the disk, and `check` has found nothing to
    raise about; what a killed process leaves is removed by the next one.
    Raises: InputError if the folder doesn't exist or, being remote, has no manifest; ResourceError if the store doesn't
    answer, the disk is full, or the folder was replaced meanwhile; what `check` raises.
    """
    if not is_folder(uri):
        raise InputError(f"{uri} is not a folder")
    if not is_remote(uri):
        return local_path(uri)
    # Other weights under the same URI have another manifest. The user's id: a shared /tmp has one folder for each.
    manifest = read_bytes(join(uri, MANIFEST_NAME))
    name = "-".join([name_of(uri), *(hashlib.sha256(part).hexdigest()[:8] for part in (uri.encode(), manifest))])
    root = Path(tempfile.gettempdir()) / f"nexusgen-cache-{os.getuid()}"
    target = root / name
    if target.is_dir():
        return target
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _alone(root / f".{name}.lock"):
            if not target.is_dir():  # or else another process has just copied it
                for left in root.glob(f".{name}-*"):  # by a process that was killed
                    shutil.rmtree(left, ignore_errors=True)
                _fetch(uri, manifest, target, check)
    except OSError as error:
        raise ResourceError(f"cannot copy {uri} to {target}: {error}; check rights and space there") from error
    return target


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """The body runs in one process of this machine at a time; the system takes the lock from one that is killed."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process, which has %s", lock)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(uri: str, manifest: bytes, target: Path, check: Callable[[Path], None] | None) -> None:
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    began = time.monotonic()
    try:
        num_bytes = _download_folder(uri, staging)
        seconds = max(time.monotonic() - began, 1e-6)
        if read_bytes(join(uri, MANIFEST_NAME)) != manifest:
            raise ResourceError(f"{uri} was replaced while it was copied: start the job again")
        if check is not None:
            check(staging)
        put_in_place(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    log.info(
        "%s: %.3f GB fetched in %.1f s, %.0f MB/s; checked and in place after %.1f s",
        uri,
        num_bytes / 1e9,
        seconds,
        num_bytes / 1e6 / seconds,
        time.monotonic() - began,
    )


def _download_folder(uri: str, target: Path) -> int:
    """Copy all files, in ranges; they are on the disk then. Gives their bytes. Raises: OSError; ResourceError."""
    sizes = list_sizes(uri, recursive=True)
    paths = {file: target / file.removeprefix(f"{uri.rstrip('/')}/") for file in sizes}
    needed, free = sum(sizes.values()), shutil.disk_usage(target).free
    if needed > free:
        raise ResourceError(
            f"cannot copy {uri} to {target.parent}: it takes {needed / 1e9:.3f} GB, and {free / 1e9:.3f} GB are free "
            "there: make room, or let TMPDIR name another disk"
        )
    for file, path in paths.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as out:
            out.truncate(sizes[file])
    ranges = [
        (file, start, min(start + RANGE_BYTES, size))
        for file, size in sizes.items()
        for start in range(0, size, RANGE_BYTES)
    ]
    with ThreadPoolExecutor(NUM_PARALLEL_RANGES) as pool:
        list(pool.map(lambda of_file: _download_range(of_file[0], paths[of_file[0]], *of_file[1:]), ranges))
        list(pool.map(_sync, paths.values()))
    process_use.count_read(needed)
    return needed


def _download_range(uri: str, path: Path, start: int, end: int) -> None:
    """Copy the bytes from `start` up to `end` into their place in a file. Raises: OSError; ResourceError."""
    buffer = memoryview(bytearray(min(READ_BUFFER_BYTES, end - start)))
    with _RemoteFile(uri) as source, path.open("r+b") as out:
        source.seek(start)
        out.seek(start)
        while start < end:
            view = buffer[: end - start]
            if source.readinto(view) != len(view):
                raise ResourceError(f"{uri} was replaced while it was copied: start the job again")
            out.write(view)
            start += len(view)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _put(uri: str, data: bytes | pa.Buffer) -> None:
    """Write an object of S3: in one request if it is small, else in parts."""
    filesystem, path = open_filesystem(uri)
    with filesystem.open_output_stream(path) as stream:
        # In one call: whatever ended a loop of ours in between would leave a short object behind, as the stream, when
        # it is closed, completes what it has. A call that fails leaves none.
        stream.write(data)


def _upload(file: Path, uri: str) -> None:
    # pyarrow maps no empty file.
    data = pa.memory_map(str(file)).read_buffer() if file.stat().st_size else b""
    _retry(f"cannot write {uri}", lambda: _put(uri, data))
    process_use.count_written(file.stat().st_size)


def put_in_place(staging: Path, target: Path) -> None:
    """Rename a finished folder; where another process was faster, its folder, which holds the same files, stays.

    Raises: ResourceError if another folder of that name lacks some of them.
    """
    try:
        staging.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        missing = sorted(path.name for path in staging.iterdir() if not (target / path.name).exists())
        if missing:
            raise ResourceError(f"{target} is in the way: it lacks {', '.join(missing)}; remove it") from None


def file_digest(path: Path) -> str:
    """sha256 of a local file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def upload_folder(source: Path, uri: str) -> None:
    """Copy a local folder to a URI: below a folder it appears whole, on S3 file by file with the manifest last.

    Raises: ResourceError if it can't be written.
    """
    try:
        if not is_remote(uri):
            target = local_path(uri)
            target.parent.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
            try:
                shutil.copytree(source, staging, dirs_exist_ok=True)
                if target.exists():
                    shutil.rmtree(target)
                staging.rename(target)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
            return
        with ThreadPoolExecutor(NUM_PARALLEL_FILES) as pool:
            files = [path for path in source.rglob("*") if path.is_file()]
            # The manifest last: who finds it finds everything.
            for is_manifest in (False, True):
                group = [path for path in files if (path.name == MANIFEST_NAME) is is_manifest]
                list(pool.map(lambda path: _upload(path, join(uri, path.relative_to(source).as_posix())), group))
    except OSError as error:
        raise ResourceError(f"cannot write {uri}: {error.strerror or error}") from error


def check_writable(uri: str) -> None:
    """Find out before a job starts whether its output can be written. Raises: ResourceError."""
    probe = join(uri, _temporary_name("probe"))
    write_bytes_atomic(probe, b"")
    delete(probe)


def _temporary_name(name: str) -> str:
    return f".{name[:100]}.tmp-{uuid.uuid4().hex[:12]}"


def _info(uri: str) -> fs.FileInfo:
    filesystem, path = open_filesystem(uri)
    try:
        return _retry(f"cannot reach {uri}", lambda: filesystem.get_file_info(path))
    except OSError as error:
        raise InputError(f"cannot reach {uri}: {error}") from None


def list_folder(uri: str) -> list[fs.FileInfo]:
    """The files and folders in a folder, as pyarrow tells them, by path; none if there is no such folder.

    Raises: InputError if it can't be listed; ResourceError if the store doesn't answer.
    """
    filesystem, path = open_filesystem(uri)
    selector = fs.FileSelector(path, allow_not_found=True)
    try:
        infos = _retry(f"cannot list {uri}", lambda: filesystem.get_file_info(selector))
    except OSError as error:
        raise InputError(f"cannot list {uri}: {error}") from None
    return sorted(infos, key=lambda info: info.path)
