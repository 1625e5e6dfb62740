import datetime
import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pystac
import pytest

from geofm.cli import main
from geofm.datasets.table import Observations, RasterTable, TableError, read_observation
from geofm.datasets.table.stac import index_stac
from tests.datasets.table.rasters import dn, write_raster

WHEN = datetime.datetime(2023, 6, 1, 10, 5, 59, tzinfo=datetime.UTC)


def item(name: str = 'S2B_33UUP_20230601_0_L2A', **properties: Any) -> pystac.Item:
    """An item like those of Earth Search."""
    made = pystac.Item(
        name,
        {'type': 'Point', 'coordinates': [0, 0]},
        [0, 0, 0, 0],
        WHEN,
        {'constellation': 'sentinel-2', 'eo:cloud_cover': 25.0, **properties},
        collection='sentinel-2-l2a',
    )
    scaled = {'raster:bands': [{'scale': 1e-4, 'offset': -0.1, 'nodata': 0}]}
    for key, band, href, extra in (
        ('red', {'name': 'red', 'common_name': 'red'}, './B04.tif', scaled),
        ('red-jp2', {'name': 'red', 'common_name': 'red'}, './B04.jp2', {}),
        ('nir08', {'name': 'nir08', 'common_name': 'nir08'}, 's3://bucket/B8A.tif', scaled),
    ):
        made.add_asset(key, pystac.Asset(href, extra_fields={'eo:bands': [band], **extra}))
    made.add_asset('visual', pystac.Asset('TCI.tif', roles=['visual']))
    return made


def test_an_item_is_a_scene_of_the_bands_of_its_sensor(tmp_path: Path) -> None:
    pixels = write_raster(tmp_path / 'B04.tif', 1000 + dn((1, 8, 8)))
    (tmp_path / 'item.json').write_text(json.dumps(item().to_dict(transform_hrefs=False)))
    table = index_stac(tmp_path / 'item.json').table
    paths = {table.bands_of(i): table.path(i) for i in range(len(table))}
    assert paths == {
        ('s2l2a.B04',): str(tmp_path / 'B04.tif'),
        ('s2l2a.B8A',): 's3://bucket/B8A.tif',
    }
    assert table.time.tolist() == [int(WHEN.timestamp() * 1e6)] * 2
    assert table.cloud_cover is not None
    assert table.cloud_cover.tolist() == [0.25, 0.25]
    observations = Observations.of(table)
    assert len(observations) == 1
    values, valid = read_observation(table, observations.rows(0), ['s2l2a.B04'])
    assert np.allclose(values, pixels - 1000.0, atol=1e-2)
    assert valid.all()


def test_the_offset_of_newer_baselines_is_removed_once(tmp_path: Path) -> None:
    for flags, offset in (
        ({'s2:processing_baseline': '05.09'}, -0.1),
        ({'s2:processing_baseline': '05.09', 'earthsearch:boa_offset_applied': True}, 0.0),
        ({'s2:processing_baseline': '02.14'}, None),
    ):
        made = item(**flags)
        made.assets = {'red': made.assets['red']}
        made.assets['red'].extra_fields.pop('raster:bands')
        (tmp_path / 'item.json').write_text(json.dumps(made.to_dict(transform_hrefs=False)))
        table = index_stac(tmp_path / 'item.json').table
        found = None if table.offset is None else float(table.offset[0])
        assert found == pytest.approx(offset)


@pytest.mark.parametrize('relation', ['item', 'child', 'root', 'parent', 'self'])
def test_links_to_urls_are_not_followed(
    tmp_path: Path, relation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[Any] = []
    monkeypatch.setattr(socket.socket, 'connect', lambda _, address: requests.append(address))
    catalog = pystac.Catalog('c', 'c')
    catalog.add_item(item())
    catalog.normalize_and_save(str(tmp_path), pystac.CatalogType.SELF_CONTAINED)
    path = tmp_path / 'catalog.json'
    content = json.loads(path.read_text())
    links = [link for link in content['links'] if link['rel'] != relation]
    url = 'http://127.0.0.1:9/catalog.json'
    content['links'] = [*links, {'rel': relation, 'href': url, 'type': 'application/json'}]
    path.write_text(json.dumps(content))
    if relation in ('item', 'child'):
        with pytest.raises(TableError, match=f'links to {url}: only local files are read'):
            index_stac(path)
    else:
        assert len(index_stac(path).table)
    assert not requests


def test_collections_of_items_are_read(tmp_path: Path) -> None:
    catalog = pystac.Catalog('c', 'c')
    for i in range(3):
        catalog.add_item(item(f'S2B_{i}'))
    catalog.normalize_and_save(str(tmp_path / 'catalog'), pystac.CatalogType.SELF_CONTAINED)
    table = index_stac(tmp_path / 'catalog' / 'catalog.json').table
    assert len(Observations.of(table)) == 3
    items = pystac.ItemCollection([item(f'S2B_{i}') for i in range(2)])
    items.save_object(str(tmp_path / 'items.json'))
    assert len(Observations.of(index_stac(tmp_path / 'items.json').table)) == 2


def test_stac_geoparquet_is_read(tmp_path: Path) -> None:
    plain = item().to_dict(transform_hrefs=False)
    row = {
        'id': plain['id'],
        'type': 'Feature',
        'stac_version': '1.0.0',
        'collection': plain['collection'],
        'assets': plain['assets'],
        'datetime': WHEN,
        **{k: v for k, v in plain['properties'].items() if k != 'datetime'},
    }
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / 'items.parquet')
    table = index_stac(tmp_path / 'items.parquet').table
    assert [table.bands_of(i) for i in range(2)] == [('s2l2a.B04',), ('s2l2a.B8A',)]
    assert table.path(0) == str(tmp_path / 'B04.tif')


@pytest.mark.parametrize('text', ['{', '[]', '{"type": "Feature"}', '{"type": "x"}'])
def test_files_that_are_not_stac_give_an_error_of_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / 'item.json').write_text(text)
    with pytest.raises(TableError, match=r'item\.json: ') as error:
        index_stac(tmp_path / 'item.json')
    assert len(str(error.value).splitlines()) == 1


def test_index_writes_the_table_of_an_item(tmp_path: Path) -> None:
    write_raster(tmp_path / 'B04.tif', 1000 + dn((1, 8, 8)))
    made = item()
    made.assets.pop('nir08')
    (tmp_path / 'item.json').write_text(json.dumps(made.to_dict(transform_hrefs=False)))
    output = tmp_path / 'table.parquet'
    main(['index', '--stac', str(tmp_path / 'item.json'), '--output', str(output)])
    table = RasterTable.read(output)
    assert table.is_scanned
    assert table.path(0) == str(tmp_path / 'B04.tif')
