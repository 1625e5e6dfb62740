import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import rasterio.control
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


def test_assets_can_be_whole_sensors(tmp_path: Path) -> None:
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
def test_one_file_per_band(tmp_path: Path, names: str) -> None:
    """Bands of 10, 20 and 60 m, as in a Sentinel-2 product, are resampled to 10 m."""
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
        # The value in the middle of four coarse pixels is their mean.
        corner = own[3:5, 3:5].mean()
        around = image[i, 4 * factor - 1 : 4 * factor + 1, 4 * factor - 1 : 4 * factor + 1]
        # 10 m from the middle, bilinear weights differ by at most half.
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


def test_an_unchanged_virtual_raster_is_not_rewritten(tmp_path: Path) -> None:
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


def test_unsuitable_items_are_an_error(tmp_path: Path) -> None:
    _pair(tmp_path)
    write(tmp_path / 'west.tif', noise('s1', 48, 48)[:1], crs=rasterio.CRS.from_epsg(32629))
    write(tmp_path / 'south.tif', noise('s1', 48, 48)[:1],
          transform=Affine(10, 0, 0, 0, 10, 0))  # fmt: skip
    (tmp_path / 'text.tif').write_text('text')
    vv = {'href': 'radar.tif', 'bands': [{'name': 'VV'}]}
    # A file that cannot be read is left out if the sensor has another one.
    cases: list[tuple[str, dict[str, Any]]] = [
        ('is not a local file', {'vv': {'href': 'https://nowhere/vv.tif'}}),
        ('no asset has a band', {'B99': {'href': 'radar.tif'}}),
        ('its CRS or orientation differs', {'vv': vv, 'vh': {'href': 'west.tif'}}),
        ('its CRS or orientation differs', {'vv': vv, 'vh': {'href': 'south.tif'}}),
        ('2 bands, but the item says that band 3 is VV',
         {'a': {'href': 'radar.tif', 'bands': [{'name': 'x'}, {'name': 'y'}, {'name': 'vv'}]}}),
        (r'text\.tif: cannot be read as a raster', {'vv': {'href': 'text.tif'}}),
    ]  # fmt: skip
    for message, assets in cases:
        with pytest.raises(ValueError, match=message):
            read_item(_item(tmp_path, assets), tmp_path)
    with pytest.raises(FileNotFoundError, match=r'gone\.tif.*asset of'):
        read_item(_item(tmp_path, {'vv': {'href': 'gone.tif'}}), tmp_path)
    with pytest.raises(FileNotFoundError, match=r'gone\.json'):
        read_item(tmp_path / 'gone.json', tmp_path)
    for text, message in (('text', 'not JSON'), ('[]', 'not a STAC item'), ('{}', 'not a STAC')):
        (tmp_path / 'item.json').write_text(text)
        with pytest.raises(ValueError, match=message):
            read_item(tmp_path / 'item.json', tmp_path)


# -- scale, offset and nodata -------------------------------------------------------------------


DN = noise('s2', 24, 24).clip(200, 9000).astype('uint16')


def _values(item: Path, bands: tuple[str, ...], folder: Path) -> np.ndarray:
    found = read_item(item, folder, bands)
    with Scene(bands, found.s1, found.s2, found.dates) as scene:
        sample = scene.read(0, 0, *scene.grid.shape)
    assert sample['valid'].all()
    return sample['image'].numpy()


@pytest.mark.parametrize('form', ['raster:bands', 'bands', 'raster:bands of v2', 'asset'])
def test_the_scale_of_an_item_is_applied(tmp_path: Path, form: str) -> None:
    write(tmp_path / 'red.tif', DN[[3]] + 1000)
    forms: dict[str, dict[str, Any]] = {
        'raster:bands': {'raster:bands': [{'scale': 1e-4, 'offset': -0.1}]},
        'bands': {'bands': [{'name': 'B04', 'scale': 1e-4, 'offset': -0.1}]},
        'raster:bands of v2': {
            'bands': [{'name': 'B04', 'raster:scale': 1e-4, 'raster:offset': -0.1}]
        },
        'asset': {'raster:scale': 1e-4, 'raster:offset': -0.1},
    }
    item = _item(tmp_path, {'B04_10m': {'href': 'red.tif', **forms[form]}})
    np.testing.assert_array_equal(_values(item, ('B04',), tmp_path)[0], DN[3])


@pytest.mark.parametrize(
    ('scaling', 'properties', 'offset'),
    [
        ({}, {'s2:processing_baseline': '05.09'}, 1000),
        ({}, {'processing:version': '05.11'}, 1000),
        ({}, {'s2:product_uri': 'S2A_MSIL2A_20230601T100559_N0509_R022_T33UUP.SAFE'}, 1000),
        ({}, {'s2:processing_baseline': '03.01'}, 0),
        ({'scale': 1e-4}, {'s2:processing_baseline': '04.00'}, 1000),
        ({'scale': 1e-4, 'offset': 0}, {'s2:processing_baseline': '05.09'}, 0),
        ({}, {'s2:processing_baseline': '05.09', 'earthsearch:boa_offset_applied': True}, 0),
        ({'scale': 1e-4, 'offset': -0.1}, {'earthsearch:boa_offset_applied': True}, 0),
        ({'scale': 1e-4, 'offset': -0.1}, {'earthsearch:boa_offset_applied': False}, 1000),
        ({'scale': 1e-4, 'offset': -0.1}, {'s2:processing_baseline': '05.09'}, 1000),
    ],
)
def test_the_offset_of_a_processing_baseline_is_subtracted(
    tmp_path: Path, scaling: dict[str, Any], properties: dict[str, Any], offset: int
) -> None:
    write(tmp_path / 'red.tif', DN[[3]] + offset)
    item = _item(tmp_path, {'red': {'href': 'red.tif', 'raster:bands': [scaling]}}, **properties)
    np.testing.assert_array_equal(_values(item, ('B04',), tmp_path)[0], DN[3])


def test_the_baseline_in_the_name_of_a_product(tmp_path: Path) -> None:
    name = 'S2B_MSIL2A_20230601T100559_N0509_R022_T33UUP_20230601T132522.tif'
    path = write(tmp_path / name, DN + 1000, descriptions=S2)
    with pytest.warns(UserWarning, match=r'baseline 5\.09.*subtracted'):
        scene = Scene(S2, None, path)
    with scene:
        np.testing.assert_array_equal(scene.read(0, 0, 24, 24)['image'], DN)
    # The offset was already subtracted in this file.
    path = write(tmp_path / name, DN, descriptions=S2)
    with Scene(S2, None, path) as scene:
        np.testing.assert_array_equal(scene.read(0, 0, 24, 24)['image'], DN)


def test_the_scale_of_the_file_is_the_default(tmp_path: Path) -> None:
    for i, band in ((3, 'B04'), (7, 'B08')):
        with rasterio.open(write(tmp_path / f'{band}.tif', DN[[i]] + 1000), 'r+') as dst:
            dst.scales, dst.offsets = [1e-4], [-0.1]
    item = _item(tmp_path, {band: {'href': f'{band}.tif'} for band in ('B04', 'B08')})
    np.testing.assert_array_equal(_values(item, ('B04', 'B08'), tmp_path), DN[[3, 7]])


def test_masks_of_the_files_are_applied(tmp_path: Path) -> None:
    mask = np.full((24, 24), 255, 'uint8')
    mask[:12] = 0
    for i, band in ((3, 'B04'), (7, 'B08')):
        with rasterio.open(write(tmp_path / f'{band}.tif', DN[[i]]), 'r+') as dst:
            dst.write_mask(mask)
    item = _item(tmp_path, {band: {'href': f'{band}.tif'} for band in ('B04', 'B08')})
    with Scene(('B04', 'B08'), None, read_item(item, tmp_path).s2) as scene:
        valid = scene.read(0, 0, 24, 24)['valid'].numpy()
    np.testing.assert_array_equal(valid, mask != 0)


def test_bands_placed_by_ground_control_points(tmp_path: Path) -> None:
    points = [
        rasterio.control.GroundControlPoint(r, c, 15 + c * 1e-4, 45 - r * 1e-4)
        for r in (0, 24) for c in (0, 24)
    ]  # fmt: skip
    for i, name in enumerate(('vv', 'vh')):
        with rasterio.open(
            tmp_path / f'{name}.tif', 'w', driver='GTiff', count=1, height=24, width=24,
            dtype='float32', gcps=points, crs='EPSG:4326',
        ) as dst:  # fmt: skip
            dst.write(noise('s1', 24, 24)[[i]])
    item = _item(tmp_path, {name: {'href': f'{name}.tif'} for name in ('vv', 'vh')})
    with pytest.warns(UserWarning, match='ground control points'):
        found = read_item(item, tmp_path)
    with pytest.warns(UserWarning, match='ground control points'):
        scene = Scene(('VV', 'VH'), found.s1)
    with scene:
        valid = scene.read(0, 0, *scene.grid.shape)['valid'].numpy()
    assert valid[2:-2, 2:-2].all()


# -- choice of assets ---------------------------------------------------------------------------


@pytest.mark.parametrize('order', [('10m', '20m', '60m'), ('60m', '20m', '10m')])
def test_the_finest_of_several_resolutions_is_used(tmp_path: Path, order: tuple[str, ...]) -> None:
    for name, factor in (('10m', 1), ('20m', 2), ('60m', 6)):
        write(tmp_path / f'{name}.tif', DN[[1], : 24 // factor, : 24 // factor],
              transform=NORTH_UP @ Affine.scale(factor))  # fmt: skip
    item = _item(tmp_path, {f'B02_{name}': {'href': f'{name}.tif'} for name in order})
    np.testing.assert_array_equal(_values(item, ('B02',), tmp_path)[0], DN[1])


def test_assets_that_are_not_needed_are_ignored(tmp_path: Path) -> None:
    write(tmp_path / 'red.tif', DN[[3]])
    (tmp_path / 'text.tif').write_text('text')
    assets = {
        'red': {'href': 'red.tif'},
        'red-jp2': {'href': 's3://nowhere/B04.jp2'},
        'nir': {'href': 'https://nowhere/B08.tif'},
        'blue': {'href': 'text.tif'},
        'green': {'href': 'gone.tif'},
    }
    item = _item(tmp_path, assets)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        np.testing.assert_array_equal(_values(item, ('B04',), tmp_path)[0], DN[3])
    # Without the needed bands, a warning lists the assets that are left out.
    with pytest.warns(UserWarning, match='B08 is left out: .*fetch it first') as caught:
        assert read_item(item, tmp_path).s2
    assert [str(w.message).split()[0] for w in caught] == ['B08', 'B02', 'B03']


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'type': 'FeatureCollection', 'features': []}, 'a FeatureCollection: give one item'),
        ({'type': 'Collection'}, 'a Collection: give one item'),
        ({'assets': None}, 'no assets'),
        ({'assets': [{'href': 'red.tif'}]}, 'no assets'),
        ({'assets': {'red': 'red.tif'}}, "the asset 'red' must be a JSON object"),
        ({'assets': {'red': {}}}, 'has the href None'),
        ({'assets': {'red': {'href': 3}}}, 'has the href 3'),
        ({'assets': {'red': {'href': 'a\0b'}}}, 'has the href'),
        ({'assets': {'red': {'href': 'x' * 5000}}}, 'href'),
        ({'assets': {'red': {'href': 'http://['}}}, 'href'),
        ({'assets': {'red': {'href': '../../outside.tif'}}}, 'no such file'),
        ({'assets': {'red': {'href': 'red.tif', 'eo:bands': 'B04'}}}, 'eo:bands of the asset'),
        ({'assets': {'red': {'href': 'red.tif', 'eo:bands': ['B04']}}}, 'an entry of eo:bands'),
        ({'assets': {'red': {'href': 'red.tif', 'bands': {'name': 'B04'}}}}, 'bands of the asset'),
        ({'assets': {'red': {'href': 'red.tif', 'roles': 'data'}}}, 'roles of the asset'),
        ({'assets': {'red': {'href': 'red.tif', 'roles': [{}]}}}, 'a role of the asset'),
        ({'assets': {'red': {'href': 'red.tif', 'raster:bands': [{'scale': 'x'}]}}},
         "scale 'x' is not a number"),
        ({'properties': ['a']}, 'properties must be a JSON object'),
        ({'properties': {'datetime': 'yesterday'}}, "'yesterday' is not a date"),
        ({'properties': {'datetime': 5}}, '5 is not a date'),
        ({'properties': {'datetime': ['2020']}}, 'is not a date'),
    ],
)  # fmt: skip
def test_malformed_items_are_a_one_line_error(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    write(tmp_path / 'red.tif', DN[[3]])
    path = _item(tmp_path, {'red': {'href': 'red.tif'}})
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises((ValueError, OSError), match=message) as caught:
        read_item(path, tmp_path)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('properties', [None, {'datetime': None}, {}])
def test_items_without_properties_are_read(tmp_path: Path, properties: object) -> None:
    write(tmp_path / 'red.tif', DN[[3]])
    path = _item(tmp_path, {'red': {'href': 'red.tif'}})
    changed = {**json.loads(path.read_text()), 'properties': properties, 'id': '../../a\0b'}
    path.write_text(json.dumps(changed))
    found = read_item(path, tmp_path / 'out')
    assert found.dates == {}
    assert found.s2 is not None
    assert found.s2.parent == tmp_path / 'out'


def test_too_deeply_nested_json_is_an_error(tmp_path: Path) -> None:
    (tmp_path / 'item.json').write_text('[' * 100_000)
    with pytest.raises(ValueError, match='not JSON'):
        read_item(tmp_path / 'item.json', tmp_path)
