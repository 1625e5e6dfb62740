"""Suggestions for misspelt names."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

#: Maximum length of a name for which suggestions are made. Longer ones take long to compare.
_LONGEST = 200


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Suggest the known name that is most similar to an unknown one.

    Args:
        name: The unknown name.
        known: The known names.

    Returns:
        Text to append to a message, e.g. ``"; did you mean 'B8A'?"``; empty if no name is similar.
    """
    if len(name) > _LONGEST:
        return ''
    names = {_plain(str(candidate)): str(candidate) for candidate in known}
    close = get_close_matches(_plain(name), names, n=1, cutoff=0.7)
    return f"; did you mean '{names[close[0]]}'?" if close else ''


def _plain(name: str) -> str:
    """Remove common differences between spellings: case, and leading zeros as in 'B08'."""
    return re.sub(r'(?<=[a-z])0+(?=\d)', '', name.lower())
