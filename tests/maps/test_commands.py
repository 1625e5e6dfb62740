"""The commands that make and show maps."""

import json
from pathlib import Path
from typing import Any

import geopandas as gpd
import pytest
import rasterio
import timm
import torch

from geofm.cli import main

from .scenes import noise, write


@pytest.fixture(scope='module')
def folder(module_path: Path) -> Path:
    """A scene, and checkpoints of a small model and of a timm ViT."""
    write(module_path / 's1_2018-02-28.tif', noise('s1', 64, 96))
    write(module_path / 's2_2018-02-24.tif', noise('s2', 64, 96))
    model_args: dict[str, Any] = {'depth': 2, 'embed_dim': 48, 'num_heads': 3}
    model = timm.create_model('geofm_vit_tiny_patch16_linear', in_chans=15, **model_args)
    hparams = {
        'model': 'geofm_vit_tiny_patch16_linear',
        'in_channels': 15,
        'bands': None,
        'model_args': model_args,
    }
    state = {f'model.{key}': value for key, value in model.state_dict().items()}
    torch.save({'state_dict': state, 'hyper_parameters': hparams}, module_path / 'a.ckpt')
    vit = timm.create_model('vit_tiny_patch16_224', num_classes=0)
    torch.save(vit.state_dict(), module_path / 'vit.pth')
    return module_path


@pytest.fixture
def scene(folder: Path) -> list[str]:
    return [f'--s1={folder}/s1_2018-02-28.tif', f'--s2={folder}/s2_2018-02-24.tif']


def _centre(path: Path) -> str:
    """Longitude and latitude of a row of a table."""
    with rasterio.open(path) as src:
        lon, lat = src.lnglat()
    return f'{lon},{lat}'


def test_map_search_and_figure(
    folder: Path, scene: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = _centre(folder / 's2_2018-02-24.tif')
    assert at.startswith('-')  # argparse would take it for an option
    main(
        ['map', f'{folder}/a.ckpt', *scene, '--output', f'{tmp_path}/out', '--window=64',
         '--point', at, '--dates.s1', '2020-01-02', '--precision=int8', '--segments=3',
         '--figure', f'{tmp_path}/all.png']
    )  # fmt: skip
    printed = capsys.readouterr().out
    products = ('attention', 'rollout', 'point', 'pca', 'segments', 'embedding')
    for product in products:
        path = tmp_path / 'out' / f's2_2018-02-24_{product}.tif'
        assert str(path) in printed.replace('\n', '')
        with rasterio.open(path) as src:
            assert src.tags()['s1_date'] == '2020-01-02'
            assert src.tags()['model'] == 'geofm_vit_tiny_patch16_linear'
    assert (tmp_path / 'all.png').exists()
    assert (tmp_path / 'all.pdf').exists()

    table = tmp_path / 'out' / 's2_2018-02-24_embedding.parquet'
    main(['search', str(table), '--at', at, '--top=4', f'--output=[{tmp_path}/a.geojson]'])
    printed = capsys.readouterr().out
    assert 'here' in printed
    assert '2020-01-02' in printed
    assert gpd.read_file(tmp_path / 'a.geojson')['rank'].tolist() == [0, 1, 2, 3, 4]

    main(['figure', f'{tmp_path}/out', *scene])
    assert (tmp_path / 'out' / 's2_2018-02-24_figure.pdf').exists()


def test_each_product_alone(folder: Path, scene: list[str], tmp_path: Path) -> None:
    expected = {
        'attention': ['attention.pdf', 'attention.png', 'attention.tif'],
        'pca': [
            'foreground.tif', 'pca.pdf', 'pca.png', 'pca.safetensors', 'pca.tif',
            'pca_components.tif',
        ],
        'embed': ['embedding.parquet', 'embedding.tif'],
    }  # fmt: skip
    for command, names in expected.items():
        out = tmp_path / command
        args = [f'--checkpoint={folder}/a.ckpt', *scene, f'--output={out}', '--window=64']
        main([command, *args, '--stride=8'])
        assert sorted(path.name for path in out.iterdir()) == [f's2_2018-02-24_{n}' for n in names]
        with rasterio.open(next(out.glob('*.tif'))) as src:
            assert (src.res, src.shape) == ((80, 80), (8, 12))


def test_a_vit_of_timm_and_one_sensor(folder: Path, scene: list[str], tmp_path: Path) -> None:
    main(
        ['map', f'{folder}/vit.pth', scene[1], '--model=vit_tiny_patch16_224',
         '--bands=[B04,B03,B02]', f'--output={tmp_path}', '--products=[attention]']
    )  # fmt: skip
    with rasterio.open(tmp_path / 's2_2018-02-24_attention.tif') as src:
        assert src.tags()['model'] == 'vit_tiny_patch16_224'


def test_a_stac_item(folder: Path, tmp_path: Path) -> None:
    item = tmp_path / 'item.json'
    assets = {key: {'href': str(next(folder.glob(f'{key}_*.tif')))} for key in ('s1', 's2')}
    properties = {'datetime': '2018-02-24T00:00:00Z'}
    item.write_text(json.dumps({'id': 'place', 'assets': assets, 'properties': properties}))
    args = ['map', f'{folder}/a.ckpt', f'--item={item}', f'--output={tmp_path}', '--window=64']
    main([*args, '--products=[embedding]'])
    assert (tmp_path / 'place_s2_embedding.tif').exists()
    with pytest.raises(SystemExit, match='give --item, or --s1 and --s2'):
        main([*args, f'--s1={folder}/x.tif'])


def test_errors_are_one_line(folder: Path, scene: list[str], tmp_path: Path) -> None:
    out = f'--output={tmp_path}'
    for args, message in (
        (['map', f'{folder}/gone.ckpt', *scene, out], 'geofm map: .*gone.ckpt: no such file'),
        (['map', f'{folder}/a.ckpt', *scene, out, '--block=7'], 'block 7: the model has 2 blocks'),
        (['map', f'{folder}/a.ckpt', *scene, out, '--point=1'], "'1' is not a point"),
        (['map', f'{folder}/a.ckpt', *scene, out, '--point=1,95'], 'not on Earth'),
        (['search', f'{tmp_path}/a.parquet'], 'geofm search: missing: --at$'),
        (['figure', str(tmp_path), *scene], 'no products of'),
    ):
        with pytest.raises(SystemExit, match=message):
            main(args)
    assert list(tmp_path.iterdir()) == []
