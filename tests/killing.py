"""Killing processes while they write, at a fixed point or at random times."""

import os
import random
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn


def die(*args: Any, **kwargs: Any) -> NoReturn:
    """End the process at once, without cleaning up."""
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


def kill_at_random(function: Callable[[Path], object], folder: Path, kills: int, seed: int) -> None:
    """Write to a folder in a series of processes, each killed at a random time.

    The folder is left as the last kill left it: no process has come to its end in it. Beside it is
    ``undisturbed``, of a process that was not killed.

    Args:
        function: Writes into a folder, and goes on with what is there.
        folder: The folder; it must not exist.
        kills: Number of kills.
        seed: Seed of the moments.

    Raises:
        AssertionError: If a process failed.
    """
    start = time.monotonic()
    process = _fork(lambda: function(folder.with_name('undisturbed')))
    assert os.waitpid(process, 0)[1] == 0
    most = 1.5 * (time.monotonic() - start) / kills
    draw, done = random.Random(seed), 0
    while done < kills:
        process = _fork(lambda: function(folder))
        time.sleep(draw.uniform(0, most))
        os.kill(process, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        assert code in (0, -signal.SIGKILL)
        done += 1
        if code == 0:
            # The process had ended before.
            shutil.rmtree(folder)
            done = 0


def _fork(function: Callable[[], object]) -> int:
    """Call a function in another process, and return its process ID."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        function()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def leftovers(folder: Path) -> list[str]:
    """Return the names of temporary files and locks below a folder."""
    return [str(p.relative_to(folder)) for p in folder.rglob('.*') if '.work' not in p.name]
