"""Checks of files that others wrote, for every room that reads some."""

from collections import Counter
from typing import Any

GIT_LFS_HEAD = b"version https://git-lfs."
"""How the few lines begin that Git LFS leaves in place of a file that it has not fetched."""


class RepeatedKeyError(ValueError):
    """A key that stands twice in one JSON object: each reader makes something else of it."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; an `object_pairs_hook` of the module json.

    Raises:
        RepeatedKeyError: names the key.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise RepeatedKeyError(f"the key {twice!r} stands twice in one object; remove one")
    return values
