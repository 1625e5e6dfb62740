"""Checkpoints of earlier versions load with all public functions and give the same tokens."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from geofm.models import MultiSensorViT, export_torchgeo, load_backbone
from geofm.models.timm_vit import load_model
from tests.models.fixtures.make_checkpoints import EXPECTED, FOLDER, MODEL_ARGS, image, outputs


def expected(fusion: str) -> dict[str, Tensor]:
    every = load_file(EXPECTED)
    return {name: value for name, value in every.items() if name.startswith(f'{fusion} ')}


@pytest.mark.parametrize('fusion', MODEL_ARGS)
@pytest.mark.parametrize('suffix', ['ckpt', 'safetensors'])
def test_tokens_and_attention_are_those_of_the_code_that_wrote_it(fusion: str, suffix: str) -> None:
    model = load_backbone(FOLDER / f'{fusion}.{suffix}')
    with torch.no_grad():
        found = outputs(model, fusion)
    wanted = expected(fusion)
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        # Equal on the machine that made them; other CPUs may sum in another order.
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize('fusion', MODEL_ARGS)
def test_the_other_doors_give_the_same_tokens(fusion: str, tmp_path: Path) -> None:
    checkpoint = FOLDER / f'{fusion}.ckpt'
    exported = export_torchgeo(checkpoint, tmp_path / 'torchgeo.ckpt')
    by_name = timm.create_model(f'geofm_vit_nano_patch8_{fusion}', in_chans=15).eval()
    state = torch.load(exported, weights_only=True)['state_dict']
    by_name.load_state_dict(
        {k.removeprefix('model.'): v for k, v in state.items() if not k.startswith('modelmodel')}
    )
    wanted = expected(fusion)[f'{fusion} plain']
    for model in (load_model(checkpoint), load_backbone(exported), by_name):
        assert isinstance(model, MultiSensorViT)
        with torch.no_grad():
            tokens = model.forward_features(image())
        torch.testing.assert_close(tokens, wanted, rtol=0, atol=1e-6)
