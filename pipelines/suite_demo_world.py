"""The suite of the demo world: GenEval's six categories, explicit captions, edits and questions, in two languages."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from PIL import Image

from nexusgen import scoring, shapes
from nexusgen.config import Config
from nexusgen.model.manifest import Manifest
from nexusgen.model.weights import Model
from nexusgen.sampling import describe, edit_images, generate_images
from pipelines.sheets import Cell, draw_sheet, is_drawable
from pipelines.suites import ITEM_COLUMNS, Measures, Row, SuiteResult, Unit, cut, nested_scores, require_parts, to_png

SHEET_COLUMNS = 8
MAX_ANSWER_TOKENS = 24
LANGUAGES: tuple[shapes.Lang, ...] = ("en", "zh")
_TEXT, _BYTES = pa.string(), pa.binary()


@dataclass(frozen=True)
class _Explicit:
    """An explicit caption, shaped like `shapes.Prompt`."""

    text: str
    lang: shapes.Lang
    scene: shapes.Scene
    category: str = "explicit"


class DemoWorldSuite(Config):
    """Pictures of held-out combinations, drawn and edited, read back by the exact scorer, and questions about such.

    Short prompts stand in rounds, one of each category, so that the first 24 show all categories; picture i of the
    prompts is drawn from seed + i. A model without an editing decoder edits with its generation decoder, which sees no
    more of the original than the prediction holds.
    """

    name: ClassVar[str] = "demo_world"
    schema: ClassVar[pa.Schema] = pa.schema(
        [
            *ITEM_COLUMNS,
            *((name, _TEXT) for name in ("prompt", "lang", "category")),  # a question's category is its kind
            ("seed", pa.int64()),
            ("expected", _TEXT),  # the scene in words, or the right answer
            ("answer", _TEXT),  # the scene that the scorer sees in the picture, or the answer given
            ("score", pa.float64()),  # 1 or 0; of explicit captions the strict score
            ("strict", pa.float64()),  # pictures only: at the scorer's stricter overlap
            ("colour_and_cell", pa.float64()),  # explicit captions only
            ("done", pa.float64()),  # edits only: the instruction was carried out
            ("unchanged", pa.float64()),  # edits only: the rest is as before; the score asks for both
            ("png", _BYTES),  # the picture drawn, or asked about
            ("source_png", _BYTES),  # edits only: the picture before
        ]
    )

    seed: int
    steps: int | None
    per_category: int
    num_explicit: int
    num_questions: int
    num_edits: int
    num_pictures: int
    batch_size: int

    @property
    def path(self) -> str:
        """One set of results for each model."""
        return self.name

    @property
    def settings(self) -> dict[str, Any]:
        """All fields, and the scorer's version: another one gives other scores."""
        return {**self.model_dump(mode="json"), "scorer": scoring.VERSION}

    def check(self, manifest: Manifest) -> None:
        """Raises: ModelError if the model lacks a part."""
        require_parts(manifest, ("autoregressive", "generation_decoder", "vae"))

    def units(self) -> list[Unit]:
        """Batches of each kind; the first kinds are the slowest."""
        return [
            *cut("generation", len(shapes.CATEGORIES) * self.per_category, self.batch_size),
            *cut("explicit", self.num_explicit, self.batch_size),
            *cut("editing", self.num_edits, self.batch_size),
            *cut("understanding", self.num_questions, self.batch_size),
        ]

    def worker(self, model: Model) -> Callable[[Unit], list[Row]]:
        """A function that draws, or asks, what a unit says."""
        prompts = self._prompts()
        questions = shapes.evaluation_questions(self.num_questions, self.seed)
        edits = shapes.evaluation_edits(self.num_edits, self.seed)

        def work(unit: Unit) -> list[Row]:
            if unit.kind == "editing":
                return self._edit(model, edits[unit.first : unit.last], unit.first)
            if unit.kind == "understanding":
                return self._ask(model, questions[unit.first : unit.last])
            return self._draw(model, prompts[unit.kind][unit.first : unit.last], unit.first)

        return work

    def measures(self, rows: Sequence[Row]) -> Measures:
        """By category, language and kind of edit; `generation/overall` is the mean of the six categories.

        A name that ends in _en or _zh is the same score of one language's items.
        """
        drawn, explicit, edited, answered = self._by_kind(rows)
        found: Measures = {"generation/overall": _by_category(drawn)}
        for category in shapes.CATEGORIES:
            found[f"generation/{category}"] = [[row["score"] for row in drawn if row["category"] == category]]
        found["generation/strict"] = [[row["strict"] for row in drawn]]  # categories are of equal size
        found["generation/explicit_strict"] = [[row["score"] for row in explicit]]
        found["generation/explicit_colour_and_cell"] = [[row["colour_and_cell"] for row in explicit]]
        found["understanding/overall"] = [[row["score"] for row in answered]]
        asked = shapes.evaluation_questions(self.num_questions, self.seed)
        pairs = zip(answered, asked, strict=True)
        found["understanding/held_out"] = [[row["score"] for row, one in pairs if shapes.held_out(one.scene)]]
        for name, column in (("strict", "score"), ("done", "done"), ("unchanged", "unchanged")):
            found[f"editing/{name}"] = [[row[column] for row in edited]]
            for kind in shapes.EDIT_KINDS:
                found[f"editing/{kind}_{name}"] = [[row[column] for row in edited if row["category"] == kind]]
        for lang in LANGUAGES:
            of = [[row for row in group if row["lang"] == lang] for group in (drawn, explicit, edited, answered)]
            found[f"generation/overall_{lang}"] = _by_category(of[0])
            found[f"generation/explicit_strict_{lang}"] = [[row["score"] for row in of[1]]]
            found[f"editing/strict_{lang}"] = [[row["score"] for row in of[2]]]
            found[f"understanding/overall_{lang}"] = [[row["score"] for row in of[3]]]
        return {name: groups for name, groups in found.items() if all(groups) and groups}

    def summarise(self, rows: Sequence[Row]) -> SuiteResult:
        """Scores as in `measures`, and sheets of the first pictures and of all."""
        drawn, explicit, edited, answered = self._by_kind(rows)
        scores: dict[str, Any] = {"n": len(rows), **nested_scores(self.measures(rows))}
        if answered:
            asked = shapes.evaluation_questions(self.num_questions, self.seed)
            scores["understanding"]["majority"] = shapes.majority_score(asked)
        first, last = self.seed, self.seed + self.num_pictures - 1
        sheets = {
            "samples": (drawn[: self.num_pictures], f"short prompts, unpicked: seeds {first} to {last}"),
            "generation": (drawn, f"all short prompts: {scores['generation']['overall']:.3f}"),
            "explicit": (explicit[: self.num_pictures], "explicit captions, unpicked"),
            "editing": (edited[: self.num_pictures], "edits, unpicked: before and after"),
        }
        return SuiteResult(
            scores,
            {
                name: draw_sheet([_scored_cell(row) for row in chosen], SHEET_COLUMNS, title)
                for name, (chosen, title) in sheets.items()
                if chosen
            },
        )

    def _by_kind(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Rows of short prompts, explicit captions, edits and questions."""
        kinds = ("generation", "explicit", "editing", "understanding")
        return [[row for row in rows if row["kind"] == kind] for kind in kinds]

    def _prompts(self) -> dict[str, Sequence[_Explicit | shapes.Prompt]]:
        """The prompts of each kind, in order of the items."""
        by_category = shapes.evaluation_prompts(self.per_category, self.seed)
        rounds = [by_category[start :: self.per_category] for start in range(self.per_category)]
        explicit = shapes.explicit_prompts(self.num_explicit, self.seed)
        return {
            "generation": [prompt for one in rounds for prompt in one],
            "explicit": [_Explicit(text, lang, scene) for text, lang, scene in explicit],
        }

    def _draw(self, model: Model, prompts: Sequence[_Explicit | shapes.Prompt], first: int) -> list[Row]:
        seeds = [self.seed + first + number for number in range(len(prompts))]
        images = generate_images(model, [prompt.text for prompt in prompts], seeds, self.steps)
        return [
            {
                "prompt": prompt.text,
                "lang": prompt.lang,
                "category": prompt.category,
                "seed": seed,
                "expected": shapes.explicit_caption(prompt.scene, "en"),
                "answer": _see(image),
                **_score(prompt, image),
                "png": to_png(image),
                **_NO_EDIT,
            }
            for prompt, seed, image in zip(prompts, seeds, images, strict=True)
        ]

    def _ask(self, model: Model, questions: Sequence[shapes.Question]) -> list[Row]:
        images = [Image.fromarray(shapes.draw(question.scene)) for question in questions]
        answers = describe(model, images, [q.question for q in questions], max_new_tokens=MAX_ANSWER_TOKENS)
        return [
            {
                "prompt": question.question,
                "lang": question.lang,
                "category": question.kind,
                "seed": None,
                "expected": question.answer,
                "answer": answer,
                "score": float(scoring.score_answer(question.answer, answer)),
                "strict": None,
                "colour_and_cell": None,
                "png": to_png(image),
                **_NO_EDIT,
            }
            for question, answer, image in zip(questions, answers, images, strict=True)
        ]

    def _edit(self, model: Model, edits: Sequence[shapes.Edit], first: int) -> list[Row]:
        size = model.manifest.image_size
        sources = [Image.fromarray(shapes.draw(edit.source, size[0])) for edit in edits]
        seeds = [self.seed + first + number for number in range(len(edits))]
        images = edit_images(
            model,
            sources,
            [edit.instruction for edit in edits],
            seeds,
            self.steps,
            size,
            "generation" if model.editing_decoder is None else "editing",
        )
        rows = []
        for edit, source, seed, image in zip(edits, sources, seeds, images, strict=True):
            score = scoring.score_edit(edit, np.asarray(image.convert("RGB")))
            rows.append(
                {
                    "prompt": edit.instruction,
                    "lang": edit.lang,
                    "category": edit.kind,
                    "seed": seed,
                    "expected": shapes.explicit_caption(edit.target, "en"),
                    "answer": _see(image),
                    "score": float(score.strict),
                    "strict": None,
                    "colour_and_cell": None,
                    "done": float(score.done),
                    "unchanged": float(score.unchanged),
                    "png": to_png(image),
                    "source_png": to_png(source),
                }
            )
        return rows


_NO_EDIT: Row = {"done": None, "unchanged": None, "source_png": None}


def _score(prompt: _Explicit | shapes.Prompt, image: Image.Image) -> Row:
    """Columns score, strict and colour_and_cell of a picture."""
    pixels = np.asarray(image.convert("RGB"))
    if isinstance(prompt, shapes.Prompt):
        passed = scoring.score_prompt(prompt, pixels)
        strict = scoring.score_prompt(prompt, pixels, scoring.STRICT_OVERLAP)
        return {"score": float(passed), "strict": float(strict), "colour_and_cell": None}
    explicit = scoring.score_explicit(prompt.scene, pixels)
    score = float(explicit.strict)
    return {"score": score, "strict": score, "colour_and_cell": float(explicit.colour_and_cell)}


def _see(image: Image.Image) -> str:
    """What the scorer sees in a picture, in words; empty if that is no scene."""
    scene = scoring.read_scene(np.asarray(image.convert("RGB"))).scene()
    return shapes.explicit_caption(scene, "en") if scene is not None else ""


def _scored_cell(row: Row) -> Cell:
    text = row["prompt"] if is_drawable(row["prompt"]) else f"({row['lang']}) {row['expected']}"
    shown = [row[name] for name in ("source_png", "png") if row[name] is not None]
    return Cell(tuple(Image.open(io.BytesIO(data)) for data in shown), text, row["score"] == 1)


def _by_category(drawn: Iterable[Row]) -> list[list[float]]:
    """Scores of short prompts in groups, one for each category that has any."""
    rows = list(drawn)
    groups = [[row["score"] for row in rows if row["category"] == category] for category in shapes.CATEGORIES]
    return [group for group in groups if group]
