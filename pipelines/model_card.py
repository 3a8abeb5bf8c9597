"""The model card: what a registered model is made of, what it scores and may be used for, said from its lineage alone.

Nothing is written by hand, so nothing can be forgotten: data by source and licence from the fields that the tars' own
samples have (`source` and `license`, or the host of `url`; they travel in the column `meta` of embedded data), stages
and configurations from the checkpoints, scores with n and interval from the evaluations, licences of weights from the
origin and the sizes of the parts. What can't be found is said to be unknown. Samples are counted once for each state of
the data: `sources.json` beside it keeps the counts.

The card is README.md in the model's folder, an artefact of the version's run, and (its first part) the version's
description. It is written when a version is registered, and anew when it is evaluated and when the gate has spoken.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

import yaml

from nexusgen.errors import InputError, ResourceError
from nexusgen.model.manifest import Manifest, demo_base, read_manifest
from nexusgen.schema import MANIFEST_NAME
from pipelines import embedded, storage
from pipelines.accounting import Usage, account_uri, read_attempts, usage_of
from pipelines.tracking import redact

CARD_NAME = "README.md"
SOURCES_NAME = "sources.json"
MAX_DESCRIPTION = 4900  # characters; MLflow keeps 5,000 of a version's description
UNKNOWN = "not told"

# By the hidden size of the language model, as released; checked 2026-11-26.
_QWEN = {
    2048: ("Qwen2.5-VL-3B", "Qwen Research License: research and other non-commercial use alone"),
    3584: ("Qwen2.5-VL-7B", "Apache-2.0"),
    5120: ("Qwen2.5-VL-32B", "Apache-2.0"),
    8192: ("Qwen2.5-VL-72B", "Qwen License: commercial use is bounded, see its text"),
}
_FLUX_BLOCKS = (19, 38)  # double and single blocks of FLUX.1


@dataclass(frozen=True)
class DataPart:
    """Samples of one source, licence, task and language."""

    source: str
    licence: str
    task: str
    lang: str
    samples: int


@dataclass(frozen=True)
class CardFacts:
    """All that a card says. `data` by the name of embedded data; None where it is gone."""

    version: str
    manifest: Manifest
    base_fingerprint: str  # of the base that all training began from
    weights: Sequence[tuple[str, str, str]]  # part, what it was made from, licence
    data: Mapping[str, Sequence[DataPart] | None]
    left_out: Mapping[str, Mapping[str, int]]  # by the name of embedded data: quarantined samples by reason
    checkpoints: Mapping[str, Mapping[str, Any]]  # by stage: its meta.json, empty where it is gone
    evaluations: Sequence[Mapping[str, Any]]  # scores.json of each suite
    base_evaluations: Mapping[str, Mapping[str, Any]]  # of the base model, by suite
    gate: Mapping[str, str]  # what was said, by alias
    usage: Mapping[str, Usage]  # by job: of all attempts that made what this model is made of; none if unknown


def collect(storage_uri: str, version: str, folder: str, base_fingerprint: str, gate: Mapping[str, str]) -> CardFacts:
    """Look up all facts of the model in `folder`, a URI. Raises: InputError if it holds no manifest."""
    uri = storage.join(folder, MANIFEST_NAME)
    if not storage.exists(uri):
        raise InputError(f"no model card for {folder}: it holds no {MANIFEST_NAME}")
    manifest = Manifest.model_validate_json(storage.read_bytes(uri))
    stages: Mapping[str, Any] = manifest.lineage.get("stages", {})
    names = dict.fromkeys(entry["name"] for stage in stages.values() for entry in stage.get("inputs", ()))
    data: dict[str, Sequence[DataPart] | None] = {}
    left_out: dict[str, Mapping[str, int]] = {}
    for name in names:
        data[name], left_out[name] = _count(storage_uri, name)
    return CardFacts(
        version=version,
        manifest=manifest,
        base_fingerprint=base_fingerprint,
        weights=_licences(folder, manifest, base_fingerprint),
        data=data,
        left_out=left_out,
        checkpoints={
            name: storage.find_json(storage.join(stage["checkpoint"], "meta.json")) or {}
            for name, stage in stages.items()
        },
        evaluations=list(_evaluations(storage_uri, manifest.fingerprint)),
        base_evaluations={one["suite"]: one for one in _evaluations(storage_uri, base_fingerprint) if "suite" in one},
        gate=gate,
        usage=_usage(storage_uri, manifest, names),
    )


def _usage(storage_uri: str, manifest: Manifest, names: Iterable[str]) -> dict[str, Usage]:
    """What each job of the lineage has used, by the accounts in the storage."""
    found: dict[str, list[dict[str, Any]]] = {}
    packed: set[str] = set()
    for name in names:
        of, _, mode = name.rpartition("/")
        try:
            data = embedded.read_manifest(storage_uri, of, mode)  # type: ignore[arg-type]
        except (InputError, ResourceError):
            continue
        recipe = f"{data.config_hash} {data.fingerprint}"
        attempts = read_attempts(account_uri(storage_uri, "embed", of, mode))
        found[f"embed {name}"] = [one for one in attempts if one["recipe"] == recipe]
        packed |= {storage.name_of(shard.uri.rpartition("/")[0]) for shard in data.shards}
    for project in sorted(packed):
        # The last recipe is that of the tars that lie there.
        attempts = read_attempts(account_uri(storage_uri, "pack", project))
        found[f"pack {project}"] = [one for one in attempts if one["recipe"] == attempts[-1]["recipe"]]
    project = manifest.lineage.get("project", UNKNOWN)
    for stage, made in manifest.lineage.get("stages", {}).items():
        uri = made["checkpoint"].rstrip("/").rpartition("/")[0]
        attempts = read_attempts(account_uri(storage_uri, "train", *uri.split("/")[-2:]))
        found[f"train {stage}"] = [one for one in attempts if one["run_id"] == made["run_id"]]
    for fingerprint, run_id in _versions(storage_uri, manifest):
        attempts = read_attempts(account_uri(storage_uri, "register", project))
        recipes = {one["recipe"] for one in attempts if one["run_id"] == run_id}
        found.setdefault("register", []).extend(one for one in attempts if one["recipe"] in recipes)
        evaluated = read_attempts(account_uri(storage_uri, "evaluate", fingerprint))
        found.setdefault("evaluate", []).extend(evaluated)
    return {job: usage_of(attempts) for job, attempts in found.items() if attempts}


def _versions(storage_uri: str, manifest: Manifest) -> Iterable[tuple[str, str]]:
    """Fingerprint and register run of a model, and of those that it was trained on."""
    seen: set[str] = set()
    while manifest.fingerprint not in seen:
        seen.add(manifest.fingerprint)
        yield manifest.fingerprint, manifest.lineage.get("register_run_id", "")
        base = manifest.lineage.get("base_fingerprint")
        content = storage.find_json(storage.join(storage_uri, "models", str(base), MANIFEST_NAME))
        if content is None:
            return
        manifest = Manifest.model_validate(content)


def _evaluations(storage_uri: str, fingerprint: str) -> Iterable[Mapping[str, Any]]:
    for uri in storage.list_files(storage.join(storage_uri, "evaluations", fingerprint), recursive=True):
        if storage.name_of(uri) == "scores.json" and (content := storage.find_json(uri)) is not None:
            yield content


def _count(storage_uri: str, name: str) -> tuple[Sequence[DataPart] | None, Mapping[str, int]]:
    """Samples of embedded data NAME/MODE by source, licence, task and language; None if the data is gone."""
    of, _, mode = name.rpartition("/")
    try:
        manifest = embedded.read_manifest(storage_uri, of, mode)  # type: ignore[arg-type]
        kept = storage.join(embedded.folder_of(storage_uri, of, mode), SOURCES_NAME)  # type: ignore[arg-type]
        known = storage.find_json(kept)
        if known is not None and known.get("digest") == manifest.digest:
            return [DataPart(**part) for part in known["parts"]], manifest.quarantined
        with ThreadPoolExecutor(embedded.NUM_PARALLEL) as pool:
            counts = sum(pool.map(_count_slice, (info for info in manifest.slices if info.num_rows)), Counter())
        parts = [DataPart(*key, samples) for key, samples in sorted(counts.items())]
        storage.write_json(kept, {"digest": manifest.digest, "parts": [asdict(part) for part in parts]})
    except (InputError, ResourceError, OSError):
        return None, {}
    return parts, manifest.quarantined


def _count_slice(info: embedded.SliceInfo) -> Counter[tuple[str, str, str, str]]:
    rows = embedded.read_slice(info, ["task", "lang", "meta"]).to_pylist()
    return Counter((*_origin(row["meta"]), row["task"] or UNKNOWN, row["lang"] or UNKNOWN) for row in rows)


def _origin(meta: str | None) -> tuple[str, str]:
    """Source and licence of a sample, from the fields of its json."""
    try:
        fields = json.loads(meta or "{}")
    except ValueError:
        fields = {}
    fields = fields if isinstance(fields, dict) else {}
    source = fields.get("source") or urlsplit(str(fields.get("url") or "")).hostname or UNKNOWN
    licence = fields.get("license") or fields.get("licence") or UNKNOWN
    return str(source), str(licence)


def _licences(folder: str, manifest: Manifest, base_fingerprint: str) -> list[tuple[str, str, str]]:
    """Of each half of the weights, what it was made from and what that asks for."""
    origin = manifest.lineage.get("origin", {})
    if origin.get("made_by") == "nexusgen make-base" or base_fingerprint == read_manifest(demo_base()).fingerprint:
        return [("all parts", "the tiny base that ships with nexusgen, trained on its own demo world", "Apache-2.0")]
    found = []
    config = storage.find_json(storage.join(folder, "autoregressive", "config.json"))
    if config is not None:
        size = config.get("text_config", config).get("hidden_size")
        made_from, licence = _QWEN.get(size, (f"a language model of hidden size {size}", UNKNOWN))
        found.append(("autoregressive", made_from, licence))
    for part in ("generation", "editing"):
        config = storage.find_json(storage.join(folder, "decoders", part, "transformer", "config.json"))
        if config is None:
            continue
        blocks = (config.get("num_layers"), config.get("num_single_layers"))
        if blocks == _FLUX_BLOCKS and config.get("guidance_embeds", True):
            licence = "FLUX.1 [dev] Non-Commercial License: this part is a derivative, and for non-commercial use alone"
            found.append((f"{part}_decoder", "FLUX.1 [dev]", licence))
        else:
            found.append((f"{part}_decoder", f"a transformer of {blocks[0]} + {blocks[1]} blocks", UNKNOWN))
    return found


# --- rendering --------------------------------------------------------------------------------------------------------


def render(facts: CardFacts, is_short: bool = False) -> str:
    """The card in Markdown. The short one leaves out front matter, configurations and per-suite detail."""
    parts = [
        *([] if is_short else [_front_matter(facts)]),
        _summary(facts),
        _scores(facts, is_short),
        _licence_notes(facts),
        _data(facts),
        _limits(facts),
        _costs(facts),
        *([] if is_short else [_stages(facts), _configurations(facts)]),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    if is_short and len(text) > MAX_DESCRIPTION:
        text = text[: MAX_DESCRIPTION - 40].rsplit("\n", 1)[0] + f"\n\n... the rest is in {CARD_NAME}\n"
    return text


def _is_commercial_use_barred(facts: CardFacts) -> bool:
    return any("non-commercial" in licence.lower() for _, _, licence in facts.weights)


def _front_matter(facts: CardFacts) -> str:
    licences = {licence for _, _, licence in facts.weights}
    values = {
        "license": "apache-2.0" if licences == {"Apache-2.0"} else "other",
        "language": ["en", "zh"],
        "pipeline_tag": "any-to-any",
        "tags": ["nexus-gen", "image-generation", "image-editing", "visual-question-answering"],
    }
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---"


def _summary(facts: CardFacts) -> str:
    manifest, lineage = facts.manifest, facts.manifest.lineage
    height, width = manifest.image_size
    said = "".join(f"\n- gate of `{alias}`: {text}" for alias, text in sorted(facts.gate.items()))
    return (
        f"# nexusgen, version {facts.version}\n\n"
        "A unified image model after Nexus-Gen (arXiv 2504.21356): it answers questions about pictures, draws and "
        "edits them. Generated from the lineage; not to be edited by hand.\n\n"
        f"- fingerprint `{manifest.fingerprint}`, made by nexusgen {manifest.version} in project "
        f"`{lineage.get('project', UNKNOWN)}`; its training began from the base `{facts.base_fingerprint}`\n"
        f"- parts: {', '.join(manifest.parts)}\n"
        f"- pictures of {width}x{height} in {manifest.num_inference_steps} steps, "
        f"{manifest.token_counts.get('target', UNKNOWN)} embeddings each{said}"
    )


def _scores(facts: CardFacts, is_short: bool) -> str:
    if not facts.evaluations:
        return "## Scores\n\nNone: it hasn't been evaluated."
    blocks = ["## Scores\n\nWith the number of items and the 95 % confidence interval of each."]
    for evaluation in facts.evaluations:
        base = facts.base_evaluations.get(evaluation.get("suite", ""), {})
        intervals: Mapping[str, Mapping[str, float]] = evaluation.get("intervals", {})
        of_base: Mapping[str, Mapping[str, float]] = base.get("intervals", {})
        names = [name for name in intervals if not is_short or name.count("_") == 0]
        rows = [
            [
                name,
                f"{intervals[name]['value']:.3f}",
                f"{intervals[name]['low']:.3f} to {intervals[name]['high']:.3f}",
                str(int(intervals[name]["n"])),
                f"{of_base[name]['value']:.3f}" if name in of_base else "",
            ]
            for name in names
        ]
        settings = ", ".join(f"{name}={value}" for name, value in evaluation.get("settings", {}).items())
        title = f"Suite `{evaluation.get('suite', UNKNOWN)}`" + ("" if is_short else f" ({settings})")
        table = (
            _table(["score", "value", "95 %", "n", "base model"], rows) if rows else "No intervals: evaluate it again."
        )
        blocks.append(f"{title}\n\n{table}")
    return "\n\n".join(blocks)


def _licence_notes(facts: CardFacts) -> str:
    lines = ["## Licences", ""]
    lines += [f"- {part}: from {made_from}. {licence}" for part, made_from, licence in facts.weights]
    if _is_commercial_use_barred(facts):
        lines.append(
            "- **This model is not for commercial use**: derivatives of a model under a non-commercial licence are "
            "under it too. Outputs aren't derivatives in the sense of FLUX.1 [dev]'s licence; read its present text."
        )
    told = {part.licence for parts in facts.data.values() for part in parts or ()}
    lines.append(f"- data: {', '.join(sorted(told)) or UNKNOWN}, as its own fields say")
    if UNKNOWN in told or any(parts is None for parts in facts.data.values()):
        lines.append("- Of some of the data the licence isn't known: find out before the weights are passed on.")
    return "\n".join(lines)


def _data(facts: CardFacts) -> str:
    """Tables of samples; what several modes of one name hold alike is said once."""
    alike: dict[tuple[str, Sequence[DataPart] | None], list[str]] = {}
    for name, parts in facts.data.items():
        alike.setdefault((name.rpartition("/")[0], tuple(parts) if parts is not None else None), []).append(name)
    stages = facts.manifest.lineage.get("stages", {})
    lines = ["## Data", ""]
    for (_, parts), names in alike.items():
        readers = [s for s, made in stages.items() if any(one["name"] in names for one in made.get("inputs", ()))]
        told = ", ".join(f"`{name}`" for name in names)
        if parts is None:
            lines += [f"{told} (read by {', '.join(readers)}): no longer in the storage, so not counted", ""]
            continue
        rows = [[part.source, part.licence, part.task, part.lang, f"{part.samples:,}"] for part in parts]
        lines += [f"{told} (read by {', '.join(readers)})", ""]
        lines += [_table(["source", "licence", "task", "language", "samples"], rows), ""]
        for name in names:
            if facts.left_out.get(name):
                reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(facts.left_out[name].items()))
                lines += [f"Left out of `{name}`: {reasons}.", ""]
    return "\n".join(lines).rstrip() if facts.data else "## Data\n\nNot told: the model has no stages of its own."


def _limits(facts: CardFacts) -> str:
    lines = ["## Limits", ""]
    suites = [str(one.get("suite")) for one in facts.evaluations]
    measured = ", ".join(f"`{suite}`" for suite in suites) or "nothing"
    lines.append(
        f"- Measured on {measured} alone; nothing is known of safety, bias, faces, text in pictures, or any other use."
    )
    for evaluation in facts.evaluations:
        intervals = evaluation.get("intervals", {})
        weak = sorted((name for name in intervals if "/" in name), key=lambda name: float(intervals[name]["value"]))[:3]
        if weak:
            told = ", ".join(f"{name} {intervals[name]['value']:.3f}" for name in weak)
            lines.append(f"- Weakest in `{evaluation.get('suite')}`: {told}.")
        base = facts.base_evaluations.get(evaluation.get("suite", ""), {}).get("intervals", {})
        name = "understanding/overall"
        if name in base and name in intervals and intervals[name]["value"] < base[name]["value"]:
            lost = base[name]["value"] - intervals[name]["value"]
            lines.append(f"- It understands pictures worse than the base model: {name} has lost {lost:.3f}.")
    langs = sorted({part.lang for parts in facts.data.values() for part in parts or ()})
    if langs:
        lines.append(f"- Its training data speaks {', '.join(langs)}.")
    if "editing_decoder" not in facts.manifest.parts:
        lines.append(
            "- It has no editing decoder: it edits with the generation decoder, which sees little of the original."
        )
    return "\n".join(lines)


def _costs(facts: CardFacts) -> str:
    """What all jobs together have used, over all restarts."""
    if not facts.usage:
        return ""

    def row(job: str, usage: Usage) -> list[str]:
        values = (usage.cpu_seconds / 3600, usage.gpu_seconds / 3600)
        sizes = (usage.bytes_read / 1e9, usage.bytes_written / 1e9)
        cost = "" if usage.cost_usd is None else f"{usage.cost_usd:,.2f}"
        numbers = [*(f"{value:,.3f}" for value in values), f"{usage.samples:,}", *(f"{size:,.3f}" for size in sizes)]
        return [job, *numbers, cost]

    rows = [row(job, usage) for job, usage in facts.usage.items()]
    rows.append(row("all", sum(facts.usage.values(), Usage())))
    header = ["job", "CPU hours", "GPU hours", "samples", "GB read", "GB written", "US dollars"]
    told = "Of the jobs that made it, restarts included; dollars only of jobs whose prices were configured."
    return f"## What it took\n\n{told}\n\n{_table(header, rows)}"


def _stages(facts: CardFacts) -> str:
    rows = []
    for stage, made in facts.manifest.lineage.get("stages", {}).items():
        meta = facts.checkpoints.get(stage, {})
        loss = f"{meta['loss_first']:.4g} -> {meta['loss_last']:.4g}" if meta else UNKNOWN
        rows.append(
            [stage, f"{made['step']:,}", f"{meta.get('num_samples', 0):,}" if meta else UNKNOWN, loss, made["run_id"]]
        )
    table = _table(["stage", "steps", "samples seen", "loss first -> last", "MLflow run"], rows)
    return f"## Training\n\n{table}" if rows else ""


def _configurations(facts: CardFacts) -> str:
    blocks = []
    for stage, meta in facts.checkpoints.items():
        if meta.get("config"):
            text = redact(yaml.safe_dump(meta["config"], sort_keys=False, allow_unicode=True))
            blocks.append(f"<details><summary>{stage}</summary>\n\n```yaml\n{text}```\n\n</details>")
    return "## Configurations\n\n" + "\n\n".join(blocks) if blocks else ""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
