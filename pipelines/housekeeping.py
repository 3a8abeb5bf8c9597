"""What a storage holds that nobody needs any more: found, listed with its size, and deleted when that is asked for.

| kind | what |
|---|---|
| slice | a file of embedded data that its manifest doesn't list, with its entry and its quarantine |
| data | embedded data that was begun, and no slice of it finished: it has neither manifest nor entries |
| checkpoint | incomplete; of another run than the stage's last one; or of later steps than that |
| model | a model folder whose versions have no alias |
| half-written | what a killed process left: temporary files, unfinished folders, scratch of Ray Train |

Needed, and never listed: what a version with an alias is made of (its folder, the models that it was trained on, the
checkpoints and data of its stages, as its manifest's lineage names them), the version that an alias would roll back to,
the same of it; a stage's last and best checkpoints and all complete ones of the same run, with the model that they were
trained on; a model that a run under way names; a model in a folder that isn't named by a fingerprint, which no job of
ours made; data that a training has read; finished slices without a manifest, as the embed job that was killed goes on
with them. Nothing is listed that is younger than the threshold, or that lies where something was written since then:
a job that goes on writes all the time. Tars, evaluations, accounts and MLflow are left alone.

Versions that `serve` was given by number have no alias: give them one, or keep the threshold above their age. Where the
registry knows none of the storage's models it is taken for the wrong one, and nothing is listed at all.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from nexusgen.errors import InputError
from nexusgen.model.manifest import Manifest
from nexusgen.schema import MANIFEST_NAME, EmbedMode
from pipelines import checkpoint, embedded, registry, storage, tracking

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

NUM_PARALLEL = 16  # files deleted at a time
POINTERS = ("latest.json", "best.json")  # of a stage
ASK_EVERY_S = 5.0  # whether something has come to be needed; for a model each time
_STEP = re.compile(r"step-\d{6,}")
_BEING_WRITTEN = re.compile(r"\.(step-.+|assembling-.+|ray|[0-9a-f]{16}-.+)")  # folders
_FINGERPRINT = re.compile(r"[0-9a-f]{16}")
_SLICE = re.compile(r".+-[0-9a-f]{8}-\d{5}")


@dataclass(frozen=True)
class Found:
    """Something that nobody needs: its files, and why."""

    kind: str
    uri: str
    reason: str
    files: tuple[str, ...]
    num_bytes: int
    versions: tuple[str, ...] = ()  # of the registered model, that go with it

    def to_json(self) -> dict[str, Any]:
        """A mapping that `json.dumps` takes."""
        return {
            "kind": self.kind,
            "uri": self.uri,
            "reason": self.reason,
            "files": len(self.files),
            "bytes": self.num_bytes,
            "versions": [int(version) for version in self.versions],
        }


@dataclass
class Needed:
    """What must stay, by URI: model folders, checkpoints, folders of embedded data."""

    models: set[str] = field(default_factory=set)
    checkpoints: set[str] = field(default_factory=set)
    data: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Registry:
    """The registered model's versions, by fingerprint, and the fingerprints that something points to."""

    versions: Mapping[str, Sequence[ModelVersion]]
    pointed_to: frozenset[str]  # by an alias, as its roll back, or by a run under way


def find_garbage(storage_uri: str, older_than_s: float, now_s: float | None = None) -> list[Found]:
    """List what nobody needs and nobody has touched for `older_than_s` seconds.

    Raises: InputError if there is no such storage, the registry is another one's, or what a version needs can't be
    told; ResourceError if a store doesn't answer.
    """
    root = storage.absolute(storage_uri)
    if not storage.is_folder(root):
        raise InputError(f"storage={storage_uri}: there is no such folder, so nothing to tidy; correct --storage")
    before_ns = int(((now_s if now_s is not None else time.time()) - older_than_s) * 1e9)
    known = read_registry(root)
    models = _Listing(storage.join(root, "models"))
    _check_registry(root, models, known)
    needed = what_is_needed(root, known)
    found = [
        *_find_in_data(root, needed, before_ns),
        *_find_in_checkpoints(root, needed, before_ns),
        *_find_in_models(models, needed, known, before_ns),
    ]
    return sorted(found, key=lambda one: (one.kind, one.uri))


def delete_garbage(storage_uri: str, found: Sequence[Found]) -> int:
    """Delete what was found, but for what has come to be needed since. Gives the bytes that were freed.

    What is found by one file (a manifest, meta.json) loses that first: what is deleted in part is nothing whole.
    """
    root = storage.absolute(storage_uri)
    freed = 0
    listed: dict[str, set[str]] = {}  # by folder of embedded data
    asked_s, needed = -math.inf, Needed()
    for one in found:
        folder = one.uri.rpartition("/")[0]
        if one.kind == "model" or time.monotonic() - asked_s > ASK_EVERY_S:
            asked_s, needed = time.monotonic(), what_is_needed(root, read_registry(root))
        if one.uri in needed.models | needed.checkpoints | needed.data:
            continue
        if one.kind == "data" and _is_begun(storage.list_files(one.uri, recursive=True), one.uri):
            continue  # somebody has gone on
        if one.kind == "slice":
            listed[folder] = listed[folder] if folder in listed else _listed_slices(folder)
            if storage.name_of(one.uri) in listed[folder]:
                continue
        first = [uri for uri in one.files if storage.name_of(uri) in (MANIFEST_NAME, "meta.json")]
        for uri in first:
            storage.delete(uri)
        with ThreadPoolExecutor(NUM_PARALLEL) as pool:
            list(pool.map(storage.delete, [uri for uri in one.files if uri not in first]))
        if not storage.is_remote(one.uri):
            _remove_empty(storage.local_path(one.uri))
        for version in one.versions:
            tracking.connect(root).delete_model_version(registry.MODEL_NAME, version)
        freed += one.num_bytes
    return freed


def _remove_empty(folder: Path) -> None:
    """Remove a folder and those below it, but for what holds something, like what was written since it was listed."""
    for place, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):
            Path(place).rmdir()


# --- what is needed ---------------------------------------------------------------------------------------------------


def read_registry(root: str) -> Registry:
    """The versions, and which of them something points to; an embedded registry that isn't there isn't made."""
    from mlflow.exceptions import MlflowException

    uri = tracking.mlflow_uri(root)
    if uri.startswith("sqlite:///") and not storage.exists(uri.removeprefix("sqlite:///")):
        return Registry({}, frozenset())
    client = tracking.connect(root)
    try:
        model = client.get_registered_model(registry.MODEL_NAME)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return Registry({}, frozenset())
    by_number = {str(version.version): version for version in _all_versions(client)}
    fingerprints = {number: version.tags.get(tracking.TAG_FINGERPRINT, "") for number, version in by_number.items()}
    kept = {str(number) for number in model.aliases.values()}
    for alias, target in model.aliases.items():
        history = json.loads(model.tags.get(f"{registry.TAG_PREVIOUS}.{alias}", "[]"))
        earlier = [str(number) for number in history if str(number) != str(target)]
        kept |= set(earlier[-1:])  # what a rollback returns to
    pointed_to = {fingerprints[number] for number in kept if number in fingerprints}
    for spec in _models_of_running(client):
        number = spec.removeprefix(f"models:/{registry.MODEL_NAME}/")
        pointed_to.add(fingerprints.get(number, storage.name_of(spec)))
    versions: dict[str, list[ModelVersion]] = defaultdict(list)
    for number, version in by_number.items():
        versions[fingerprints[number]].append(version)
    return Registry(versions, frozenset(pointed_to - {""}))


def _check_registry(root: str, models: _Listing, known: Registry) -> None:
    """Raises: InputError if the registry knows none of the storage's models: then it is hardly theirs."""
    whole = sorted(name for name, files in models.by_name().items() if _is_whole(models.folder, name, files))
    if not whole or any(name in known.versions for name in whole):
        return
    held = f"holds {sum(map(len, known.versions.values()))} versions of {registry.MODEL_NAME}, of other models"
    found = held if known.versions else f"holds no version of {registry.MODEL_NAME}"
    raise InputError(
        f"{models.folder} holds {len(whole)} models, first {whole[0]}, but the registry "
        f"{tracking.redact(tracking.mlflow_uri(root))} {found}, so which of them are needed can't be told, and nothing "
        "was deleted: set MLFLOW_TRACKING_URI to where they were registered (unset it if that was in the storage "
        "itself), or delete their folders by hand if they never were"
    )


def _is_whole(folder: str, name: str, files: Mapping[str, storage.FileStat]) -> bool:
    """Whether a folder is a registered model's, and has its manifest, which is written last."""
    return bool(_FINGERPRINT.fullmatch(name)) and storage.join(folder, name, MANIFEST_NAME) in files


def _all_versions(client: MlflowClient) -> Iterator[ModelVersion]:
    token = None
    while True:
        page = client.search_model_versions(f"name = '{registry.MODEL_NAME}'", page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _models_of_running(client: MlflowClient) -> set[str]:
    """The models that runs under way name as theirs; a killed run never says that it has ended, and counts."""
    experiments = [one.experiment_id for one in client.search_experiments()]
    token, found = None, set[str]()
    while True:
        page = client.search_runs(experiments, "attributes.status = 'RUNNING'", page_token=token)
        for run in page:
            found |= {run.data.params[name] for name in ("model", "against") if name in run.data.params}
        token = page.token
        if not token:
            return found


def what_is_needed(root: str, known: Registry) -> Needed:
    """Everything that the lineage of the versions that something points to names, and what trainings go on from."""
    needed = Needed()
    todo = list(known.pointed_to)
    for bases, data in _read_by_trainings(root):
        todo += bases
        needed.data |= {storage.join(root, "embedded", name) for name in data}
    while todo:
        folder = storage.join(root, "models", todo.pop())
        if folder in needed.models:
            continue
        needed.models.add(folder)
        content = storage.find_json(storage.join(folder, MANIFEST_NAME))
        if content is None:
            continue  # a base from elsewhere, or a version whose folder is gone
        lineage = Manifest.model_validate(content).lineage
        for stage in lineage.get("stages", {}).values():
            needed.checkpoints.add(_here(root, stage["checkpoint"], "checkpoints", 3))
            needed.data |= {storage.join(root, "embedded", data["name"]) for data in stage.get("inputs", ())}
        todo += [lineage["base_fingerprint"]] if "base_fingerprint" in lineage else []
        record = storage.find_json(storage.join(folder, "adapter.json")) or {}
        todo += [record["base_fingerprint"]] if "base_fingerprint" in record else []
    return needed


def _read_by_trainings(root: str) -> Iterator[tuple[list[str], list[str]]]:
    """Of each stage, fingerprints of the models that its last and best checkpoints were trained on, without which these
    are worth nothing; and names of the data that it has read, NAME/MODE."""
    top = storage.join(root, "checkpoints")
    for folder in _groups(_Listing(top).files, top, 2):
        pointers = _pointers(folder)
        metas = [_meta(storage.join(folder, str(pointer.get("path", "-")))) for pointer in pointers]
        inputs = [data.name for meta in metas if meta is not None for data in meta.inputs]
        begun = storage.find_json(storage.join(folder, "run.json")) or {}  # also of one without a checkpoint
        inputs += [str(data["name"]) for data in begun.get("inputs", ())]
        yield [meta.base_fingerprint for meta in metas if meta is not None], inputs


def _pointers(folder: str) -> list[dict[str, Any]]:
    """What a stage's pointers hold, the last one's first; one that isn't there is empty."""
    return [storage.find_json(storage.join(folder, name)) or {} for name in POINTERS]


def _here(root: str, uri: str, top: str, depth: int) -> str:
    """The same place in the storage at hand, which may have moved since."""
    return storage.join(root, top, *uri.rstrip("/").split("/")[-depth:])


# --- what isn't -------------------------------------------------------------------------------------------------------


class _Listing:
    """The files below a folder, temporary ones too, by the names of the folders on their way."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.files = storage.list_stats(folder)

    def by_name(self) -> dict[str, dict[str, storage.FileStat]]:
        """The files of each folder in it."""
        return {storage.name_of(uri): files for uri, files in _groups(self.files, self.folder, 1).items()}


def _groups(files: Mapping[str, storage.FileStat], folder: str, depth: int) -> dict[str, dict[str, storage.FileStat]]:
    """Files by the folder of their first `depth` names below `folder`; those that lie higher are left out."""
    groups: dict[str, dict[str, storage.FileStat]] = defaultdict(dict)
    prefix = folder.rstrip("/") + "/"
    for uri, found in files.items():
        names = uri.removeprefix(prefix).split("/")
        if len(names) > depth:
            groups[storage.join(folder, *names[:depth])][uri] = found
    return groups


def _is_quiet(files: Mapping[str, storage.FileStat], before_ns: int) -> bool:
    return all(found.mtime_ns < before_ns for found in files.values())


def _as_found(kind: str, uri: str, reason: str, files: Mapping[str, storage.FileStat], versions: Any = ()) -> Found:
    return Found(kind, uri, reason, tuple(files), sum(found.size for found in files.values()), tuple(versions))


def _find_temporary(files: Mapping[str, storage.FileStat], before_ns: int) -> Iterator[Found]:
    for uri, found in files.items():
        if storage.is_temporary(uri) and found.mtime_ns < before_ns:
            yield _as_found("half-written", uri, "a write that was killed", {uri: found})


def _find_in_data(root: str, needed: Needed, before_ns: int) -> Iterator[Found]:
    top = storage.join(root, "embedded")
    listing = _Listing(top)
    for folder, files in _groups(listing.files, top, 2).items():
        if storage.name_of(folder) not in get_args(EmbedMode):
            continue
        manifest = storage.join(folder, embedded.MANIFEST_NAME)
        if manifest not in files:
            if _is_begun(files, folder):
                yield from _find_temporary(files, before_ns)
            elif folder not in needed.data and _is_quiet(files, before_ns):
                yield _as_found("data", folder, "begun, and no slice of it was finished", files)
            continue
        yield from _find_temporary(files, before_ns)
        if not _is_quiet(files, before_ns):
            continue  # somebody works here
        listed = _listed_slices(folder)
        orphans: dict[str, dict[str, storage.FileStat]] = defaultdict(dict)
        for uri, found in files.items():
            stem = storage.name_of(uri).rpartition(".")[0]
            if _SLICE.fullmatch(stem) and f"{stem}.parquet" not in listed and not storage.is_temporary(uri):
                orphans[stem][uri] = found
        for stem, own in orphans.items():
            uri = storage.join(folder, f"{stem}.parquet")
            if uri in own:  # of a slice without rows there are an entry and a quarantine, and no file
                yield _as_found("slice", uri, "not in the data's manifest", own)


def _is_begun(files: Iterable[str], folder: str) -> bool:
    """Whether embedded data has anything that a job would go on with or read: its manifest, or what is entered."""
    entries = storage.join(folder, embedded.ENTRIES_FOLDER) + "/"
    manifest = storage.join(folder, embedded.MANIFEST_NAME)
    return any(uri == manifest or (uri.startswith(entries) and not storage.is_temporary(uri)) for uri in files)


def _listed_slices(folder: str) -> set[str]:
    """Names of the slices in a manifest. Raises: InputError if it can't be read."""
    uri = storage.join(folder, embedded.MANIFEST_NAME)
    content = storage.find_json(uri)
    if content is None or "slices" not in content:
        if not storage.exists(uri):
            return set()
        raise InputError(f"{uri} can't be read as a manifest of embedded data, so nothing was deleted: embed it again")
    return {entry["uri"] for entry in content["slices"]}


def _find_in_checkpoints(root: str, needed: Needed, before_ns: int) -> Iterator[Found]:
    top = storage.join(root, "checkpoints")
    for folder, files in _groups(_Listing(top).files, top, 2).items():
        if not _is_quiet(files, before_ns):
            continue  # a training under way writes its progress all the time
        pointers = _pointers(folder)
        pointed_to = {str(pointer["path"]) for pointer in pointers if "path" in pointer}
        last = _meta(storage.join(folder, str(pointers[0].get("path", "-"))))
        for uri, own in _groups(files, folder, 1).items():
            name = storage.name_of(uri)
            if uri in needed.checkpoints or name in pointed_to:
                continue
            if _BEING_WRITTEN.fullmatch(name):
                yield _as_found("half-written", uri, "a checkpoint or scratch of a training that was killed", own)
            elif _STEP.fullmatch(name) and (reason := _why_not(_meta(uri), last)):
                yield _as_found("checkpoint", uri, reason, own)


def _meta(uri: str) -> checkpoint.Meta | None:
    content = storage.find_json(storage.join(uri, "meta.json"))
    try:
        return checkpoint.Meta.model_validate(content) if content is not None else None
    except ValueError:
        return None


def _why_not(meta: checkpoint.Meta | None, last: checkpoint.Meta | None) -> str:
    """Why a checkpoint isn't one of its stage's; empty if it is."""
    if meta is None:
        return "incomplete: it has no meta.json that can be read"
    if last is None:
        return "of a training that was started over: nothing points to it"
    if meta.run_id != last.run_id:
        return f"of another run ({meta.run_id}) than the stage's last"
    return f"of later steps than the stage's last ({last.step})" if meta.step > last.step else ""


def _find_in_models(models: _Listing, needed: Needed, known: Registry, before_ns: int) -> Iterator[Found]:
    for name, files in models.by_name().items():
        folder = storage.join(models.folder, name)
        if folder in needed.models or not _is_quiet(files, before_ns):
            continue
        if not _is_whole(models.folder, name, files):
            if storage.join(folder, MANIFEST_NAME) in files and not _BEING_WRITTEN.fullmatch(name):
                continue  # a base that somebody imported to here
            yield _as_found("half-written", folder, "a model that was being assembled", files)
            continue
        versions = known.versions.get(name, ())
        if not _is_old(versions, before_ns):
            continue  # registered a moment ago: it may yet be evaluated and promoted
        numbers = [str(version.version) for version in versions]
        told = f"version {', '.join(sorted(numbers, key=int))} has no alias" if numbers else "no version refers to it"
        yield _as_found("model", folder, told, files, numbers)


def _is_old(versions: Iterable[ModelVersion], before_ns: int) -> bool:
    return all(int(version.last_updated_timestamp or 0) * 1_000_000 < before_ns for version in versions)
