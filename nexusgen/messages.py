"""Conversations as messages: their task, their rules, and the paper's templates that make them of image-text pairs.

Everything here is about text; reader processes import it, which are to start without torch. Tokens: `prompts.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from nexusgen.errors import SampleError
from nexusgen.schema import IMAGE_MARK, Message, Task

MAX_PROMPT_CHARACTERS = 32_768  # about 8,000 tokens of English: room for any prompt that fits the model's context


def task_of(messages: Sequence[Message]) -> Task:
    """The task that a conversation is: who says images decides, never a field of the data."""
    said_by = {
        role: sum(m.content.count(IMAGE_MARK) for m in messages if m.role == role) for role in ("user", "assistant")
    }
    if said_by["assistant"]:
        return "editing" if said_by["user"] else "generation"
    return "understanding"


def image_roles(messages: Sequence[Message]) -> list[str]:
    """Who says each image, in order: `user` or `assistant`."""
    return [m.role for m in messages for _ in range(m.content.count(IMAGE_MARK))]


def validate_messages(messages: Sequence[Message], num_images: int) -> None:
    """Check a sample's conversation: user and assistant in turn, text in every answer, marks matching images.

    Raises: SampleError `messages_invalid` or `text_invalid`.
    """
    turns = [m for m in messages if m.role != "system"]
    if len(messages) - len(turns) > 1 or (len(turns) != len(messages) and messages[0].role != "system"):
        raise SampleError("messages_invalid", "a system message may only stand first")
    if len(turns) != len(messages) and IMAGE_MARK in messages[0].content:
        raise SampleError(
            "messages_invalid", f"the system message holds {IMAGE_MARK}; only user and assistant say images"
        )
    if not turns:
        raise SampleError("messages_invalid", "no messages")
    for index, message in enumerate(turns):
        expected = ("user", "assistant")[index % 2]
        if message.role != expected:
            raise SampleError("messages_invalid", f"message {index} is said by {message.role!r}, expected {expected!r}")
        if not message.content.strip():
            raise SampleError("text_invalid", f"message {index} ({message.role}) is empty")
        _check_unicode(message.content, index)
    if turns[-1].role != "assistant":
        raise SampleError("messages_invalid", "the last message must be the assistant's")
    marks = sum(m.content.count(IMAGE_MARK) for m in messages)
    if marks != num_images:
        raise SampleError("messages_invalid", f"{marks} {IMAGE_MARK} marks in the text, {num_images} images")


def _check_unicode(text: str, index: int) -> None:
    if not is_unicode(text):
        raise SampleError("text_invalid", f"message {index} isn't valid Unicode")


def is_unicode(text: str) -> bool:
    """False if the text holds lone surrogates, as bytes on a command line that aren't UTF-8 become."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:  # raised for surrogates alone
        return False
    return True


_GENERATION_REPLY = {
    "en": f"Here is an image based on the description: {IMAGE_MARK}",
    "zh": f"这是根据您的描述生成的图像：{IMAGE_MARK}",
}
_GENERATION_REQUEST = {
    "en": "Please generate an image based on the following description: {}",
    "zh": "请根据以下描述生成一张图像：{}",
}
_UNDERSTANDING_REQUEST = {"en": f"{IMAGE_MARK}\nDescribe this image.", "zh": f"{IMAGE_MARK}\n请描述这张图片。"}


def generation_messages(caption: str, lang: str) -> tuple[Message, ...]:
    """An image-text pair as a generation sample, in the caption's language (English unless `zh`)."""
    key = "zh" if lang == "zh" else "en"
    return (
        Message("user", _GENERATION_REQUEST[key].format(plain_text(caption))),
        Message("assistant", _GENERATION_REPLY[key]),
    )


def understanding_messages(caption: str, lang: str) -> tuple[Message, ...]:
    """An image-text pair as an understanding sample: describe the image."""
    key = "zh" if lang == "zh" else "en"
    return (Message("user", _UNDERSTANDING_REQUEST[key]), Message("assistant", plain_text(caption)))


def plain_text(text: str) -> str:
    """Text in which an image mark, being the data's own words, is no mark."""
    return text.replace(IMAGE_MARK, "< image >")
