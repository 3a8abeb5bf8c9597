"""Files by URI: a folder's path or `s3://bucket/prefix`, read and written the same way; every write is atomic.

Addresses and credentials of S3 come from the environment (`AWS_*`), as pyarrow reads them. A write to a folder goes to
a temporary name and is renamed; an object of S3 appears whole when it is closed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from nexusgen.errors import InputError, ResourceError
from nexusgen.schema import MANIFEST_NAME

READ_BUFFER_BYTES = 8 << 20  # S3 answers a few large ranged reads faster than many small ones
_TEMPORARY = ".tmp-"


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
        filesystem, path = fs.FileSystem.from_uri(uri)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"cannot open {uri}: {error}; expected a path or s3://bucket/prefix") from None
    return filesystem, path


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


def open_input(uri: str) -> pa.NativeFile:
    """A file as a stream of bytes. Raises: OSError."""
    filesystem, path = open_filesystem(uri)
    return filesystem.open_input_stream(path, compression=None, buffer_size=READ_BUFFER_BYTES)


def open_random(uri: str) -> pa.NativeFile:
    """A file for reading at any place, as Parquet wants it. Raises: InputError if it can't be opened."""
    filesystem, path = open_filesystem(uri)
    try:
        return filesystem.open_input_file(path)
    except OSError as error:
        raise InputError(f"cannot read {uri}: {error}") from None


def read_bytes(uri: str) -> bytes:
    """The whole content of a file. Raises: InputError if it can't be read."""
    try:
        with open_input(uri) as stream:
            return bytes(stream.read())
    except OSError as error:
        raise InputError(f"cannot read {uri}: {error}") from None


def write_bytes_atomic(uri: str, data: bytes | pa.Buffer) -> None:
    """Write a file that is seen whole or not at all; its folder is made. Raises: ResourceError if that fails."""
    try:
        if is_remote(uri):
            filesystem, path = open_filesystem(uri)
            with filesystem.open_output_stream(path) as stream:
                stream.write(data)
            return
        target = local_path(uri)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name[:100]}{_TEMPORARY}{uuid.uuid4().hex[:12]}")
        try:
            temporary.write_bytes(data)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ResourceError(
            f"cannot write {uri}: {error.strerror or error}; check the path, its rights and the space"
        ) from (error)


def list_files(uri: str, *, recursive: bool = False) -> list[str]:
    """URIs of the files in a folder by name; none if there is no such folder. Temporary files are left out."""
    filesystem, path = open_filesystem(uri)
    selector = fs.FileSelector(path, allow_not_found=True, recursive=recursive)
    names = sorted(info.path for info in filesystem.get_file_info(selector) if info.type == fs.FileType.File)
    prefix = f"{uri.partition('://')[0]}://" if is_remote(uri) else ""
    return [prefix + name for name in names if _TEMPORARY not in name.rpartition("/")[2]]


def delete(uri: str) -> None:
    """Delete a file; it may be absent."""
    filesystem, path = open_filesystem(uri)
    if filesystem.get_file_info(path).type == fs.FileType.File:
        filesystem.delete_file(path)


def fetch_folder(uri: str, cache: Path | None = None) -> Path:
    """A folder as a local path: a local one as it is, a remote one copied once into `cache`.

    Raises: InputError if the folder doesn't exist.
    """
    if not is_folder(uri):
        raise InputError(f"{uri} is not a folder")
    if not is_remote(uri):
        return local_path(uri)
    root = cache or Path(tempfile.gettempdir()) / "nexusgen-cache"
    target = root / f"{name_of(uri)}-{hashlib.sha256(uri.encode()).hexdigest()[:8]}"
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=root))
    try:
        filesystem, path = open_filesystem(uri)
        fs.copy_files(path, str(staging), source_filesystem=filesystem, destination_filesystem=fs.LocalFileSystem())
        put_in_place(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


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
        # The manifest last: who finds it finds everything.
        files = sorted((p for p in source.rglob("*") if p.is_file()), key=lambda p: (p.name == MANIFEST_NAME, str(p)))
        for file in files:
            filesystem, path = open_filesystem(join(uri, file.relative_to(source).as_posix()))
            with filesystem.open_output_stream(path) as stream, file.open("rb") as content:
                while chunk := content.read(READ_BUFFER_BYTES):
                    stream.write(chunk)
    except OSError as error:
        raise ResourceError(f"cannot write {uri}: {error.strerror or error}") from error


def check_writable(uri: str) -> None:
    """Find out before a job starts whether its output can be written. Raises: ResourceError."""
    probe = join(uri, f"{_TEMPORARY}{os.getpid()}")
    write_bytes_atomic(probe, b"")
    delete(probe)


def _info(uri: str) -> fs.FileInfo:
    filesystem, path = open_filesystem(uri)
    try:
        return filesystem.get_file_info(path)
    except OSError as error:
        raise InputError(f"cannot reach {uri}: {error}") from None
