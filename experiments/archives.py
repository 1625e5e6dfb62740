"""Pretrain on real archives of other layouts, from YAML alone, and map a place of each.

    python experiments/archives.py DATA --output output/archives

DATA holds the folders sen1floods11_sample, terramind_examples, bigearthnet_example,
worldcereal_series and, beside or in its parent, ombria. For each, this indexes the files by a
layout of a few lines, pretrains a nano model for 2 epochs, takes a scene out of the table, and
draws attention maps where the files have a CRS. The table says how long each took.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from geofm.atomic import atomic_file
from geofm.cli import main as geofm
from geofm.datasets import RasterArchive
from geofm.datasets.table import RasterTable
from geofm.sensors import load_sensors

RESULTS = Path(__file__).parent / 'results'

_S2L2A = ['B01', 'B02', 'B03', 'B04', 'B05', 'B06', 'B07', 'B08', 'B8A', 'B09', 'B11', 'B12']


@dataclass(frozen=True)
class Archive:
    """An archive.

    Attributes:
        folder: Name of its folder.
        layout: Layout of its file names.
        bands: Names of the model's channels.
        sensors: Keys of the sensors.
        fusion: Variant of the model.
        side: Side of the windows that are read, in pixels.
        definitions: Definitions of sensors that are not built in.
        georeferenced: Whether its files have a CRS, so that there is a map.
    """

    folder: str
    layout: str
    bands: list[str]
    sensors: list[str]
    fusion: str
    side: int
    definitions: str = ''
    georeferenced: bool = True


ARCHIVES = (
    Archive(
        'sen1floods11_sample',
        r"""
files:
  - {sensor: s1, regex: '(?P<place>.*)_S1Hand\.tif', date: 2019-09-17}
  - {sensor: s2, regex: '(?P<place>.*)_S2Hand\.tif', date: 2019-09-18}
""",
        ['VV', 'VH', 'B02', 'B03', 'B04', 'B08', 'B11', 'B12'],
        ['s1', 's2'],
        'linear',
        128,
    ),
    Archive(
        'terramind_examples',
        r"""
files:
  - {sensor: s1, regex: 'S1RTC/(?P<place>.*)\.tif'}
  - {sensor: s2l2a, regex: 'S2L2A/(?P<place>.*)\.tif'}
  - {sensor: dem, regex: 'DEM/(?P<place>.*)\.tif'}
""",
        ['VV', 'VH', *(f's2l2a.{band}' for band in _S2L2A), 'dem.elevation'],
        ['s1', 's2l2a', 'dem'],
        'joint',
        112,
    ),
    Archive(
        'bigearthnet_example',
        r"""
files:
  - sensor: s1
    regex: 'S1A_IW_GRDH_1SDV_(?P<date>\d{8})T\d+_\w{5}_(?P<place>\d+_\d+)_(?P<band>V[VH])\.tif'
  - sensor: s2l2a
    regex: 'S2[AB]_MSIL2A_(?P<date>\d{8})T\d+_(?P<place>\d+_\d+)_(?P<band>B\w\w)\.tif'
""",
        ['VV', 'VH', *(f's2l2a.{band}' for band in _S2L2A)],
        ['s1', 's2l2a'],
        'xattn',
        112,
    ),
    Archive(
        'worldcereal_series',
        r"""
files:
  - {sensor: s1, regex: '(?P<place>\w+)/S1_GRD.*\.nc', time: timestamp}
  - {sensor: s2l2a, regex: '(?P<place>\w+)/S2_L2A_.*\.nc', time: timestamp}
""",
        ['VV', 'VH', 's2l2a.B02', 's2l2a.B03', 's2l2a.B04', 's2l2a.B08', 's2l2a.B11', 's2l2a.B12'],
        ['s1', 's2l2a'],
        'early',
        64,
    ),
    Archive(
        'ombria',
        r"""
files:
  - {sensor: radar, regex: '.*/s1/after/(?P<place>\d+)\.png'}
  - {sensor: optical, regex: '.*/s2/after/(?P<place>\d+)\.png'}
""",
        ['radar.backscatter', 'optical.first', 'optical.second', 'optical.third'],
        ['radar', 'optical'],
        'linear',
        128,
        """
radar:
  {title: Stretched backscatter, quantity: image, unit: 8-bit,
   bands: [{name: backscatter, mean: 100, std: 50}]}
optical:
  {title: Composite, quantity: image, unit: 8-bit,
   bands: [{name: first, mean: 100, std: 50}, {name: second, mean: 100, std: 50},
           {name: third, mean: 100, std: 50}]}
""",
        georeferenced=False,
    ),
)


def configuration(archive: Archive, table: Path, output: Path) -> dict[str, object]:
    """Return the configuration of a pretraining run of two epochs."""
    model = {
        'model': f'geofm_vit_nano_patch16_{archive.fusion}',
        'in_channels': len(archive.bands),
        'bands': archive.bands,
        'model_args': {'sensors': archive.sensors, 'init_values': 1.0},
        'drop_path_rate': 0.0,
        'global_size': 64,
        'local_size': 32,
        'n_local': 2,
        'prototypes': 256,
        'head_hidden_dim': 128,
        'head_bottleneck_dim': 64,
    }
    if archive.fusion == 'xattn':
        model['model_args'] = {**model['model_args'], 'query': archive.sensors[0]}  # type: ignore[dict-item]
    data = {
        'table': str(table),
        'sensors': archive.sensors,
        'bands': archive.bands,
        'window_size': archive.side,
        'batch_size': 4,
        'allow_missing': [key for key in archive.sensors[1:] if key == 'dem'],
    }
    return {
        'seed_everything': 0,
        'trainer': {
            'default_root_dir': str(output),
            'max_epochs': 2,
            'accelerator': 'cpu',
            'limit_train_batches': 16,
            'enable_progress_bar': False,
            'log_every_n_steps': 1,
        },
        'model': {'class_path': 'geofm.tasks.DINOv2', 'init_args': model},
        'data': {'class_path': 'geofm.datamodules.RasterArchiveDataModule', 'init_args': data},
    }


def run(archive: Archive, root: Path, output: Path) -> dict[str, object]:
    """Index, pretrain on and map an archive; return the row of the table."""
    start = time.monotonic()
    output.mkdir(parents=True)
    options = []
    if archive.definitions:
        (output / 'sensors.yaml').write_text(archive.definitions)
        load_sensors(output / 'sensors.yaml')
        options = ['--sensors', str(output / 'sensors.yaml')]
    (output / 'layout.yaml').write_text(archive.layout)
    table = output / 'table.parquet'
    layout = ['--layout', str(output / 'layout.yaml')]
    geofm(['index', str(root), *layout, '--output', str(table), *options])
    config = output / 'pretrain.yaml'
    config.write_text(yaml.safe_dump(configuration(archive, table, output)))
    geofm(['fit', '--config', str(config), *options])
    (checkpoint,) = output.rglob('*.ckpt')
    found: dict[str, object] = {
        'archive': archive.folder,
        'layout_lines': len(archive.layout.strip().splitlines()),
        'rows': len(RasterTable.read(table)),
    }
    archived = RasterArchive(table, archive.sensors, archive.bands, split='all')
    found['samples'] = len(archived)
    if archive.georeferenced:
        known = archived.table
        place = known.places[int(known.place[archived.matches.main_rows()[0]])]
        geofm(['scene', str(table), place, '--output', str(output / 'scene')])
        files = [
            f'--scene={path.stem}={path}'
            for path in sorted((output / 'scene').glob('*.tif'))
            if path.stem in archive.sensors
        ]
        maps = ['--output', str(output / 'maps'), '--window', '64']
        geofm(['attention', str(checkpoint), *files, *maps])
        found['maps'] = len(list((output / 'maps').glob('*.tif')))
    found['seconds'] = round(time.monotonic() - start)
    return found


def main() -> None:
    """Run all archives and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('data', type=Path)
    parser.add_argument('--output', type=Path, default=Path('output/archives'))
    parser.add_argument('--only', nargs='*', help='names of folders')
    args = parser.parse_args()
    rows = []
    for archive in ARCHIVES:
        if args.only and archive.folder not in args.only:
            continue
        roots = (args.data / archive.folder, args.data.parent / archive.folder)
        root = next(folder for folder in roots if folder.is_dir())
        rows.append(run(archive, root, args.output / archive.folder))
        print(rows[-1], flush=True)
    names = ('archive', 'layout_lines', 'rows', 'samples', 'maps', 'seconds')
    lines = [
        '| archive | lines of the layout | rows | samples | maps | seconds |',
        '|---|---:|---:|---:|---:|---:|',
        *('| ' + ' | '.join(str(row.get(name, 'no CRS')) for name in names) + ' |' for row in rows),
    ]
    text = (
        'Indexing, 2 epochs of a nano model and attention maps on a CPU, configured with YAML '
        'only.\n\n'
    )
    for name, content in (
        ('archives.md', text + '\n'.join(lines) + '\n'),
        ('archives.json', json.dumps(rows, indent=1) + '\n'),
    ):
        with atomic_file(RESULTS / name) as part:
            part.write_text(content)
    print('\n'.join(lines))
    assert all(row['samples'] for row in rows)


if __name__ == '__main__':
    main()
