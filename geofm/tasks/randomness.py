"""Random numbers of a batch, which are its own: a run that is resumed draws them again."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def batch_seed(seed: int, stage: str, batch: int, rank: int) -> int:
    """Seed of all that is drawn for a batch on the device: crops, masks, stochastic depth.

    Args:
        seed: Seed of the run.
        stage: 'train', 'val' or 'test'.
        batch: Batches before it in the run, or in its epoch if not for training.
        rank: Rank of the process.

    Returns:
        A seed for ``torch.manual_seed``.
    """
    key = [seed, int.from_bytes(stage.encode()), batch, rank]
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from a seed of one's own, and leave the process's generators as they were.

    Args:
        seed: The seed.
        device: Device whose generator, beside the CPU's, is used.

    Yields:
        None.
    """
    on_cpu = device.type == 'cpu'
    with torch.random.fork_rng(
        devices=[] if on_cpu else [device], device_type='cuda' if on_cpu else device.type
    ):
        torch.manual_seed(seed)
        yield
