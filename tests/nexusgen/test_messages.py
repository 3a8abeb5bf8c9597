import pytest

from nexusgen.errors import SampleError
from nexusgen.messages import (
    generation_messages,
    is_unicode,
    plain_text,
    task_of,
    understanding_messages,
    validate_messages,
)
from nexusgen.schema import Message

GENERATION = (Message("user", "Draw: a red star"), Message("assistant", "Here it is: <image>"))
EDITING = (Message("user", "<image> Make it blue."), Message("assistant", "<image>"))
UNDERSTANDING = (Message("user", "<image>\nWhat is it?"), Message("assistant", "a star"))


def test_task_is_who_says_images():
    assert task_of(GENERATION) == "generation"
    assert task_of(EDITING) == "editing"
    assert task_of(UNDERSTANDING) == "understanding"
    assert task_of((Message("user", "hello"), Message("assistant", "hi"))) == "understanding"


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
    assert plain_text("<image>") != "<image>"


def test_lone_surrogates_are_no_unicode():
    for text in ("", "plain", "日本語 😀 \x00", "\ud7ff\ue000\U0010ffff"):
        assert is_unicode(text)
    for text in ("\ud800", "a\udcff", "\ud83d\ude00", "日\udfff"):
        assert not is_unicode(text)
