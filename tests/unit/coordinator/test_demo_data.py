"""The demo's split: nothing overlaps, nobody is too poor, and labels stay where they belong."""

import stat

import numpy as np
import pytest

from liberatai_coordinator.demo import digits
from liberatai_core.errors import ConfigError


@pytest.fixture(scope="module")
def samples():
    return digits.load()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("devices", [1, 2, 4, 8, 20, 40])
def test_split_covers_every_row_once_and_no_device_is_too_poor(samples, devices, seed):
    parts = digits.split(samples.y, devices, seed)
    rows = np.concatenate([parts.test, parts.unlabeled, parts.validation, *parts.devices])
    assert np.array_equal(np.sort(rows), np.arange(len(samples)))
    assert len(parts.devices) == devices
    assert min(len(own) for own in parts.devices) >= digits.SMALLEST
    assert all(len(np.unique(samples.y[own])) >= 2 for own in parts.devices)


def test_split_has_the_promised_sizes(samples):
    parts = digits.split(samples.y, 8, 0)
    assert len(parts.test) == round(0.2 * len(samples))
    assert (len(parts.unlabeled), len(parts.validation)) == (300, 100)


def test_split_is_seeded(samples):
    first, again, other = (digits.split(samples.y, 8, seed) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(first.devices, again.devices, strict=True))
    assert not np.array_equal(first.test, other.test)


def test_split_is_uneven(samples):
    """Under Dirichlet(0.3) the average device's three most frequent digits are most of what it has."""
    parts = digits.split(samples.y, 8, 0)
    top = [np.sort(np.bincount(samples.y[own], minlength=10))[-3:].sum() / len(own) for own in parts.devices]
    assert np.mean(top) > 0.55


@pytest.mark.parametrize("devices", [0, -1, 41])
def test_split_refuses_numbers_of_devices_that_the_set_cannot_serve(samples, devices):
    with pytest.raises(ConfigError, match="--devices"):
        digits.split(samples.y, devices, 0)


def test_files_hold_inputs_without_labels_where_promised_and_are_private(samples, tmp_path):
    parts = digits.split(samples.y, 3, 0)
    files = digits.write(samples, parts, tmp_path, ["a", "b", "c"])
    with np.load(tmp_path / "unlabeled.npz") as public:
        assert public.files == ["x"]
        assert public["x"].shape == (300, 1, 8, 8)
    for (_, path), rows in zip(files.items(), parts.devices, strict=True):
        with np.load(path) as own:
            assert np.array_equal(own["y"], samples.y[rows])
            assert own["x"].dtype == np.float32
            assert own["x"].max() <= 1.0
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_test_set_is_in_no_file(samples, tmp_path):
    parts = digits.split(samples.y, 4, 1)
    digits.write(samples, parts, tmp_path, ["a", "b", "c", "d"])
    written = np.concatenate([np.load(path)["x"] for path in tmp_path.rglob("*.npz")])
    seen = {row.tobytes() for row in written}
    held_back = {row.tobytes() for row in samples.x[parts.test]}
    twins = {row.tobytes() for row in np.delete(samples.x, parts.test, axis=0)}
    assert not (held_back - twins) & seen
