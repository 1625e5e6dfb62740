"""Suggestions for misspelt names."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

#: Characters of a name beyond which it is none, and comparing it takes long.
_LONGEST = 200


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Suggest the known name that is most like a name that is not known.

    Args:
        name: The name that was given.
        known: Names that would have been accepted.

    Returns:
        E.g. ``"; did you mean 'B8A'?"``, to append to a message; empty if no name is similar.
    """
    if len(name) > _LONGEST:
        return ''
    names = {_plain(str(candidate)): str(candidate) for candidate in known}
    close = get_close_matches(_plain(name), names, n=1, cutoff=0.7)
    return f"; did you mean '{names[close[0]]}'?" if close else ''


def _plain(name: str) -> str:
    """A name without what is most often mistaken: case, and leading zeros as in 'B08'."""
    return re.sub(r'(?<=[a-z])0+(?=\d)', '', name.lower())
