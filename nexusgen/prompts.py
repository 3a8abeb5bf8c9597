"""Conversations as token ids: roles, image marks, chat template, labels.

Source of the template: Qwen2.5's chat format (`<|im_start|>role`, text, `<|im_end|>`) and the released system prompt.
Text from data or users never becomes a control token: it is tokenised with special tokens split into plain text.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from jaxtyping import Int
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nexusgen import defaults
from nexusgen.errors import InputError, ModelError, ShapeError
from nexusgen.messages import MAX_PROMPT_CHARACTERS, is_unicode
from nexusgen.positions import conversation_positions
from nexusgen.schema import IMAGE_MARK, Message

IGNORED_LABEL = -100
CONTROL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|endoftext|>")
_CONSTANT_TEXTS = ("\n", f"system\n{defaults.SYSTEM_PROMPT}", "user\n", "assistant\n")  # as conversations cut them

TokenGrid = tuple[int, int]


@dataclass(frozen=True)
class Conversation:
    """A tokenised conversation. `labels` is -100 where nothing is learned; image_pad stays at target positions."""

    input_ids: Int[np.ndarray, " length"]
    labels: Int[np.ndarray, " length"]
    position_ids: Int[np.ndarray, "3 length"]
    next_position: int


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder. Raises: ModelError if it is absent or damaged, or lacks control tokens."""
    if not (folder / "tokenizer_config.json").is_file():
        raise ModelError(f"{folder}: no tokenizer_config.json; expected a tokenizer beside the language model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # for a damaged tokenizer.json, tokenizers has no narrower class
        raise ModelError(f"{folder}: the tokenizer's files can't be read: {error!r}") from None
    missing = [token for token in CONTROL_TOKENS if token not in tokenizer.get_added_vocab()]
    if missing:
        raise ModelError(f"{folder}: the tokenizer lacks the control tokens {', '.join(missing)}")
    return tokenizer


class _Spelling:
    """Token ids of one tokenizer: those of control tokens, and of the texts that every conversation holds."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.control = {token: int(tokenizer.convert_tokens_to_ids(token)) for token in CONTROL_TOKENS}
        self.constant = {text: _encode(tokenizer, text) for text in _CONSTANT_TEXTS}


# Kept as long as the tokenizer is; its vocabulary doesn't change once it is loaded.
_spellings: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, _Spelling] = weakref.WeakKeyDictionary()


def _spelling_of(tokenizer: PreTrainedTokenizerBase) -> _Spelling:
    known = _spellings.get(tokenizer)
    if known is None:
        known = _spellings[tokenizer] = _Spelling(tokenizer)
    return known


class _Tokens:
    """Accumulates ids; adjacent text is tokenised as one string, as the chat template would."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.spelling = _spelling_of(tokenizer)
        self.ids: list[int] = []
        self.learned: list[tuple[int, int]] = []  # ranges of ids, in order
        self._text = ""
        self._text_learned = False

    def text(self, text: str, learned: bool) -> None:
        if learned != self._text_learned:
            self.flush()
            self._text_learned = learned
        self._text += text

    def control(self, token: str, learned: bool, count: int = 1) -> None:
        self.flush()
        self._add([self.spelling.control[token]] * count, learned)

    def flush(self) -> None:
        if self._text:
            ids = self.spelling.constant.get(self._text)
            self._add(encode_text(self.tokenizer, self._text) if ids is None else ids, self._text_learned)
            self._text = ""

    def _add(self, ids: Sequence[int], learned: bool) -> None:
        if learned:
            self.learned.append((len(self.ids), len(self.ids) + len(ids)))
        self.ids += ids


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of plain text; control tokens written in it are spelled out as ordinary text.

    Raises: InputError if the text isn't valid Unicode.
    """
    _check_unicode(text)
    return _encode(tokenizer, text)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """What `tokenizer(text, add_special_tokens=False, split_special_tokens=True)` gives, at a fifth of its cost.

    Its settings are those of the last call, whoever made it, so they are looked at before each.
    """
    backend: tokenizers.Tokenizer = tokenizer.backend_tokenizer
    if not backend.encode_special_tokens:
        backend.encode_special_tokens = True
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    (encoding,) = backend.encode_batch_fast([text], add_special_tokens=False)  # fast: without characters' offsets
    ids: list[int] = encoding.ids
    return ids


def _check_unicode(text: str) -> None:
    if not is_unicode(text):
        raise InputError("the text isn't valid Unicode: give it in UTF-8")


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], grids: Sequence[TokenGrid]
) -> Conversation:
    """A whole conversation for training; `grids` gives each image's token grid (h, w), in order.

    Learned: every assistant turn's text, its image blocks and its `<|im_end|>`.
    Raises: ShapeError if the number of grids and image marks differ.
    """
    tokens = _Tokens(tokenizer)
    remaining = _encode_messages(tokens, messages, list(grids))
    if remaining:
        raise ShapeError(f"{len(grids)} image grids for {len(grids) - len(remaining)} {IMAGE_MARK} marks")
    return _finish(tokens, grids)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], grids: Sequence[TokenGrid]
) -> Conversation:
    """A conversation up to the assistant's next words: ends with `<|im_start|>assistant\\n`.

    Labels are -100, but for image_pad at the pictures that the assistant has made earlier: as in training, they are
    target positions, which hold query embeddings. `grids` gives each image's token grid (h, w), in order.
    Raises: InputError if the text is longer than 32,768 characters; ShapeError as `encode_conversation`.
    """
    check_messages(messages)
    tokens = _Tokens(tokenizer)
    remaining = _encode_messages(tokens, messages, list(grids))
    return _finish_prompt(tokens, grids, remaining)


def encode_turn(tokenizer: PreTrainedTokenizerBase, message: Message, grids: Sequence[TokenGrid]) -> Conversation:
    """What follows a reply of the assistant in one conversation: the end of its turn, then the user's `message`, up to
    the assistant's next words. Positions count from 0.

    Raises: InputError and ShapeError as `encode_prompt`.
    """
    check_messages([message])
    tokens = _Tokens(tokenizer)
    tokens.control("<|im_end|>", learned=False)
    tokens.text("\n", learned=False)
    remaining = _encode_message(tokens, message, list(grids))
    return _finish_prompt(tokens, grids, remaining)


def check_messages(messages: Sequence[Message]) -> None:
    """Raises: InputError if the text is too long, or isn't valid Unicode; needs no tokenizer."""
    for message in messages:
        _check_unicode(message.content)
    num_characters = sum(len(m.content) for m in messages)
    if num_characters > MAX_PROMPT_CHARACTERS:
        raise InputError(
            f"the prompt has {num_characters:,} characters; at most {MAX_PROMPT_CHARACTERS:,} are accepted: shorten it"
        )


def _finish_prompt(tokens: _Tokens, grids: Sequence[TokenGrid], remaining: Sequence[TokenGrid]) -> Conversation:
    if remaining:
        raise ShapeError(f"{len(grids)} image grids for {len(grids) - len(remaining)} {IMAGE_MARK} marks")
    tokens.text("\n", learned=False)
    tokens.control("<|im_start|>", learned=False)
    tokens.text("assistant\n", learned=False)
    conversation = _finish(tokens, grids)
    is_target = conversation.labels == tokens.spelling.control["<|image_pad|>"]
    conversation.labels[~is_target] = IGNORED_LABEL
    return conversation


def _encode_messages(tokens: _Tokens, messages: Sequence[Message], grids: list[TokenGrid]) -> list[TokenGrid]:
    if not messages or messages[0].role != "system":
        messages = (Message("system", defaults.SYSTEM_PROMPT), *messages)
    for turn, message in enumerate(messages):
        if turn:
            tokens.text("\n", learned=False)
        grids = _encode_message(tokens, message, grids)
    return grids


def _encode_message(tokens: _Tokens, message: Message, grids: list[TokenGrid]) -> list[TokenGrid]:
    """Append one message; takes its images' grids from `grids` and gives back those left."""
    learned = message.role == "assistant"
    tokens.control("<|im_start|>", learned=False)
    tokens.text(f"{message.role}\n", learned=False)
    pieces = message.content.split(IMAGE_MARK)
    num_images = len(pieces) - 1
    if num_images > len(grids):
        raise ShapeError(f"more {IMAGE_MARK} marks than image grids")
    for index, piece in enumerate(pieces):
        if index:
            height, width = grids[index - 1]
            tokens.control("<|vision_start|>", learned)
            tokens.control("<|image_pad|>", learned, count=height * width)
            tokens.control("<|vision_end|>", learned)
        tokens.text(piece, learned)
    tokens.control("<|im_end|>", learned)
    return grids[num_images:]


def _finish(tokens: _Tokens, grids: Sequence[TokenGrid]) -> Conversation:
    tokens.flush()
    input_ids = np.array(tokens.ids, dtype=np.int64)
    labels = np.full_like(input_ids, IGNORED_LABEL)
    for start, end in tokens.learned:
        labels[start:end] = input_ids[start:end]
    image_token_id = tokens.spelling.control["<|image_pad|>"]
    position_ids, next_position = conversation_positions(input_ids, grids, image_token_id)
    return Conversation(input_ids, labels, position_ids, next_position)
