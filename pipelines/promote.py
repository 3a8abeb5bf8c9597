"""Moving an alias to a version that passes its gate, or back: `candidate` needs an evaluation of exactly these weights,
`champion` needs what gate.py asks for."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from nexusgen.config import Config, dump_config
from nexusgen.errors import GateError, UsageError
from pipelines import gate, registry, storage, tracking
from pipelines.runtime import CpuMeter, JobReport

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

MAX_TAG = 4900  # characters; MLflow keeps 5,000 of a version's tag


# Of the demo world's scores, and of their number: 144 short prompts, 96 captions, 140 edits, 192 questions.
CHAMPION_THRESHOLDS = {
    "n": 572.0,
    "generation.overall": 0.85,
    "generation.explicit_strict": 0.35,
    "editing.strict": 0.30,
    "understanding.overall": 0.70,
}

Alias = Literal["candidate", "champion"]


class PromoteConfig(Config):
    """Which version an alias moves to, and what it must have reached."""

    storage: str
    version: int | None = None  # may be left out with rollback
    to: Alias = "champion"
    rollback: bool = False
    suite: str = "demo_world"
    thresholds: dict[str, float] = Field(default_factory=lambda: dict(CHAMPION_THRESHOLDS))
    understanding_drop: Annotated[float, Field(ge=0, le=1)] = Field(
        default=gate.REFERENCE_DROP,
        description="how much of the base model's understanding may be lost; the default is what the reference lost",
    )


def promote(config: PromoteConfig, parent_run_id: str | None = None) -> JobReport:
    """Move an alias to a version that passes its gate, or back to the alias's last target.

    Raises: UsageError for a version or rollback that doesn't exist; GateError, with the reason, if the gate refuses.
    """
    with CpuMeter() as meter:
        client = tracking.connect(config.storage)
        current = registry.alias_target(client, config.to)
        history = _alias_history(client, config.to)
        version = _rollback_target(client, config, current, history) if config.rollback else _wanted(client, config)
        project = version.tags.get(registry.TAG_PROJECT, registry.MODEL_NAME)
        with tracking.job_run(config.storage, project, "promote", dump_config(config), parent=parent_run_id) as run:
            run.set_tags({tracking.TAG_FINGERPRINT: version.tags.get(tracking.TAG_FINGERPRINT, "")})
            said = "not asked" if config.rollback else _pass_gate(client, config, version, current, run)
            if str(version.version) != current:
                _move_alias(client, config, str(version.version), current, history)
            report = JobReport(
                job="promote",
                seconds=meter.seconds,
                cpu_seconds=meter.cpu_seconds,
                outputs={
                    "alias": config.to,
                    "version": int(version.version),
                    "previous": int(current) if current is not None else None,
                    "model": f"models:/{registry.MODEL_NAME}@{config.to}",
                    "gate": said,
                    "run_id": run.run_id,
                },
                reused=str(version.version) == current,
            )
            run.log_report(report)
        return report


def _wanted(client: MlflowClient, config: PromoteConfig) -> ModelVersion:
    if config.version is None:
        raise UsageError("promote: which version? (only --rollback needs none)")
    return registry.get_version(client, str(config.version))


def _rollback_target(
    client: MlflowClient, config: PromoteConfig, current: str | None, history: list[str]
) -> ModelVersion:
    """The alias's last target. A version may be named too, if it is the one to leave or to return to."""
    earlier = [version for version in history if version != current]
    if current is None or not earlier:
        raise UsageError(f"promote: {config.to} has no earlier version to roll back to")
    if config.version is not None and str(config.version) not in (current, earlier[-1]):
        raise UsageError(
            f"promote --rollback: {config.to} is at version {current} and came from {earlier[-1]}, "
            f"but version {config.version} was named: leave it out"
        )
    return registry.get_version(client, earlier[-1])


def _pass_gate(
    client: MlflowClient, config: PromoteConfig, version: ModelVersion, current: str | None, run: tracking.Run
) -> str:
    """What was compared. Raises: GateError. What the gate said is kept in the tags of version and run either way."""
    verdict = _ask_gate(client, config, version, current)
    refusal = verdict.refusal
    said = f"refused: {refusal}" if refusal else f"passed: {verdict.summary}"
    tag = f"{registry.TAG_GATE}.{config.to}"
    client.set_model_version_tag(registry.MODEL_NAME, version.version, tag, said[:MAX_TAG])
    run.set_tags({tag: said[:MAX_TAG]})
    run.log_text(json.dumps(verdict.to_json(), indent=2), "gate.json")
    registry.write_card(client, config.storage, version)
    if refusal:
        raise GateError(f"version {version.version} does not become {config.to}: {refusal}")
    return verdict.summary


def _ask_gate(client: MlflowClient, config: PromoteConfig, version: ModelVersion, current: str | None) -> gate.Verdict:
    """Find the evaluations of the version, of the alias's present target and of the base, and ask the gate."""
    fingerprint = version.tags.get(tracking.TAG_FINGERPRINT, "")
    uri = registry.scores_uri(config.storage, fingerprint, config.suite)
    if not fingerprint or not storage.exists(uri):
        return gate.Verdict((f"it has no evaluation ({uri} is missing): run evaluate on it first",))
    ours = registry.read_evaluation(config.storage, fingerprint, config.suite)
    if ours.fingerprint != fingerprint:
        return gate.Verdict((f"{uri} belongs to other weights ({ours.fingerprint[:12]})",))
    if config.to == "candidate":
        return gate.Verdict(())
    others: dict[str, gate.Evaluation] = {}
    missing = []
    wanted = (
        {"champion": registry.get_version(client, current).tags[tracking.TAG_FINGERPRINT]}
        if current is not None
        else {}
    )
    if gate.UNDERSTANDING.replace("/", ".") in ours.scores:
        wanted["base model"] = registry.root_base(config.storage, fingerprint)
    for name, other in wanted.items():
        place = registry.scores_uri(config.storage, other, config.suite)
        if storage.exists(place):
            others[name] = registry.read_evaluation(config.storage, other, config.suite)
        else:
            missing.append(f"the {name} {other} has no evaluation to compare with ({place} is missing): evaluate it")
    verdict = gate.judge(
        ours,
        others.get("champion"),
        others.get("base model"),
        gate.Rules(config.thresholds, config.understanding_drop),
    )
    return replace(verdict, reasons=(*missing, *verdict.reasons))


def _move_alias(
    client: MlflowClient, config: PromoteConfig, version: str, current: str | None, history: list[str]
) -> None:
    """History first: if we die between the two writes, an extra entry equal to the current target does no harm."""
    if config.rollback:
        while history and history[-1] in (current, version):
            history = history[:-1]
    elif current is not None:
        history = [*history, current]
    client.set_registered_model_tag(
        registry.MODEL_NAME, f"{registry.TAG_PREVIOUS}.{config.to}", json.dumps(history[-100:])
    )
    client.set_registered_model_alias(registry.MODEL_NAME, config.to, version)


def _alias_history(client: MlflowClient, alias: str) -> list[str]:
    return [
        str(v) for v in json.loads(registry.registered_model(client).tags.get(f"{registry.TAG_PREVIOUS}.{alias}", "[]"))
    ]
