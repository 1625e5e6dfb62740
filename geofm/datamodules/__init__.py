"""Lightning data modules in TorchGeo's style."""

from geofm.datamodules.eurosat_rgb import EuroSATRGBDataModule
from geofm.datamodules.labelled_archive import LabelledArchiveDataModule
from geofm.datamodules.labelled_folder import LabelledFolderDataModule
from geofm.datamodules.landcover import SampleLandCoverDataModule
from geofm.datamodules.masked_archive import MaskedArchiveDataModule
from geofm.datamodules.mmflood_height import MMFloodHeightDataModule
from geofm.datamodules.named_bands import NamedBandsDataModule
from geofm.datamodules.raster_archive import RasterArchiveDataModule
from geofm.datamodules.sampling import run_seed
from geofm.datamodules.sen12mscrts import SEN12MSCRDataModule, SEN12MSCRTSDataModule
from geofm.datamodules.shards import ShardsDataModule

__all__ = (
    'EuroSATRGBDataModule',
    'LabelledArchiveDataModule',
    'LabelledFolderDataModule',
    'MMFloodHeightDataModule',
    'MaskedArchiveDataModule',
    'NamedBandsDataModule',
    'RasterArchiveDataModule',
    'SEN12MSCRDataModule',
    'SEN12MSCRTSDataModule',
    'SampleLandCoverDataModule',
    'ShardsDataModule',
    'run_seed',
)
