import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import nexusgen
from nexusgen.base_training import GEOMETRY, HIDDEN_SIZE, TRANSFORMER_SIZES
from nexusgen.errors import InputError, ModelError
from nexusgen.images import reference_image, to_patches
from nexusgen.model.conditioners import MergerConfig
from nexusgen.model.decoder import DecoderConfig, VisionDecoder, save_decoder
from nexusgen.model.weights import load_model, read_manifest, write_manifest
from nexusgen.replies import ImageMode
from nexusgen.sampling import (
    decode_embeddings,
    describe,
    edit_images,
    generate_images,
    predict_edits,
    predict_embeddings,
)

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


@pytest.fixture(scope="module")
def editor(tmp_path_factory):
    """The base with an editing decoder of random weights."""
    folder = shutil.copytree(BASE, tmp_path_factory.mktemp("editor") / "model")
    torch.manual_seed(0)
    config = DecoderConfig(
        conditioner="editing",
        embedding_dim=HIDDEN_SIZE,
        context_dim=HIDDEN_SIZE,
        token_grid=GEOMETRY.target_grid,
        token_positions="grid",
        merger=MergerConfig(
            reference_grid=GEOMETRY.reference_grid,
            intermediate_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            mrope_section=(4, 6, 6),
        ),
    )
    decoder = VisionDecoder.from_config(config, TRANSFORMER_SIZES)
    save_decoder(decoder, folder / "decoders" / "editing", torch.bfloat16)
    values = read_manifest(folder).model_dump(exclude={"version", "parts", "fingerprints", "fingerprint"})
    write_manifest(folder, **values)
    return load_model(folder)


def test_the_editing_decoder_sees_original_and_instruction(editor):
    white, black = (Image.new("RGB", (120, 90), colour) for colour in ("white", "black"))
    draw = [(white, "Make it red."), (black, "Make it red."), (white, "Remove the blue ring.")]
    images, instructions = zip(*draw, strict=True)
    together = [np.asarray(i, dtype=int) for i in edit_images(editor, images, instructions, [5, 5, 5], steps=2)]
    alone = np.asarray(edit_images(editor, images[1:2], instructions[1:2], [5], steps=2)[0], dtype=int)
    assert together[0].shape == (*editor.manifest.image_size, 3)
    assert np.abs(together[1] - alone).max() <= 1
    embeddings = predict_edits(editor, [white], ["Make it red."])
    drawn = [
        decode_embeddings(editor, embeddings, [5], 2, decoder="editing", reference=reference(editor, image))[0]
        for image in (white, black)
    ]
    assert np.abs(np.asarray(drawn[0], dtype=int) - np.asarray(drawn[1], dtype=int)).max() > 1
    assert np.abs(np.asarray(drawn[0], dtype=int) - together[0]).max() <= 1
    assert relative(predict_edits(editor, [white], ["Remove the blue ring."]), embeddings) > 0.01


def reference(model, image):
    pixels, grid = to_patches(
        [reference_image(image, model.manifest.geometry, training=False)], model.manifest.geometry
    )
    with torch.no_grad():
        return model.autoregressive.encode_images(pixels, grid)[None]


def test_pictures_have_any_shape_in_steps_of_16_up_to_a_limit(model):
    wide = generate_images(model, PROMPTS[:1], [1], steps=1, size=(48, 160))[0]
    assert wide.size == (160, 48)
    for size in ((40, 96), (0, 96), (4096, 4096)):
        with pytest.raises(InputError, match=f"{size[0]}x{size[1]}.*multiples of 16"):
            generate_images(model, PROMPTS[:1], [1], steps=1, size=size)


def test_editing_without_its_decoder_or_instruction_is_refused(model):
    picture = Image.new("RGB", (96, 96), "white")
    with pytest.raises(ModelError, match="no editing decoder"):
        edit_images(model, [picture], ["Make it red."], [0])
    with pytest.raises(InputError, match="say what to change"):
        edit_images(model, [picture], [" "], [0])
    assert edit_images(model, [picture], ["Make it red."], [0], steps=1, decoder="generation")[0].size == (96, 96)


def test_a_prompt_that_leaves_no_room_for_the_image_is_refused(model):
    with pytest.raises(InputError, match="context of 4,096"):
        predict_embeddings(model, ["a star", "a " * 4050])
