"""Reads users' text files: class names, templates, tasks, baselines."""

from pathlib import Path
from typing import Any

from cwcl_jax.files import parse_json
from cwcl_jax.paths import to_path


def user_file(name: str) -> Path:
    """Returns the path of a file that settings name; `~` is the home folder, `://` a store."""
    return to_path(name).expanduser()


def read_text(path: Path) -> str:
    """Returns the text of a UTF-8 file, without a byte order mark.

    Raises:
      ValueError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); save it as UTF-8.") from error


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file.

    Raises:
      ValueError: it is neither UTF-8 nor JSON.
    """
    text = read_text(path)
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
