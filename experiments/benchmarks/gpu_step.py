"""Count what a training step copies to a GPU, and where the host waits for it. Needs no GPU.

Lightning's Trainer runs some steps of DINOv2 on a device whose tensors have shapes but no values
(see ``fake_gpu.py``). The count covers everything that a step does: data module, task,
optimiser, logs and progress bar. Pinning, which needs a GPU, is only recorded.

    python experiments/benchmarks/gpu_step.py            # ViT-B/16, both sensors, batch 64
    python experiments/benchmarks/gpu_step.py --label before   # in a checkout of an older commit
"""

import argparse
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fake_gpu import Traffic, fake_gpu
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from rounds import RESULTS, write_results
from torch import Tensor, nn
from torch.utils.data import Dataset

from geofm.datamodules import NamedBandsDataModule
from geofm.sensors import BANDS
from geofm.tasks import DINOv2

GPU = torch.device('cuda', 0)

#: The flagship: configs/pretrain/sen12mscrts_vitb16_linear.yaml.
FLAGSHIP: dict[str, Any] = {
    'model': 'geofm_vit_base_patch16_linear',
    'model_args': {'reg_tokens': 2},
    'global_size': 192,
    'mask_probability': 0.3,
    'mask_ratio': (0.1, 0.3),
    'check_every_n_batches': 4,
}
#: Code that copies images and their dates.
BATCH = 'batch_to'


class NoDriver(CPUAccelerator):
    """Lightning accelerator for the simulated device."""

    def setup_device(self, device: torch.device) -> None:
        """Accept any device.

        Args:
            device: The device.
        """


class FakeStrategy(SingleDeviceStrategy):
    """Lightning strategy for one simulated device."""

    def __init__(self) -> None:
        """Initialize a new FakeStrategy instance."""
        super().__init__(GPU, NoDriver())

    def model_to_device(self) -> None:
        """Replace parameters and buffers by fake ones, which ``Module.to`` cannot."""
        assert self.lightning_module is not None
        for module in self.lightning_module.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    moved = parameter.detach().to(GPU)
                    module._parameters[name] = nn.Parameter(moved, parameter.requires_grad)
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(GPU)
        self.lightning_module._device = GPU

    def teardown(self) -> None:
        """Leave the model as it is, because it has no values to copy back."""


class GeneratedPairs(Dataset[dict[str, Tensor]]):
    """Data set of backscatter in dB and reflectances in DN, identical for all samples.

    Args:
        length: Number of samples.
        size: Side of an image in pixels.
    """

    def __init__(self, length: int, size: int) -> None:
        self.length = length
        backscatter = 5 * torch.randn(2, size, size) - 12
        reflectance = torch.randint(0, 10_000, (len(BANDS) - 2, size, size)).float()
        self.image = torch.cat([backscatter, reflectance])

    def __len__(self) -> int:
        """Return the number of samples."""
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return a sample.

        Args:
            index: Its number.

        Returns:
            ``image`` in raw units, ``valid`` and ``dates``.
        """
        valid = torch.ones(self.image.shape[1:], dtype=torch.bool)
        return {'image': self.image, 'valid': valid, 'dates': torch.tensor([17_600, 17_603])}


class Count(Callback):
    """Callback that keeps the counts of each step.

    Args:
        gpu: The device that counts.
    """

    def __init__(self, gpu: Any) -> None:
        self.gpu = gpu
        self.steps: list[Traffic] = []

    def on_train_batch_end(self, *args: Any) -> None:
        """Start counting the next step.

        Args:
            *args: Accepted for Lightning.
        """
        self.steps.append(self.gpu.traffic)
        self.gpu.traffic = Traffic()


def count_steps(
    task: dict[str, Any],
    batch_size: int,
    size: int,
    steps: int,
    folder: Path,
    attention: str = 'varlen',
) -> list[Traffic]:
    """Count copies and waits of training steps.

    Args:
        task: Arguments of the task.
        batch_size: Number of images in a batch.
        size: Side of an image in pixels.
        steps: Number of steps.
        folder: Where Lightning writes to.
        attention: How packed attention is computed.

    Returns:
        What each step counted, the first one left out, which also sets up.
    """
    with fake_gpu(attention) as gpu, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        pairs = GeneratedPairs((steps + 1) * batch_size, size)
        data = NamedBandsDataModule(list(BANDS), train_dataset=pairs, batch_size=batch_size)
        count = Count(gpu)
        trainer = Trainer(
            strategy=FakeStrategy(),
            max_epochs=1,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            callbacks=[count],
            default_root_dir=folder,
        )
        trainer.fit(DINOv2(**task), datamodule=data)
    return count.steps[1:]


def of_batch(copied: dict[str, int]) -> int:
    """Return the bytes of images and their dates and masks.

    Args:
        copied: Bytes by place in the code.

    Returns:
        Their sum.
    """
    return sum(size for place, size in copied.items() if place.endswith(BATCH))


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Return a Markdown table of the counts.

    Args:
        results: Steps by label.

    Returns:
        A row for each label, then where the host waits.
    """
    lines = [
        '| | waits for the GPU in each step | copied apart from the batch | of which not pinned '
        '| batch |',
        '|---|---|---:|---:|---:|',
    ]
    places: dict[str, list[str]] = {}
    for label, steps in results.items():
        waits = ', '.join(str(sum(step['waits'].values())) for step in steps)
        batch = max(of_batch(step['copied']) for step in steps)
        beside, pageable = (
            max(sum(step[key].values()) - of_batch(step[key]) for step in steps)
            for key in ('copied', 'pageable')
        )
        figures = ' | '.join(f'{x / 1e6:,.2f} MB' for x in (beside, pageable, batch))
        lines.append(f'| {label} | {waits} | {figures} |')
        most = max(steps, key=lambda step: sum(step['waits'].values()))
        places[label] = [f'{name} ({n})' for name, n in most['waits'].items()]
    lines += ['', 'Where the host waits, in the step that waits most often:', '']
    return '\n'.join(lines + [f'* {label}: {", ".join(at)}' for label, at in places.items()])


def main(arguments: Sequence[str] | None = None) -> None:
    """Count, print the table, and write it beside what was counted before under other labels.

    Args:
        arguments: Those of the command line by default.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument('--label', default='now')
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--steps', type=int, default=4)
    parser.add_argument('--output', type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    # Options of the task that an older commit does not know.
    known = {k: v for k, v in FLAGSHIP.items() if k in DINOv2.__init__.__annotations__}
    counted = count_steps(known, options.batch_size, 256, options.steps, options.output)
    file = options.output / 'gpu_step.json'
    results = json.loads(file.read_text())['steps'] if file.exists() else {}
    # Not asdict: that has a Counter count its items.
    results[options.label] = [
        {'waits': step.waits, 'copied': step.copied, 'pageable': step.pageable} for step in counted
    ]
    about = {'batch_size': options.batch_size, 'torch': torch.__version__, 'steps': results}
    text = table(results)
    print(text)
    write_results(options.output, 'gpu_step', about, text)


if __name__ == '__main__':
    main()
