"""Compare the speed of a DINOv2 training step with compositions of timm and lightly.

All rows use the same crops, masks, initial weights, stochastic depth and fused AdamW. Their losses
must be equal without stochastic depth, and stay close over the timed steps with it. Steps take
turns, so that other load on the machine affects all rows equally. Compare ratios within a run
rather than times of different runs. The fraction of the machine's peak is the rate of the FLOPs
that the step needs (forward, and twice that backward) divided by that of the fastest matrix
product measured beside it.

    python experiments/benchmarks/step.py                    # ViT-S/16 on the CPU
    python experiments/benchmarks/step.py --preset gpu       # ViT-B/16, both sensors, bf16
"""

import argparse
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from composition import Composition, PackedComposition
from rich.progress import track
from rounds import RESULTS, write_results
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.flop_counter import FlopCounterMode

from geofm.models import MultiSensorViT
from geofm.models.fusion import LinearFusion
from geofm.models.packed_attention import choose_attention
from geofm.models.registry import SIZES
from geofm.sensors import SENSORS
from geofm.tasks import DINOv2
from geofm.tasks.parameters import gradient_norms, parameter_groups
from geofm.transforms import Crops, MultiCrop

TEMPERATURE, MOMENTUM, CLIP = 0.05, 0.994, 3.0
#: Names of the rows in tables.
OURS, REFERENCE, PACKED = 'geofm', 'timm + lightly', "DINOv2's method, plain implementation"
#: Largest difference between the mean losses of two rows over the timed steps, relative.
SAME_LOSS = 0.05

PRESETS: dict[str, dict[str, Any]] = {
    'cpu': {
        'device': 'cpu',
        'autocast': None,
        'size': 'small',
        'sensors': ['s2'],
        'batch_size': 8,
        'prototypes': 8192,
        'drop_path': [0.0, 0.3],
        'rounds': 7,
    },
    'gpu': {
        'device': 'cuda',
        'autocast': 'bfloat16',
        'size': 'base',
        'sensors': ['s1', 's2'],
        'batch_size': 64,
        'prototypes': 65536,
        'drop_path': [0.3],
        'rounds': 20,
    },
}


class _TheseCrops(nn.Module):
    """Replacement of the multi-crop that returns existing crops."""

    def __init__(self, crops: Crops) -> None:
        super().__init__()
        self.crops = crops

    def forward(self, batch: Any) -> Crops:
        return self.crops


def make_crops(preset: dict[str, Any]) -> Crops:
    """Return 2 crops of 192 px and 8 of 96 px of noise, with masks as DINOv2 draws them."""
    bands = [band for key in preset['sensors'] for band in SENSORS[key].band_names]
    multi_crop = MultiCrop(bands, global_size=192, local_size=96, n_local=8)
    images = torch.randn(preset['batch_size'], len(bands), 256, 256, device=preset['device'])
    crops: Crops = multi_crop({'image': images})
    return crops


def step_of_ours(crops: Crops, preset: dict[str, Any], drop_path: float) -> tuple[DINOv2, Any]:
    """Return geofm's step, as the Trainer would run it."""
    fused = len(preset['sensors']) == 2
    task = DINOv2(
        model=f'geofm_vit_{preset["size"]}_patch16_{"linear" if fused else preset["sensors"][0]}',
        in_channels=crops.globals.shape[1],
        prototypes=preset['prototypes'],
        drop_path_rate=drop_path,
        global_size=192,
        local_size=96,
    ).to(preset['device'])
    task.train()
    task.multi_crop = _TheseCrops(crops)  # type: ignore[assignment]
    optimizer = AdamW(parameter_groups(task.student, task.model.depth), lr=1e-4, fused=True)

    def step() -> float:
        with _autocast(preset):
            losses, _ = task.losses({'image': crops.globals}, TEMPERATURE, update_centers=True)
        loss = task.total(losses)
        loss.backward()
        norms = gradient_norms(task.student)
        for name, module in task.student.items():
            nn.utils.clip_grads_with_norm_(module.parameters(), CLIP, norms[name])
        optimizer.step()
        optimizer.zero_grad()
        task.move_teacher(MOMENTUM)
        return loss.item()

    return task, step


def step_of_composition(
    crops: Crops,
    preset: dict[str, Any],
    drop_path: float,
    kind: type[Composition] = Composition,
) -> tuple[Composition, Any]:
    """Return the step of a reference."""
    vit = {
        'model_name': 'vit_base_patch16_224',
        'img_size': 224,
        'reg_tokens': 4,
        'no_embed_class': True,
        'init_values': 1e-5,
        **SIZES[preset['size']],
    }
    channels = [len(SENSORS[key].bands) for key in preset['sensors']]
    composition = kind(vit, channels, preset['prototypes'], drop_path).to(preset['device'])
    composition.student.train()
    composition.head.train()
    parameters = [*composition.student.parameters(), *composition.head.parameters()]
    optimizer = AdamW(parameters, lr=1e-4, fused=True)

    def step() -> float:
        with _autocast(preset):
            losses = composition.losses(crops, TEMPERATURE)
        loss = losses['dino'] + losses['ibot'] + 0.1 * losses['koleo']
        loss.backward()
        nn.utils.clip_grad_norm_(composition.student.parameters(), CLIP)
        nn.utils.clip_grad_norm_(composition.head.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        composition.move_teacher(MOMENTUM)
        return loss.item()

    return composition, step


def _autocast(preset: dict[str, Any]) -> torch.autocast:
    dtype = getattr(torch, preset['autocast']) if preset['autocast'] else None
    return torch.autocast(preset['device'], dtype, enabled=dtype is not None)


def copy_weights(composition: Composition, task: DINOv2, sensors: Sequence[str]) -> None:
    """Copy the weights of a composition to a task."""
    backbones = task.student['backbone'], task.model
    for ours, theirs in zip(backbones, (composition.student, composition.teacher), strict=True):
        assert isinstance(ours, MultiSensorViT)
        for i, key in enumerate(sensors):
            ours.encoders[key].load_state_dict(theirs.vits[i].vit.state_dict())
            with torch.no_grad():
                ours.mask_token[i] = theirs.vits[i].mask_token.flatten()
        if theirs.fusion is not None:
            assert isinstance(ours.fusion, LinearFusion)
            ours.fusion.load_state_dict(theirs.fusion.state_dict())
    task.student['dino_head'].load_state_dict(composition.head.state_dict())
    task.teacher_heads['dino_head'].load_state_dict(composition.teacher_head.state_dict())


def make_steps(crops: Crops, preset: dict[str, Any], drop_path: float) -> dict[str, Any]:
    """Return the model and step of each row, all with the same weights."""
    reference = step_of_composition(crops, preset, drop_path)
    packed = step_of_composition(crops, preset, drop_path, PackedComposition)
    packed[0].load_state_dict(reference[0].state_dict())
    ours = step_of_ours(crops, preset, drop_path)
    copy_weights(reference[0], ours[0], preset['sensors'])
    return {REFERENCE: reference, PACKED: packed, OURS: ours}


def check_same_losses(crops: Crops, preset: dict[str, Any]) -> None:
    """Check that all rows compute equal losses from equal weights."""
    rows = make_steps(crops, preset, 0.0)
    task = rows.pop(OURS)[0]
    with torch.no_grad():
        losses, _ = task.losses({'image': crops.globals}, TEMPERATURE)
        for composition, _ in rows.values():
            for name, expected in composition.losses(crops, TEMPERATURE).items():
                torch.testing.assert_close(losses[name], expected, rtol=1e-4, atol=1e-4)


def needed_flops(crops: Crops, preset: dict[str, Any], drop_path: float) -> float:
    """Arithmetic of this package's step: what the counter sees, and attention, which it does not.

    Attention of a sequence of L tokens of width D is 4 L^2 D forward and twice that backward.
    """
    task, step = step_of_ours(crops, preset, drop_path)
    with FlopCounterMode(display=False) as counter:
        step()
    backbone = task.model
    width, prefix = backbone.embed_dim, backbone.num_prefix_tokens
    attention = 0.0
    for views, passes in (
        (crops.globals, 3 * (1 - drop_path) + 1),
        (crops.locals, 3 * (1 - drop_path)),
    ):
        tokens = prefix + (views.shape[-1] // backbone.patch_size) ** 2
        attention += len(views) * 4 * tokens**2 * width * passes
    return counter.get_total_flops() + attention * backbone.depth * len(backbone.sensors)


def gemm_peak(preset: dict[str, Any]) -> float:
    """Return the highest rate of a matrix product in the precision of the run, in FLOP/s."""
    dtype = getattr(torch, preset['autocast']) if preset['autocast'] else torch.float32
    on_gpu = preset['device'] == 'cuda'
    # A GPU is waited for after many products, of which one alone would be too short to time.
    repeats = 20 if on_gpu else 1
    best = 0.0
    for side in (1024, 2048, 4096, *([8192] if on_gpu else [])):
        a, b = (torch.randn(side, side, device=preset['device'], dtype=dtype) for _ in range(2))

        def multiply(a: Tensor = a, b: Tensor = b) -> None:
            for _ in range(repeats):
                a @ b

        _timed(multiply, preset['device'])
        for _ in range(5):
            best = max(best, repeats * 2 * side**3 / _timed(multiply, preset['device']))
    return best


def _timed(step: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    step()
    if device == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _peak_memory(which: str, preset: dict[str, Any], drop_path: float, threads: int) -> float:
    """Return the peak memory of three steps in this process, in MiB."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    crops = make_crops(preset)
    make: dict[str, Callable[[Crops, dict[str, Any], float], tuple[nn.Module, Any]]] = {
        OURS: step_of_ours,
        REFERENCE: step_of_composition,
        PACKED: partial(step_of_composition, kind=PackedComposition),
    }
    _, step = make[which](crops, preset, drop_path)
    for _ in range(3):
        step()
    if preset['device'] == 'cuda':
        return torch.cuda.max_memory_allocated() / 2**20
    # Not getrusage: a child's figure there starts at its parent's.
    (line,) = [x for x in Path('/proc/self/status').read_text().splitlines() if 'VmHWM' in x]
    return int(line.split()[1]) / 1024


def measure(preset: dict[str, Any], drop_path: float, threads: int) -> dict[str, Any]:
    """Time the rows in turns at one drop path rate, and measure the memory of each in a process."""
    torch.manual_seed(0)
    crops = make_crops(preset)
    flops = needed_flops(crops, preset, drop_path)
    steps = {name: step for name, (_, step) in make_steps(crops, preset, drop_path).items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, list[float]] = {name: [] for name in steps}
    peaks: list[float] = []
    for step in steps.values():
        step()
    for _ in track(range(preset['rounds']), description=f'Drop path {drop_path}'):
        peaks.append(gemm_peak(preset))
        for name, step in steps.items():

            def keep_loss(step: Any = step, losses: list[float] = losses[name]) -> None:
                losses.append(step())

            seconds[name].append(_timed(keep_loss, preset['device']))
    del steps
    means = {name: statistics.fmean(values) for name, values in losses.items()}
    if max(means.values()) > (1 + SAME_LOSS) * min(means.values()):
        raise RuntimeError(f'the rows do not train equally: mean losses {means}')
    context = multiprocessing.get_context('spawn')
    memory = {}
    for name in seconds:
        with context.Pool(1) as pool:
            memory[name] = pool.apply(_peak_memory, (name, preset, drop_path, threads))
    return {
        'drop_path': drop_path,
        'losses': {k: round(v, 4) for k, v in means.items()},
        'seconds': {k: [round(v, 4) for v in values] for k, values in seconds.items()},
        'flops': flops,
        'gemm_peak': [round(peak) for peak in peaks],
        'peak_memory_mib': {k: round(v) for k, v in memory.items()},
    }


def table(results: Sequence[dict[str, Any]], batch_size: int) -> str:
    """Return a Markdown table of medians and of median ratios within a round."""
    lines = [
        '| drop path | step | s per step | images/s | speed-up | range | of GEMM peak '
        '| peak memory | mean loss |',
        '|---:|---|---:|---:|---:|---:|---:|---:|---:|',
    ]
    for result in results:
        base = result['seconds'][REFERENCE]
        for name, values in result['seconds'].items():
            ratios = [b / v for v, b in zip(values, base, strict=True)]
            shares = [
                result['flops'] / v / peak
                for v, peak in zip(values, result['gemm_peak'], strict=True)
            ]
            share = f'{100 * statistics.median(shares):.0f} %' if name == OURS else ''
            median = statistics.median(values)
            lines.append(
                f'| {result["drop_path"]} | {name} | {median:.2f} | {batch_size / median:.2f} '
                f'| {statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} '
                f'| {share} | {result["peak_memory_mib"][name]:,} MiB '
                f'| {result["losses"][name]:.2f} |'
            )
    return '\n'.join(lines)


def multicrop_share(preset: dict[str, Any], step_seconds: float) -> float:
    """Return the time of the multi-crop as a fraction of a step."""
    for _ in range(3):
        make_crops(preset)
    seconds = [_timed(lambda: make_crops(preset), preset['device']) for _ in range(9)]
    return statistics.median(seconds) / step_seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison, print the table and write it with the values of each round."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument('--preset', choices=PRESETS, default='cpu')
    parser.add_argument('--rounds', type=int)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--output', type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    preset = PRESETS[options.preset]
    if options.rounds:
        preset = {**preset, 'rounds': options.rounds}
    if preset['device'] == 'cuda' and not torch.cuda.is_available():
        parser.error('the preset gpu needs a CUDA device, and there is none')
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision('high')
    torch.manual_seed(0)
    check_same_losses(make_crops({**preset, 'batch_size': 2}), preset)
    results = [measure(preset, rate, options.threads) for rate in preset['drop_path']]
    text = table(results, preset['batch_size'])
    print(text)
    device = torch.device(preset['device'])
    dtype = getattr(torch, preset['autocast']) if preset['autocast'] else torch.float32
    card = torch.cuda.get_device_name() if preset['device'] == 'cuda' else platform.machine()
    share = multicrop_share(preset, statistics.median(results[-1]['seconds'][OURS]))
    about = {
        'torch': torch.__version__,
        'device': card,
        'threads': options.threads,
        'attention': choose_attention(device, dtype),
        'multicrop_share_of_step': round(share, 4),
        **preset,
        'results': results,
    }
    name = 'step' if options.preset == 'cpu' else f'step-{options.preset}'
    write_results(options.output, name, about, text)


if __name__ == '__main__':
    main()
