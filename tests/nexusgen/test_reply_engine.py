import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import test_replies
import torch
from PIL import Image
from test_replies import (
    EMBEDDING_TOLERANCE,
    TEXTS,
    assert_same_reply,
    continued,
    decided_length,
    find_sampling,
    image_free_prompt,
    random_prompt,
    random_sampling,
    relative,
    text_prompt,
)

from nexusgen.errors import InputError, ResourceError, ShapeError
from nexusgen.model.manifest import demo_base
from nexusgen.model.weights import load_model
from nexusgen.prompts import encode_prompt
from nexusgen.replies import Prompt, SamplingParams, generate_replies
from nexusgen.reply_engine import ReplyEngine
from nexusgen.sampling import (
    drawing_messages,
    drawing_params,
    edit_messages,
    predict_edits,
    predict_embeddings,
    question_messages,
    read_conversation,
    respond,
)
from nexusgen.schema import Message

NUM_REQUESTS = 60
MAX_LENGTH = 200  # tokens; the longest of the random prompts and replies together

tokenizer = test_replies.tokenizer
model = test_replies.model


@pytest.fixture(scope="module")
def demo():
    return load_model(demo_base())


@pytest.fixture
def engine(model, tokenizer):
    return ReplyEngine(model, tokenizer, 4, MAX_LENGTH)


def finish(engine, *tickets):
    """Steps until these requests are finished: their replies."""
    replies = {}
    while not set(tickets) <= set(replies):
        replies |= {piece.row: piece.reply for piece in engine.step() if piece.reply is not None}
    return [replies[ticket] for ticket in tickets]


def run_alone(engine, prompt, params):
    (reply,) = finish(engine, engine.join(prompt, params))
    return reply


def run_in_company(engine, requests, rng, num_leaving=0):
    """All requests, joining in random order at random steps; some leave again. Pieces of each, in order; those of a
    request that has left have no reply."""
    order = [int(index) for index in rng.permutation(len(requests))]
    leaving = {int(index) for index in rng.choice(len(requests), num_leaving, replace=False)}
    pieces = [[] for _ in requests]
    of_ticket, present, num_rows = {}, [], []
    while order or present:
        while order and engine.num_free and rng.random() < 0.7:
            index = order.pop()
            ticket = engine.join(*requests[index])
            assert ticket not in of_ticket
            of_ticket[ticket] = index
            present.append(ticket)
        for ticket in [ticket for ticket in present if of_ticket[ticket] in leaving and rng.random() < 0.1]:
            engine.leave(ticket)
            present.remove(ticket)
        num_rows.append(len(present))
        for piece in engine.step():
            assert piece.row in present
            pieces[of_ticket[piece.row]].append(piece)
            if piece.reply is not None:
                present.remove(piece.row)
    assert np.mean(num_rows) > 2
    return pieces


def random_requests(tokenizer, rng, count):
    return [(random_prompt(tokenizer, rng), random_sampling(rng)) for _ in range(count)]


def said(pieces):
    """Texts and images of pieces, as in a reply."""
    texts, images = [""], []
    for piece in pieces:
        texts[-1] += piece.text
        if piece.image is not None:
            images.append(piece.image)
            texts.append("")
    return texts, images


def assert_same_bits(got, want):
    assert got.token_ids == want.token_ids
    assert got.texts == want.texts
    assert got.finish_reason == want.finish_reason
    assert len(got.images) == len(want.images)
    assert all(torch.equal(a, b) for a, b in zip(got.images, want.images, strict=True))


# -------------------------------------------------------------------------------------------------------- company


@pytest.mark.parametrize("deterministic", [False, True])
def test_requests_that_come_and_go_equal_their_solo_replies(model, tokenizer, deterministic):
    rng = np.random.default_rng(3)
    requests = random_requests(tokenizer, rng, NUM_REQUESTS)
    engine = ReplyEngine(model, tokenizer, 4, MAX_LENGTH, deterministic=deterministic)
    num_images = num_decided = num_tokens = num_left = 0
    for (prompt, params), pieces in zip(requests, run_in_company(engine, requests, rng, num_leaving=20), strict=True):
        (alone,) = generate_replies(model, [prompt], [params], tokenizer, keep_logits=True)
        texts, images = said(pieces)
        if pieces and pieces[-1].reply is not None:
            reply = pieces[-1].reply
            assert_same_reply(model, reply, alone)
            assert texts == reply.texts
            assert all(a is b for a, b in zip(images, reply.images, strict=True))
            assert all(piece.reply is None for piece in pieces[:-1])
            num_images += len(alone.images)
            num_decided += decided_length(model, alone)
            num_tokens += len(alone.token_ids)
        else:
            num_left += 1
            if decided_length(model, alone) == len(alone.token_ids):
                assert "<image>".join(alone.texts).startswith("<image>".join(texts))
    assert engine.num_free == 4
    assert num_images > 30
    assert num_left > 5
    assert num_decided > 0.95 * num_tokens


def test_deterministic_replies_are_equal_in_every_bit_alone_and_in_company(model, tokenizer):
    rng = np.random.default_rng(4)
    requests = random_requests(tokenizer, rng, NUM_REQUESTS)
    engine = ReplyEngine(model, tokenizer, 4, MAX_LENGTH, deterministic=True)
    in_company = run_in_company(engine, requests, rng)
    fresh = ReplyEngine(model, tokenizer, 4, MAX_LENGTH, deterministic=True)
    for (prompt, params), pieces in zip(requests, in_company, strict=True):
        assert_same_bits(pieces[-1].reply, run_alone(fresh, prompt, params))


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("two_threads")
def test_deterministic_replies_are_equal_in_every_bit_on_several_threads(model, tokenizer):
    opened = continued(text_prompt(tokenizer), [model.config.vision_start_token_id], model)
    params = SamplingParams(max_new_tokens=25)
    engine = ReplyEngine(model, tokenizer, 4, MAX_LENGTH, deterministic=True)
    alone = run_alone(engine, opened, params)
    for reply in finish(engine, *[engine.join(opened, params) for _ in range(4)]):
        assert_same_bits(reply, alone)


def test_deterministic_replies_of_the_demo_base_are_equal_in_every_bit(demo):
    rng = np.random.default_rng(5)
    colours = ("red", "green", "blue", "white")
    pictures = [Image.new("RGB", (96 + 32 * (i % 2), 96), colour) for i, colour in enumerate(colours)]
    drawing = drawing_params(demo.manifest.geometry)
    chatting = [SamplingParams(max_new_tokens=40, temperature=t, seed=seed) for seed, t in enumerate((0.0, 1.0, 1.5))]
    requests = [
        *[(read_conversation(demo, drawing_messages(f"a {colour} circle")), drawing) for colour in colours],
        *[(read_conversation(demo, edit_messages("Make it blue."), [picture]), drawing) for picture in pictures],
        *[
            (read_conversation(demo, question_messages("What is it?"), [picture]), params)
            for picture in pictures
            for params in chatting
        ],
    ]
    engine = ReplyEngine(demo.autoregressive, demo.tokenizer, 5, 250, deterministic=True)
    in_company = run_in_company(engine, requests, rng)
    for (prompt, params), pieces in zip(requests, in_company, strict=True):
        assert_same_bits(pieces[-1].reply, run_alone(engine, prompt, params))
    assert sum(len(pieces[-1].reply.images) for pieces in in_company) >= 8


def test_requests_read_from_messages_and_pictures_give_what_the_pipelines_give(demo):
    picture = Image.new("RGB", (120, 90), "red")
    engine = ReplyEngine(demo.autoregressive, demo.tokenizer, 3, 400)
    drawing = drawing_params(demo.manifest.geometry)
    messages = [Message("user", "a blue square"), Message("assistant", "<image>"), Message("user", "Look: <image>")]
    params = SamplingParams(max_new_tokens=30)
    drawn, edited, answered = finish(
        engine,
        engine.join(read_conversation(demo, drawing_messages("a large <image> star")), drawing),
        engine.join(read_conversation(demo, edit_messages("Make it blue."), [picture]), drawing),
        engine.join(read_conversation(demo, messages, [picture]), params),
    )
    assert relative(drawn.images[0], predict_embeddings(demo, ["a large <image> star"])[0]) <= EMBEDDING_TOLERANCE
    assert relative(edited.images[0], predict_edits(demo, [picture], ["Make it blue."])[0]) <= EMBEDDING_TOLERANCE
    *_, last = respond(demo, messages, [picture], params)
    assert answered.token_ids == last.reply.token_ids
    assert answered.texts == last.reply.texts
    with pytest.raises(InputError, match="must end in a message of the user"):
        read_conversation(demo, messages[:2])


class Passes:
    """The sizes (rows, tokens) of the passes through the layers, which run as they are."""

    def __init__(self, model, monkeypatch):
        self.sizes = []
        run_layers = model.run_layers

        def counted(embeddings, *args):
            self.sizes.append(tuple(embeddings.shape[:2]))
            return run_layers(embeddings, *args)

        monkeypatch.setattr(model, "run_layers", counted)

    def of(self, engine):
        """Those of one step, and its pieces."""
        self.sizes.clear()
        pieces = engine.step()
        return list(self.sizes), pieces


def test_a_step_is_one_pass_for_text_and_one_for_images_and_joining_prompts_are_read_alone(
    model, tokenizer, engine, monkeypatch
):
    talking = find_sampling(model, tokenizer, lambda reply: not reply.images and len(reply.token_ids) >= 20)
    prompt = text_prompt(tokenizer)
    length = len(prompt.conversation.input_ids)
    opened = continued(prompt, [model.config.vision_start_token_id], model)
    passes = Passes(model, monkeypatch)
    engine.join(prompt, talking)
    assert passes.of(engine)[0] == [(1, length)]
    assert passes.of(engine)[0] == [(1, 1)]
    pair = [engine.join(opened, SamplingParams()) for _ in range(2)]
    sizes, pieces = passes.of(engine)
    assert sizes == [(2, length), (1, 1), (2, 11)]
    assert {piece.row for piece in pieces if piece.image is not None} == set(pair)
    for ticket in pair:
        engine.leave(ticket)
    assert passes.of(engine)[0] == [(1, 1)]


def test_prompts_that_join_together_are_read_together_unless_padding_would_outweigh_them(
    model, tokenizer, engine, monkeypatch
):
    prompt = text_prompt(tokenizer)
    length = len(prompt.conversation.input_ids)
    passes = Passes(model, monkeypatch)
    for ids in ([], [1], [1] * 100):
        engine.join(continued(prompt, ids, model), SamplingParams())
    assert sorted(passes.of(engine)[0]) == [(1, length + 100), (2, length + 1)]


def test_deterministic_passes_have_one_size(model, tokenizer, monkeypatch):
    engine = ReplyEngine(model, tokenizer, 4, MAX_LENGTH, deterministic=True)
    rng = np.random.default_rng(6)
    passes = Passes(model, monkeypatch)
    seen = set()
    for request in random_requests(tokenizer, rng, 4):
        engine.join(*request)
    while engine.num_free < 4:
        seen |= set(passes.of(engine)[0])
    assert {size for size in seen if size[0] > 1} == {(4, 1), (4, 11)}
    assert all(rows == 1 for rows, tokens in seen if tokens not in (1, 11))


def test_text_is_given_out_at_the_step_that_writes_it(model, tokenizer, engine):
    talking = find_sampling(model, tokenizer, lambda reply: not reply.images and len(reply.texts[0]) >= 10)
    (alone,) = generate_replies(model, [text_prompt(tokenizer)], [talking], tokenizer)
    engine.join(text_prompt(tokenizer), talking)
    texts = []
    while engine.num_free < 4:
        texts.append("".join(piece.text for piece in engine.step()))
    assert "".join(texts) == alone.texts[0]
    assert len(texts) == len(alone.token_ids)  # no step only to find out that it was the end


# ------------------------------------------------------------------------------------------------- joining and leaving


def test_leaving_frees_the_slot_at_once_and_disturbs_nobody(model, tokenizer):
    engine = ReplyEngine(model, tokenizer, 2, MAX_LENGTH, deterministic=True)
    talking = find_sampling(model, tokenizer, lambda reply: len(reply.token_ids) >= 30)
    prompt = text_prompt(tokenizer)
    alone = run_alone(engine, prompt, talking)
    stays = engine.join(prompt, talking)
    unread = engine.join(prompt, talking)
    engine.leave(unread)  # before its prompt has been read
    assert engine.num_free == 1
    leaves = engine.join(text_prompt(tokenizer, TEXTS[2]), talking)
    for _ in range(3):
        engine.step()
    engine.leave(leaves)
    assert engine.num_free == 1
    follows = engine.join(prompt, talking)
    engine.leave(leaves)  # gone already: its slot is another's now
    assert engine.num_free == 0
    for reply in finish(engine, stays, follows):
        assert_same_bits(reply, alone)
    engine.leave(stays)
    assert engine.num_free == 2
    assert engine.step() == []


def test_a_request_is_not_changed_by_what_its_slot_held_before(model, tokenizer):
    torch.manual_seed(0)
    prompt, params = text_prompt(tokenizer), SamplingParams(max_new_tokens=30)
    encoded = encode_prompt(tokenizer, [Message("user", "<image> hm")], [(9, 9)])
    broken = Prompt(encoded, torch.full((81, 32), torch.nan))
    for deterministic in (False, True):
        engine = ReplyEngine(model, tokenizer, 2, MAX_LENGTH, deterministic=deterministic)
        alone = run_alone(engine, prompt, params)
        tickets = [engine.join(broken, params), engine.join(prompt, params)]
        _, beside = finish(engine, *tickets)
        after = finish(engine, *[engine.join(prompt, params) for _ in range(2)])
        for reply in (beside, *after):
            assert reply.token_ids == alone.token_ids


def test_300_requests_through_4_slots_keep_memory_flat(model, tokenizer, engine):
    rng = np.random.default_rng(7)
    params = [random_sampling(rng) for _ in range(20)]
    prompts = [random_prompt(tokenizer, rng) for _ in range(20)]

    def num_bytes():
        gc.collect()
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in gc.get_objects()
            if issubclass(type(tensor), torch.Tensor)
        }
        return sum(storages.values())

    held, num_joined, num_replies = [], 0, 0
    while num_replies < 300:
        while engine.num_free and num_joined < 300:
            engine.join(prompts[num_joined % 20], params[num_joined % 19])
            num_joined += 1
        num_replies += sum(piece.reply is not None for piece in engine.step())
        if engine.num_free == 4 or num_joined in (100, 200):
            held.append(num_bytes())
    assert len(held) >= 3
    assert held[-1] <= min(held[:-1])  # now without requests


def test_an_engine_given_up_gives_its_cache_back_at_once(model, tokenizer):
    engine = ReplyEngine(model, tokenizer, 2, MAX_LENGTH)
    run_alone(engine, text_prompt(tokenizer), SamplingParams(max_new_tokens=3))
    keys = weakref.ref(engine._cache.layers[0].keys)
    gc.disable()  # it would be given back at some time even in a circle of references
    try:
        del engine
        assert keys() is None
    finally:
        gc.enable()


# ----------------------------------------------------------------------------------------------------- edges and errors


def test_a_request_that_fills_its_slot_ends_with_length(model, tokenizer):
    talking = find_sampling(model, tokenizer, lambda reply: not reply.images and len(reply.token_ids) >= 30)
    prompt = text_prompt(tokenizer)
    length = len(prompt.conversation.input_ids)
    engine = ReplyEngine(model, tokenizer, 2, length + 12)
    other = engine.join(text_prompt(tokenizer, TEXTS[4]), SamplingParams(max_new_tokens=8))
    reply, _ = finish(engine, engine.join(prompt, talking), other)
    assert reply.finish_reason == "length"
    assert len(reply.token_ids) == 12
    (alone,) = generate_replies(model, [prompt], [replace(talking, max_new_tokens=12)], tokenizer)
    assert reply.token_ids == alone.token_ids
    assert reply.texts == alone.texts


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("room", "num_images"), [(8, 0), (9, 1), (10, 1), (12, 1)])
def test_an_image_at_the_very_end_of_a_slot_fits_or_is_not_begun(model, tokenizer, room, num_images, deterministic):
    opened = continued(text_prompt(tokenizer), [model.config.vision_start_token_id], model)
    engine = ReplyEngine(model, tokenizer, 2, len(opened.conversation.input_ids) + room, deterministic=deterministic)
    (alone,) = generate_replies(model, [opened], [SamplingParams(max_new_tokens=room)], tokenizer)
    first, second = finish(engine, *[engine.join(opened, SamplingParams()) for _ in range(2)])
    for reply in (first, second):
        assert reply.token_ids == alone.token_ids
        assert reply.finish_reason == alone.finish_reason
        assert len(reply.images) == num_images
        for image, expected in zip(reply.images, alone.images, strict=True):
            assert relative(image, expected) <= EMBEDDING_TOLERANCE


def test_a_prompt_may_be_vision_start_alone(model, tokenizer, engine):
    opened = image_free_prompt(model, [model.config.vision_start_token_id])
    (alone,) = generate_replies(model, [opened], max_new_tokens=12, tokenizer=tokenizer)
    params = SamplingParams(max_new_tokens=12)
    _, reply = finish(engine, engine.join(text_prompt(tokenizer), params), engine.join(opened, params))
    assert reply.token_ids == alone.token_ids
    assert relative(reply.images[0], alone.images[0]) <= EMBEDDING_TOLERANCE


def test_bad_prompts_are_refused_as_ever_and_change_nothing(model, tokenizer, engine):
    encoded = encode_prompt(tokenizer, [Message("user", "<image>")], [(2, 2)])
    earlier = [Message("user", "draw"), Message("assistant", "<image>"), Message("user", "thanks")]
    bad = [
        image_free_prompt(model, []),
        Prompt(encoded, torch.zeros(3, 32)),
        Prompt(encode_prompt(tokenizer, earlier, [(2, 2)]), torch.zeros(0, 32)),
        image_free_prompt(model, [1] * 1024),
    ]
    whole = ReplyEngine(model, tokenizer, 1, 1024)
    for prompt in bad:
        with pytest.raises((InputError, ShapeError)) as expected:
            generate_replies(model, [prompt], tokenizer=tokenizer)
        with pytest.raises(expected.type) as refused:
            whole.join(prompt, SamplingParams())
        assert str(refused.value).replace("a slot of the engine", "the model's context") == str(expected.value)
        assert whole.num_free == 1
    with pytest.raises(InputError, match=r"200 tokens, images included; a slot of the engine holds 200, .*shorten it"):
        engine.join(image_free_prompt(model, [1] * 200), SamplingParams())
    assert engine.num_free == 4
    assert engine.step() == []


def test_a_full_engine_refuses_to_be_joined(model, tokenizer):
    engine = ReplyEngine(model, tokenizer, 1, MAX_LENGTH)
    prompt = text_prompt(tokenizer)
    engine.join(prompt, SamplingParams(max_new_tokens=5))
    with pytest.raises(ResourceError, match="all 1 slots are taken"):
        engine.join(prompt, SamplingParams())


@pytest.mark.parametrize(
    ("num_slots", "max_length", "name"),
    [(0, 100, "num_slots"), (1, 1, "max_length is 1;"), (1, 1025, "max_length is 1,025;.*1,024")],
)
def test_sizes_out_of_range_are_refused_by_name(model, tokenizer, num_slots, max_length, name):
    with pytest.raises(InputError, match=name):
        ReplyEngine(model, tokenizer, num_slots, max_length)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_reply_that_may_not_draw_is_text_alone(model, tokenizer, engine, temperature):
    """Replies that would draw, alone and in the engine; up to the image they say the same."""
    rng = np.random.default_rng(5)
    num_drawn = 0
    for seed in range(30):
        prompt, params = random_prompt(tokenizer, rng), SamplingParams(temperature=temperature, seed=seed)
        params = replace(params, max_new_tokens=40)
        (free,) = generate_replies(model, [prompt], [params], tokenizer)
        (bound,) = generate_replies(model, [prompt], [replace(params, may_draw=False)], tokenizer)
        assert not bound.images
        assert model.config.vision_start_token_id not in bound.token_ids
        num_drawn += len(free.images)
        if not free.images and model.config.vision_start_token_id not in free.token_ids and not temperature:
            assert bound.token_ids == free.token_ids
        assert run_alone(engine, prompt, replace(params, may_draw=False)).token_ids == bound.token_ids
    assert num_drawn > 0
    with pytest.raises(InputError, match="needs_image demands an image, which may_draw=False forbids"):
        SamplingParams(needs_image=True, may_draw=False)
