"""A step of the task against DINOv2 in NumPy, starting from the outputs of the heads."""

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from geofm.tasks import DINOv2
from tests.losses.test_koleo import koleo
from tests.losses.test_ranks import sinkhorn
from tests.tasks.test_dinov2 import SMALL, batch, small_task

IMAGES, N_LOCAL, TEMPERATURE = 4, 8, 0.06
Array = NDArray[np.float64]


class Seen:
    """Recorder of the inputs and outputs of the heads in a step, and of the masks."""

    def __init__(self, task: DINOv2) -> None:
        self.calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for side, heads in (('student', task.student), ('teacher', task.teacher_heads)):
            for name in ('dino_head', 'ibot_head'):
                if name in heads:
                    heads[name].register_forward_hook(self._keep(f'{side} {name}'))
        task.multi_crop.register_forward_hook(self._keep_masks)

    def _keep(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            self.calls.setdefault(name, []).append((args[0].detach(), output.detach()))

        return hook

    def _keep_masks(self, module: nn.Module, args: Any, crops: Any) -> None:
        self.masks = crops.masks.numpy()

    def logits(self, side: str, crops: int) -> tuple[Array, Array]:
        """Logits of the CLS tokens, by crop, and of the masked patches."""
        (_, logits), *more = self.calls[f'{side} dino_head']
        assert not more
        every = logits.double().numpy()
        cls, patches = every[: crops * IMAGES], every[crops * IMAGES :]
        if f'{side} ibot_head' in self.calls:
            assert not len(patches)
            ((_, of_patches),) = self.calls[f'{side} ibot_head']
            patches = of_patches.double().numpy()
        assert len(patches) == self.masks.sum()
        return cls.reshape(crops, IMAGES, -1), patches


def log_softmax(logits: Array) -> Array:
    scaled = logits - logits.max(axis=-1, keepdims=True)
    return scaled - np.log(np.exp(scaled).sum(axis=-1, keepdims=True))


def dino_loss(student: Array, targets: Array) -> float:
    """Compute DINOv2's two terms: local crops against both teachers, global crops crosswise."""
    predictions = log_softmax(student / 0.1)
    cross_entropy = lambda t, s: -(targets[t] * predictions[s]).sum(axis=-1).mean()  # noqa: E731
    pairs = [(t, s) for s in range(2, 2 + N_LOCAL) for t in range(2)]
    of_locals = sum(cross_entropy(t, s) for t, s in pairs) / 18
    crosswise = -(targets[::-1] * predictions[:2]).sum(axis=-1).mean() * 2 / 18
    assert len(pairs) == 16
    return float(of_locals + crosswise)


def ibot_loss(student: Array, targets: Array, masks: NDArray[np.bool_]) -> float:
    """Weigh tokens by 1 / masked tokens of the crop, and divide by all 2 x B crops."""
    cross_entropies = -(targets * log_softmax(student / 0.1)).sum(axis=-1)
    total, place = 0.0, 0
    for mask in masks:
        for _ in range(mask.sum()):
            total += cross_entropies[place] / mask.sum()
            place += 1
    return total / (2 * IMAGES)


def targets_of(logits: Array, centre: Array | None) -> Array:
    rows = logits.reshape(-1, logits.shape[-1])
    if centre is None:
        targets = sinkhorn(rows)
    else:
        targets = np.exp(log_softmax((rows - centre) / TEMPERATURE))
    return targets.reshape(logits.shape)


CASES: dict[str, dict[str, Any]] = {
    'defaults': {},
    'sinkhorn': {'centering': 'sinkhorn_knopp'},
    'two heads': {'separate_ibot_head': True, 'ibot_prototypes': 48},
    'two heads, sinkhorn': {'separate_ibot_head': True, 'centering': 'sinkhorn_knopp'},
    'weights': {'dino_weight': 0.7, 'ibot_weight': 1.3, 'koleo_weight': 0.2},
}


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('bf16', [False, True])
def test_losses_are_the_formulas(case: str, bf16: bool) -> None:
    """Losses are exact to float32 with bf16, because nothing after the heads is in bf16."""
    task = small_task(n_local=N_LOCAL, **CASES[case]).train()
    gains = [p for name, p in task.named_parameters() if name.endswith('weight_g')]
    centres = {name: getattr(task, name) for name in ('dino_center', 'ibot_center')}
    with torch.no_grad():
        for value in [*gains, *(b for c in centres.values() for b in c.buffers())]:
            value.uniform_(0.2, 1.4)
    old = {
        name: None if 'sinkhorn' in case else next(centre.buffers()).double().numpy().copy()
        for name, centre in centres.items()
    }
    seen = Seen(task)
    with torch.autocast('cpu', torch.bfloat16, enabled=bf16):
        losses, watched = task.losses(batch(IMAGES), TEMPERATURE, update_centers=True)
        total = task.total(losses)

    student_cls, student_patches = seen.logits('student', 2 + N_LOCAL)
    teacher_cls, teacher_patches = seen.logits('teacher', 2)
    ((features, logits),) = seen.calls['student dino_head']
    assert logits.dtype == (torch.bfloat16 if bf16 else torch.float32)
    global_cls = features[: 2 * IMAGES].double().numpy().reshape(2, IMAGES, -1)
    targets = targets_of(teacher_cls, old['dino_center'])
    patch_targets = targets_of(teacher_patches, old['ibot_center'])
    expected = {
        'dino': dino_loss(student_cls, targets),
        'ibot': ibot_loss(student_patches, patch_targets, seen.masks),
        'koleo': koleo(global_cls[0]) + koleo(global_cls[1]),
    }
    assert seen.masks.any(axis=1).sum() == IMAGES
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value, rel=2e-5), name
    weights = {'dino': 1.0, 'ibot': 1.0, 'koleo': 0.1}
    weights.update({k[:-7]: v for k, v in CASES[case].items() if k.endswith('_weight')})
    assert total.item() == pytest.approx(
        sum(weights[name] * value for name, value in expected.items()), rel=2e-5
    )

    # The centres moved after they were used, each by its own tokens.
    means = {'dino_center': teacher_cls.mean(axis=(0, 1)), 'ibot_center': teacher_patches.mean(0)}
    for name, centre in old.items():
        if centre is not None:
            (buffer,) = centres[name].buffers()
            moved = 0.9 * centre + 0.1 * means[name]
            np.testing.assert_allclose(buffer.numpy(), moved, rtol=1e-5)
    entropy = -(targets * np.log(np.maximum(targets, 1e-300))).sum(axis=-1).mean()
    assert watched['target_entropy'].item() == pytest.approx(entropy, rel=1e-4, abs=1e-6)


def test_teacher_sees_whole_crops_and_gets_no_gradient() -> None:
    task = small_task(n_local=N_LOCAL, centering='sinkhorn_knopp').train()
    hidden: list[Any] = []
    for network in (task.model, task.student['backbone']):
        forward = network.forward_views

        def spy(views: Any, forward: Any = forward) -> Any:
            hidden.append([view.masks for view in views])
            return forward(views)

        object.__setattr__(network, 'forward_views', spy)
    losses, _ = task.losses(batch(IMAGES), TEMPERATURE)
    ((of_teacher,), of_student) = hidden
    assert of_teacher is None
    assert of_student[0].any()
    assert of_student[1] is None
    task.total(losses).backward()
    assert all(p.grad is None for p in task.model.parameters())
    assert all(p.grad is None for p in task.teacher_heads.parameters())
    assert not any(m.training for m in (*task.model.modules(), *task.teacher_heads.modules()))
    # Every parameter of the student learns but LayerScale's start is tiny, and stand-ins rest.
    idle = [n for n, p in task.student.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == []


def test_defaults_are_those_of_dinov2s_default_config() -> None:
    """Values of facebookresearch/dinov2, dinov2/configs/ssl_default_config.yaml."""
    published: dict[str, Any] = {
        'dino_weight': 1.0,
        'ibot_weight': 1.0,
        'koleo_weight': 0.1,
        'prototypes': 65536,
        'head_hidden_dim': 2048,
        'head_bottleneck_dim': 256,
        'separate_ibot_head': False,
        'centering': 'ema',
        'mask_probability': 0.5,
        'mask_ratio': (0.1, 0.5),
        'drop_path_rate': 0.3,
        'student_temperature': 0.1,
        'momentum': (0.992, 1.0),
        'teacher_temperature': (0.04, 0.07),
        'warmup_teacher_temperature_epochs': 30,
        'lr': 0.004,
        'scale_lr': True,
        'min_lr': 1e-6,
        'warmup_epochs': 10,
        'freeze_last_layer_epochs': 1,
        'weight_decay': (0.04, 0.4),
        'layer_decay': 0.9,
        'patch_embed_lr_mult': 0.2,
        'betas': (0.9, 0.999),
        'clip_grad': 3.0,
        'global_size': 224,
        'local_size': 96,
        'n_local': 8,
        'global_scale': (0.32, 1.0),
        'local_scale': (0.05, 0.32),
    }
    # Arguments that a class passes on to its base have the defaults of the base.
    parameters = {
        name: parameter
        for base in reversed(DINOv2.__mro__)
        if '__init__' in vars(base) and base.__module__.startswith('geofm')
        for name, parameter in inspect.signature(vars(base)['__init__']).parameters.items()
    }
    assert {name: parameters[name].default for name in published} == published
    # What no argument of the task sets: layer scale, and momentum of the centres.
    task = small_task(model_args={k: v for k, v in SMALL['model_args'].items() if k[:4] != 'init'})
    gammas = [v for k, v in task.model.named_parameters() if k.endswith('gamma')]
    assert len(gammas) == 2 * 2 * 2
    assert all(torch.equal(gamma, torch.full_like(gamma, 1e-5)) for gamma in gammas)
    assert {task.dino_center.center.momentum, task.ibot_center.center.momentum} == {0.9}  # type: ignore[union-attr]
