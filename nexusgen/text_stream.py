"""Tokens as text while they are written: whole characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"  # what bytes that don't make a whole character are decoded to


class TextStream:
    """Tokens as text, given out as soon as it is certain: in whole characters, and never a stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self.is_stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids: list[int] = []  # tokens of a character that isn't finished
        self._held = ""  # may be the beginning of a stop string

    def push(self, token_id: int) -> str:
        """The text that one more token makes certain; sets `is_stopped` if a stop string follows it."""
        self._ids.append(token_id)
        text = decode_text(self._tokenizer, self._ids)
        if text.endswith(_UNFINISHED):
            return ""
        self._ids = []
        text = self._held + text
        self._held = ""
        found = [text.index(stop) for stop in self._stop if stop in text]
        if found:
            self.is_stopped = True
            return text[: min(found)]
        certain = len(text) - _num_held(text, self._stop)
        self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """The text held back, when no more of it can come. Bytes that make no character become U+FFFD."""
        text = self._held + decode_text(self._tokenizer, self._ids)
        self._ids, self._held = [], ""
        return text


def decode_text(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """The text of tokens; control tokens have none."""
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _num_held(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` with which one of `stops` begins."""
    lengths = [length for stop in stops for length in range(1, len(stop)) if text.endswith(stop[:length])]
    return max(lengths, default=0)
