import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import nexusgen
from nexusgen import flow_matching
from nexusgen.base_training import GEOMETRY, HIDDEN_SIZE, TRANSFORMER_SIZES
from nexusgen.errors import InputError, ModelError
from nexusgen.images import input_image, to_patches
from nexusgen.model.conditioners import MergerConfig
from nexusgen.model.decoder import DecoderConfig, VisionDecoder, save_decoder
from nexusgen.model.manifest import read_manifest
from nexusgen.model.weights import load_model, write_manifest
from nexusgen.prompts import encode_prompt
from nexusgen.replies import ImageMode, Prompt, SamplingParams, generate_replies
from nexusgen.sampling import (
    decode_embeddings,
    describe,
    edit_images,
    encode_references,
    generate_images,
    predict_edits,
    predict_embeddings,
    question_messages,
    respond,
)
from nexusgen.schema import Message

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
        decode_embeddings(editor, embeddings, [5], 2, decoder="editing", reference=encode_references(editor, [image]))[
            0
        ]
        for image in (white, black)
    ]
    assert np.abs(np.asarray(drawn[0], dtype=int) - np.asarray(drawn[1], dtype=int)).max() > 1
    assert np.abs(np.asarray(drawn[0], dtype=int) - together[0]).max() <= 1
    assert relative(predict_edits(editor, [white], ["Remove the blue ring."]), embeddings) > 0.01


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_offloaded_model_draws_edits_and_answers_bit_for_bit_the_same(model, editor, dtype):
    picture = Image.new("RGB", (120, 90), "red")

    def work(one):
        pictures = generate_images(one, PROMPTS[:2], [1, 2], steps=2)
        pictures += edit_images(one, [picture], ["Make it blue."], [3], steps=2)
        return [image.tobytes() for image in pictures], describe(one, [picture], ["What?"], max_new_tokens=8)

    whole, offloaded = (load_model(editor.folder, dtype=dtype, offload=offload) for offload in (False, True))
    assert work(offloaded) == work(whole)
    assert offloaded.generation_decoder is None  # the answer came last
    assert whole.generation_decoder is not None


@pytest.mark.parametrize(("numerics", "dtype"), [("reference", torch.bfloat16), ("exact", torch.float32)])
def test_latents_between_steps_have_the_dtype_of_model_and_numerics(monkeypatch, numerics, dtype):
    made = []

    def sampled(velocity, noise, scheduler, num_steps):
        made.append(flow_matching.euler_sample(velocity, noise, scheduler, num_steps))
        return made[-1]

    monkeypatch.setattr("nexusgen.sampling.euler_sample", sampled)
    model = load_model(BASE, dtype=torch.bfloat16, numerics=numerics)
    embeddings = predict_embeddings(model, PROMPTS[:1]).bfloat16()
    pictures = [decode_embeddings(model, given, [1], steps=2)[0] for given in (embeddings, embeddings.float())]
    assert [latents.dtype for latents in made] == [dtype, dtype]
    assert pictures[0].tobytes() == pictures[1].tobytes()  # whatever the dtype of the embeddings


def test_nothing_is_written_after_the_image(model, monkeypatch):
    fed = []
    run_layers = model.autoregressive.run_layers

    def counted(embeddings, *arguments):
        fed.append(embeddings.shape[1])
        return run_layers(embeddings, *arguments)

    monkeypatch.setattr(model.autoregressive, "run_layers", counted)
    predict_embeddings(model, PROMPTS[:1])
    assert fed[-1] == model.manifest.geometry.num_target_tokens + 2  # the image, between its start and its end


def test_a_quantised_decoder_draws_almost_the_same(model):
    embeddings = predict_embeddings(model, PROMPTS)
    plain, quantised = (
        np.stack(
            decode_embeddings(load_model(BASE, dtype=torch.bfloat16, quantise=how), embeddings.bfloat16(), [1] * 3)
        )
        for how in (None, "fp8")
    )
    error = np.square(plain.astype(float) - quantised).mean()
    assert 0 < error <= 255**2 / 10**3  # 30 dB


def test_a_streamed_answer_is_the_one_that_describe_gives(model):
    picture, question = Image.new("RGB", (96, 96), "white"), "Describe the picture."
    pieces = list(respond(model, question_messages(question), [picture], SamplingParams(max_new_tokens=12)))
    assert sum(bool(piece.text) for piece in pieces) > 1
    text = "".join(piece.text for piece in pieces)
    assert [text.strip()] == describe(model, [picture], [question], max_new_tokens=12)
    assert pieces[-1].reply.content == text


def test_a_conversation_with_images_on_both_sides(model):
    red, blue = (Image.new("RGB", (96, 64), colour) for colour in ("red", "blue"))
    messages = [
        Message("user", "<image> Draw it again."),
        Message("assistant", "Here it is: <image>"),
        Message("user", "Is <image> the same? Draw it."),
    ]
    pieces = list(respond(model, messages, [red, blue], SamplingParams(max_new_tokens=48, needs_image=True)))
    image = next(piece.image for piece in pieces if piece.image is not None)
    assert decode_embeddings(model, image[None], [1], steps=1)[0].size == (96, 96)

    # The same, prepared by hand: the user's images are their embeddings, the assistant's gets query embeddings.
    geometry = model.manifest.geometry
    pixels, grids = to_patches([input_image(picture, geometry) for picture in (red, blue)], geometry)
    first, second = ((height // 2, width // 2) for _, height, width in grids.tolist())
    conversation = encode_prompt(model.tokenizer, messages, [first, geometry.target_grid, second])
    with torch.no_grad():
        embeddings = model.autoregressive.encode_images(pixels, grids)
    sampling = [SamplingParams(max_new_tokens=48, needs_image=True)]
    want = generate_replies(model.autoregressive, [Prompt(conversation, embeddings)], sampling)[0]
    assert pieces[-1].reply.token_ids == want.token_ids
    assert relative(image, want.images[0]) <= 3e-6
    swapped = list(respond(model, messages, [blue, red], sampling[0]))[-1].reply
    assert relative(swapped.images[0], image) > 0.001


def test_respond_takes_sampling_and_stop_strings(model):
    picture = Image.new("RGB", (96, 96), "white")
    messages = question_messages("Describe the picture.")

    def text(**values):
        pieces = list(respond(model, messages, [picture], SamplingParams(max_new_tokens=12, **values)))
        return "".join(piece.text for piece in pieces), pieces[-1].reply

    greedy, _ = text()
    assert len({text(temperature=2.0, top_p=0.95, seed=seed)[0] for seed in range(4)}) > 1
    assert text(temperature=2.0, seed=1)[0] == text(temperature=2.0, seed=1)[0]
    assert text(temperature=2.0, top_p=1e-9, seed=1)[0] == greedy
    stop = greedy[4:7]
    stopped, reply = text(stop=(stop,))
    assert stopped == greedy[: greedy.index(stop)]
    assert reply.finish_reason == "stop"


def test_conversations_whose_images_do_not_match_are_refused(model):
    picture = Image.new("RGB", (96, 96), "white")
    with pytest.raises(InputError, match="0 <image> marks and gives 1 images"):
        respond(model, [Message("user", "Hello")], [picture])
    with pytest.raises(InputError, match="1 <image> marks and gives 0 images"):
        respond(model, [Message("user", "<image> Hello")])
    for messages in ([], [Message("user", "Hello"), Message("assistant", "Hi")], [Message("user", " ")]):
        with pytest.raises(InputError, match="must end in a message of the user"):
            respond(model, messages)
