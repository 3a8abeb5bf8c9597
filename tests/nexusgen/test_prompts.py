import numpy as np
import pytest

from nexusgen import prompts
from nexusgen.errors import InputError, ModelError, SampleError, ShapeError
from nexusgen.prompts import (
    IGNORED_LABEL,
    encode_conversation,
    encode_prompt,
    encode_text,
    generation_messages,
    load_tokenizer,
    task_of,
    understanding_messages,
    validate_messages,
)
from nexusgen.schema import Message

GENERATION = (Message("user", "Draw: a red star"), Message("assistant", "Here it is: <image>"))
EDITING = (Message("user", "<image> Make it blue."), Message("assistant", "<image>"))
UNDERSTANDING = (Message("user", "<image>\nWhat is it?"), Message("assistant", "a star"))


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_folder):
    return load_tokenizer(tiny_tokenizer_folder)


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False)


def test_task_is_who_says_images():
    assert task_of(GENERATION) == "generation"
    assert task_of(EDITING) == "editing"
    assert task_of(UNDERSTANDING) == "understanding"
    assert task_of((Message("user", "hello"), Message("assistant", "hi"))) == "understanding"


def test_template_is_qwens(tokenizer):
    conversation = encode_conversation(tokenizer, GENERATION, [(1, 2)])
    assert decoded(tokenizer, conversation.input_ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nDraw: a red star<|im_end|>\n"
        "<|im_start|>assistant\nHere it is: <|vision_start|><|image_pad|><|image_pad|><|vision_end|><|im_end|>"
    )


def test_learned_are_the_assistants_words_images_and_end(tokenizer):
    conversation = encode_conversation(tokenizer, EDITING, [(1, 1), (1, 2)])
    learned = conversation.labels != IGNORED_LABEL
    assert decoded(tokenizer, conversation.input_ids[learned]) == (
        "<|vision_start|><|image_pad|><|image_pad|><|vision_end|><|im_end|>"
    )
    assert np.array_equal(conversation.labels[learned], conversation.input_ids[learned])


def test_positions_and_ids_have_one_length(tokenizer):
    conversation = encode_conversation(tokenizer, UNDERSTANDING, [(2, 2)])
    assert conversation.position_ids.shape == (3, len(conversation.input_ids))
    assert conversation.next_position == len(conversation.input_ids) - 2  # four image tokens span two positions


def test_a_prompt_ends_where_the_assistant_begins_and_learns_nothing(tokenizer):
    prompt = encode_prompt(tokenizer, GENERATION[:1], [])
    assert decoded(tokenizer, prompt.input_ids).endswith("a red star<|im_end|>\n<|im_start|>assistant\n")
    assert (prompt.labels == IGNORED_LABEL).all()
    whole = encode_conversation(tokenizer, GENERATION, [(1, 2)])
    assert np.array_equal(whole.input_ids[: len(prompt.input_ids)], prompt.input_ids)


def test_control_tokens_in_text_are_plain_text(tokenizer):
    ids = encode_text(tokenizer, "say <|im_end|> and <|image_pad|>")
    assert decoded(tokenizer, ids) == "say <|im_end|> and <|image_pad|>"
    assert not set(ids) & set(tokenizer.get_added_vocab().values())


def test_any_text_has_tokens(tokenizer):
    text = "日本語 😀 \x00 é"
    assert decoded(tokenizer, encode_text(tokenizer, text)) == text


def test_grids_and_marks_must_agree(tokenizer):
    for grids in ([], [(1, 1), (1, 1)]):
        with pytest.raises(ShapeError):
            encode_conversation(tokenizer, GENERATION, grids)


def test_a_prompt_of_100_000_characters_is_refused_with_the_numbers(tokenizer):
    with pytest.raises(InputError, match=r"100,000 characters.*32,768"):
        encode_prompt(tokenizer, [Message("user", "a" * 100_000)], [])


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"tokenizer_config\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("messages", "num_images", "code"),
    [
        ((), 0, "messages_invalid"),
        (UNDERSTANDING[:1], 1, "messages_invalid"),
        (UNDERSTANDING[1:], 0, "messages_invalid"),
        ((UNDERSTANDING[0], UNDERSTANDING[0]), 2, "messages_invalid"),
        (UNDERSTANDING, 0, "messages_invalid"),
        (UNDERSTANDING, 2, "messages_invalid"),
        ((UNDERSTANDING[0], Message("assistant", "  ")), 1, "text_invalid"),
        ((UNDERSTANDING[0], Message("assistant", "\ud83d")), 1, "text_invalid"),
        ((*UNDERSTANDING, Message("system", "late")), 1, "messages_invalid"),
        ((Message("system", "<image>"), *UNDERSTANDING), 2, "messages_invalid"),
    ],
)
def test_bad_conversations_have_a_reason(messages, num_images, code):
    with pytest.raises(SampleError) as caught:
        validate_messages(messages, num_images)
    assert caught.value.reason_code == code


@pytest.mark.parametrize("lang", ["en", "zh", "fr"])
def test_captions_become_conversations(lang):
    for make, task in ((generation_messages, "generation"), (understanding_messages, "understanding")):
        messages = make("a <image> of a cat", lang)
        validate_messages(messages, 1)
        assert task_of(messages) == task
    assert prompts.plain_text("<image>") != "<image>"
