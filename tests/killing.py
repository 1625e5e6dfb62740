"""Ending a process amid its work, as SIGKILL does, at a point that is the same each time."""

import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn


def die(*args: Any, **kwargs: Any) -> NoReturn:
    """End the process at once: nothing is cleaned up."""
    os._exit(9)


def killed_before_rename(function: Callable[[], object]) -> None:
    """Call a function in a process that ends when it first renames something.

    Args:
        function: What to call.

    Raises:
        AssertionError: If it never came to rename anything.
    """
    process = os.fork()
    if not process:
        try:
            Path.replace = Path.rename = die  # type: ignore[method-assign]
            function()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 9


def leftovers(folder: Path) -> list[str]:
    """Names of temporary files and locks below a folder."""
    return [str(p.relative_to(folder)) for p in folder.rglob('.*') if '.work' not in p.name]
