"""Secrets, taken out of whatever is shown or stored."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

HIDDEN = "***"
_SECRET_NAMES = r"(?:secret|password|passwd|api[_-]?key)[\w-]{0,32}"
# `eos_token=</s>` and the like name no secret.
_TOKEN_NAME = "".join(f"(?<!{special}_)" for special in ("eos", "bos", "pad", "unk", "sep", "cls", "mask")) + "token"
# Prose has tokens too ("the first differing token: 'ab'"): after a word and a space only `token=x` names a secret.
_KEY = rf"(?:{_SECRET_NAMES}|(?<![a-z] ){_TOKEN_NAME})[\"']?[ \t]{{0,8}}[=:]|{_TOKEN_NAME}="
_FLAG = rf"--[\w-]{{0,32}}(?:{_SECRET_NAMES}|token)(?=[ \t])"
_VALUE = r"(?:\"(?:[^\"\\\n]|\\.)*\"?|'(?:[^'\\\n]|\\.)*'?|[^\s,;&}\])]+)"
_PATTERNS = (
    (re.compile(r"(?:hf|api_org)_[A-Za-z0-9]{8,}"), HIDDEN),
    (re.compile(r"(?<=://)[^/\s?#]*@"), f"{HIDDEN}@"),
    (re.compile(r"(\bbearer[ \t]{1,8})[^\s\"',;]+", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(rf"((?:{_KEY}|{_FLAG})[ \t]{{0,8}}){_VALUE}", re.IGNORECASE), rf"\1{HIDDEN}"),
)
_SECRET_VARIABLE = re.compile(r"(?:TOKEN|SECRET|PASSWORD|PASSWD|(?:API|ACCESS)_?KEY)$", re.IGNORECASE)
_SHORTEST_SECRET = 8


def scrub(text: str) -> str:
    """`text` with secrets replaced by `***`.

    Hidden are Hugging Face tokens, the values of keys and flags named token, secret, password or api_key, the user part
    of URLs, bearer headers, and the values of environment variables with such names.
    """
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and value in text and _SECRET_VARIABLE.search(name):
            text = text.replace(value, HIDDEN)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def scrub_values(value: Any) -> Any:
    """A copy of nested plain values in which `scrub` went over every string, by the name of its key too."""
    if isinstance(value, Mapping):
        hidden = {key for key in value if scrub(f"{key}=x") == f"{key}={HIDDEN}"}
        return {key: HIDDEN if key in hidden and entry else scrub_values(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [scrub_values(entry) for entry in value]
    return scrub(value) if isinstance(value, str) else value


def scrub_command(arguments: Iterable[str]) -> list[str]:
    """A command's arguments without their secrets; `--token x` loses its x, though it stands by itself."""
    shown: list[str] = []
    for argument in arguments:
        follows_flag = bool(shown) and scrub(f"{shown[-1]} x") == f"{shown[-1]} {HIDDEN}"
        shown.append(HIDDEN if follows_flag else scrub(argument))
    return shown
