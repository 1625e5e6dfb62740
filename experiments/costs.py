"""Count the cost of a step of DINOv2: FLOPs, memory of states, communication, and data read.

    python experiments/costs.py --output experiments/results/costs.md

Counted from shapes: matrix products of the backbone, attention, and the heads, for the crops of the
recipe, as packed sequences; a product of (m, k) and (k, n) is 2 m k n FLOPs, and the backward pass
costs twice the forward pass. Biases, norms, activation functions and photometry are left out. Rates
are estimates: counted FLOPs over a stated fraction of the data sheet's peak.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

#: Width, depth, and weights of the MLP per squared width: 8, or those of SwiGLU.
SIZES = {
    'ViT-S/16': (384, 12, 8.0),
    'ViT-B/16': (768, 12, 8.0),
    'ViT-L/16': (1024, 24, 8.0),
    'ViT-g/16': (1536, 40, 8.0),
}

#: Head: hidden width, bottleneck, prototypes.
HIDDEN, BOTTLENECK, PROTOTYPES = 2048, 256, 65_536

#: Peak of an H200 in bfloat16, dense, in FLOP/s, by its data sheet.
PEAK = 989e12


@dataclass(frozen=True)
class Recipe:
    """Crops of an image: number and tokens of each, CLS included, and masked patches in all."""

    globals_: int = 2
    global_tokens: int = 145
    locals_: int = 8
    local_tokens: int = 37
    # Half of the global crops, 0.1 to 0.5 of their patches.
    masked: float = 2 * 0.5 * 0.3 * 144


def backbone_weights(width: int, depth: int, mlp: float) -> float:
    """Return the number of weights of the blocks."""
    return depth * (4 + mlp) * width**2


def head_weights(width: int) -> float:
    """Return the number of weights of a projection head."""
    return width * HIDDEN + HIDDEN**2 + HIDDEN * BOTTLENECK + BOTTLENECK * PROTOTYPES


def forward_flops(width: int, depth: int, mlp: float, crops: int, tokens: int) -> float:
    """Return the FLOPs of a forward pass of the blocks over crops."""
    products = 2 * backbone_weights(width, depth, mlp) * tokens
    attention = depth * 4 * tokens**2 * width
    return crops * (products + attention)


def step_flops(width: int, depth: int, mlp: float, recipe: Recipe) -> float:
    """Return the FLOPs of a step per image: student, teacher and heads."""
    large = forward_flops(width, depth, mlp, recipe.globals_, recipe.global_tokens)
    small = forward_flops(width, depth, mlp, recipe.locals_, recipe.local_tokens)
    crops = recipe.globals_ + recipe.locals_
    head = 2 * head_weights(width)
    heads = head * (3 * (crops + recipe.masked) + recipe.globals_ + recipe.masked)
    return 3 * (large + small) + large + heads


def table(utilisation: float, sample_mb: float, per_core: float) -> str:
    """Return the table of all models."""
    lines = [
        '| one sensor | GFLOP per image (counted) | weights, gradients, AdamW, teacher (counted) '
        '| gradients sent per GPU and step, DDP (counted) | images/s per GPU (estimated) '
        '| MB/s read per GPU (estimated) | reading cores per GPU (estimated) |',
        '|---|---:|---:|---:|---:|---:|---:|',
    ]
    for name, (width, depth, mlp) in SIZES.items():
        flops = step_flops(width, depth, mlp, Recipe())
        trained = backbone_weights(width, depth, mlp) + head_weights(width)
        rate = utilisation * PEAK / flops
        lines.append(
            f'| {name} | {flops / 1e9:,.0f} | {20 * trained / 2**30:.1f} GiB '
            f'| {8 * trained / 1e9:.1f} GB | {rate:,.0f} | {rate * sample_mb:,.0f} '
            f'| {rate / per_core:.0f} |'
        )
    note = (
        f'\nCrops 2 x 192 and 8 x 96 px; one head for DINO and iBOT. Estimates for an H200 at '
        f'{utilisation:.0%} of its bfloat16 peak, samples of {sample_mb:g} MB, and {per_core:g} '
        'samples/s per core.\n'
    )
    return '\n'.join(lines) + '\n' + note


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--utilisation', type=float, default=0.4)
    parser.add_argument('--sample_mb', type=float, default=1.7, help='13 bands uint16, 256 px')
    parser.add_argument('--per_core', type=float, default=150, help='see results/read_pair.md')
    parser.add_argument('--output', type=Path)
    args = parser.parse_args()
    text = table(args.utilisation, args.sample_mb, args.per_core)
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == '__main__':
    main()
