"""Credentials do not reach files, logs or the terminal: text goes through `mask` on its way out."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
SHORTEST = 8
"""Characters; shorter values of environment variables are not looked for, as they would be found in ordinary words."""
_SECRET_NAME = re.compile(
    r"TOKEN(?!IZ)|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY", re.IGNORECASE
)
_USER_IN_URL = re.compile(r"(?<=://)[^/\s@'\"]+@")
_SIGNED_URL = re.compile(
    r"(?<=[?&])((?:x-amz-)?(?:sig|signature|token|access_token|api_?key|password|secret|credential|security-token)=)"
    r"[^&\s'\"]+",
    re.IGNORECASE,
)
_KNOWN_TOKENS = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}"  # Hugging Face
    r"|\b(?:sk|rk|pk)-[A-Za-z0-9_-]{20,}"  # OpenAI and others
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"  # AWS
    r"|\b(?:ghp|gho|ghu|ghs|ghr)_[A-Za-z0-9]{30,}|\bgithub_pat_[A-Za-z0-9_]{30,}|\bglpat-[A-Za-z0-9_-]{20,}"
    r"|\bxox[abeprs]-[A-Za-z0-9-]{10,}"  # Slack
    r"|\bAIza[A-Za-z0-9_-]{35}"  # Google
    r"|\beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]+"  # JSON web tokens
)


def mask(text: str, environment: Mapping[str, str] | None = None) -> str:
    """The text with credentials replaced: user and password of URLs, signatures, tokens of well-known forms, and the
    values of environment variables whose names say that they are secret."""
    environment = os.environ if environment is None else environment
    values = {value for name, value in environment.items() if _is_secret(name, value)}
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    text = _USER_IN_URL.sub(f"{HIDDEN}@", text)
    text = _SIGNED_URL.sub(rf"\g<1>{HIDDEN}", text)
    return _KNOWN_TOKENS.sub(HIDDEN, text)


def holds_secret(text: str, environment: Mapping[str, str] | None = None) -> bool:
    """Whether the value of an environment variable whose name says that it is secret stands in a text."""
    environment = os.environ if environment is None else environment
    return any(value in text for name, value in environment.items() if _is_secret(name, value))


def _is_secret(name: str, value: str) -> bool:
    return _SECRET_NAME.search(name) is not None and len(value) >= SHORTEST


def mask_tree(value: Any) -> Any:
    """The same for every text in nested lists and dicts."""
    if isinstance(value, Mapping):
        return {name: mask_tree(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [mask_tree(item) for item in value]
    return mask(value) if isinstance(value, str) else value
