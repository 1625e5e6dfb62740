"""Functions shared by the commands that map every scene of a table."""

import shlex
import sys
from pathlib import Path

from geofm.maps.make import TableRun
from geofm.printing import say


def command_line() -> str:
    """Return the command line to record in files, without ``--part``, which is irrelevant."""
    words: list[str] = []
    for word in sys.argv[1:]:
        if words[-1:] == ['--part']:
            words.pop()
        elif not word.startswith('--part='):
            words.append(word)
    return shlex.join([Path(sys.argv[0]).name, *words])


def say_scenes(found: TableRun, output: Path, count: int) -> None:
    """Print how many scenes have been mapped.

    Args:
        found: Result of the run.
        output: Folder of the maps.
        count: Number of scenes of the run.
    """
    said = f'{output}: {len(found.files)} of {count} scenes are mapped'
    say(said + (f', {found.skipped} of them earlier' if found.skipped else ''))
    if found.catalogue is not None:
        say(found.catalogue)


def raise_failed(found: TableRun) -> None:
    """Raise an error if scenes failed.

    Args:
        found: Result of the run.

    Raises:
        ValueError: If any scene failed, with the error of the first.
    """
    if found.failed:
        name, message = next(iter(found.failed.items()))
        count = len(found.failed) + len(found.files)
        raise ValueError(
            f'{len(found.failed)} of {count} scenes failed, the others are done; the first: '
            f'{name}: {message}'
        )
