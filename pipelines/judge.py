"""A judge: any server that speaks OpenAI's chat completions and sees pictures. It is asked for whole numbers.

The key comes from the environment variable NEXUSGEN_JUDGE_API_KEY and goes nowhere but into the request. Who answered
is what the answers themselves say (`model` and `system_fingerprint`), as an alias like `gpt-4o` moves.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit

from PIL import Image

from nexusgen.errors import InputError, ResourceError

KEY_VARIABLE = "NEXUSGEN_JUDGE_API_KEY"
MAX_ANSWER_TOKENS = 512
TIMEOUT_S = 180
PAUSES_S = (1.0, 4.0, 16.0)  # before another attempt, if the judge is busy or away
_PASSING = (408, 409, 429)  # and all from 500 on: another attempt may succeed


@dataclass(frozen=True)
class Verdict:
    """A judge's answer, and who gave it."""

    text: str
    model: str
    system_fingerprint: str | None


@dataclass(frozen=True)
class Judge:
    """Where a judge answers (a base URL such as https://api.openai.com/v1), and the name of its model."""

    url: str
    model: str

    def ask(self, question: str, pictures: Sequence[bytes], temperature: float = 0.0) -> Verdict:
        """One question about pictures (compressed files), in a conversation of its own.

        Raises: InputError if the judge refuses; ResourceError if it doesn't answer after several attempts.
        """
        content = [
            {"type": "text", "text": question},
            *({"type": "image_url", "image_url": {"url": _data_uri(data)}} for data in pictures),
        ]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": temperature,
            "max_tokens": MAX_ANSWER_TOKENS,
        }
        answer = self._post(json.dumps(body).encode())
        try:
            said = json.loads(answer)
            text = said["choices"][0]["message"]["content"]
            fingerprint = said.get("system_fingerprint")
            return Verdict(str(text), str(said.get("model") or self.model), fingerprint and str(fingerprint))
        except (ValueError, LookupError, TypeError, AttributeError):
            found = answer[:200].decode(errors="replace")
            raise InputError(f"judge={self.url} answered {found!r}; wanted OpenAI's chat completion") from None

    def digest(self, question: str, pictures: Sequence[bytes]) -> str:
        """What an answer belongs to: equal exactly if judge, question and pictures are."""
        whole = hashlib.sha256(json.dumps([asdict(self), question]).encode())
        for data in pictures:
            whole.update(hashlib.sha256(data).digest())
        return whole.hexdigest()

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        url = f"{self.url.rstrip('/')}/chat/completions"
        reason = ""
        for pause in (0.0, *PAUSES_S):
            time.sleep(pause)
            try:
                with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=TIMEOUT_S) as response:
                    return bytes(response.read())
            except urllib.error.HTTPError as error:
                said = error.read(500).decode(errors="replace")
                if error.code < 500 and error.code not in _PASSING:
                    hint = f"; the key is read from {KEY_VARIABLE}" if error.code in (401, 403) else ""
                    raise InputError(f"judge={self.url} refuses with status {error.code}: {said}{hint}") from None
                reason = f"status {error.code}: {said}"
            except (OSError, http.client.HTTPException) as error:  # no connection, or one that breaks off
                reason = str(error) or type(error).__name__
        raise ResourceError(
            f"judge={self.url} doesn't answer after {len(PAUSES_S) + 1} attempts ({reason}); "
            "what it has answered is kept: start again when it is there"
        )


def check_url(url: str) -> None:
    """Raises: ValueError for what isn't a base URL, or holds a secret that would be recorded."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"judge={url}: wanted a base URL such as https://api.openai.com/v1")
    if parts.username or parts.password or parts.query:
        raise ValueError(
            f"judge: a URL without name, password and query is wanted; the key is read from {KEY_VARIABLE}"
        )


def find_scores(text: str, criteria: Mapping[str, str], lowest: int, highest: int) -> list[float] | None:
    """The whole number that an answer gives for each criterion, in order; None if one is missing or out of range."""
    scores = []
    for name in criteria:
        found = re.search(rf"{re.escape(name)}[*\s]*[:：=][*\s]*(\d+)(?![\d.])", text, re.IGNORECASE)
        if found is None or not lowest <= int(found[1]) <= highest:
            return None
        scores.append(float(found[1]))
    return scores


def write_question(task: str, criteria: Mapping[str, str], lowest: int, highest: int) -> str:
    """A question for whole numbers about what `task` tells."""
    example = next(iter(criteria))
    return "\n".join(
        [
            task,
            "",
            f"Judge strictly. Give each of these a whole number from {lowest} (bad) to {highest} (nothing is wrong):",
            *(f"- {name}: {meaning}?" for name, meaning in criteria.items()),
            "",
            f'Answer with one line for each, such as "{example}: {lowest}", and nothing else.',
        ]
    )


def _data_uri(data: bytes) -> str:
    with Image.open(io.BytesIO(data)) as image:
        kind = Image.MIME.get(image.format or "", "image/png")
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
