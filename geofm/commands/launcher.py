"""Ranks that end with the process that launched them."""

import os
import sys
import threading
import time

#: Seconds that a rank may go on, as at the end of a run.
_GRACE = 30.0


def end_with_launcher(grace: float = _GRACE) -> None:
    """End this process some time after its launcher: Lightning's first rank, or torchrun.

    If the launcher is killed, a rank that waits for another one on a GPU would wait until the
    timeout of the process group.

    Args:
        grace: Seconds that it may run without its launcher.
    """
    if 'LOCAL_RANK' not in os.environ:
        return
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        time.sleep(grace)
        print(f'rank {os.environ["LOCAL_RANK"]}: the launcher has ended', file=sys.stderr)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name='end-with-launcher').start()
