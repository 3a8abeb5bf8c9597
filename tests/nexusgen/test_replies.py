from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2_5_VLConfig

from nexusgen.comparison import TOKEN_MARGIN
from nexusgen.errors import InputError, ShapeError
from nexusgen.geometry import Geometry
from nexusgen.model.autoregressive import AutoregressiveModel
from nexusgen.model.weights import load_autoregressive
from nexusgen.positions import conversation_positions
from nexusgen.prompts import IGNORED_LABEL, Conversation, encode_prompt, encode_text, encode_turn, load_tokenizer
from nexusgen.replies import (
    Chat,
    ImageMode,
    PostImagePositions,
    Prompt,
    SamplingParams,
    TextStream,
    generate_replies,
    sample_token,
    stream_replies,
)
from nexusgen.schema import Message

GOLDEN = Path(__file__).parent.parent / "golden" / "ar"
EMBEDDING_TOLERANCE = 3e-6  # max|a-b| / max|b|
LOGIT_TOLERANCE = 5e-6
NUM_RANDOM_BATCHES = 50
TEXTS = (
    "Draw a large red circle.",
    "What colour is it?",
    "Make the star green and leave the rest as it is.",
    "画一个红色的大圆形。",
    "hi",
)


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_folder):
    return load_tokenizer(tiny_tokenizer_folder)


@pytest.fixture(scope="module")
def model(tokenizer):
    """A random model that writes text, images of 9 tokens and ends in lively alternation."""
    token = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
            "tie_word_embeddings": False,
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
        },
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32},
        image_token_id=token("<|image_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    random = AutoregressiveModel(config, Geometry(target_size=84)).eval()
    with torch.no_grad():
        for parameter in random.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.2)
        random.qwen.lm_head.weight *= 2
        random.qwen.lm_head.weight[token("<|vision_start|>")] *= 2
        random.qwen.lm_head.weight[token("<|im_end|>")] *= 1.5
    return random


@pytest.fixture(scope="module")
def golden_model():
    return load_autoregressive(GOLDEN, Geometry())


@pytest.fixture(scope="module")
def golden_prompts(golden_model):
    """The four recorded prompts, of different lengths and both tasks."""
    vision = load_file(GOLDEN / "vision.safetensors")
    made = []
    for name in ("t2i0", "edit0", "t2i1", "t2i2"):
        ids = load_file(GOLDEN / f"gen_{name}.safetensors")["prompt_ids"].numpy()
        is_edit = name == "edit0"
        embeddings = vision["embeds.edit_source"] if is_edit else torch.zeros(0, golden_model.hidden_size)
        grid = vision["grid_thw.edit_source"][0].tolist()
        grids = [(grid[1] // 2, grid[2] // 2)] if is_edit else []
        positions, following = conversation_positions(ids, grids, golden_model.image_token_id)
        conversation = Conversation(ids, np.full_like(ids, IGNORED_LABEL), positions, following)
        made.append(Prompt(conversation, embeddings))
    return made


def text_prompt(tokenizer, text=TEXTS[0]):
    return Prompt(encode_prompt(tokenizer, [Message("user", text)], []), torch.zeros(0, 32))


def random_prompt(tokenizer, rng):
    """A prompt of any task: text, a question about an image, an edit, or a chat with images on both sides."""
    text, other = rng.choice(TEXTS, 2)
    messages, grids = {
        "text": ([Message("user", text)], []),
        "image": ([Message("user", f"<image>\n{text}")], [(2, 4)]),
        "images": ([Message("user", f"<image> {text} <image>")], [(3, 3), (1, 5)]),
        "chat": (
            [
                Message("user", f"{other}<image>"),
                Message("assistant", f"Here <image> is {other}"),
                Message("user", text),
            ],
            [(2, 2), (3, 3)],
        ),
    }[rng.choice(["text", "image", "images", "chat"])]
    count = sum(h * w for h, w in grids) - (9 if len(messages) > 1 else 0)
    embeddings = torch.from_numpy(rng.normal(size=(count, 32)).astype(np.float32))
    return Prompt(encode_prompt(tokenizer, messages, grids), embeddings)


def random_sampling(rng):
    return SamplingParams(
        max_new_tokens=int(rng.integers(5, 60)),
        temperature=float(rng.choice([0, 0, 0.7, 1.3])),
        top_p=float(rng.choice([0.8, 1])),
        seed=int(rng.integers(1000)),
        stop=(str(rng.choice(["re", "的", "e "])),) if rng.random() < 0.3 else (),
        needs_image=bool(rng.random() < 0.3),
    )


def relative(got, want):
    assert got.shape == want.shape
    return ((got - want).abs().max() / want.abs().max()).item()


def decided_length(model, reply):
    """Number of the first tokens that no near tie leaves open."""
    for index, logits in enumerate(reply.logits):
        if logits is not None:
            allowed = logits.clone()
            allowed[[model.image_token_id, model.config.vision_end_token_id]] = -torch.inf
            first, second = allowed.topk(2).values
            if first - second <= TOKEN_MARGIN:
                return index
    return len(reply.token_ids)


def assert_same_reply(model, got, want):
    decided = decided_length(model, want)
    assert got.token_ids[:decided] == want.token_ids[:decided]
    if decided == len(want.token_ids):
        assert got.token_ids == want.token_ids
        assert got.texts == want.texts
        assert got.finish_reason == want.finish_reason
        assert len(got.images) == len(want.images)
    for image, expected in zip(got.images, want.images, strict=False):
        assert relative(image, expected) <= EMBEDDING_TOLERANCE


def said_ids(model, reply):
    """What stays of a reply in its chat: all but an end token, and an image that was begun without room for it."""
    ids = list(reply.token_ids)
    if ids and ids[-1] in (model.text_config.eos_token_id, model.config.vision_start_token_id):
        ids.pop()
    if ids and ids[-1] == model.image_token_id:
        ids.append(model.config.vision_end_token_id)  # always follows, though the reply had no room left for it
    return ids


class Transcript:
    """A conversation's tokens with the embeddings fed at each, for a forward over all of it at once."""

    def __init__(self, model, post_image_positions):
        self.model = model
        self.span = 9 if post_image_positions is PostImagePositions.RELEASED else 3
        self.ids, self.embeddings, self.positions, self.replies = [], [], [], []
        self.next_position = 0

    def add_text(self, ids):
        for token in ids:
            self.ids.append(token)
            self.embeddings.append(self.model.embed_tokens(torch.tensor([[token]]))[0])
            self.positions.append([self.next_position] * 3)
            self.next_position += 1

    def add_image(self, embeddings, grid, span):
        start, (height, width) = self.next_position, grid
        self.ids += [self.model.image_token_id] * (height * width)
        self.embeddings.append(embeddings)
        self.positions += [[start, start + row, start + column] for row in range(height) for column in range(width)]
        self.next_position += span

    def add_prompt(self, conversation, images=()):
        """`images`: (embeddings, grid) in order."""
        remaining, images = list(conversation.input_ids), list(images)
        while remaining:
            if remaining[0] == self.model.image_token_id:
                embeddings, grid = images.pop(0)
                self.add_image(embeddings, grid, max(grid))
                del remaining[: grid[0] * grid[1]]
            else:
                self.add_text([int(remaining.pop(0))])

    def add_reply(self, reply, image_inputs=None):
        """What a reply has fed back, with query embeddings at its images."""
        self.replies.append((len(self.ids), reply))
        inputs = list(image_inputs or [self.model.image_prefill_embeds.weight] * len(reply.images))
        remaining = said_ids(self.model, reply)
        while remaining:
            if remaining[0] == self.model.image_token_id:
                self.add_image(inputs.pop(0), (3, 3), self.span)
                del remaining[:9]
            else:
                self.add_text([remaining.pop(0)])

    @torch.no_grad()
    def assert_replies_equal_one_forward(self):
        """Logits and embeddings of all replies, against one forward without a cache."""
        positions = torch.tensor(self.positions).T[:, None]
        hidden = self.model.run_layers(torch.cat(self.embeddings)[None], positions)[0]
        logits, predictions = self.model.qwen.lm_head(hidden), self.model.vision_head(hidden)
        for start, reply in self.replies:
            images = list(reply.images)
            for index, recorded in enumerate(reply.logits):
                if recorded is not None:
                    assert relative(recorded, logits[start + index - 1]) <= LOGIT_TOLERANCE
                if reply.token_ids[index : index + 2] == [
                    self.model.config.vision_start_token_id,
                    self.model.image_token_id,
                ]:
                    place = slice(start + index, start + index + 9)
                    assert relative(images.pop(0), predictions[place]) <= EMBEDDING_TOLERANCE
            assert not images


def find_sampling(model, tokenizer, is_wanted, **options):
    """Sampling parameters whose reply to the first text is as wanted: a reply depends on its seed, not on company."""
    params = [SamplingParams(max_new_tokens=80, temperature=1.0, seed=seed) for seed in range(40)]
    replies = generate_replies(model, [text_prompt(tokenizer)] * len(params), params, tokenizer, **options)
    return next(sampling for sampling, reply in zip(params, replies, strict=True) if is_wanted(reply))


def two_image_reply(model, tokenizer, **options):
    """A prompt, sampling parameters and their reply: text before, between and after two images."""
    sampling = find_sampling(model, tokenizer, lambda reply: len(reply.images) == 2 and all(reply.texts), **options)
    prompt = text_prompt(tokenizer)
    (reply,) = generate_replies(model, [prompt], [sampling], tokenizer, keep_logits=True, **options)
    assert len(reply.images) == 2
    return prompt, sampling, reply


# ------------------------------------------------------------------------------------------------- batches and caching


def test_random_mixed_batches_equal_single_runs(model, tokenizer):
    rng = np.random.default_rng(0)
    num_images = num_decided = num_tokens = 0
    for _ in range(NUM_RANDOM_BATCHES):
        batch = [random_prompt(tokenizer, rng) for _ in range(rng.integers(2, 6))]
        sampling = [random_sampling(rng) for _ in batch]
        together = generate_replies(model, batch, sampling, tokenizer)
        for prompt, params, batched in zip(batch, sampling, together, strict=True):
            (alone,) = generate_replies(model, [prompt], [params], tokenizer, keep_logits=True)
            assert_same_reply(model, batched, alone)
            num_images += len(alone.images)
            num_decided += decided_length(model, alone)
            num_tokens += len(alone.token_ids)
    assert num_images > 100
    assert num_decided > 0.95 * num_tokens


def test_the_recorded_prompts_in_a_batch_equal_single_runs(golden_model, golden_prompts):
    together = generate_replies(golden_model, golden_prompts, max_new_tokens=104)
    for prompt, batched in zip(golden_prompts, together, strict=True):
        (alone,) = generate_replies(golden_model, [prompt], max_new_tokens=104)
        assert batched.token_ids == alone.token_ids
        assert len(batched.images) == len(alone.images) == 1
        torch.testing.assert_close(batched.images[0], alone.images[0], atol=3e-6, rtol=0)


@pytest.mark.parametrize("post_image_positions", PostImagePositions)
def test_a_reply_of_two_images_equals_one_forward(model, tokenizer, post_image_positions):
    prompt, _, reply = two_image_reply(model, tokenizer, post_image_positions=post_image_positions)
    transcript = Transcript(model, post_image_positions)
    transcript.add_prompt(prompt.conversation)
    transcript.add_reply(reply)
    transcript.assert_replies_equal_one_forward()


@pytest.mark.parametrize("post_image_positions", PostImagePositions)
def test_a_chat_of_three_turns_equals_one_forward(model, tokenizer, post_image_positions):
    torch.manual_seed(0)
    chat = Chat(model, tokenizer, post_image_positions=post_image_positions, keep_logits=True)
    transcript = Transcript(model, post_image_positions)
    given = torch.randn(8, 32)
    turns = ((TEXTS[0], []), (f"<image>{TEXTS[2]}", [(given, (2, 4))]), (TEXTS[3], []))
    for turn, (content, images) in enumerate(turns):
        grids = [grid for _, grid in images]
        embeddings = torch.cat([torch.zeros(0, 32), *(e for e, _ in images)])
        sampling = SamplingParams(max_new_tokens=60, temperature=1.0, seed=turn, needs_image=True)
        reply = chat.reply(content, grids, embeddings, sampling)
        assert reply.images
        assert any(reply.texts)
        message = Message("user", content)
        read = encode_turn(tokenizer, message, grids) if turn else encode_prompt(tokenizer, [message], grids)
        transcript.add_prompt(read, images)
        transcript.add_reply(reply)
    transcript.assert_replies_equal_one_forward()


@pytest.mark.parametrize("post_image_positions", PostImagePositions)
def test_a_chat_equals_its_history_read_anew(model, tokenizer, post_image_positions):
    torch.manual_seed(1)
    given = torch.randn(4, 32)
    chat = Chat(model, tokenizer, post_image_positions=post_image_positions)
    sampling = SamplingParams(max_new_tokens=40, needs_image=True)
    first = chat.reply(f"<image>{TEXTS[2]}", [(2, 2)], given, sampling)
    continued = chat.reply(TEXTS[1], [], torch.zeros(0, 32), sampling)
    # The very tokens of the first reply: its text would be cut into others when tokenised again.
    asked = encode_prompt(tokenizer, [Message("user", f"<image>{TEXTS[2]}")], [(2, 2)]).input_ids
    following = encode_turn(tokenizer, Message("user", TEXTS[1]), []).input_ids
    said = said_ids(model, first)
    ids = np.concatenate([asked, said, following])
    grids = [(2, 2)] + [(3, 3)] * len(first.images)
    positions, next_position = conversation_positions(ids, grids, model.image_token_id)
    labels = np.where((ids == model.image_token_id) & (np.arange(len(ids)) >= len(asked)), ids, IGNORED_LABEL)
    prompt = Prompt(Conversation(ids, labels, positions, next_position), given)
    (anew,) = generate_replies(
        model, [prompt], [sampling], tokenizer, post_image_positions=post_image_positions, keep_logits=True
    )
    assert len(anew.images) >= 1
    assert decided_length(model, anew) == len(anew.token_ids)
    assert_same_reply(model, continued, anew)


def test_text_after_the_image_depends_on_the_positions_chosen(golden_model, golden_prompts):
    options = {"max_new_tokens": 104, "keep_logits": True}
    (released,) = generate_replies(
        golden_model, golden_prompts[:1], post_image_positions=PostImagePositions.RELEASED, **options
    )
    (trained,) = generate_replies(
        golden_model, golden_prompts[:1], post_image_positions=PostImagePositions.TRAINED, **options
    )
    torch.testing.assert_close(released.images[0], trained.images[0])
    recorded = load_file(GOLDEN / "gen_t2i0.safetensors")
    after = trained.logits[89]  # chosen from the hidden state of vision_end
    torch.testing.assert_close(after, recorded["teacher_logits_after_image"][0], atol=5e-6, rtol=0)
    assert (released.logits[89] - after).abs().max() > 0.05


# --------------------------------------------------------------------------------------------------------- image modes


def test_the_sequential_mode_equals_one_pass(model, tokenizer):
    rng = np.random.default_rng(1)
    batch = [random_prompt(tokenizer, rng) for _ in range(8)]
    sampling = [replace(random_sampling(rng), needs_image=True, max_new_tokens=80) for _ in batch]
    one_pass = generate_replies(model, batch, sampling, tokenizer, keep_logits=True)
    sequential = generate_replies(model, batch, sampling, tokenizer, image_mode=ImageMode.SEQUENTIAL)
    assert sum(len(reply.images) for reply in one_pass) > 8
    for got, want in zip(sequential, one_pass, strict=True):
        assert_same_reply(model, got, want)


def test_naive_autoregression_feeds_its_predictions_back(model, tokenizer):
    prompt, sampling, reply = two_image_reply(model, tokenizer, image_mode=ImageMode.NAIVE)
    transcript = Transcript(model, PostImagePositions.RELEASED)
    transcript.add_prompt(prompt.conversation)
    transcript.add_reply(reply, image_inputs=reply.images)
    transcript.assert_replies_equal_one_forward()
    (prefilled,) = generate_replies(model, [prompt], [sampling], tokenizer)
    torch.testing.assert_close(reply.images[0][0], prefilled.images[0][0])  # both predicted at vision_start
    assert relative(reply.images[0][1:], prefilled.images[0][1:]) > 0.1


def test_naive_autoregression_refuses_earlier_images_of_the_assistant(model, tokenizer):
    messages = [Message("user", "a"), Message("assistant", "<image>"), Message("user", "b")]
    prompt = Prompt(encode_prompt(tokenizer, messages, [(3, 3)]), torch.zeros(0, 32))
    with pytest.raises(InputError, match="naive autoregression"):
        generate_replies(model, [prompt], image_mode=ImageMode.NAIVE)


# ------------------------------------------------------------------------------------------------------------ sampling


def test_tokens_are_drawn_with_the_softmax_of_their_logits():
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    drawn = [sample_token(logits, 0.5, 1.0, generator) for _ in range(4000)]
    shares = torch.bincount(torch.tensor(drawn), minlength=4) / 4000
    torch.testing.assert_close(shares, (logits / 0.5).softmax(0), atol=0.02, rtol=0)


@pytest.mark.parametrize(("top_p", "allowed"), [(1e-9, {0}), (0.6, {0}), (0.7, {0, 2}), (0.9, {0, 1, 2})])
def test_top_p_keeps_the_fewest_likely_tokens_that_reach_it(top_p, allowed):
    logits = torch.tensor([0.64, 0.09, 0.24, 0.03]).log()
    generator = torch.Generator().manual_seed(0)
    assert {sample_token(logits, 1.0, top_p, generator) for _ in range(400)} == allowed


def test_a_tiny_temperature_is_greedy():
    generator = torch.Generator().manual_seed(0)
    assert sample_token(torch.tensor([1.0, 80.0, 79.9]), 1e-300, 1.0, generator) == 1


def test_near_ties_draw_the_same_token():
    # Rounding swaps which of two tokens is the more likely; the draws must not care.
    first = torch.tensor([1.0, 1.0 + 1e-7, 0.0])
    second = torch.tensor([1.0 + 1e-7, 1.0, 0.0])
    for seed in range(100):
        generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
        assert sample_token(first, 1.0, 0.9, generators[0]) == sample_token(second, 1.0, 0.9, generators[1])


def test_a_seed_gives_one_reply_and_another_seed_another(model, tokenizer):
    params = [SamplingParams(max_new_tokens=30, temperature=1.0, seed=seed) for seed in (3, 4, 3)]
    replies = generate_replies(model, [text_prompt(tokenizer)] * 3, params)
    assert replies[0].token_ids == replies[2].token_ids
    assert replies[0].token_ids != replies[1].token_ids


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"seed": -1},
        {"stop": ("end", "")},
    ],
)
def test_values_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        SamplingParams(**wrong)


def test_an_image_can_be_demanded(golden_model, golden_prompts):
    start = golden_model.config.vision_start_token_id
    weight = golden_model.qwen.lm_head.weight
    silenced = weight[start].clone()
    with torch.no_grad():
        weight[start] = 0  # this model would now go on writing
        try:
            (free,) = generate_replies(golden_model, golden_prompts[:1], max_new_tokens=130)
            needs_image = SamplingParams(max_new_tokens=130, needs_image=True)
            (demanded,) = generate_replies(golden_model, golden_prompts[:1], [needs_image])
        finally:
            weight[start] = silenced
    assert free.images == []
    assert len(demanded.images) == 1
    assert demanded.images[0].shape == (81, golden_model.hidden_size)


def test_image_tokens_are_never_sampled(model, tokenizer):
    weight = model.qwen.lm_head.weight
    before = weight.clone()
    with torch.no_grad():
        loud = [model.image_token_id, model.config.vision_end_token_id]
        weight[loud] *= 50  # now the largest logit at every other token
        try:
            (reply,) = generate_replies(model, [text_prompt(tokenizer)], max_new_tokens=60, keep_logits=True)
        finally:
            weight.copy_(before)
    assert any(int(logits.argmax()) in loud for logits in reply.logits if logits is not None)
    assert reply.token_ids.count(model.image_token_id) == 9 * len(reply.images)


# ---------------------------------------------------------------------------------------------- text, streams and stops


def test_text_comes_in_whole_characters(tokenizer):
    text = "日本 😀 é, größer"
    stream = TextStream(tokenizer)
    ids = encode_text(tokenizer, text)
    pieces = [stream.push(token) for token in ids] + [stream.flush()]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert len([piece for piece in pieces if piece]) > 5
    assert "" in pieces[:-1]  # some tokens end inside a character


def test_bytes_that_never_become_a_character_are_replaced_at_the_end(tokenizer):
    stream = TextStream(tokenizer)
    half = encode_text(tokenizer, "😀")[:-1]
    assert [stream.push(token) for token in half] == [""] * len(half)
    assert set(stream.flush()) == {"\ufffd"}


@pytest.mark.parametrize(
    ("text", "stops", "said", "is_stopped"),
    [
        ("one STOP two", ("STOP",), "one ", True),
        ("one STO", ("STOP",), "one STO", False),
        ("aab", ("ab",), "a", True),
        ("one two", ("wo", "ne"), "o", True),
        ("图中有方形", ("有",), "图中", True),
        ("STOP", ("STOP",), "", True),
    ],
)
def test_text_ends_before_a_stop_string(tokenizer, text, stops, said, is_stopped):
    stream = TextStream(tokenizer, stops)
    got = ""
    for token in encode_text(tokenizer, text):
        got += stream.push(token)
        assert said.startswith(got)  # nothing is taken back
        if stream.is_stopped:
            break
    assert got + stream.flush() == said
    assert stream.is_stopped is is_stopped


def test_a_stream_is_the_replies_piece_by_piece(model, tokenizer):
    rng = np.random.default_rng(2)
    batch = [random_prompt(tokenizer, rng) for _ in range(4)]
    sampling = [replace(random_sampling(rng), temperature=1.0, max_new_tokens=60) for _ in batch]
    whole = generate_replies(model, batch, sampling, tokenizer)
    pieces = []
    for piece in stream_replies(model, batch, sampling, tokenizer):
        assert torch.is_grad_enabled()  # what is switched off while a piece is made is on again for its reader
        pieces.append(piece)
    for row, reply in enumerate(whole):
        mine = [piece for piece in pieces if piece.row == row]
        texts, images = [""], []
        for piece in mine:
            texts[-1] += piece.text
            if piece.image is not None:
                images.append(piece.image)
                texts.append("")
        assert texts == reply.texts
        assert len(images) == len(reply.images)
        assert not any(image.requires_grad for image in images)
        assert all(torch.equal(a, b) for a, b in zip(images, reply.images, strict=True))
        assert mine[-1].reply.token_ids == reply.token_ids
        assert all(piece.reply is None for piece in mine[:-1])
    first_end = next(i for i, piece in enumerate(pieces) if piece.reply is not None)
    assert {piece.row for piece in pieces[:first_end] if piece.text} == set(range(4))  # rows advance side by side


def test_a_reply_is_the_text_of_its_tokens_with_marks_at_images(model, tokenizer):
    _, _, reply = two_image_reply(model, tokenizer)
    assert "".join(reply.texts) == tokenizer.decode(reply.token_ids, skip_special_tokens=True)
    assert reply.content.split("<image>") == reply.texts


def chat_and_reply(model, tokenizer, sampling):
    chat = Chat(model, tokenizer, keep_logits=True)
    return chat, chat.reply(TEXTS[0], [], torch.zeros(0, 32), sampling)


def test_a_stop_string_ends_the_reply_and_leaves_no_trace_in_the_chat(model, tokenizer):
    def is_readable(reply):
        return len(reply.texts[0]) >= 10 and "\ufffd" not in reply.texts[0][:10]

    sampling = find_sampling(model, tokenizer, is_readable)
    _, free = chat_and_reply(model, tokenizer, sampling)
    text = free.texts[0]
    stop = text[4:10]
    chat, reply = chat_and_reply(model, tokenizer, replace(sampling, stop=(stop,)))
    assert reply.finish_reason == "stop"
    assert reply.texts == [text[: text.index(stop)]]
    num_kept = len(reply.token_ids)
    assert reply.token_ids == free.token_ids[:num_kept]
    assert stop not in tokenizer.decode(free.token_ids[: num_kept + 1])  # so some of its tokens had been fed
    assert len(reply.logits) == num_kept
    following = chat.reply(TEXTS[1], [], torch.zeros(0, 32), SamplingParams(max_new_tokens=50, needs_image=True))
    transcript = Transcript(model, PostImagePositions.RELEASED)
    transcript.add_prompt(encode_prompt(tokenizer, [Message("user", TEXTS[0])], []))
    transcript.add_reply(reply)
    transcript.add_prompt(encode_turn(tokenizer, Message("user", TEXTS[1]), []))
    transcript.add_reply(following)
    transcript.assert_replies_equal_one_forward()


def test_stop_strings_need_a_tokenizer(model, tokenizer):
    with pytest.raises(InputError, match="give the tokenizer"):
        generate_replies(model, [text_prompt(tokenizer)], [SamplingParams(stop=("end",))])


# ----------------------------------------------------------------------------------------------------- edges of prompts


def image_free_prompt(model, ids):
    ids = np.array(ids, dtype=np.int64)
    positions, following = conversation_positions(ids, [], model.image_token_id)
    return Prompt(Conversation(ids, np.full_like(ids, IGNORED_LABEL), positions, following), torch.zeros(0, 32))


def continued(prompt, ids, model):
    """The text prompt with more tokens behind it, no image among them."""
    return image_free_prompt(model, [*prompt.conversation.input_ids, *ids])


@pytest.mark.parametrize("image_mode", [ImageMode.ONE_PASS, ImageMode.SEQUENTIAL])
def test_after_a_prompt_that_ends_in_vision_start_the_reply_begins_with_the_image(model, tokenizer, image_mode):
    prompt = text_prompt(tokenizer, TEXTS[2])
    sampling = SamplingParams(max_new_tokens=60, needs_image=True)
    (whole,) = generate_replies(model, [prompt], [sampling], tokenizer)
    begin = whole.token_ids.index(model.config.vision_start_token_id) + 1
    opened = continued(prompt, whole.token_ids[:begin], model)
    # In company of a prompt that doesn't: the row waits from its first step.
    shorter = replace(sampling, max_new_tokens=60 - begin)
    reply, other = generate_replies(model, [opened, prompt], [shorter, sampling], tokenizer, image_mode=image_mode)
    assert reply.token_ids == whole.token_ids[begin:]
    assert reply.texts == ["", *whole.texts[1:]]
    assert relative(reply.images[0], whole.images[0]) <= EMBEDDING_TOLERANCE
    assert other.token_ids == whole.token_ids


def test_a_prompt_may_be_vision_start_alone(model):
    opened = image_free_prompt(model, [model.config.vision_start_token_id])
    (reply,) = generate_replies(model, [opened], max_new_tokens=12, keep_logits=True)
    assert len(reply.images) == 1
    transcript = Transcript(model, PostImagePositions.RELEASED)
    transcript.add_text([model.config.vision_start_token_id])
    transcript.add_reply(reply)
    with torch.no_grad():
        hidden = model.run_layers(torch.cat(transcript.embeddings)[None], torch.tensor(transcript.positions).T[:, None])
    assert relative(reply.images[0], model.vision_head(hidden[0, :9])) <= EMBEDDING_TOLERANCE


def test_a_prompt_that_ends_inside_an_image_is_refused(model):
    ids = np.array([1, model.config.vision_start_token_id] + [model.image_token_id] * 4)
    positions, following = conversation_positions(ids, [(2, 2)], model.image_token_id)
    prompt = Prompt(Conversation(ids, np.full_like(ids, IGNORED_LABEL), positions, following), torch.zeros(4, 32))
    with pytest.raises(InputError, match=r"ends inside an image.*<\|vision_end\|>"):
        generate_replies(model, [prompt])


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(InputError, match="no tokens"):
        generate_replies(model, [image_free_prompt(model, [])])


def test_images_and_embeddings_must_agree(model, tokenizer):
    encoded = encode_prompt(tokenizer, [Message("user", "<image>")], [(2, 2)])
    with pytest.raises(ShapeError, match="4 tokens, but 3 embeddings"):
        generate_replies(model, [Prompt(encoded, torch.zeros(3, 32))])
    said = [Message("user", "draw"), Message("assistant", "<image>"), Message("user", "thanks")]
    with pytest.raises(ShapeError, match=r"4 tokens.*multiple of the model's 9"):
        generate_replies(model, [Prompt(encode_prompt(tokenizer, said, [(2, 2)]), torch.zeros(0, 32))])


def test_no_room_for_an_image_ends_the_reply(golden_model, golden_prompts):
    (reply,) = generate_replies(golden_model, golden_prompts[:1], max_new_tokens=20)
    assert reply.finish_reason == "length"
    assert reply.images == []
    assert len(reply.token_ids) <= 20


@pytest.mark.parametrize(("room", "num_images"), [(8, 0), (9, 1), (10, 1)])
def test_an_image_fits_or_is_not_begun(model, tokenizer, room, num_images):
    opened = continued(text_prompt(tokenizer), [model.config.vision_start_token_id], model)
    (reply,) = generate_replies(model, [opened], max_new_tokens=room)
    assert len(reply.images) == num_images
    assert reply.finish_reason == "length"
    assert reply.token_ids == ([model.image_token_id] * 9 + [model.config.vision_end_token_id])[: room * num_images]


def test_a_reply_ends_where_the_models_context_does(model, tokenizer):
    prompt = text_prompt(tokenizer)
    length = len(prompt.conversation.input_ids)
    nearly_full = continued(prompt, [1] * (1024 - 3 - length), model)
    (reply,) = generate_replies(model, [nearly_full], [SamplingParams(max_new_tokens=512)])
    assert reply.finish_reason == "length"
    assert len(reply.token_ids) == 3
    with pytest.raises(InputError, match=r"1,024 tokens.*context holds 1,024"):
        generate_replies(model, [continued(nearly_full, [1] * 3, model)])


def test_a_refused_message_leaves_the_chat_as_it_was(model, tokenizer):
    sampling = SamplingParams(max_new_tokens=20)
    nothing = torch.zeros(0, 32)
    replies = []
    for is_disturbed in (False, True):
        chat = Chat(model, tokenizer)
        chat.reply(TEXTS[0], [], nothing, sampling)
        if is_disturbed:
            with pytest.raises(ShapeError):
                chat.reply("<image>", [(2, 2)], nothing, sampling)
        replies.append(chat.reply(TEXTS[1], [], nothing, sampling))
    assert replies[0].token_ids == replies[1].token_ids
