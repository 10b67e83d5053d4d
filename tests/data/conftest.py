"""The data set most tests of the data layer read."""

import pytest
from data_samples import make_sample, write_dataset

from laid_ds.data.dataset import Dataset


@pytest.fixture
def dataset(tmp_path) -> Dataset:
    """25 samples with 0 to 3 images in four shards of unequal size."""
    return write_dataset(tmp_path / "set", [make_sample(i, i % 4) for i in range(25)], samples_per_shard=7)
