"""Centres and Sinkhorn-Knopp on two processes against one process with all tokens."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from geofm.losses import EMACentering, SinkhornKnopp

PROTOTYPES, TEMPERATURE = 7, 0.06

#: Tokens of the two ranks: as many CLS tokens on each; masked ones vary, down to none.
COUNTS = {'cls': (4, 4), 'masked': (3, 9), 'none on one': (0, 5), 'none': (0, 0)}


def tokens(name: str, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * list(COUNTS).index(name) + rank)
    return torch.rand(COUNTS[name][rank], PROTOTYPES, generator=generator) * 2 - 1


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group('gloo', f'file://{folder}/store', rank=rank, world_size=2)
    found: dict[str, Any] = {}
    for name in COUNTS:
        logits = tokens(name, rank)
        found[f'{name} sinkhorn'] = SinkhornKnopp(PROTOTYPES)(logits, TEMPERATURE)
        centering = EMACentering(PROTOTYPES)
        centering.update(tokens('cls', rank))
        centering.update(logits)
        found[f'{name} centre'] = centering.center.value
        found[f'{name} targets'] = centering(logits, TEMPERATURE)
    torch.save(found, f'{folder}/{rank}.pt')
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def found(module_path: Path) -> list[dict[str, Tensor]]:
    if not dist.is_gloo_available() or not hasattr(os, 'fork'):
        pytest.skip('needs gloo and fork')
    start_processes(work, (str(module_path),), nprocs=2, start_method='fork')
    return [torch.load(module_path / f'{rank}.pt') for rank in range(2)]


def sinkhorn(logits: np.ndarray, iterations: int = 3) -> np.ndarray:
    """Caron et al., 2020, Listing 1, in float64: prototypes are rows, samples are columns."""
    q = np.exp(logits / TEMPERATURE).T
    prototypes, samples = q.shape
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(axis=1, keepdims=True)
        q /= prototypes
        q /= q.sum(axis=0, keepdims=True)
        q /= samples
    return (q * samples).T


@pytest.mark.parametrize('name', COUNTS)
def test_sinkhorn_over_ranks_is_that_of_all_their_tokens(
    found: list[dict[str, Tensor]], name: str
) -> None:
    ours = torch.cat([part[f'{name} sinkhorn'] for part in found])
    every = torch.cat([tokens(name, rank) for rank in range(2)]).double().numpy()
    assert ours.shape == every.shape
    if len(every):
        np.testing.assert_allclose(ours.numpy(), sinkhorn(every), rtol=1e-4, atol=1e-7)
        alone = sinkhorn(tokens(name, 1).double().numpy())
        if COUNTS[name][0]:
            assert not np.allclose(ours.numpy()[COUNTS[name][0] :], alone, rtol=1e-2)


@pytest.mark.parametrize('name', COUNTS)
def test_centre_is_that_of_all_tokens(found: list[dict[str, Tensor]], name: str) -> None:
    """All tokens have the same weight on any rank; without tokens the centre does not change."""
    centre = np.zeros(PROTOTYPES)
    for step in ('cls', name):
        every = torch.cat([tokens(step, rank) for rank in range(2)]).double().numpy()
        if len(every):
            centre = 0.9 * centre + 0.1 * every.mean(axis=0)
    for rank in range(2):
        ours = found[rank][f'{name} centre']
        np.testing.assert_allclose(ours[0].numpy(), centre, atol=1e-7)
        weights = np.exp((tokens(name, rank).double().numpy() - centre) / TEMPERATURE)
        expected = weights / weights.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(found[rank][f'{name} targets'].numpy(), expected, rtol=1e-4)
    assert torch.equal(found[0][f'{name} centre'], found[1][f'{name} centre'])
