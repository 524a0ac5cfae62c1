"""Cleans captions from users' files: byte order marks, broken encodings, gaps in lists."""

from typing import Any


def clean(text: str) -> str:
    """Returns the text without a byte order mark, and with "?" for lone surrogates.

    JSON can hold lone surrogates, but neither UTF-8 nor a tokenizer accepts them.
    """
    return text.removeprefix("\ufeff").encode("utf-8", "replace").decode("utf-8")


def text_of_bytes(data: bytes) -> str:
    """Returns the text of UTF-8 bytes without byte order mark; invalid bytes are replaced."""
    return data.decode("utf-8-sig", "replace")


def lines_of(text: str) -> list[str]:
    """Returns the lines that are not blank."""
    return [line for line in text.splitlines() if line.strip()]


def captions_of(value: Any) -> str | list[str] | None:
    """Returns a caption, or several, from a JSON value; null is no caption, also in a list."""
    if value is None or isinstance(value, str):
        return value and clean(value)
    if isinstance(value, list):
        return [clean(str(item)) for item in value if item is not None]
    return str(value)
