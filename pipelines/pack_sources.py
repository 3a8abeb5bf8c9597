"""What `pack` reads beside the demo world: annotations in jsonl, pictures with texts beside them, Parquet files.

A source gives its records in a fixed order, from any place on, and holds one line, folder or batch of rows at a time.
What a record names is read ahead by a few threads, as an object store answers slowly. Nothing is decoded: a picture's
header is looked at, its bytes go on unchanged.

Policies, where the formats leave a choice:
- Names of images are taken below the image root (default: the folder of the jsonl file); a name that leads out of it is
  refused (`member_unsafe`). Give the root `/` for absolute names from all over a machine.
- A key is the sample's id with everything but letters, digits, `_` and `-` replaced by `_`; an id over 80 bytes is cut
  and ends in a hash of itself. Without an id it is the file's stem and the number of the line or row.
- An id that comes again gets the first free of ID-2, ID-3, ..., over all shards; the json keeps the id as it was.
- Empty lines and hidden files are no samples. A picture without text, or a text without picture, is a bad one.
- Columns of Parquet that hold bytes, other than the picture's, are left out, and said so.
- A file that a record names and that doesn't exist makes a bad sample (`member_missing`). One that exists but can't be
  read (its rights, a damaged disk, an object store that doesn't answer) ends the job: it says nothing about the data.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import posixpath
import re
import sqlite3
import sys
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pyarrow import fs

from nexusgen.errors import ConfigError, InputError, SampleError
from nexusgen.images import FORMATS
from nexusgen.messages import generation_messages, understanding_messages
from nexusgen.schema import Message
from pipelines import storage
from pipelines.ahead import map_ahead
from pipelines.shards import IMAGE_EXTENSIONS, MAX_MEMBER_BYTES, guess_language, list_shards, parse_record, parse_sample

MAX_LINE_BYTES = 16 << 20
MAX_KEY_BYTES = 80  # with extension and number below the 100 bytes that a plain tar header has room for
BATCH_ROWS = 16  # of Parquet at a time: pictures are large
NUM_READERS = 8
MAX_READ_AHEAD = 16  # records whose files are being read, or wait to be packed

PairsAs = Literal["generation", "understanding"]

_JSONL_ENDINGS = (".jsonl",)
_PARQUET_ENDINGS = (".parquet",)
_IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
_TEXT_COLUMNS = ("text", "caption", "prompt", "txt", "description")
_ID_COLUMNS = ("id", "key", "__key__", "uid")
_EXTENSION_OF = {"JPEG": "jpg", "JPEG2000": "jp2"}  # others: the format's name


@dataclass(frozen=True)
class Place:
    """Where reading begins or goes on: the file of the input, the line, row or pair, and its byte in a text file."""

    file: int = 0
    row: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Content:
    """A record's fields as its json shall hold them, and its pictures: name and bytes."""

    fields: dict[str, Any]
    pictures: tuple[tuple[str, bytes], ...]


@dataclass(frozen=True)
class Record:
    """One sample of the input. `load` reads the files that it names; it raises SampleError."""

    source: str  # URI of the file that it stands in
    where: str  # in that file, for a person
    key: str  # not yet told from others of the same id
    end: Place
    load: Callable[[], Content]


Loaded = tuple[Record, Content | SampleError]  # what the record holds, or why it can't be used


class Source(Protocol):
    """A kind of input."""

    def stamps(self) -> Iterator[tuple[str, str]]:
        """URI of each file (or folder) of the input and a digest of its size and time of change."""
        ...

    def records(self, start: Place) -> Iterator[Record]:
        """The records from `start` on."""
        ...


# ---- jsonl ----------------------------------------------------------------------------------------------------------


class JsonlSource:
    """Nexus-Gen's annotations: one json per line with `id`, `images`, `messages` and whatever else.

    Source: github.com/modelscope/Nexus-Gen, assets/example_datasets/llm_dataset.jsonl (July 2025).
    Raises: InputError if there is no such file.
    """

    def __init__(self, inputs: str | Sequence[str], images: str | None) -> None:
        self.files = list_shards(inputs, _JSONL_ENDINGS)
        self._images = images

    def stamps(self) -> Iterator[tuple[str, str]]:
        return map(_stamp, self.files)

    def records(self, start: Place) -> Iterator[Record]:
        for index, file in enumerate(self.files[start.file :], start.file):
            root = _Root(self._images or file.rpartition("/")[0])
            place = start if index == start.file else Place(index)
            for line, end in _read_lines(file, place):
                if line.strip():
                    yield self._record(file, root, line, end)

    @staticmethod
    def _record(file: str, root: _Root, line: bytes, end: Place) -> Record:
        key, where = f"{_stem(file)}-{end.row:08d}", f"line {end.row}"
        try:
            if len(line) > MAX_LINE_BYTES:
                raise SampleError("text_too_long", f"the line is longer than {MAX_LINE_BYTES:,} bytes")
            fields = parse_record(line)
            key = safe_key(fields.get("id")) or key
            names = fields.get("images", [])
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise SampleError("json_invalid", "`images` isn't a list of names")
        except SampleError as error:
            return Record(file, where, key, end, _refusal(error))
        return Record(file, where, key, end, lambda: Content(fields, tuple((name, root.read(name)) for name in names)))


def _read_lines(file: str, start: Place) -> Iterator[tuple[bytes, Place]]:
    """Lines of a text file with the place after each; one that is too long comes cut, but longer than the limit."""
    row, offset = start.row, start.offset
    with storage.open_random(file) as raw:
        raw.seek(offset)
        stream = io.BufferedReader(raw, storage.READ_BUFFER_BYTES)
        try:
            while line := stream.readline(MAX_LINE_BYTES + 1):
                offset += len(line)
                rest = line
                while not rest.endswith(b"\n") and (rest := stream.readline(MAX_LINE_BYTES)):
                    offset += len(rest)
                row += 1
                yield line, Place(start.file, row, offset)
        except OSError as error:
            raise InputError(f"cannot read {file}: {error}; start the job again once it can be read") from None


# ---- pictures with texts beside them --------------------------------------------------------------------------------


class PairSource:
    """Folders of pictures, each with a `.txt` of the same name; a `.json` of that name gives further fields.

    Raises: InputError if there is no such folder.
    """

    def __init__(self, inputs: str | Sequence[str], pairs_as: PairsAs) -> None:
        self.folders = [inputs] if isinstance(inputs, str) else list(inputs)
        self._pairs_as = pairs_as
        for folder in self.folders:
            if not storage.is_folder(folder):
                raise InputError(f"input {folder!r} is not a folder; format pairs reads folders of pictures and texts")

    def stamps(self) -> Iterator[tuple[str, str]]:
        for folder in self.folders:
            root = _Root(folder)
            digest = hashlib.sha256()
            for infos in _walk(root.uri):
                for info in infos:
                    name = info.path[len(root.path) :]
                    digest.update(f"{name}\0{info.size}\0{info.mtime_ns}\0".encode("utf-8", "surrogateescape"))
            yield folder, digest.hexdigest()[:16]

    def records(self, start: Place) -> Iterator[Record]:
        for index, folder in enumerate(self.folders[start.file :], start.file):
            root = _Root(folder)
            row = 0
            for infos in _walk(root.uri):
                paths = {info.path for info in infos}
                stems = {_split(path)[0] for path in paths if _split(path)[1].lower() in IMAGE_EXTENSIONS}
                for path in sorted(paths):
                    stem, extension = _split(path)
                    is_image = extension.lower() in IMAGE_EXTENSIONS
                    if not is_image and (extension.lower() != "txt" or stem in stems):
                        continue
                    row += 1
                    if index == start.file and row <= start.row:
                        continue
                    yield self._record(root, path, paths, Place(index, row), is_image=is_image)

    def _record(self, root: _Root, path: str, paths: set[str], end: Place, *, is_image: bool) -> Record:
        stem, _ = _split(path)
        identity = stem[len(root.path) :].strip("/")
        text, sidecar = (
            next((p for p in (f"{stem}.{e}", f"{stem}.{e.upper()}") if p in paths), "") for e in ("txt", "json")
        )

        def load() -> Content:
            if not is_image:
                raise SampleError("member_missing", f"no picture stands beside {posixpath.basename(path)}", path)
            fields = parse_record(root.read(sidecar)) if sidecar else {}
            caption = fields.get("caption")
            if text:
                try:
                    caption = root.read(text).decode("utf-8-sig")
                except UnicodeDecodeError as error:
                    raise SampleError("text_invalid", f"the text isn't UTF-8: {error.reason}", text) from None
            elif caption is None:
                raise SampleError("member_missing", f"no text stands beside it; expected {stem}.txt", path)
            fields = {"id": identity, **fields, "caption": caption}
            return _captioned(fields, caption, self._pairs_as, (path, root.read(path)))

        return Record(
            root.uri_of(path), posixpath.basename(path), safe_key(identity) or f"pair-{end.row:08d}", end, load
        )


def _walk(folder: str) -> Iterator[list[fs.FileInfo]]:
    """The files of a folder and of those below it, folder by folder, in order of name; hidden ones are left out."""
    infos = [info for info in storage.list_folder(folder) if not info.base_name.startswith(".")]
    yield [info for info in infos if info.type == fs.FileType.File]
    for info in infos:
        if info.type == fs.FileType.Directory:
            yield from _walk(storage.join(folder, info.base_name))


# ---- Parquet --------------------------------------------------------------------------------------------------------


class ParquetSource:
    """Parquet files with a picture's bytes and a text in each row; every other column is kept as a field.

    A picture is a binary column or Hugging Face's struct of `bytes` and `path`. Columns that aren't named are found by
    common names, or by being the only one of their kind, in the first file.
    Raises: ConfigError for columns that are absent or can't be told; InputError if the first file can't be read.
    """

    def __init__(
        self,
        inputs: str | Sequence[str],
        image_column: str | None,
        text_column: str | None,
        id_column: str | None,
        pairs_as: PairsAs,
    ) -> None:
        self.files = list_shards(inputs, _PARQUET_ENDINGS)
        self._pairs_as = pairs_as
        try:
            with storage.open_random(self.files[0]) as file:
                schema = pq.read_schema(file)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{self.files[0]} can't be read as Parquet: {error}") from None
        images = [field.name for field in schema if _is_image(field.type)]
        texts = [f.name for f in schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
        self.image_column = _find_column("image_column", image_column, images, _IMAGE_COLUMNS, schema)
        self.id_column = id_column or next((name for name in _ID_COLUMNS if name in schema.names), None)
        if self.id_column is not None and self.id_column not in schema.names:
            raise ConfigError(f"id_column = {self.id_column!r}: the columns are {', '.join(schema.names)}")
        texts = [name for name in texts if name == text_column or name != self.id_column]
        self.text_column = _find_column("text_column", text_column, texts, _TEXT_COLUMNS, schema)
        left_out = [f.name for f in schema if f.name != self.image_column and _holds_bytes(f.type)]
        if left_out:
            print(f"pack: the columns {', '.join(left_out)} hold bytes; left out", file=sys.stderr, flush=True)
        self._columns = [name for name in schema.names if name not in left_out]

    def stamps(self) -> Iterator[tuple[str, str]]:
        return map(_stamp, self.files)

    def records(self, start: Place) -> Iterator[Record]:
        for index, file in enumerate(self.files[start.file :], start.file):
            first = start.row if index == start.file else 0
            row = first
            try:
                for values in self._rows(file, first):
                    row += 1
                    yield self._record(file, values, Place(index, row))
            except (pa.ArrowException, OSError, InputError) as error:
                damage = SampleError("tar_unreadable", f"can't be read as Parquet after {row} rows: {error}"[:300])
                yield Record(file, "the file", "", Place(index + 1), _refusal(damage))

    def _rows(self, file: str, first: int) -> Iterator[dict[str, Any]]:
        with (
            storage.open_random(file) as raw,
            pq.ParquetFile(raw, buffer_size=storage.READ_BUFFER_BYTES, pre_buffer=False) as parquet,
        ):
            missing = sorted({self.image_column, self.text_column} - set(parquet.schema_arrow.names))
            if missing:
                raise InputError(f"it lacks the column {', '.join(missing)}")
            begin = 0
            for group in range(parquet.num_row_groups):
                end = begin + parquet.metadata.row_group(group).num_rows
                if end > first:
                    for batch in parquet.iter_batches(BATCH_ROWS, row_groups=[group], columns=self._columns):
                        skipped = min(max(first - begin, 0), batch.num_rows)
                        yield from batch.slice(skipped).to_pylist()
                        begin += batch.num_rows
                begin = end

    def _record(self, file: str, values: dict[str, Any], end: Place) -> Record:
        picture = values.pop(self.image_column)
        name, data = (picture.get("path") or "", picture["bytes"]) if isinstance(picture, dict) else ("", picture)
        identity = values.get(self.id_column) if self.id_column is not None else None

        def load() -> Content:
            if not data:
                raise SampleError("member_missing", f"the column {self.image_column!r} holds no bytes", name)
            # Through json, so that times, decimals and infinities are what a json can hold.
            fields = json.loads(json.dumps(values, default=str), parse_constant=lambda _: None)
            fields |= {} if identity is None else {"id": str(identity)}
            return _captioned(fields, fields[self.text_column], self._pairs_as, (name, data))

        key = safe_key(identity) or f"{_stem(file)}-{end.row:08d}"
        return Record(file, f"row {end.row}", key, end, load)


def _is_binary(kind: pa.DataType) -> bool:
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    return any(test(kind) for test in tests)


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_binary(field.type) for field in kind.fields)
    return _is_binary(kind)


def _holds_bytes(kind: pa.DataType) -> bool:
    return _is_binary(kind) or any(_holds_bytes(kind.field(index).type) for index in range(kind.num_fields))


def _find_column(key: str, named: str | None, fitting: list[str], common: Iterable[str], schema: pa.Schema) -> str:
    """The column that is named, has a common name, or is the only one that fits. Raises: ConfigError."""
    chosen = named or next((name for name in common if name in fitting), None)
    if chosen is None and len(fitting) == 1:
        chosen = fitting[0]
    if chosen is None or chosen not in fitting:
        found = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise ConfigError(
            f"{key} = {named!r}: set it to one of {', '.join(fitting) or 'none'}; the columns are {found}"
        )
    return chosen


# ---- from records to members ----------------------------------------------------------------------------------------


def safe_key(identity: object) -> str:
    """An id as a key: safe in a tar and free of dots, slashes and what readers skip; empty if nothing is left."""
    if not isinstance(identity, (str, int)):
        return ""
    text = str(identity)
    key = re.sub(r"[^\w-]", "_", text).strip("_")
    if len(key.encode()) > MAX_KEY_BYTES:
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
        key = f"{key.encode()[: MAX_KEY_BYTES - 9].decode('utf-8', 'ignore')}-{digest}"
    return key


class Keys:
    """Every key given so far, in a temporary file: millions of them take no memory."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None)
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute(
            "CREATE TABLE keys (key TEXT PRIMARY KEY, last INTEGER NOT NULL DEFAULT 1) WITHOUT ROWID"
        )

    def add(self, key: str) -> bool:
        """Whether the key was free; then it is taken now."""
        return self._database.execute("INSERT OR IGNORE INTO keys (key) VALUES (?)", (key,)).rowcount == 1

    def take(self, key: str) -> str:
        """The key itself, or the first free of KEY-2, KEY-3, ..."""
        if self.add(key):
            return key
        (last,) = self._database.execute("SELECT last FROM keys WHERE key = ?", (key,)).fetchone()
        number = last + 1
        while not self.add(f"{key}-{number}"):
            number += 1
        self._database.execute("UPDATE keys SET last = ? WHERE key = ?", (number, key))
        return f"{key}-{number}"

    def close(self) -> None:
        """Drop the temporary file."""
        self._database.close()


def read_ahead(records: Iterator[Record]) -> Generator[Loaded, None, None]:
    """Records in order with what they hold, or why they can't be used; files are read by a few threads."""
    pool = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="pack")
    try:
        yield from map_ahead(pool, _load, records, MAX_READ_AHEAD)
    finally:
        pool.shutdown(cancel_futures=True)


def _load(record: Record) -> Loaded:
    try:
        return record, record.load()
    except SampleError as error:
        return record, error


def to_members(key: str, content: Content) -> dict[str, bytes]:
    """A sample as extension -> bytes in Nexus-Gen's convention, judged as `ShardReader` will judge it.

    Raises: SampleError.
    """
    members: dict[str, bytes] = {}
    for index, (name, data) in enumerate(content.pictures):
        extension = _split(name)[1]
        found = _check_header(name, data)
        if extension.lower() not in IMAGE_EXTENSIONS:
            extension = _EXTENSION_OF.get(found, found.lower())
        members[f"{index}.{extension}"] = data
    record = {"id": key, **content.fields, "images": list(members)}
    try:
        members["json"] = json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise SampleError("text_invalid", f"a text isn't valid Unicode: {error.reason}") from None
    parse_sample(key, members)
    return members


def _check_header(name: str, data: bytes) -> str:
    """The format that a picture's header tells. Whether its pixels can be read, embed finds out."""
    if not data:
        raise SampleError("image_undecodable", "the image has no bytes", name)
    if len(data) > MAX_MEMBER_BYTES:
        raise SampleError("member_too_large", f"{len(data):,} bytes; at most {MAX_MEMBER_BYTES:,} are read", name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                return str(image.format)
        except Image.DecompressionBombError as error:
            raise SampleError("image_too_large", str(error), name) from None
        except Exception as error:  # header parsers fed with damaged bytes raise almost anything
            raise SampleError("image_undecodable", f"{type(error).__name__}: {error}"[:300], name) from None


def _captioned(fields: dict[str, Any], caption: object, pairs_as: PairsAs, picture: tuple[str, bytes]) -> Content:
    """A picture with a text as a conversation in the paper's templates."""
    text = caption.strip() if isinstance(caption, str) else ""
    if not text:
        raise SampleError("text_invalid", "the caption is empty")
    stated = fields.get("lang")
    lang = stated if isinstance(stated, str) and stated else guess_language([Message("user", text)])
    build = generation_messages if pairs_as == "generation" else understanding_messages
    messages = [{"role": message.role, "content": message.content} for message in build(text, lang)]
    return Content({**fields, "lang": lang, "messages": messages}, (picture,))


def _refusal(error: SampleError) -> Callable[[], NoReturn]:
    def refuse() -> NoReturn:
        raise error

    return refuse


class _Root:
    """A folder that images are named in."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._scheme = f"{uri.partition('://')[0]}://" if storage.is_remote(uri) else ""
        self.path = storage.open_filesystem(uri)[1].rstrip("/")

    def uri_of(self, path: str) -> str:
        return self._scheme + path

    def read(self, name: str) -> bytes:
        """The bytes of a file below the root.

        Raises: SampleError if it is outside, absent or too large; InputError if it can't be read; ResourceError if the
        store doesn't answer.
        """
        stated = name.removeprefix(self._scheme or "file://")
        is_absolute = stated != name or stated.startswith(("/", f"{self.path}/"))
        path = posixpath.normpath(stated if is_absolute else f"{self.path}/{stated}")
        if "\0" in name or "://" in stated or not path.startswith(f"{self.path}/"):
            raise SampleError("member_unsafe", f"leads out of the image root {self._scheme}{self.path}/", name)
        uri = self.uri_of(path)
        pieces: list[bytes] = []
        num_bytes = 0
        try:
            with storage.open_input(uri) as stream:
                while piece := stream.read(storage.READ_BUFFER_BYTES):
                    pieces.append(piece)
                    num_bytes += len(piece)
                    if num_bytes > MAX_MEMBER_BYTES:
                        raise SampleError("member_too_large", f"more than {MAX_MEMBER_BYTES:,} bytes", name)
        except (OSError, UnicodeError) as error:
            if _is_absence(uri, error):
                raise SampleError("member_missing", f"no file at {uri}: {error}"[:300], name) from None
            raise InputError(f"cannot read {uri}: {error}; start the job again once it can be read") from None
        return b"".join(pieces)


def _is_absence(uri: str, error: Exception) -> bool:
    """Whether there is no file of this name: none at all, a folder, or a name that no file can have."""
    no_file = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
    if isinstance(error, UnicodeError) or getattr(error, "errno", None) in no_file:
        return True
    return storage.is_folder(uri)  # of which pyarrow gives no number


def _split(path: str) -> tuple[str, str]:
    """A path before and after its last dot; no extension where the base name has none."""
    stem, extension = posixpath.splitext(path)
    return stem, extension.removeprefix(".")


def _stem(uri: str) -> str:
    return safe_key(_split(storage.name_of(uri))[0]) or "input"


def _stamp(uri: str) -> tuple[str, str]:
    known = storage.stat(uri)
    return uri, hashlib.sha256(f"{known.size} {known.mtime_ns}".encode()).hexdigest()[:16]
