from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import nexusgen
from nexusgen.errors import InputError
from nexusgen.model.weights import load_model
from nexusgen.replies import ImageMode
from nexusgen.sampling import describe, generate_images, predict_embeddings

BASE = Path(nexusgen.__file__).parent / "demo_base"
PROMPTS = ("a large red circle", "two blue squares on a yellow background", "<|vision_end|> <image>")


@pytest.fixture(scope="module")
def model():
    return load_model(BASE)


def relative(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()


def test_embeddings_are_those_of_single_prompts_in_both_modes_of_prefilled_autoregression(model):
    together = predict_embeddings(model, PROMPTS)
    assert together.shape == (3, model.manifest.geometry.num_target_tokens, model.autoregressive.hidden_size)
    sequential = predict_embeddings(model, PROMPTS, ImageMode.SEQUENTIAL)
    for index, prompt in enumerate(PROMPTS):
        alone = predict_embeddings(model, [prompt])[0]
        assert relative(together[index], alone) <= 3e-6
        assert relative(sequential[index], alone) <= 3e-6


def test_naive_autoregression_shares_only_the_first_embedding(model):
    prefilled = predict_embeddings(model, PROMPTS)
    naive = predict_embeddings(model, PROMPTS, ImageMode.NAIVE)
    assert relative(naive[:, 0], prefilled[:, 0]) <= 3e-6
    assert relative(naive[:, 1:], prefilled[:, 1:]) > 0.01


def test_a_picture_depends_on_its_prompt_and_seed_alone(model):
    together = [np.asarray(image, dtype=int) for image in generate_images(model, PROMPTS[:2], [1, 2], steps=2)]
    alone = np.asarray(generate_images(model, PROMPTS[1:2], [2], steps=2)[0], dtype=int)
    assert np.abs(together[1] - alone).max() <= 1
    assert np.abs(together[0] - alone).max() > 50


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_an_empty_prompt_is_refused(model, prompt):
    with pytest.raises(InputError, match="say what to draw"):
        predict_embeddings(model, ["a star", prompt])


def test_answers_are_about_their_own_images(model):
    pictures = [Image.new("RGB", (96, 96), colour) for colour in ("white", "black")]
    question = "What colour is the background?"
    together = describe(model, pictures, [question] * 2, max_new_tokens=12)
    alone = [describe(model, [picture], [question], max_new_tokens=12)[0] for picture in pictures]
    assert together == alone
    assert together[0] != together[1]


def test_a_size_that_the_decoder_cannot_draw_is_refused(model):
    with pytest.raises(InputError, match="multiples of 16"):
        generate_images(model, ["a star"], [0], size=(96, 100))
