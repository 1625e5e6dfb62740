"""Printing and warnings, safe for names from untrusted sources, such as names of files and bands.

A file name may contain escape sequences that control the terminal, line breaks that fake a message,
or rich's markup.
"""

import os
import unicodedata
import warnings
from pathlib import Path

#: Unicode categories of characters without a glyph: control and format characters, surrogates, and
#: line and paragraph separators.
_HIDDEN = ('Cc', 'Cf', 'Cs', 'Zl', 'Zp')


def printable(text: object, keep: str = '') -> str:
    r"""Escape the characters of a text that have no glyph.

    Args:
        text: The text, or an object to convert to text.
        keep: Characters not to escape, e.g. line breaks.

    Returns:
        The text, with these characters escaped as in a Python string, e.g. ``\x1b``.
    """
    return ''.join(
        c if c in keep or unicodedata.category(c) not in _HIDDEN else ascii(c)[1:-1]
        for c in str(text)
    )


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Write a number of things.

    Args:
        number: The number.
        noun: What is counted, in the singular.
        plural: The plural, unless it is the noun and an *s*.

    Returns:
        E.g. ``1 file`` or ``2,000 files``.
    """
    return f'{number:,} {noun if number == 1 else plural or noun + "s"}'


def one_line(error: BaseException) -> str:
    """Return the message of an error on one line, shortened to 300 characters.

    Args:
        error: The error.

    Returns:
        The message, or the name of the error's class if it has no message.
    """
    text = ' '.join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f'{text[:300]} ...'


def say(text: object) -> None:
    """Print a line, escaped by :func:`printable`.

    Args:
        text: The line.
    """
    print(printable(text))


#: Folder of this package.
_PACKAGE = (f'{Path(__file__).parent}{os.sep}',)

_plain_format = warnings.formatwarning


def format_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """Format a warning as Python does, with its message escaped by :func:`printable`.

    Args:
        message: The warning.
        category: Class of the warning.
        filename: File that raised the warning.
        lineno: Line number in the file.
        line: Text of the line.

    Returns:
        The text to print.
    """
    return _plain_format(printable(message, keep='\n'), category, filename, lineno, line)


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Issue a warning that refers to the caller of geofm, however deep in geofm it is issued.

    Args:
        message: The message.
        category: Class of the warning.
    """
    warnings.warn(message, category, skip_file_prefixes=_PACKAGE)
