"""Captions as people's files hold them: byte order marks, broken encodings, gaps in lists."""

from typing import Any


def clean(text: str) -> str:
    """The text without a byte order mark, and with "?" for lone surrogates, which JSON can hold
    and neither UTF-8 nor a tokenizer takes."""
    return text.removeprefix("\ufeff").encode("utf-8", "replace").decode("utf-8")


def text_of_bytes(data: bytes) -> str:
    """UTF-8 without its byte order mark; bytes that are none become replacement signs."""
    return data.decode("utf-8-sig", "replace")


def lines_of(text: str) -> list[str]:
    """The lines that hold anything."""
    return [line for line in text.splitlines() if line.strip()]


def captions_of(value: Any) -> str | list[str] | None:
    """A caption, or several, out of a JSON value; null is none, also in a list."""
    if value is None or isinstance(value, str):
        return value and clean(value)
    if isinstance(value, list):
        return [clean(str(item)) for item in value if item is not None]
    return str(value)
