"""Printing names that come from outside: of files, bands and models.

A file name may hold escape sequences that steer a terminal, line breaks that fake a message, or
rich's markup.
"""

import unicodedata
import warnings

#: Kinds of characters that have no glyph: controls, format controls such as those of direction,
#: halves of surrogate pairs, and separators of lines and paragraphs.
_HIDDEN = ('Cc', 'Cf', 'Cs', 'Zl', 'Zp')


def printable(text: object, keep: str = '') -> str:
    r"""Escape the characters of a text that have no glyph.

    Args:
        text: The text, or an object with one.
        keep: Characters to leave, e.g. line breaks of a message.

    Returns:
        The text with such characters as in a Python string, e.g. ``\x1b``.
    """
    return ''.join(
        c if c in keep or unicodedata.category(c) not in _HIDDEN else ascii(c)[1:-1]
        for c in str(text)
    )


def say(text: object) -> None:
    """Print a line.

    Args:
        text: The line, escaped by :func:`printable`.
    """
    print(printable(text))


_plain_format = warnings.formatwarning


def format_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """Format a warning as Python does, escaped by :func:`printable`.

    Args:
        message: The warning.
        category: Its class.
        filename: Where it was raised.
        lineno: The line there.
        line: Text of that line.

    Returns:
        What to print.
    """
    return _plain_format(printable(message, keep='\n'), category, filename, lineno, line)
