"""Compare the speed of many linear heads: trained in a loop, and side by side in one product.

Heads of DINOv2's sweep (13 learning rates) on features of 50,000 images. The loop is the obvious
implementation: a `torch.nn.Linear` and an SGD per head, each fed with every batch. Both take turns,
so that other load on the machine affects them equally. Compare ratios within a run.

    python experiments/benchmarks/linear_probe.py
"""

import argparse
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.progress import track
from rounds import RESULTS, ratio_table, write_results
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from geofm.evaluation.probes.heads import train_heads
from geofm.evaluation.probes.images import LEARNING_RATES

BATCH_SIZE = 128
MOMENTUM = 0.9

#: Trains all heads for a number of steps; their outputs on the features come back.
Training = Callable[[Tensor, Tensor, int], Tensor]


def _rate(learning_rate: float) -> float:
    return learning_rate * BATCH_SIZE / 256


def loop(classes: int) -> Training:
    """Train with one layer and one optimiser per head."""

    def train(features: Tensor, labels: Tensor, steps: int) -> Tensor:
        heads = [nn.Linear(features.shape[1], classes) for _ in LEARNING_RATES]
        for head in heads:
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        optimizers = [
            torch.optim.SGD(head.parameters(), lr=_rate(rate), momentum=MOMENTUM)
            for head, rate in zip(heads, LEARNING_RATES, strict=True)
        ]
        schedules = [
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) for optimizer in optimizers
        ]
        features = (features - features.mean(0)) / features.std(0, correction=0)
        for rows in _rows(len(features), steps):
            x, y = features[rows], labels[rows]
            for head, optimizer, schedule in zip(heads, optimizers, schedules, strict=True):
                optimizer.zero_grad()
                cross_entropy(head(x), y).backward()
                optimizer.step()
                schedule.step()
        with torch.no_grad():
            return torch.stack([head(features) for head in heads], dim=1)

    return train


def stacked(classes: int) -> Training:
    """Train with geofm: one matrix product for all heads, forward and backward."""

    def train(features: Tensor, labels: Tensor, steps: int) -> Tensor:
        heads = train_heads(
            features,
            one_hot(labels, classes).float(),
            torch.ones(features.shape[1], len(LEARNING_RATES), dtype=torch.bool),
            LEARNING_RATES,
            'softmax',
            steps,
            BATCH_SIZE,
            torch.Generator().manual_seed(0),
        )
        outputs = [heads.outputs(features, head) for head in range(len(LEARNING_RATES))]
        return torch.stack(outputs, dim=1)

    return train


def _rows(count: int, steps: int) -> list[Tensor]:
    """Return the batches that :func:`train_heads` draws in an epoch or less."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return list(order[: steps * BATCH_SIZE].split(BATCH_SIZE))


def measure(
    trainings: dict[str, Training], features: Tensor, labels: Tensor, steps: int, rounds: int
) -> dict[str, list[float]]:
    """Return the seconds of each method per round, after one run that checks that they agree."""
    seconds: dict[str, list[float]] = {name: [] for name in trainings}
    outputs = [train(features[:2000], labels[:2000], 8) for train in trainings.values()]
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-3, rtol=1e-3)
    for _ in track(range(rounds), description='Rounds'):
        for name, train in trainings.items():
            start = time.perf_counter()
            train(features, labels, steps)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison, print the table and write it with the values of each round."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument('--images', type=int, default=50_000)
    parser.add_argument('--width', type=int, default=768)
    parser.add_argument('--classes', type=int, default=10)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--output', type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    labels = torch.randint(0, options.classes, (options.images,))
    centers = torch.randn(options.classes, options.width)
    features = torch.randn(options.images, options.width) + 0.1 * centers[labels]
    trainings = {'loop': loop(options.classes), 'geofm, stacked': stacked(options.classes)}
    steps = options.images // BATCH_SIZE
    seconds = measure(trainings, features, labels, steps, options.rounds)
    text = ratio_table('heads', 'seconds per epoch', seconds, 'loop', 'relative time')
    print(text)
    about = {
        'torch': torch.__version__,
        'processor': platform.machine(),
        'cores': os.cpu_count(),
        'threads': options.threads,
        'images': options.images,
        'width': options.width,
        'classes': options.classes,
        'heads': len(LEARNING_RATES),
        'seconds': {name: [round(v, 3) for v in values] for name, values in seconds.items()},
    }
    write_results(options.output, 'linear_probe', about, text)


if __name__ == '__main__':
    main()
