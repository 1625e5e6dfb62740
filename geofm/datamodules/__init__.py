"""Lightning data modules in TorchGeo's style."""

from geofm.datamodules.landcover import SampleLandCoverDataModule
from geofm.datamodules.sen12mscrts import SEN12MSCRTSDataModule

__all__ = ('SEN12MSCRTSDataModule', 'SampleLandCoverDataModule')
