"""Fenced bash blocks of the READMEs: those that are run, and what the others say they need."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>.*?) -->\n)?^```bash(?P<info>[^\n]*)\n(?P<text>.*?)^```$", re.M | re.S
)
_PROGRAMS = ("nexusgen", "ray", "serve", "mlflow")
_SUBSTITUTION = re.compile(r"\$\((?:[^()]|\([^()]*\))*\)")
_SEPARATORS = {"|", "&&", "||", ";", "&", ">", "<"}


@dataclass(frozen=True)
class Block:
    """One block: `is_run` if it is marked so; else `reason` says why it can't be run here, if it does."""

    text: str
    is_run: bool
    reason: str | None
    where: str


def blocks(path: Path) -> list[Block]:
    """All bash blocks of a Markdown file, in order."""
    text = path.read_text()
    found = []
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("info")) + 1
        found.append(Block(match["text"], match["info"].split() == ["run"], match["reason"], f"{path.name}:{line}"))
    return found


def commands(block: Block) -> Iterator[list[str]]:
    """The block's commands of programs whose arguments can be parsed, as words; variables stay as they are written."""
    arrays = {name: shlex.split(words) for name, words in re.findall(r"^(\w+)=\((.*)\)$", block.text, re.M)}
    text = re.sub(r"<<'(\w+)'\n.*?^\1$", "", block.text, flags=re.M | re.S).replace("\\\n", " ")
    for line in text.splitlines():
        lexer = shlex.shlex(_SUBSTITUTION.sub("SUBSTITUTED", line), posix=True, punctuation_chars="|&;<>()")
        lexer.whitespace_split = True
        command: list[str] = []
        for word in [*lexer, ";"]:
            if word in _SEPARATORS or set(word) <= set("|&;<>()"):
                yield from _known(command)
                command = [">"] if word == ">" else []
            elif array := re.fullmatch(r"\$\{(\w+)\[@\]\}", word):
                command += arrays.get(array[1], ["storage=runs/mine", "name=mine"])
            else:
                command.append(word)


def _known(command: list[str]) -> Iterator[list[str]]:
    while command and re.match(r"[A-Z_]+=", command[0]):
        command = command[1:]
    if command[:2] == ["docker", "compose"] and "exec" in command:  # in a container
        command = command[command.index("exec") + 2 :]
    if command and command[0].rpartition("/")[2] in _PROGRAMS:
        yield [command[0].rpartition("/")[2], *command[1:]]
