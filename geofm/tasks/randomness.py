"""Random numbers per batch, so that a resumed run draws the same ones."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def batch_seed(seed: int, stage: str, batch: int, rank: int) -> int:
    """Compute the seed of a batch's random numbers: crops, masks, stochastic depth.

    Args:
        seed: Seed of the run.
        stage: 'train', 'val' or 'test'.
        batch: Index of the batch in the run; in the epoch for 'val' and 'test'.
        rank: Rank of the process.

    Returns:
        A seed for ``torch.manual_seed``.
    """
    key = [seed, int.from_bytes(stage.encode()), batch, rank]
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the random generators within a context, and restore their state afterwards.

    Args:
        seed: The seed.
        device: Device whose generator is seeded in addition to the CPU's.

    Yields:
        None.
    """
    on_cpu = device.type == 'cpu'
    with torch.random.fork_rng(
        devices=[] if on_cpu else [device], device_type='cuda' if on_cpu else device.type
    ):
        torch.manual_seed(seed)
        yield
