"""Environment variables that a launcher sets for a rank."""

import os


def as_rank(rank: int, ranks: int, port: int) -> None:
    """Set the variables that torchrun would set, for Lightning to find.

    Args:
        rank: Number of this process.
        ranks: Number of processes, all on this machine.
        port: A free port.
    """
    os.environ |= {
        'TORCHELASTIC_RUN_ID': 'test',
        'MASTER_ADDR': '127.0.0.1',
        'MASTER_PORT': str(port),
        'RANK': str(rank),
        'LOCAL_RANK': str(rank),
        'GROUP_RANK': '0',
        'WORLD_SIZE': str(ranks),
        'LOCAL_WORLD_SIZE': str(ranks),
    }
