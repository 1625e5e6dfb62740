"""Count memory of weights, gradients and optimizer state per rank with DDP and FSDP2.

    python experiments/benchmarks/state_memory.py configs/pretrain/vitl14.yaml \
        configs/pretrain/vitg14.yaml

Networks are built on the meta device: any machine counts those of any size. Activations are left
out, which are the same in both.
"""

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from geofm.models.packed import PackedBlock
from geofm.tasks import DINOv2
from geofm.tasks.pretraining import networks_on_meta

GIB = 2**30
#: Bytes of a trained parameter: weight, gradient and AdamW's two moments, in float32.
TRAINED = 16
#: Bytes of a parameter of the teacher.
TEACHER = 4
#: Bytes of a trained parameter that is gathered: weight and gradient.
GATHERED = 8
#: Blocks that are gathered at a time: the current one and the next one.
BLOCKS = 2


def size(module: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def normalised(module: nn.Module) -> int:
    """Return the number of weights that weight normalisation computes per step and rank."""
    return sum(p.numel() for name, p in module.named_parameters() if name.endswith('weight_v'))


def count(task: DINOv2, ranks: int) -> tuple[float, float]:
    """Return the bytes per rank with DDP and with FSDP2.

    Args:
        task: The task.
        ranks: Number of ranks.
    """
    student, teacher = size(task.student), size(task.model) + size(task.teacher_heads)
    states = TRAINED * student + TEACHER * teacher
    computed = 4 * (normalised(task.student) + normalised(task.teacher_heads))
    backbone = task.student['backbone']
    blocks = [module for module in backbone.modules() if isinstance(module, PackedBlock)]
    rest = size(backbone) - sum(size(block) for block in blocks)
    heads = [size(head) for name, head in task.student.items() if name != 'backbone']
    # Backward, heads come first, then the blocks; what is beside the blocks stays throughout.
    gathered = rest + max(BLOCKS * max(size(block) for block in blocks), max(heads))
    return states + computed, states / ranks + computed + GATHERED * gathered


def rows(configs: list[Path], ranks: list[int]) -> list[str]:
    """Return the lines of a Markdown table."""
    columns = ['config', 'trained', 'DDP', *(f'FSDP2, {n} ranks' for n in ranks)]
    lines = [' | '.join(columns), ' | '.join(['---', *['---:'] * (len(columns) - 1)])]
    for config in configs:
        arguments: dict[str, Any] = yaml.safe_load(config.read_text())['model']['init_args']
        with networks_on_meta():
            task = DINOv2(**arguments)
        ddp, _ = count(task, 1)
        sharded = [f'{count(task, n)[1] / GIB:.1f} GiB' for n in ranks]
        trained = f'{size(task.student) / 1e6:.0f} M'
        lines.append(' | '.join([f'`{config.name}`', trained, f'{ddp / GIB:.1f} GiB', *sharded]))
    return [f'| {line} |' for line in lines]


def main() -> None:
    """Write the table to ``experiments/results`` and print it."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument('configs', nargs='+', type=Path)
    parser.add_argument('--ranks', nargs='+', type=int, default=[8, 64])
    args = parser.parse_args()
    table = '\n'.join(rows(args.configs, args.ranks)) + '\n'
    results = Path(__file__).parents[1] / 'results' / 'state_memory.md'
    results.write_text(table)
    print(table, end='')


if __name__ == '__main__':
    main()
