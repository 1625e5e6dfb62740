import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.transform import Affine

from geofm.maps import Options, map_scene, read_item
from geofm.maps.scene import Scene
from geofm.sensors import BANDS, SENTINEL2

from .scenes import NORTH_UP, UTM, GroundModel, noise, write

S2 = SENTINEL2.band_names
#: Size of a band's pixels in metres, as in a Sentinel-2 product.
METRES = dict(zip(S2, (60, 10, 10, 10, 20, 20, 20, 10, 20, 60, 60, 20, 20), strict=True))
EARTH_SEARCH = dict(
    zip(
        S2,
        ('coastal', 'blue', 'green', 'red', 'rededge1', 'rededge2', 'rededge3', 'nir', 'nir08',
         'nir09', 'cirrus', 'swir16', 'swir22'),
        strict=True,
    )
)  # fmt: skip


def _item(folder: Path, assets: dict[str, Any], **properties: Any) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / 'item.json'
    item = {
        'type': 'Feature',
        'stac_version': '1.0.0',
        'id': 'T30SXH',
        'properties': {'datetime': '2018-02-24T10:50:31Z', **properties},
        'assets': assets,
    }
    path.write_text(json.dumps(item))
    return path


def _pair(folder: Path) -> tuple[Path, Path]:
    folder.mkdir(exist_ok=True)
    s1 = write(folder / 'radar.tif', noise('s1', 48, 48), descriptions=['VV', 'VH'])
    return s1, write(folder / 'optical.tif', noise('s2', 48, 48), descriptions=S2)


def test_whole_sensors_are_assets(tmp_path: Path) -> None:
    folder = tmp_path / 'a b'
    s1, s2 = _pair(folder)
    assets = {
        'S1': {'href': './radar.tif', 'datetime': '2018-02-28T06:00:00Z'},
        'S2': {'href': s2.as_uri(), 'roles': ['data']},
        'thumbnail': {'href': 'https://nowhere/B04.png', 'roles': ['thumbnail']},
        'metadata': {'href': 'meta.xml', 'roles': ['metadata']},
    }
    item = read_item(_item(folder, assets), tmp_path / 'out')
    assert item.dates == {'s1': '2018-02-28', 's2': '2018-02-24'}
    assert item.s2 == tmp_path / 'out' / 'T30SXH_s2.vrt'
    with (
        Scene(BANDS, item.s1, item.s2, item.dates) as scene,
        Scene(BANDS, s1, s2, item.dates) as same,
    ):
        assert scene.grid == same.grid
        assert str(scene.rasters['s1'].date) == '2018-02-28'
        found, expected = scene.read(0, 0, 48, 48), same.read(0, 0, 48, 48)
    for key in ('image', 'valid', 'dates'):
        np.testing.assert_array_equal(found[key], expected[key])


@pytest.mark.parametrize('names', ['keys', 'earth-search', 'eo:bands', 'bands'])
def test_bands_in_a_file_each(tmp_path: Path, names: str) -> None:
    """Of 10, 20 and 60 m, as in a Sentinel-2 product: brought onto 10 m."""
    pixels = {band: noise('s2', 6 * 10, 6 * 10)[[i]] for i, band in enumerate(S2)}
    assets: dict[str, Any] = {'visual': {'href': 'TCI.tif', 'eo:bands': [{'name': 'B04'}]}}
    for i, (band, metres) in enumerate(METRES.items()):
        factor, own = metres // 10, pixels[band]
        own = own[:, : 60 // factor, : 60 // factor]
        path = tmp_path / f'{i}.tif'
        write(path, own.astype('uint16'), transform=NORTH_UP @ Affine.scale(factor), nodata=0)
        asset: dict[str, Any] = {'href': path.name}
        if names in ('eo:bands', 'bands'):
            entry = {'name': band} if i % 2 else {'name': str(i), 'common_name': EARTH_SEARCH[band]}
            asset[names] = [entry]
        key = {'keys': f'{band}_{metres}m', 'earth-search': EARTH_SEARCH[band]}.get(names, f'x{i}')
        assets[key] = asset
    item = read_item(_item(tmp_path, assets), tmp_path / 'out')
    assert item.s1 is None
    assert item.s2 is not None
    with rasterio.open(item.s2) as src:
        assert set(src.descriptions) == set(S2)
        assert (src.crs, src.transform, src.shape) == (UTM, NORTH_UP, (60, 60))
    with Scene(S2, None, item.s2) as scene:
        image = scene.read(0, 0, 60, 60)['image'].numpy()
    for i, (band, metres) in enumerate(METRES.items()):
        own, factor = pixels[band][0].astype('uint16'), metres // 10
        if factor == 1:
            np.testing.assert_array_equal(image[i], own)
            continue
        own = own[: 60 // factor, : 60 // factor].astype(float)
        # In the middle between four coarse pixels lies their mean.
        corner = own[3:5, 3:5].mean()
        around = image[i, 4 * factor - 1 : 4 * factor + 1, 4 * factor - 1 : 4 * factor + 1]
        # Ten metres off the middle, bilinear weights differ by at most half.
        assert abs(around.mean() - corner) < 1.5


def test_an_item_is_mapped(tmp_path: Path) -> None:
    s1, s2 = _pair(tmp_path)
    assets = {
        'vv': {'href': 'radar.tif', 'eo:bands': [{'name': 'VV'}, {'name': 'VH'}]},
        'S2': {'href': 'optical.tif', 'eo:bands': [{'name': band} for band in S2]},
    }
    out = tmp_path / 'out'
    item = read_item(_item(tmp_path, assets), out)
    options = Options(window=32)
    files = map_scene(GroundModel(BANDS), item.s1, item.s2, out, ['embedding'], options)
    assert files['embedding'] == out / 'T30SXH_s2_embedding.tif'
    plain = map_scene(GroundModel(BANDS), s1, s2, tmp_path / 'plain', ['embedding'], options)
    with rasterio.open(files['embedding']) as a, rasterio.open(plain['embedding']) as b:
        assert a.transform == b.transform
        np.testing.assert_array_equal(a.read(), b.read())


def test_a_virtual_raster_that_is_there_is_left_alone(tmp_path: Path) -> None:
    _pair(tmp_path)
    item = _item(tmp_path, {'S1': {'href': 'radar.tif'}})
    (vrt,) = [path for path in (read_item(item, tmp_path).s1,) if path]
    os.utime(vrt, ns=(1, 1))
    read_item(item, tmp_path)
    assert vrt.stat().st_mtime_ns == 1
    write(tmp_path / 'radar.tif', noise('s1', 48, 32), descriptions=['VV', 'VH'])
    read_item(item, tmp_path)
    with rasterio.open(vrt) as src:
        assert src.shape == (48, 32)


def test_nodata_stays_nodata(tmp_path: Path) -> None:
    pixels = noise('s1', 20, 20)
    pixels[:, :, :10] = -99
    for i, name in enumerate(('vv', 'vh')):
        write(tmp_path / f'{name}.tif', pixels[[i]], nodata=-99)
    item = read_item(
        _item(tmp_path, {name: {'href': f'{name}.tif'} for name in ('vv', 'vh')}), tmp_path
    )
    with Scene(('VV',), item.s1) as scene:
        valid = scene.read(0, 0, 20, 20)['valid'].numpy()
    assert not valid[:, :10].any()
    assert valid[:, 10:].all()


def test_unfit_items_are_errors(tmp_path: Path) -> None:
    _pair(tmp_path)
    write(tmp_path / 'west.tif', noise('s1', 48, 48)[:1], crs=rasterio.CRS.from_epsg(32629))
    write(tmp_path / 'south.tif', noise('s1', 48, 48)[:1],
          transform=Affine(10, 0, 0, 0, 10, 0))  # fmt: skip
    (tmp_path / 'text.tif').write_text('text')
    vv = {'href': 'radar.tif', 'bands': [{'name': 'VV'}]}
    cases: list[tuple[str, dict[str, Any]]] = [
        ('is not a local file', {'vv': {'href': 'https://nowhere/vv.tif'}}),
        ('no asset has a band', {'B99': {'href': 'radar.tif'}}),
        (r"several assets hold \['VV'\]", {'vv': vv, 'b': vv}),
        ('another CRS or direction', {'vv': vv, 'vh': {'href': 'west.tif'}}),
        ('another CRS or direction', {'vv': vv, 'vh': {'href': 'south.tif'}}),
        ('2 bands, but the item says that band 3 is VV',
         {'a': {'href': 'radar.tif', 'bands': [{'name': 'x'}, {'name': 'y'}, {'name': 'vv'}]}}),
        (r'text\.tif: GDAL cannot read', {'vv': {'href': 'text.tif'}}),
    ]  # fmt: skip
    for message, assets in cases:
        with pytest.raises(ValueError, match=message):
            read_item(_item(tmp_path, assets), tmp_path)
    with pytest.raises(FileNotFoundError, match=r'gone\.tif.*asset of'):
        read_item(_item(tmp_path, {'vv': {'href': 'gone.tif'}}), tmp_path)
    with pytest.raises(FileNotFoundError, match=r'gone\.json'):
        read_item(tmp_path / 'gone.json', tmp_path)
    for text, message in (('text', 'no JSON'), ('[]', 'no STAC item'), ('{}', 'no STAC item')):
        (tmp_path / 'item.json').write_text(text)
        with pytest.raises(ValueError, match=message):
            read_item(tmp_path / 'item.json', tmp_path)
