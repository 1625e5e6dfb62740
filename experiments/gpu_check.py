"""Check and time pretraining on a GPU: one command, one JSON file, under 8 minutes.

Each section runs independently of the others; failures are recorded with their errors. Images are
generated. ``--tiny`` runs every section on any machine, at sizes that say nothing about speed.

    python experiments/gpu_check.py                   # on a GPU: ViT-B/16, both sensors, batch 64
    python experiments/gpu_check.py --tiny            # anywhere
"""

import argparse
import json
import platform
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._dynamo.utils
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import AdamW
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from geofm.atomic import atomic_file
from geofm.datamodules import NamedBandsDataModule
from geofm.models.packed_attention import attend, choose_attention
from geofm.sensors import BANDS, band_statistics
from geofm.tasks import DINOv2
from geofm.tasks.parameters import gradient_norms, parameter_groups
from geofm.transforms import Crops

#: Dense bfloat16 peak of cards in FLOP/s, by a part of the name, from NVIDIA's data sheets.
PEAKS = {'H200': 989e12, 'H100': 989e12, 'A100': 312e12, 'L40S': 362e12}

TEMPERATURE, MOMENTUM = 0.05, 0.994
#: configs/pretrain/sen12mscrts_vitb16_linear.yaml.
FLAGSHIP: dict[str, Any] = {
    'model': 'geofm_vit_base_patch16_linear',
    'model_args': {'reg_tokens': 2},
    'global_size': 192,
    'mask_probability': 0.3,
    'mask_ratio': (0.1, 0.3),
}
TINY: dict[str, Any] = {
    'model': 'geofm_vit_nano_patch16_linear',
    'model_args': {'depth': 2},
    'global_size': 32,
    'local_size': 16,
    'n_local': 2,
    'prototypes': 64,
    'head_hidden_dim': 32,
    'head_bottleneck_dim': 16,
}


@dataclass(frozen=True)
class Setting:
    """Sizes and device of a check.

    Attributes:
        task: Arguments of the task.
        device: The device.
        batch_size: Images in a batch.
        image_size: Side of an image in pixels.
        steps: Steps of the whole run.
        repeats: Steps of which the median is taken.
        workers: Processes that make batches.
    """

    task: dict[str, Any]
    device: torch.device
    batch_size: int = 64
    image_size: int = 256
    steps: int = 100
    repeats: int = 10
    workers: int = 12

    def autocast(self, dtype: torch.dtype | None = torch.bfloat16) -> AbstractContextManager[Any]:
        """Return an autocast context for the GPU.

        Args:
            dtype: Which; None: full precision.
        """
        on = self.device.type == 'cuda' and dtype is not None
        return torch.autocast(self.device.type, dtype, enabled=on)

    def small(self) -> 'Setting':
        """Return the same setting with a small model and few images, for numerical comparisons."""
        task = {**self.task, 'model': 'geofm_vit_tiny_patch16_linear'}
        return self if self.steps < 100 else replace(self, task=task, batch_size=8)


def wait(device: torch.device) -> None:
    """Wait until a device has finished its work.

    Args:
        device: The device.
    """
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the median time of a function after two warm-up runs.

    Args:
        function: What to time.
        device: Where it computes.
        repeats: Number of runs.

    Returns:
        Seconds.
    """
    times = []
    for _ in range(repeats + 2):
        wait(device)
        start = time.perf_counter()
        function()
        wait(device)
        times.append(time.perf_counter() - start)
    return float(torch.tensor(times[2:]).median())


def images_of(setting: Setting) -> dict[str, Tensor]:
    """Return a normalised batch on the device.

    Args:
        setting: Its size.

    Returns:
        ``image``, ``valid`` and ``dates``.
    """
    size = (setting.batch_size, len(BANDS), setting.image_size, setting.image_size)
    return {
        'image': torch.randn(size, device=setting.device),
        'valid': torch.ones(size[0], *size[2:], dtype=torch.bool, device=setting.device),
        'dates': torch.full((size[0], 2), 17_600, device=setting.device),
    }


# -- sections: each takes a setting and returns what goes into the JSON file -----------------------


def about_device(setting: Setting) -> dict[str, Any]:
    """Return name, memory and software of the device."""
    about: dict[str, Any] = {'torch': torch.__version__, 'python': platform.python_version()}
    if setting.device.type == 'cuda':
        properties = torch.cuda.get_device_properties(setting.device)
        about |= {'memory_gib': properties.total_memory / 2**30, 'cuda': torch.version.cuda}
    for dtype in (torch.float32, torch.bfloat16):
        about[f'attention_{str(dtype)[6:]}'] = choose_attention(setting.device, dtype)
    about['gemm_flops'] = gemm_rate(setting)
    return about


def gemm_rate(setting: Setting) -> float:
    """Return the rate of a large matrix product in the precision of the run, in FLOP/s."""
    on_gpu = setting.device.type == 'cuda'
    side, dtype = (8192, torch.bfloat16) if on_gpu else (512, torch.float32)
    a, b = (torch.randn(side, side, device=setting.device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / seconds(lambda: a @ b, setting.device, 10)


def attention_parity(setting: Setting) -> dict[str, Any]:
    """Return the largest difference of each kernel and its gradient from attention in float32."""
    groups = ((4, 147), (16, 41), (1, 3))
    rows = sum(count * length for count, length in groups)
    qkv = torch.randn(rows, 3, 12, 64, device=setting.device)
    seed = torch.randn(rows, 12 * 64, device=setting.device)

    def run(method: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = qkv.to(dtype, copy=True).requires_grad_()
        result = attend(leaf, groups, method=method)
        result.backward(seed.to(dtype))
        assert leaf.grad is not None
        return result.detach().float(), leaf.grad.float()

    expected = run('sdpa', torch.float32)
    found: dict[str, Any] = {}
    for method in ('sdpa', 'varlen', 'xformers'):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            name = f'{method} {str(dtype)[6:]}'
            try:
                result = run(method, dtype)
                pairs = zip(result, expected, strict=True)
                found[name] = [((a - b).norm() / b.norm()).item() for a, b in pairs]
            except Exception as error:
                found[name] = _in_short(error)
    return found


def losses_on_cpu_and_device(setting: Setting) -> dict[str, Any]:
    """Compare losses of the same batch and draws on the CPU and on the device, in float32."""
    setting = replace(setting.small(), batch_size=4)
    seed_everything(0, verbose=False)
    task = DINOv2(**setting.task, drop_path_rate=0.2).train()
    batch = {key: value.cpu() for key, value in images_of(setting).items()}
    found = []
    torch.set_float32_matmul_precision('highest')
    for device in (torch.device('cpu'), setting.device):
        task.to(device)
        # Speckle is drawn on the device: without it, all draws are the CPU's.
        assert task.multi_crop.photometry is not None
        task.multi_crop.photometry.speckle = nn.ModuleList()
        torch.manual_seed(1)
        losses, _ = task.losses({k: v.to(device) for k, v in batch.items()}, TEMPERATURE)
        found.append({name: value.item() for name, value in losses.items()})
    torch.set_float32_matmul_precision('high')
    differ = {k: abs(found[1][k] - v) / max(abs(v), 1e-6) for k, v in found[0].items()}
    return {'cpu': found[0], 'device': found[1], 'relative_difference': differ}


def precisions(setting: Setting) -> dict[str, Any]:
    """Return losses of some steps of Lightning's Trainer in each precision."""
    setting = setting.small()
    kinds = ['32-true', 'bf16-mixed', *(['16-mixed'] if setting.device.type == 'cuda' else [])]
    return {kind: train(replace(setting, steps=6, workers=0), kind)['losses'] for kind in kinds}


def transfer(setting: Setting) -> dict[str, Any]:
    """Check that images sent as integers arrive unchanged, and time the copies."""
    pairs = GeneratedPairs(setting.batch_size, setting.image_size)
    batches = []
    for as_integers in (False, True):
        data = NamedBandsDataModule(list(BANDS), train_dataset=pairs, batch_size=len(pairs), seed=0)
        data.images_as_integers = as_integers
        keep = KeepBatch()
        _trainer(setting, '32-true', 1, [keep]).fit(DINOv2(**setting.small().task), datamodule=data)
        batches.append(keep.image)
    assert batches[0] is not None
    host = torch.empty(batches[0].shape, dtype=torch.uint16)
    if setting.device.type == 'cuda':
        host = host.pin_memory()
    copy = seconds(lambda: host.to(setting.device, non_blocking=True), setting.device, 5)
    same = all(batch is not None and batch.equal(batches[0]) for batch in batches)
    return {'same': same, 'gb_per_s': host.nbytes / copy / 1e9}


@dataclass
class Step:
    """Task with an optimiser, whose step is split into phases."""

    setting: Setting
    options: dict[str, Any]

    def __post_init__(self) -> None:
        seed_everything(0, verbose=False)
        self.task = DINOv2(**{**self.setting.task, **self.options}).to(self.setting.device).train()
        groups = parameter_groups(self.task.student, self.task.model.depth)
        self.optimizer = AdamW(groups, lr=1e-4, fused=True)
        self.batch = images_of(self.setting)
        self.crops: Crops = self.task.multi_crop(self.batch)

    def crop(self) -> None:
        """Create crops."""
        self.crops = self.task.multi_crop(self.batch)

    def teacher(self) -> None:
        """Run the teacher."""
        with torch.no_grad(), self.setting.autocast():
            self.task.teacher_forward(self.crops)

    def student(self) -> None:
        """Run the student, keeping what its gradient needs."""
        with self.setting.autocast():
            self.task.student_forward(self.crops)

    def forward(self) -> Tensor:
        """Compute the loss of existing crops."""
        crops = mock.patch.object(self.task.multi_crop, 'forward', return_value=self.crops)
        with crops, self.setting.autocast():
            losses, _ = self.task.losses(self.batch, TEMPERATURE, update_centers=True)
        return self.task.total(losses)

    def forward_backward(self) -> None:
        """Compute the gradient."""
        self.optimizer.zero_grad()
        self.forward().backward()

    def update(self) -> None:
        """Clip, step, and move the teacher."""
        norms = gradient_norms(self.task.student)
        for name, module in self.task.student.items():
            nn.utils.clip_grads_with_norm_(module.parameters(), 3.0, norms[name])
        self.optimizer.step()
        self.task.move_teacher(MOMENTUM)

    def whole(self) -> None:
        """Run a whole step."""
        self.crop()
        self.forward_backward()
        self.update()


def flops(step: Step, run: Callable[[], object], passes: dict[str, float]) -> float:
    """Count the FLOPs of a phase, including attention that PyTorch's counter does not see.

    Args:
        step: The step.
        run: The phase.
        passes: Passes through attention of 'globals' and 'locals': 1 forward, 2 backward.

    Returns:
        FLOPs.
    """
    with FlopCounterMode(display=False) as counter:
        run()
    seen = counter.get_flop_counts().get('Global', {})
    if any('attention' in str(operator) for operator in seen):
        return float(counter.get_total_flops())
    model = step.task.model
    attention = 0.0
    for name, count in passes.items():
        crops = getattr(step.crops, name)
        tokens = model.num_prefix_tokens + (crops.shape[-1] // model.patch_size) ** 2
        attention += count * len(crops) * 4 * tokens**2 * model.embed_dim
    return float(counter.get_total_flops() + attention * model.depth * len(model.encoders))


def phases(setting: Setting) -> dict[str, Any]:
    """Measure time, FLOPs and utilisation of each phase, with the stochastic depth of the task."""
    step = Step(setting, {})
    kept = 1 - step.task.hparams['drop_path_rate']
    both = {'globals': kept, 'locals': kept}
    passes: dict[str, tuple[Callable[[], object], dict[str, float]]] = {
        'crops': (step.crop, {}),
        'teacher': (step.teacher, {'globals': 1.0}),
        'student forward': (step.student, both),
        'losses forward and backward': (
            step.forward_backward,
            {'globals': 3 * kept + 1, 'locals': 3 * kept},
        ),
        'optimiser and EMA': (step.update, {}),
        'whole step': (step.whole, {'globals': 3 * kept + 1, 'locals': 3 * kept}),
    }
    rate = gemm_rate(setting)
    peak = next((v for k, v in PEAKS.items() if k in device_name(setting.device)), None)
    found: dict[str, Any] = {}
    for name, (run, count) in passes.items():
        taken = seconds(run, setting.device, setting.repeats)
        work = flops(step, run, count)
        found[name] = {
            'seconds': taken,
            'flops': work,
            'of_gemm': work / taken / rate,
            'mfu': None if peak is None else work / taken / peak,
        }
    once, forward = found['losses forward and backward'], found['student forward']
    found['backward, by difference'] = {
        'seconds': once['seconds'] - forward['seconds'] - found['teacher']['seconds']
    }
    found['images_per_s'] = setting.batch_size / found['whole step']['seconds']
    return found


@contextmanager
def counting_saved(step: Step) -> Iterator[list[int]]:
    """Count the bytes that autograd keeps for the backward pass, each storage once.

    Args:
        step: The step, whose parameters do not count.

    Yields:
        A list with the bytes so far.
    """
    seen = {p.untyped_storage().data_ptr() for p in step.task.parameters()}
    total = [0]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.device == step.setting.device and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total[0] += storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total


def memory(setting: Setting) -> dict[str, Any]:
    """Measure peak memory beside an estimate, for each kind of activation checkpointing.

    The estimate: weights and averages, gradients, moments, images, crops, and what autograd keeps.
    """
    found: dict[str, Any] = {}
    for policy in (False, 'attention', 'matmul', True):
        step = Step(setting, {'grad_checkpointing': policy})
        with counting_saved(step) as saved:
            step.forward().backward()
        trained = sum(p.nbytes for p in step.task.student.parameters())
        every = sum(p.nbytes for p in step.task.parameters())
        crops = step.crops.globals.nbytes + step.crops.locals.nbytes
        estimate = every + 3 * trained + step.batch['image'].nbytes + crops + saved[0]
        if setting.device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats()
        taken = seconds(step.whole, setting.device, 3)
        peak = torch.cuda.max_memory_allocated() if setting.device.type == 'cuda' else None
        found[str(policy)] = {
            'peak_gib': None if peak is None else peak / 2**30,
            'estimate_gib': estimate / 2**30,
            'saved_gib': saved[0] / 2**30,
            'seconds': taken,
        }
        del step
        if setting.device.type == 'cuda':
            torch.cuda.empty_cache()
    return found


def compiled(setting: Setting) -> dict[str, Any]:
    """Measure step time and loss with compiled blocks and heads, beside eager mode."""
    found: dict[str, Any] = {}
    for on in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        step = Step(setting, {'compile_blocks': on, 'drop_path_rate': 0.0})
        start = time.perf_counter()
        with torch.no_grad():
            loss = step.forward().item()
        step.whole()
        wait(setting.device)
        first = time.perf_counter() - start
        found['compiled' if on else 'eager'] = {
            'loss': loss,
            'first_step_s': first,
            'seconds': seconds(step.whole, setting.device, setting.repeats),
            'graphs': int(torch._dynamo.utils.counters['stats']['unique_graphs']),
        }
        del step
    return found


class GeneratedPairs(Dataset[dict[str, Tensor]]):
    """Data set of random textures in raw units, shifted from sample to sample.

    Args:
        length: Number of samples.
        size: Side of an image in pixels.
    """

    def __init__(self, length: int, size: int) -> None:
        self.length = length
        mean, std = band_statistics(BANDS)
        coarse = torch.randn(8, len(BANDS), 16, 16, generator=torch.Generator().manual_seed(0))
        smooth = nn.functional.interpolate(coarse, (size, size), mode='bicubic')
        self.images = mean[:, None, None] + std[:, None, None] * smooth
        self.images[:, 2:] = self.images[:, 2:].clamp(1, 65_535).round()

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
        image = self.images[index % 8].roll((7 * index, 3 * index), (1, 2))
        valid = torch.ones(image.shape[1:], dtype=torch.bool)
        return {'image': image, 'valid': valid, 'dates': torch.tensor([17_600, 17_603])}


class Losses(Callback):
    """Callback that keeps losses on the device, and the times of the steps."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.times: list[float] = []

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the loss."""
        self.losses.append(outputs['loss'].detach())
        self.times.append(time.perf_counter())


class KeepBatch(Callback):
    """Callback that keeps the images of the first batch."""

    image: Tensor | None = None

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the images."""
        self.image = batch['image'].clone() if self.image is None else self.image


def _trainer(setting: Setting, precision: Any, steps: int, callbacks: list[Callback]) -> Trainer:
    return Trainer(
        accelerator='gpu' if setting.device.type == 'cuda' else 'cpu',
        devices=1,
        precision=precision,
        max_epochs=1,
        max_steps=steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        default_root_dir=tempfile.gettempdir(),
    )


def train(setting: Setting, precision: str = 'bf16-mixed') -> dict[str, Any]:
    """Train like the command line does: Trainer, data module, workers, checks every 4 batches."""
    seed_everything(0, verbose=False)
    pairs = GeneratedPairs(setting.steps * setting.batch_size, setting.image_size)
    data = NamedBandsDataModule(
        list(BANDS),
        train_dataset=pairs,
        batch_size=setting.batch_size,
        num_workers=setting.workers,
        seed=0,
    )
    task = DINOv2(**setting.task, check_every_n_batches=4, warmup_epochs=0.1)
    watch = Losses()
    trainer = _trainer(setting, precision, setting.steps, [watch])
    on_gpu = setting.device.type == 'cuda'
    with warnings.catch_warnings(record=True) as caught, _sync_debug('warn' if on_gpu else None):
        warnings.simplefilter('always')
        trainer.fit(task, datamodule=data)
    wait(setting.device)
    losses = torch.stack(watch.losses).tolist()
    half = len(watch.times) // 2
    taken = (watch.times[-1] - watch.times[half]) / max(1, len(watch.times) - 1 - half)
    found = {
        'losses': losses,
        'finite': all(loss < float('inf') for loss in losses),
        'seconds_per_step': taken,
        'images_per_s': setting.batch_size / max(taken, 1e-9),
        'waits': sum('synchronizing' in str(w.message) for w in caught),
    }
    if on_gpu:
        found['peak_gib'] = torch.cuda.max_memory_allocated() / 2**30
    return found


@contextmanager
def _sync_debug(mode: str | None) -> Iterator[None]:
    """Make PyTorch warn about operators that synchronise with the GPU."""
    if mode is None:
        yield
        return
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode('default')


SECTIONS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    'device': about_device,
    'attention parity': attention_parity,
    'losses, CPU and device': losses_on_cpu_and_device,
    'precisions': precisions,
    'transfer': transfer,
    'phases': phases,
    'training run': train,
    'memory': memory,
    'compile': compiled,
}


def _in_short(error: Exception) -> dict[str, Any]:
    """Return the short form of an error for JSON."""
    place = traceback.format_exception(error)[-4:]
    return {'error': f'{type(error).__name__}: {error}'[:500], 'at': ''.join(place)[-1500:]}


def device_name(device: torch.device) -> str:
    """Return the name of a device.

    Args:
        device: The device.
    """
    return torch.cuda.get_device_name(device) if device.type == 'cuda' else platform.machine()


def check(setting: Setting, output: Path, limit: float, only: Sequence[str]) -> dict[str, Any]:
    """Run the sections, and write the results after each.

    Args:
        setting: What to measure, and where.
        output: The JSON file.
        limit: Seconds after which no further section is begun.
        only: Names of the sections.

    Returns:
        What the file holds.
    """
    start = time.perf_counter()
    about = {'card': device_name(setting.device), 'batch_size': setting.batch_size}
    found: dict[str, Any] = {**about, 'task': setting.task, 'sections': {}}
    for name in only:
        begun = time.perf_counter()
        if begun - start > limit:
            result: dict[str, Any] = {'error': f'left out: {limit:.0f} s were over'}
        else:
            try:
                result = SECTIONS[name](setting)
            except Exception as error:
                result = _in_short(error)
            if setting.device.type == 'cuda':
                torch.cuda.empty_cache()
        result['section_s'] = round(time.perf_counter() - begun, 1)
        found['sections'][name] = result
        print(f'{name}: {json.dumps(result, default=str)[:2000]}', flush=True)
        with atomic_file(output) as part:
            part.write_text(json.dumps(found, indent=2, default=str) + '\n')
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the checks; the exit code is 1 if a section failed.

    Args:
        arguments: Those of the command line by default.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument('--tiny', action='store_true', help='run on any machine with tiny sizes')
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--workers', type=int, default=12)
    parser.add_argument('--limit', type=float, default=400, help='start no section after (s)')
    parser.add_argument('--sections', nargs='*', choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument('--output', type=Path, default=Path('gpu_check.json'))
    options = parser.parse_args(arguments)
    device = torch.device('cuda', 0) if torch.cuda.is_available() else torch.device('cpu')
    if options.tiny:
        setting = Setting(TINY, device, 4, 64, steps=4, repeats=1, workers=0)
    elif device.type == 'cpu':
        parser.error('there is no GPU: --tiny runs anywhere')
    else:
        setting = Setting(FLAGSHIP, device, batch_size=options.batch_size, workers=options.workers)
    torch.set_float32_matmul_precision('high')
    found = check(setting, options.output, options.limit, options.sections)
    if any('error' in result for result in found['sections'].values()):
        sys.exit(1)


if __name__ == '__main__':
    main()
