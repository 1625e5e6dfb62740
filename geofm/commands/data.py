"""Commands that make and look through data."""

from pathlib import Path

from geofm.datasets import write_sample_data


def sample_data(dest: Path, seed: int = 0) -> None:
    """Write a small generated data set in the layout of SEN12MS-CR-TS.

    It has land cover for evaluation. It is generated, not observed: no result on it is science.

    Args:
        dest: Folder to write to.
        seed: Seed of the landscape.
    """
    print(write_sample_data(dest, seed=seed))
