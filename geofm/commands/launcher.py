"""Ending ranks when the process that launched them ends."""

import os
import sys
import threading
import time

#: Seconds that a rank may continue without its launcher, as at the end of a run.
_GRACE = 30.0


def end_with_launcher(grace: float = _GRACE) -> None:
    """End this process some time after its launcher, which is rank 0 of Lightning or torchrun.

    Otherwise, if the launcher is killed, a rank that waits for another rank on a GPU would wait
    until the timeout of the process group.

    Args:
        grace: Seconds that this process may run without its launcher.
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
