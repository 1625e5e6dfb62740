import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from rasterio._env import get_gdal_config
from rasterio.io import DatasetReader
from rasterio.transform import from_origin

from geofm.rasters import MAX_BLOCK_BYTES, Address, open_raster


def write(path: Path, pixels: np.ndarray, **profile: object) -> Path:
    with rasterio.open(
        path,
        'w',
        driver='GTiff',
        count=len(pixels),
        height=pixels.shape[1],
        width=pixels.shape[2],
        dtype=pixels.dtype,
        crs='EPSG:32633',
        transform=from_origin(500000, 5000000, 10, 10),
        **profile,
    ) as dst:
        dst.write(pixels)
    return path


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    pixels = np.arange(3 * 8 * 8, dtype='uint16').reshape(3, 8, 8)
    return write(tmp_path / 'scene.tif', pixels)


def virtual(source: object, relative: int = 0) -> str:
    return (
        '<VRTDataset rasterXSize="8" rasterYSize="8"><VRTRasterBand dataType="UInt16" band="1">'
        f'<SimpleSource><SourceFilename relativeToVRT="{relative}">{source}</SourceFilename>'
        '<SourceBand>1</SourceBand></SimpleSource></VRTRasterBand></VRTDataset>'
    )


def bomb(path: Path, tile: int) -> Path:
    """Write a sparse TIFF of 32,768 x 32,768 bytes in square tiles."""
    side = 32_768
    tiles = (side // tile) ** 2
    entries = [
        (256, 1, side),
        (257, 1, side),
        (258, 1, 8),
        (259, 1, 8),  # deflate
        (262, 1, 1),
        (277, 1, 1),
        (322, 1, tile),
        (323, 1, tile),
        (324, tiles, 0),
        (325, tiles, 0),
    ]
    end = 8 + 2 + 12 * len(entries) + 4
    body = struct.pack('<H', len(entries))
    for tag, count, value in entries:
        body += struct.pack('<HHII', tag, 4, count, end if count > 1 else value)
    path.write_bytes(b'II*\0' + struct.pack('<I', 8) + body + bytes(4 + 4 * tiles))
    return path


def test_a_raster_is_opened(scene: Path) -> None:
    with open_raster(scene) as src:
        assert (src.driver, src.count, Path(src.name)) == ('GTiff', 3, scene)


def test_a_virtual_raster_is_only_opened_if_its_name_ends_in_vrt(
    tmp_path: Path, scene: Path
) -> None:
    disguised = tmp_path / 'disguised.tif'
    disguised.write_text(virtual(scene))
    with pytest.raises(ValueError, match=r'disguised\.tif.*virtual raster.*ends in \.vrt'):
        open_raster(disguised)
    with open_raster(disguised.rename(tmp_path / 'named.vrt')) as src:
        assert (src.read(1) == rasterio.open(scene).read(1)).all()


@pytest.mark.parametrize('suffix', ['.msk', '.ovr'])
def test_sidecar_files_must_not_be_virtual_rasters(scene: Path, suffix: str) -> None:
    scene.with_name(scene.name + suffix).write_text(virtual(scene))
    with pytest.raises(ValueError, match=rf'scene\.tif\{suffix}.*virtual raster'):
        open_raster(scene)


def test_metadata_must_not_refer_to_another_file_for_overviews(scene: Path) -> None:
    with rasterio.open(scene, 'r+') as dst:
        dst.update_tags(ns='OVERVIEWS', OVERVIEW_FILE='/vsicurl/http://localhost/other.tif')
    with pytest.raises(ValueError, match='OVERVIEW_FILE'):
        open_raster(scene)


def test_blocks_must_not_be_too_large_for_the_file(tmp_path: Path) -> None:
    path = bomb(tmp_path / 'bomb.tif', 32_768)
    with pytest.raises(ValueError, match=r'bomb\.tif.*blocks of 32768 x 32768 px'):
        open_raster(path)
    # The same pixels in blocks that fit into memory are fine, even if the file is sparse.
    open_raster(bomb(tmp_path / 'sparse.tif', 1024)).close()


def test_blocks_of_a_mask_must_not_be_too_large(scene: Path) -> None:
    bomb(scene.with_name('scene.tif.msk'), 32_768)
    with pytest.raises(ValueError, match=r'scene\.tif\.msk.*blocks'):
        open_raster(scene)


def test_interleaved_bands_are_counted_together(tmp_path: Path) -> None:
    side = 512
    count = MAX_BLOCK_BYTES // side**2 + 1
    profile = {
        'driver': 'GTiff', 'width': side, 'height': side, 'count': count, 'dtype': 'uint8',
        'tiled': True, 'blockxsize': side, 'blockysize': side, 'SPARSE_OK': True,
    }  # fmt: skip
    for interleave in ('band', 'pixel'):
        rasterio.open(tmp_path / f'{interleave}.tif', 'w', interleave=interleave, **profile).close()
    open_raster(tmp_path / 'band.tif').close()
    with pytest.raises(ValueError, match='blocks'):
        open_raster(tmp_path / 'pixel.tif')


@pytest.mark.parametrize('form', ['/vsizip/{}/in/scene.tif', 'zip://{}!in/scene.tif'])
def test_rasters_in_archives_are_opened(tmp_path: Path, scene: Path, form: str) -> None:
    archive = tmp_path / 'archive.zip'
    with zipfile.ZipFile(archive, 'w') as file:
        file.write(scene, 'in/scene.tif')
    path = Path(form.format(archive))
    with open_raster(path) as src:
        assert src.count == 3
    address = Address.parse(path)
    assert (address.file, address.stem) == (archive, 'scene')
    with pytest.raises(ValueError, match=r'archive; give a raster in it, e.g. /vsizip/'):
        open_raster(archive)


def test_parts_of_containers_are_opened(tmp_path: Path, scene: Path) -> None:
    container = tmp_path / 'cube.nc'
    rasterio.shutil.copy(scene, container, driver='netCDF')
    with pytest.raises(ValueError, match=r'give one of them: .*Band1') as caught:
        open_raster(container)
    advised = str(caught.value).split('give one of them: ')[1].split(', ')[1]
    with open_raster(Path(advised)) as src, rasterio.open(scene) as whole:
        assert (src.read(1) == whole.read(2)).all()
    address = Address.parse(advised)
    assert (address.file, address.stem) == (container, 'cube_Band2')


@pytest.mark.parametrize(
    'address',
    ['https://host/a.tif', 's3://bucket/a.tif', '/vsicurl/https://host/a.tif', 'WMS:https://host'],
)
def test_urls_are_not_opened(address: str) -> None:
    with pytest.raises(ValueError, match='not a local file; download it first'):
        open_raster(Path(address))


def test_errors_name_files_that_are_not_rasters(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r'none\.tif: no such file'):
        open_raster(tmp_path / 'none.tif')
    with pytest.raises(ValueError, match='a folder, not a raster'):
        open_raster(tmp_path)
    (tmp_path / 'text.tif').write_text('text')
    with pytest.raises(ValueError, match=r'text\.tif: cannot be read as a raster'):
        open_raster(tmp_path / 'text.tif')


def test_a_mask_beside_a_raster_is_read_without_listing_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    option = 'GDAL_DISABLE_READDIR_ON_OPEN'
    monkeypatch.delenv(option, raising=False)
    options = []

    def reader(*args: Any, **kwargs: Any) -> DatasetReader:
        options.append(get_gdal_config(option))
        return DatasetReader(*args, **kwargs)

    monkeypatch.setattr('geofm.rasters.DatasetReader', reader)
    path = tmp_path / 'x.tif'
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False),
        rasterio.open(
            path,
            'w',
            driver='GTiff',
            count=1,
            height=4,
            width=4,
            dtype='uint16',
            crs='EPSG:32633',
            transform=rasterio.transform.from_origin(5e5, 5e6, 10, 10),
        ) as dst,
    ):
        dst.write(np.ones((1, 4, 4), 'uint16'))
        dst.write_mask(np.arange(16).reshape(4, 4) >= 8)
    assert path.with_name('x.tif.msk').is_file()
    with open_raster(path) as src:
        assert (src.dataset_mask() > 0).sum() == 8
    # The mask, which is checked first, and the raster.
    assert options == ['TRUE', 'TRUE']
    assert get_gdal_config(option) is None
