"""Compare the speed of exact k-nearest-neighbour search: 10,000 queries in 50,000 x 768.

Faiss's `IndexFlatIP`, scikit-learn's brute force and geofm take turns, so that other load on the
machine affects all of them equally. Compare ratios within a run rather than times of different
runs. All searches get float32 unit vectors and must find the same neighbours.

    pip install faiss-cpu
    python experiments/benchmarks/knn.py
"""

import argparse
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import track
from rounds import RESULTS, ratio_table, write_results
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits
from torch.nn.functional import normalize

from geofm.evaluation.probes.knn import nearest

Array = npt.NDArray[np.float32]
#: From bank and queries to the positions of the neighbours.
Search = Callable[[Array, Array], npt.NDArray[np.int64]]


def geofm(k: int) -> Search:
    """Search with geofm: a matrix product and topk per chunk of queries."""

    def search(bank: Array, queries: Array) -> npt.NDArray[np.int64]:
        return nearest(torch.from_numpy(bank), torch.from_numpy(queries), k)[1].numpy()

    return search


def scikit_learn(k: int) -> Search:
    """Search by brute force; Euclidean distances of unit vectors rank like cosine similarities."""

    def search(bank: Array, queries: Array) -> npt.NDArray[np.int64]:
        index = NearestNeighbors(n_neighbors=k, algorithm='brute').fit(bank)
        found: npt.NDArray[np.int64] = index.kneighbors(queries, return_distance=False)
        return found

    return search


def faiss_flat(k: int, threads: int) -> Search | None:
    """Search with faiss's exact inner product; None if faiss is not installed."""
    try:
        import faiss  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        print('faiss-cpu is not installed: compared with scikit-learn alone')
        return None
    faiss.omp_set_num_threads(threads)

    def search(bank: Array, queries: Array) -> npt.NDArray[np.int64]:
        index = faiss.IndexFlatIP(bank.shape[1])
        index.add(bank)
        found: npt.NDArray[np.int64] = index.search(queries, k)[1]
        return found

    return search


def measure(
    searches: dict[str, Search], bank: Array, queries: Array, rounds: int
) -> dict[str, list[float]]:
    """Return the seconds of each search per round, after one run that checks its neighbours."""
    seconds: dict[str, list[float]] = {name: [] for name in searches}
    few = queries[:200]
    exact = (few.astype(np.float64) @ bank.astype(np.float64).T).argsort(axis=1)[:, ::-1]
    for name, search in searches.items():
        found = search(bank, few)
        # Rounding may swap neighbours that are as near to within float32.
        agreed = np.mean(
            [
                len({*a} & {*b}) / len(a)
                for a, b in zip(found, exact[:, : found.shape[1]], strict=True)
            ]
        )
        assert agreed > 0.999, f'{name} finds {agreed:.2%} of the neighbours'
    for _ in track(range(rounds), description='Rounds'):
        for name, search in searches.items():
            start = time.perf_counter()
            search(bank, queries)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison, print the table and write it with the values of each round."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument('--bank', type=int, default=50_000)
    parser.add_argument('--queries', type=int, default=10_000)
    parser.add_argument('--width', type=int, default=768)
    parser.add_argument('--k', type=int, default=20)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--output', type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    bank, queries = (
        normalize(torch.randn(count, options.width, generator=generator), dim=1).numpy()
        for count in (options.bank, options.queries)
    )
    searches = {'geofm': geofm(options.k), 'scikit-learn, brute': scikit_learn(options.k)}
    flat = faiss_flat(options.k, options.threads)
    if flat is not None:
        searches = {'faiss IndexFlatIP': flat, **searches}
    with threadpool_limits(options.threads):
        seconds = measure(searches, bank, queries, options.rounds)
    text = ratio_table('search', 'seconds', seconds, next(iter(searches)), 'relative time')
    print(text)
    about = {
        'torch': torch.__version__,
        'processor': platform.machine(),
        'cores': os.cpu_count(),
        'threads': options.threads,
        'bank': options.bank,
        'queries': options.queries,
        'width': options.width,
        'k': options.k,
        'seconds': {name: [round(v, 3) for v in values] for name, values in seconds.items()},
    }
    write_results(options.output, 'knn', about, text)


if __name__ == '__main__':
    main()
