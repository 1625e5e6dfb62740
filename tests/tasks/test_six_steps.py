"""Six steps under a Trainer against DINOv2 written out from the paper, dropout in the fusion.

Written for one crop size at a time, from functions of PyTorch and the weights alone: no packed
crops, no losses, schedules, parameter groups or optimiser of this project. It takes over what is
random: the crops with their masks, and the state of the generator that dropout draws from.
"""

import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from torch import Tensor
from torch.nn import functional as F

from geofm.transforms import Crops
from tests.pairs import RandomPairsDataModule
from tests.tasks.test_dinov2 import SMALL, small_task, small_trainer
from tests.tasks.test_parameters import dinov2_rules
from tests.tasks.test_updates import CLIP, RECIPE, values

STEPS, DEPTH, HEADS, PATCH, DROPOUT, LAYERS, FUSION_HEADS = 6, 2, 2, 8, 0.3, 2, 4
CHANNELS = {'s1': slice(0, 2), 's2': slice(2, 15)}
Weights = dict[str, Tensor]


def norm(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f'{name}.weight'], w[f'{name}.bias'], eps)


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f'{name}.weight'], w[f'{name}.bias'])


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, drop: float = 0.0) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)
    return (F.dropout(weights, drop) @ v).transpose(1, 2).flatten(2)


def date_waves(days: Tensor) -> Tensor:
    rows = []
    for day in days.tolist():
        date = datetime.date(1970, 1, 1) + datetime.timedelta(days=day)
        first, next_year = datetime.date(date.year, 1, 1), datetime.date(date.year + 1, 1, 1)
        angle = 2 * torch.pi * (date - first).days / (next_year - first).days
        angles = angle * torch.arange(1, 5, dtype=torch.float64)
        rows.append(torch.cat([angles.sin(), angles.cos()]))
    return torch.stack(rows)


def vit(w: Weights, sensor: str, image: Tensor, days: Tensor, masks: Tensor | None) -> Tensor:
    """A pre-norm ViT with registers and LayerScale; all tokens, normalised."""
    e = f'backbone.encoders.{sensor}'
    weight, bias = w[f'{e}.patch_embed.proj.weight'], w[f'{e}.patch_embed.proj.bias']
    patches = F.conv2d(image[:, CHANNELS[sensor]], weight, bias, stride=PATCH)
    side = patches.shape[-1]
    patches = patches.flatten(2).mT
    if masks is not None:
        token = w['backbone.mask_token'][list(CHANNELS).index(sensor)]
        patches = torch.where(masks[..., None], token, patches)
    positions = w[f'{e}.pos_embed']
    if side * side != positions.shape[1]:
        stored = positions.mT.unflatten(2, (round(positions.shape[1] ** 0.5), -1))
        resized = F.interpolate(stored, (side, side), mode='bicubic', antialias=True)
        positions = resized.flatten(2).mT
    prefix = torch.cat([w[f'{e}.cls_token'], w[f'{e}.reg_token']], dim=1)
    x = torch.cat([prefix.expand(len(image), -1, -1), patches + positions], dim=1)
    x = x + (date_waves(days) @ w['backbone.day_of_year.proj.weight'].T)[:, None]
    for i in range(DEPTH):
        b = f'{e}.blocks.{i}'
        q, k, v = linear(w, f'{b}.attn.qkv', norm(w, f'{b}.norm1', x, 1e-6)).chunk(3, dim=-1)
        attended = linear(w, f'{b}.attn.proj', attention(q, k, v, HEADS))
        x = x + w[f'{b}.ls1.gamma'] * attended
        hidden = F.gelu(linear(w, f'{b}.mlp.fc1', norm(w, f'{b}.norm2', x, 1e-6)))
        x = x + w[f'{b}.ls2.gamma'] * linear(w, f'{b}.mlp.fc2', hidden)
    return norm(w, f'{e}.norm', x, 1e-6)


def backbone(
    w: Weights, image: Tensor, dates: Tensor, masks: Tensor | None = None, drop: float = 0.0
) -> Tensor:
    """Both ViTs; the tokens of S1 then attend to those of S2, post-norm, by shared layers."""
    query, context = (
        vit(w, sensor, image, dates[:, i], masks) for i, sensor in enumerate(CHANNELS)
    )
    f = 'backbone.fusion.blocks.0'
    of_q, of_k, of_v = w[f'{f}.attn.in_proj_weight'].chunk(3)
    bias_q, bias_k, bias_v = w[f'{f}.attn.in_proj_bias'].chunk(3)
    for _ in range(LAYERS):
        q = F.linear(query, of_q, bias_q)
        k, v = F.linear(context, of_k, bias_k), F.linear(context, of_v, bias_v)
        attended = linear(w, f'{f}.attn.out_proj', attention(q, k, v, FUSION_HEADS, drop))
        # PyTorch's module has its output token by token, and dropout draws in that order.
        dropped = F.dropout(attended.transpose(0, 1).contiguous(), drop).transpose(0, 1)
        query = norm(w, f'{f}.norm1', query + dropped, 1e-5)
        hidden = F.dropout(F.gelu(linear(w, f'{f}.mlp.0', query)), drop)
        changed = F.dropout(linear(w, f'{f}.mlp.3', hidden), drop)
        query = norm(w, f'{f}.norm2', query + changed, 1e-5)
    return query


def head(w: Weights, name: str, x: Tensor) -> Tensor:
    x = F.gelu(linear(w, f'{name}.layers.0', x))
    x = F.gelu(linear(w, f'{name}.layers.2', x))
    x = F.normalize(linear(w, f'{name}.layers.4', x), dim=-1)
    v = w[f'{name}.last_layer.weight_v']
    return x @ (w[f'{name}.last_layer.weight_g'] * v / v.norm(dim=1, keepdim=True)).T


class Statement:
    """DINOv2's student, teacher, centres and AdamW, from the weights of a task."""

    def __init__(self, task: Any) -> None:
        learning = {k: v for k, v in task.student.named_parameters() if v.requires_grad}
        self.student = {k: v.detach().double().clone() for k, v in learning.items()}
        for weight in self.student.values():
            weight.requires_grad_()
        self.teacher = {k: v.detach().clone() for k, v in self.student.items()}
        self.centres = {name: torch.zeros(1, 64).double() for name in ('dino', 'ibot')}
        self.moments = {k: (torch.zeros_like(v), torch.zeros_like(v)) for k, v in learning.items()}
        self.step_number = 0

    def loss(self, crops: Crops, state: Tensor) -> Tensor:
        temperature = values(self.step_number)['teacher_temperature']
        assert crops.global_dates is not None
        assert crops.local_dates is not None
        images = len(crops.globals) // 2
        with torch.no_grad():
            seen = backbone(self.teacher, crops.globals, crops.global_dates)
            of_patches = seen[:, 5:][crops.masks]
            logits = {'dino': head(self.teacher, 'dino_head', seen[:, 0])}
            logits['ibot'] = head(self.teacher, 'ibot_head', of_patches)
            targets = {
                k: ((x - self.centres[k]) / temperature).softmax(-1) for k, x in logits.items()
            }
            for k, x in logits.items():
                self.centres[k] = 0.9 * self.centres[k] + 0.1 * x.mean(dim=0, keepdim=True)
        torch.set_rng_state(state)
        masked = backbone(self.student, crops.globals, crops.global_dates, crops.masks, DROPOUT)
        small = backbone(self.student, crops.locals, crops.local_dates, drop=DROPOUT)
        predictions = torch.cat([masked[:, 0], small[:, 0]])
        logs = (head(self.student, 'dino_head', predictions) / 0.1).log_softmax(-1).split(images)
        of_teacher = targets['dino'].split(images)
        pairs = [(t, s) for t in range(2) for s in range(len(logs)) if s != t]
        dino = torch.stack([-(of_teacher[t] * logs[s]).sum(-1).mean() for t, s in pairs]).mean()
        guesses = (head(self.student, 'ibot_head', masked[:, 5:][crops.masks]) / 0.1).log_softmax(
            -1
        )
        entropies = -(targets['ibot'] * guesses).sum(-1)
        counts = crops.masks.sum(1).tolist()
        parts = [part.mean() for part in entropies.split(counts) if len(part)]
        ibot = torch.stack(parts).sum() / len(counts)
        koleo = sum(self.koleo(view) for view in masked[:, 0].split(images))
        return dino + ibot + 0.1 * koleo

    @staticmethod
    def koleo(features: Tensor) -> Tensor:
        x = F.normalize(features, dim=-1)
        distances = (x[:, None] - x[None]).square().sum(-1)
        nearest = (distances + 10 * torch.eye(len(x))).argmin(dim=1)
        return -(x - x[nearest]).norm(dim=-1).log().mean()

    def step(self, loss: Tensor) -> None:
        now, (first, second) = values(self.step_number), RECIPE['betas']
        found = torch.autograd.grad(loss, list(self.student.values()))
        gradients = dict(zip(self.student, found, strict=True))
        for network in ('backbone', 'dino_head', 'ibot_head'):
            mine = [k for k in gradients if k.startswith(network)]
            size = torch.stack([gradients[k].square().sum() for k in mine]).sum().sqrt()
            for k in mine:
                gradients[k] = gradients[k] * min(1.0, CLIP / (size.item() + 1e-6))
        self.step_number += 1
        for k, g in gradients.items():
            mean, square = self.moments[k]
            mean = first * mean + (1 - first) * g
            square = second * square + (1 - second) * g**2
            self.moments[k] = mean, square
            factor, _, last = self.rules(k)
            lr = now['last_layer_lr' if last else 'lr'] * factor
            decay = now['weight_decay'] if g.ndim > 1 else 0.0
            root = (square / (1 - second**self.step_number)).sqrt() + 1e-8
            with torch.no_grad():
                weight = self.student[k] * (1 - lr * decay)
                weight -= lr * mean / (1 - first**self.step_number) / root
                self.student[k].copy_(weight)
                m = now['momentum']
                self.teacher[k] = m * self.teacher[k] + (1 - m) * weight

    @staticmethod
    def rules(name: str) -> tuple[float, float, bool]:
        if '.fusion.' in name:
            return 1.0, 1.0, False
        if 'day_of_year' in name:
            return 0.8**3, 1.0, False
        return dinov2_rules(name, DEPTH, 0.8, 0.2)


class Follow(Callback):
    """Repeat every step with the reference, and compare."""

    def __init__(self) -> None:
        self.losses: list[tuple[float, float]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.statement = Statement(pl_module)
        pl_module.multi_crop.register_forward_hook(self.keep)

    def keep(self, module: Any, args: Any, crops: Crops) -> None:
        self.crops, self.state = crops, torch.get_rng_state()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        with torch.random.fork_rng(devices=[]):
            loss = self.statement.loss(self.crops, self.state)
        self.statement.step(loss)
        self.losses.append((outputs['loss'].item(), loss.item()))
        teacher = {f'backbone.{k}': v for k, v in pl_module.model.named_parameters()}
        teacher |= dict(pl_module.teacher_heads.named_parameters())
        student = dict(pl_module.student.named_parameters())
        for ours, theirs in ((student, self.statement.student), (teacher, self.statement.teacher)):
            for name, weight in theirs.items():
                torch.testing.assert_close(
                    ours[name].detach(), weight.detach(), rtol=1e-4, atol=1e-6, msg=name
                )
        trainer.should_stop = len(self.losses) == STEPS


def test_six_steps_of_a_trainer_are_those_of_the_paper(tmp_path: Path) -> None:
    seed_everything(0)
    follow = Follow()
    task = small_task(
        **RECIPE,
        model='geofm_vit_tiny_patch16_xattn',
        drop_path_rate=0.0,
        model_args={
            **SMALL['model_args'],
            'img_size': 32,
            'dropout': DROPOUT,
            'nlayer': LAYERS,
            'nhead': FUSION_HEADS,
        },
    )
    before = {k: v.detach().clone() for k, v in task.student.named_parameters()}
    trainer = small_trainer(
        tmp_path, max_epochs=5, precision='64-true', callbacks=[follow], limit_val_batches=0
    )
    trainer.fit(task, datamodule=RandomPairsDataModule())
    assert len(follow.losses) == STEPS
    for ours, theirs in follow.losses:
        assert ours == pytest.approx(theirs, rel=1e-6)
    moved = [
        k for k, v in task.student.named_parameters() if not torch.equal(v, before[k].double())
    ]
    assert len(moved) > 0.9 * len(before)
