"""Data module of shards."""

from collections.abc import Mapping, Sequence
from typing import Any

from geofm.datamodules.resumable import TIMEOUT, ResumableDataModule, StartMethod
from geofm.datamodules.sampling import run_seed
from geofm.datasets import ShardError, Shards, is_remote, pad_and_stack
from geofm.sensors import bands_of, canonical_order


class ShardsDataModule(ResumableDataModule):
    """Samples of shards written by ``geofm shard``, on disk or object storage.

    The order of training samples is the same as for the archive from which the shards were made,
    on any number of ranks and workers. Training can be resumed within an epoch.

    .. seealso:: :class:`geofm.datasets.Shards`
    """

    collate_fn = staticmethod(pad_and_stack)

    def __init__(
        self,
        root: str,
        sensors: Sequence[str],
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int | None = None,
        start_method: StartMethod | None = None,
        statistics: str | None = None,
        storage_options: Mapping[str, Any] | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        """Initialize a new ShardsDataModule instance.

        Args:
            root: Path, or URL such as ``s3://bucket/shards``, of the folder with the splits 'train'
                and optionally 'val' and 'test'.
            sensors: Keys of the sensors in the shards.
            batch_size: Number of samples in a batch (on each device).
            num_workers: Number of worker processes that read samples.
            seed: Seed of the order of the training samples; by default the seed of Lightning's
                ``seed_everything``.
            start_method: How worker processes are started; by default as Python does, and by
                forkserver where *root* is a URL.
            statistics: YAML file with mean and standard deviation of each band, as written by
                ``geofm stats``. By default, the statistics that the weights of the model were
                trained with, or else those of the sensors.
            storage_options: Options for the object storage, see
                :class:`~geofm.datasets.Shards`.
            timeout: Maximum time in seconds for workers to load a batch. After that, the run ends.
                0 for no limit.

        Raises:
            SensorError: If a sensor is unknown, or none is given.
        """
        super().__init__(Shards, batch_size, num_workers, storage_options=storage_options)
        self.root = root
        self.sensors = canonical_order(sensors)
        self.seed = run_seed(seed)
        self.start_method = start_method or ('forkserver' if is_remote(root) else None)
        self.statistics = statistics
        self.timeout = timeout
        self.normalize_by(bands_of(self.sensors))

    def setup(self, stage: str) -> None:
        """Open the shards of a stage.

        Args:
            stage: Either 'fit', 'validate' or 'test'.

        Raises:
            ShardError: If the shards of a split are missing or have other sensors. For fitting,
                validation shards may be missing.
        """
        super().setup(stage)
        if stage == 'fit':
            self.train_dataset = self._open('train')
        if stage in ('fit', 'validate'):
            try:
                self.val_dataset = self._open('val')
            except ShardError:
                if stage == 'validate':
                    raise
        if stage == 'test':
            self.test_dataset = self._open('test')

    def _open(self, split: str) -> Shards:
        """Open the shards of a split."""
        shards = Shards(f'{self.root.rstrip("/")}/{split}', **self.kwargs)
        if shards.contents.sensors != self.sensors:
            raise ShardError(
                f'{shards.root}: shards of {list(shards.contents.sensors)}, not of '
                f'{list(self.sensors)}: set sensors'
            )
        self.normalize_by_file(shards.bands, self.statistics)
        return shards
