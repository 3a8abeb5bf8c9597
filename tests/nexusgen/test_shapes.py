import itertools
import re
from collections import Counter

import numpy as np
import pytest

from nexusgen import shapes
from nexusgen.messages import task_of, validate_messages
from nexusgen.schema import TASKS
from nexusgen.scoring import STRICT_OVERLAP, read_scene

NUM_SAMPLES = 3000


def held_out_words(lang):
    """Every way in which a held-out combination can be named in a text of the world."""
    english = lang == "en"
    for shape, colour in shapes.HELD_OUT_COLOURS:
        name = shapes.SHAPES[shape]
        yield f"{colour} {name[0]}" if english else f"{shapes.COLOURS[colour][0]}{name[2]}"
    for shape, count in shapes.HELD_OUT_COUNTS:
        name = shapes.SHAPES[shape]
        number = ("zero", "one", "two", "three", "four")[count] if english else "零一两三四"[count]
        yield f"{number} {name[1]}" if english else f"{number}个{name[2]}"
    for shape, background in shapes.HELD_OUT_BACKGROUNDS:
        name = shapes.SHAPES[shape]
        yield f"{name[0]} on a {background}" if english else f"{shapes.BACKGROUNDS[background][0]}背景上的{name[2]}"


@pytest.fixture(scope="module")
def samples():
    return {task: list(shapes.training_samples(task, 0, NUM_SAMPLES, seed=1)) for task in TASKS}


def test_no_training_text_names_a_held_out_combination(samples):
    for sample in itertools.chain(*samples.values()):
        text = " ".join(message.content for message in sample.messages)
        named = [words for words in held_out_words(sample.lang) if words in text]
        assert named == [], (sample.key, text)


def test_no_training_text_pairs_held_out_shapes(samples):
    for sample in itertools.chain(*samples.values()):
        # One turn at a time: "Is there a red circle?" - "no" may be asked of a picture whose cross is named elsewhere.
        for text in (message.content for message in sample.messages):
            for pair in shapes.HELD_OUT_PAIRS:
                names = [shapes.SHAPES[shape][0 if sample.lang == "en" else 2] for shape in pair]
                assert not all(name in text for name in names), text


@pytest.mark.parametrize("task", TASKS)
def test_no_training_picture_shows_a_held_out_combination(samples, task):
    for sample in samples[task][:300]:
        for image in sample.images:
            scene = read_scene(image).scene(STRICT_OVERLAP)
            assert scene is not None
            assert not shapes.held_out(scene), sample.key


def test_no_training_scene_shows_a_held_out_combination():
    rng = np.random.default_rng(0)
    assert not any(shapes.held_out(shapes.sample_scene(rng)) for _ in range(NUM_SAMPLES))
    for lang in ("en", "zh"):
        for prompts in shapes.short_prompts(lang, is_held_out=False).values():
            assert not any(shapes.held_out(prompt.scene) for prompt in prompts)
        assert not any(shapes.held_out_edit(shapes.sample_edit(rng, lang)) for _ in range(300))


def test_the_bases_captions_and_questions_hold_none_either():
    rng = np.random.default_rng(3)
    for index in range(NUM_SAMPLES):
        lang = ("en", "zh")[index % 2]
        scene = shapes.sample_scene(rng)
        texts = [m.content for m in shapes.understanding_conversation(scene, lang, rng)]
        texts.append(shapes.explicit_caption(scene, lang))
        assert not any(words in text for words in held_out_words(lang) for text in texts), texts


def test_every_evaluation_item_holds_a_held_out_combination():
    prompts = shapes.evaluation_prompts()
    assert len(prompts) == 144
    assert [p.category for p in prompts[::24]] == list(shapes.CATEGORIES)
    assert sum(p.lang == "en" for p in prompts) == 72
    assert all(shapes.held_out(p.scene) for p in prompts)
    assert all(shapes.held_out(scene) for _, _, scene in shapes.explicit_prompts(50))
    assert [bool(shapes.held_out(q.scene)) for q in shapes.evaluation_questions(50)] == [False, True] * 25
    assert all(shapes.held_out_edit(edit) for edit in shapes.evaluation_edits(42))


def test_held_out_share_is_small_enough_to_learn_every_word():
    for lang in ("en", "zh"):
        kept, out = (shapes.short_prompts(lang, is_held_out=flag) for flag in (False, True))
        for category in shapes.CATEGORIES[:-1]:
            share = len(out[category]) / (len(out[category]) + len(kept[category]))
            assert 0.1 <= share <= 0.2, category


def test_samples_are_valid_and_of_their_task(samples):
    for task, made in samples.items():
        for sample in made[:100]:
            validate_messages(sample.messages, len(sample.images))
            assert task_of(sample.messages) == task == sample.task
            assert all(image.shape == (96, 96, 3) and image.dtype == np.uint8 for image in sample.images)


def test_a_sample_depends_on_its_index_alone(samples):
    (again,) = shapes.training_samples("generation", 57, 1, seed=1)
    first = samples["generation"][57]
    assert again.messages == first.messages
    assert np.array_equal(again.images[0], first.images[0])
    (other,) = shapes.training_samples("generation", 57, 1, seed=2)
    assert other.messages != first.messages


def test_both_languages_say_the_same_number_of_things(samples):
    langs = [sample.lang for sample in samples["understanding"]]
    assert langs.count("en") == langs.count("zh")


def test_yes_and_no_are_balanced():
    rng = np.random.default_rng(4)
    answers = [shapes.ask(shapes.sample_scene(rng), "exists", "en", rng).answer for _ in range(600)]
    assert 240 < answers.count("yes") < 360


def test_edits_change_what_they_say():
    edits = shapes.evaluation_edits(56)
    assert Counter((edit.kind, edit.lang) for edit in edits) == dict.fromkeys(
        itertools.product(shapes.EDIT_KINDS, ("en", "zh")), 4
    )
    assert all(edit.source != edit.target for edit in edits)
    for edit in edits:
        if edit.kind == "background":
            assert edit.source.things == edit.target.things


def test_a_reply_to_an_edit_says_where_the_named_thing_was():
    rng = np.random.default_rng(8)
    for _ in range(300):
        edit = shapes.sample_edit(rng, "en")
        reply, _, picture = shapes.edit_reply(edit).rpartition("Here is the image: ")
        assert picture == "<image>"
        if edit.kind in ("add", "background"):
            assert not reply
            continue
        (name,) = re.findall(r"(?:Make|Turn|Move|Remove) the (\w+ \w+)", edit.instruction)
        (thing,) = (t for t in edit.source.things if f"{t.colour} {shapes.SHAPES[t.shape][0]}" == name)
        assert reply == f"The {name} is at the {shapes.CELLS[thing.cell][0]}. "
    assert shapes.edit_reply(shapes.sample_edit(rng, "zh")).endswith("图像如下：<image>")


def test_majority_score_is_that_of_constant_answers():
    questions = shapes.evaluation_questions(240)
    assert 0.2 < shapes.majority_score(questions) < 0.5


def test_pictures_of_both_sizes_show_the_same(samples):
    scene = shapes.Scene((shapes.Thing(4, "ring", "red"),))
    small, large = shapes.draw(scene, 96), shapes.draw(scene, 192)
    shrunk = large.reshape(96, 2, 96, 2, 3).mean(axis=(1, 3))
    assert abs(shrunk - small).mean() < 2
