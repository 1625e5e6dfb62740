import re
from typing import Any

import pytest
from torch import nn

from geofm.models import MultiSensorViT
from geofm.tasks import DINOv2
from geofm.tasks.parameters import parameter_groups


def test_each_parameter_is_treated_as_in_dinov2() -> None:
    depth, decay = 3, 0.9
    backbone = MultiSensorViT(
        embed_dim=32, depth=depth, num_heads=2, patch_size=8, fusion='xattn', nlayer=2
    )
    head = nn.Module()
    head.layers = nn.Sequential(nn.Linear(32, 8))
    head.last_layer = nn.utils.weight_norm(nn.Linear(8, 4, bias=False))
    student = nn.ModuleDict({'backbone': backbone, 'dino_head': head})
    groups = parameter_groups(student, depth, decay, patch_embed_lr_mult=0.2)

    treatment = {
        name: (round(group['lr_mult'], 6), group['wd_mult'], group['last_layer'])
        for group in groups
        for name in group['names']
    }
    assert set(treatment) == {name for name, _ in student.named_parameters()}
    stem = decay ** (depth + 1)
    expected = {
        'backbone.encoders.s1.patch_embed.proj.weight': (stem * 0.2, 1.0, False),
        'backbone.encoders.s2.patch_embed.proj.bias': (stem * 0.2, 0.0, False),
        'backbone.encoders.s1.pos_embed': (stem, 1.0, False),
        'backbone.encoders.s1.cls_token': (stem, 1.0, False),
        'backbone.mask_token': (stem, 1.0, False),
        'backbone.encoders.s1.blocks.0.attn.qkv.weight': (decay**3, 1.0, False),
        'backbone.encoders.s2.blocks.2.attn.qkv.bias': (decay**1, 0.0, False),
        'backbone.encoders.s2.blocks.2.norm1.weight': (decay**1, 0.0, False),
        'backbone.encoders.s2.blocks.1.ls1.gamma': (decay**2, 0.0, False),
        'backbone.encoders.s2.norm.weight': (1.0, 0.0, False),
        'backbone.fusion.blocks.0.mlp.0.weight': (1.0, 1.0, False),
        'backbone.fusion.blocks.0.norm1.weight': (1.0, 0.0, False),
        'dino_head.layers.0.weight': (1.0, 1.0, False),
        'dino_head.last_layer.weight_v': (1.0, 1.0, True),
        'dino_head.last_layer.weight_g': (1.0, 1.0, True),
    }
    for name, (lr_mult, wd_mult, last) in expected.items():
        assert treatment[name] == (round(lr_mult, 6), wd_mult, last), name
    # Those of equal treatment are one group.
    keys = [(g['lr_mult'], g['wd_mult'], g['last_layer']) for g in groups]
    assert len(keys) == len(set(keys))


def test_frozen_parameters_are_left_out() -> None:
    student = nn.ModuleDict({'backbone': nn.Linear(2, 2)})
    student['backbone'].bias.requires_grad_(False)
    (group,) = parameter_groups(student, depth=1)
    assert group['names'] == ['backbone.weight']


def dinov2_rules(name: str, depth: int, decay: float, patch: float) -> tuple[float, float, bool]:
    """DINOv2's treatment of a parameter by its name: lr and decay multipliers, last layer."""
    layer = depth + 1
    if name.startswith('backbone'):
        stem = ('pos_embed', 'patch_embed', 'mask_token', 'cls_token', 'reg_token')
        if any(part in name for part in stem):
            layer = 0
        elif block := re.search(r'blocks\.(\d+)\.', name):
            layer = int(block[1]) + 1
    lr = decay ** (depth + 1 - layer) * (patch if 'patch_embed' in name else 1)
    still = name.endswith('.bias') or 'norm' in name or 'gamma' in name
    return lr, 0.0 if still else 1.0, 'last_layer' in name


@pytest.mark.parametrize(
    'args', [{}, {'ffn_layer': 'swiglu'}, {'qk_norm': True}, {'reg_tokens': 0, 'init_values': None}]
)
def test_a_single_sensor_follows_the_rules_of_dinov2(args: dict[str, Any]) -> None:
    """Every parameter of backbone and heads; only the encoding of dates is not DINOv2's."""
    model = {'embed_dim': 32, 'depth': 5, 'num_heads': 2, 'patch_size': 8, **args}
    student = DINOv2(
        'geofm_vit_tiny_patch16_s2',
        in_channels=13,
        model_args=model,
        prototypes=16,
        head_hidden_dim=8,
        head_bottleneck_dim=4,
        separate_ibot_head=True,
    ).student
    seen = {}
    for group in parameter_groups(student, 5, 0.7, 0.3):
        for name, parameter in zip(group['names'], group['params'], strict=True):
            assert student.get_parameter(name) is parameter
            assert name not in seen
            seen[name] = group['lr_mult'], group['wd_mult'], group['last_layer']
    dates = seen.pop('backbone.day_of_year.proj.weight')
    assert dates == (pytest.approx(0.7**6), 1.0, False)
    assert {*seen, 'backbone.day_of_year.proj.weight'} == dict(student.named_parameters()).keys()
    for name, (lr_mult, wd_mult, last_layer) in seen.items():
        expected_lr, *expected = dinov2_rules(name, 5, 0.7, 0.3)
        assert lr_mult == pytest.approx(expected_lr), name
        assert [wd_mult, last_layer] == expected, name
