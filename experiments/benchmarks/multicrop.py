"""Compare the speed of multi-crop pipelines.

Each turns a batch of Sentinel-2 images in DN (13 bands, 256 px) into 2 global crops of 192 px and 8
local ones of 96 px: random box, antialiased bicubic resizing, flips, DINOv2's asymmetric blur and
normalisation. Pipelines take turns, so that other load on the machine affects all of them equally.
Compare ratios within a run rather than times of different runs.

    python experiments/benchmarks/multicrop.py
"""

import argparse
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import kornia.augmentation as K
import torch
from rich.progress import track
from rounds import RESULTS, ratio_table, write_results
from torch import Tensor, nn
from torchvision.transforms import v2  # type: ignore[import-untyped]

from geofm.sensors import SENTINEL2, band_statistics
from geofm.transforms import MultiCrop, Normalize

BANDS = SENTINEL2.band_names
IMAGE, GLOBAL, LOCAL, N_LOCAL = 256, 192, 96, 8
GLOBAL_SCALE, LOCAL_SCALE = (0.32, 1.0), (0.05, 0.32)
SIGMA = (0.1, 2.0)
#: Odd, and wide enough for three of the largest standard deviations on either side.
KERNEL = 13
#: Side, scale and probability of blur of each crop.
CROPS = [
    (GLOBAL, GLOBAL_SCALE, 1.0),
    (GLOBAL, GLOBAL_SCALE, 0.1),
    *[(LOCAL, LOCAL_SCALE, 0.5)] * N_LOCAL,
]

Pipeline = Callable[[Tensor], object]


def torchvision_per_sample() -> Pipeline:
    """Apply Torchvision's transforms image by image, as a data set would."""
    mean, std = band_statistics(BANDS)
    transforms = [
        v2.Compose(
            [
                v2.RandomResizedCrop(
                    size, scale, interpolation=v2.InterpolationMode.BICUBIC, antialias=True
                ),
                v2.RandomHorizontalFlip(),
                v2.RandomVerticalFlip(),
                v2.RandomApply([v2.GaussianBlur(KERNEL, SIGMA)], blur),
                v2.Normalize(mean.tolist(), std.tolist()),
            ]
        )
        for size, scale, blur in CROPS
    ]
    return lambda images: [
        torch.stack([transform(image) for image in images]) for transform in transforms
    ]


def kornia_batched() -> Pipeline:
    """Apply Kornia's augmentations batch by batch; its resizing is not antialiased."""
    mean, std = band_statistics(BANDS)
    pipelines = [
        nn.Sequential(
            K.RandomResizedCrop(
                (size, size), scale, resample='bicubic', align_corners=False, cropping_mode='slice'
            ),
            K.RandomHorizontalFlip(),
            K.RandomVerticalFlip(),
            K.RandomGaussianBlur((KERNEL, KERNEL), SIGMA, p=blur),
            K.Normalize(mean, std),
        )
        for size, scale, blur in CROPS
    ]
    return lambda images: [pipeline(images) for pipeline in pipelines]


def geofm(photometry: bool) -> Pipeline:
    """Apply geofm's multi-crop, with photometry and iBOT's masks or with boxes and flips only."""
    normalize = Normalize(BANDS)
    crop = MultiCrop(
        BANDS,
        GLOBAL,
        LOCAL,
        N_LOCAL,
        global_scale=GLOBAL_SCALE,
        local_scale=LOCAL_SCALE,
        photometry=photometry,
    )
    return lambda images: crop(normalize({'image': images}))


def measure(pipelines: dict[str, Pipeline], images: Tensor, rounds: int) -> dict[str, list[float]]:
    """Time pipelines in turn.

    Args:
        pipelines: Pipelines by name.
        images: Batch to give to each.
        rounds: Number of times each runs, after one run to warm up.

    Returns:
        Samples per second of each pipeline in each round.
    """
    speeds: dict[str, list[float]] = {name: [] for name in pipelines}
    for pipeline in pipelines.values():
        pipeline(images)
    for _ in track(range(rounds), description='Rounds'):
        for name, pipeline in pipelines.items():
            start = time.perf_counter()
            pipeline(images)
            speeds[name].append(len(images) / (time.perf_counter() - start))
    return speeds


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison, print the table and write it with the values of each round."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument('--batch-size', type=int, default=16)
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--output', type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    mean, std = band_statistics(BANDS)
    images = torch.randn(options.batch_size, len(BANDS), IMAGE, IMAGE)
    images = images * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
    pipelines = {
        'torchvision, per sample': torchvision_per_sample(),
        'Kornia, batched': kornia_batched(),
        'geofm': geofm(photometry=True),
        'geofm, no photometry': geofm(photometry=False),
    }
    speeds = measure(pipelines, images, options.rounds)
    text = ratio_table(
        'pipeline', 'samples/s', speeds, 'torchvision, per sample', 'speed-up', digits=0
    )
    print(text)
    about = {
        'torch': torch.__version__,
        'processor': platform.machine(),
        'threads': options.threads,
        'batch_size': options.batch_size,
        'samples_per_second': {
            name: [round(value, 1) for value in values] for name, values in speeds.items()
        },
    }
    write_results(options.output, 'multicrop', about, text)


if __name__ == '__main__':
    main()
