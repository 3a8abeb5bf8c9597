"""The gate in earnest: the demo's language model trained again with other seeds, and a tenth as long.

A version is trained, registered, evaluated and made champion as the first one of `nexusgen demo` is, which draws and
doesn't edit yet. Then the language model is trained anew, with the same decoder: by as many other seeds, which the
gate should let pass, and by a tenth of the steps, which it should refuse. All meet the same champion: where one passes
and takes the alias, it's given back before the next. Everything stands in the MLflow store of OUT. Trainings that are
finished are kept: killed and started again, it goes on with the first that isn't.

    python benchmarks/gate.py [--out DIR] [--retrainings N] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks.report import Report  # noqa: E402 (the project's own folders come first)
from jobs.chain import RoadConfig, load_road  # noqa: E402
from nexusgen.errors import GateError  # noqa: E402
from pipelines.embed import embed  # noqa: E402
from pipelines.evaluate import evaluate  # noqa: E402
from pipelines.pack import pack  # noqa: E402
from pipelines.promote import PromoteConfig, promote  # noqa: E402
from pipelines.register import RegisterConfig, register  # noqa: E402
from pipelines.registry import MODEL_NAME  # noqa: E402
from pipelines.runtime import ray_cluster  # noqa: E402
from pipelines.train import train  # noqa: E402

SUITE = "demo_world"
SMALL = (
    "pack.counts={generation: 600, editing: 200, understanding: 200}", "train_ar.num_steps=200",
    "train_generation_decoder.num_steps=100", "evaluate.per_category=4", "evaluate.num_explicit=16",
    "evaluate.num_questions=32",
)  # fmt: skip


class Versions:
    """Trainings of the language model, each of which becomes a version that is evaluated and brought to the gate."""

    def __init__(self, config: RoadConfig, thresholds: Mapping[str, float]) -> None:
        self._config = config
        self._thresholds = dict(thresholds)
        self._record = Path(config.storage) / "gate.json"
        self.found: dict[str, dict[str, Any]] = json.loads(self._record.read_bytes()) if self._record.is_file() else {}

    def bring(self, label: str, changes: Mapping[str, Any], is_champion: bool = False) -> dict[str, Any]:
        """Train with some settings changed, and ask the gate: {"version", "scores", "refusal" (empty: passed)}."""
        if label in self.found:
            return self.found[label]
        config = self._config
        train(config.train_ar.model_copy(update={**changes, "fresh": bool(changes)}))
        made = register(RegisterConfig(storage=config.storage, name=config.name, model=config.model))
        version = made.outputs["version"]
        report = evaluate(config.evaluate.model_copy(update={"model": f"models:/{MODEL_NAME}/{version}"}))
        refusal = self._ask(version)
        if not refusal and not is_champion:
            promote(PromoteConfig(storage=config.storage, rollback=True))
        self.found[label] = {"version": version, "scores": report.outputs["scores"][SUITE], "refusal": refusal}
        self._record.write_text(json.dumps(self.found, indent=2))
        print(f"{label}: version {version}: {refusal or 'passed'}", file=sys.stderr, flush=True)
        return self.found[label]

    def _ask(self, version: int) -> str:
        wanted = self._config.promote.model_copy(update={"version": version, "thresholds": self._thresholds})
        try:
            promote(wanted)
        except GateError as error:
            return str(error)
        return ""


def main() -> int:
    """Exit code 1 if a wanted figure isn't reached."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", default="runs/gate", help="folder for data and versions (default: %(default)s)")
    parser.add_argument("--retrainings", type=int, default=10, help="other seeds (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small trainings, whose verdicts are only told")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    num_retrainings = 1 if arguments.quick else arguments.retrainings
    overrides = [f"storage={json.dumps(arguments.out)}", "evaluate.num_edits=0", *(SMALL if arguments.quick else ())]
    config = load_road(ROOT / "jobs" / "configs" / "demo" / "road.yaml", overrides)
    editing = ("editing.strict", "n")  # the demo's model has both; these versions don't edit
    thresholds = {name: value for name, value in config.promote.thresholds.items() if name not in editing}
    with ray_cluster(config.num_cpus, "the gate"):
        pack(config.pack)
        embed(config.embed_vision)
        embed(config.embed_latents)
        train(config.train_generation_decoder)
        evaluate(config.evaluate.model_copy(update={"model": config.model}))
        versions = Versions(config, {} if arguments.quick else thresholds)
        champion = versions.bring("champion", {}, is_champion=True)
        tenth = versions.bring("a tenth as long", {"num_steps": config.train_ar.num_steps // 10})
        retrained = [versions.bring(f"seed {seed}", {"seed": seed}) for seed in range(1, num_retrainings + 1)]
    report = Report()
    report.tell("champion: overall score of short prompts", champion["scores"]["generation"]["overall"])
    report.tell("a tenth as long: overall score", tenth["scores"]["generation"]["overall"])
    overall = [one["scores"]["generation"]["overall"] for one in retrained]
    report.tell("retrained: least overall score", min(overall))
    report.tell("retrained: greatest overall score", max(overall))
    num_refused = sum(bool(one["refusal"]) for one in retrained)
    if arguments.quick:
        report.tell("a tenth as long is refused", bool(tenth["refusal"]))
        report.tell(f"refused of {num_retrainings} retrained", num_refused)
    else:
        report.at_least("a tenth as long is refused", bool(tenth["refusal"]), 1)
        report.at_most(f"refused of {num_retrainings} retrained", num_refused, num_retrainings // 10)
    return report.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
