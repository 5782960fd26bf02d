"""The aggregator's benchmark on a world small enough for a test: who has what, and what arms leave."""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("sklearn")

from benchmarks import aggregator as bench

from liberatai_coordinator.models.members import Public
from liberatai_core.aggregator.methods import ENSEMBLES
from liberatai_core.structure import DataContract


def options(tmp_path: Path, *more: str) -> argparse.Namespace:
    given = "--structures 2 --devices 4 --rounds 2 --epochs 1 --samples 300 --test 100 --public 60 --trials 3"
    given += f" --validation 60 --teach-steps 20 --copies 0 --workers 1 --picture {tmp_path / 'weights.png'}"
    return bench.parsed([*given.split(), *more])


def rows(*parts: Any) -> Counter[bytes]:
    return Counter(row.tobytes() for part in parts for row in part)


def test_private_unlabeled_labelled_and_test_samples_are_apart(tmp_path: Path) -> None:
    given = bench.world(options(tmp_path))
    private = [x for x, _ in given.people.devices]
    assert given.public.unlabeled is not None
    parts = [*private, given.public.unlabeled, given.labelled[0], given.people.test[0]]
    assert sum(map(len, parts[:-1])) == 300
    assert (len(given.public.unlabeled), len(given.labelled[0]), len(given.people.test[0])) == (60, 60, 100)
    # Some digits stand in the data more than once, but never as often as a shared sample would make them.
    assert max(rows(*parts).values()) == 1


def test_every_structure_gets_its_share_of_the_devices(tmp_path: Path) -> None:
    chosen = options(tmp_path)
    given = bench.world(chosen)
    assert given.owners == [0, 1, 0, 1]
    ended = bench.federated(chosen, given, given.public, given.choices, given.owners)
    assert sorted(ended.test) == sorted(given.ids)
    for place, sid in enumerate(given.ids):
        own = np.concatenate(
            [y for (_, y), one in zip(given.people.devices, given.owners, strict=True) if one == place]
        )
        counted = ended.class_counts[sid]
        # Devices with 40 samples or more hold some back, so a few are not counted.
        assert 0.8 * len(own) <= counted.sum() <= len(own)


def test_unlabeled_samples_teach(tmp_path: Path) -> None:
    """With equal seeds the arms differ by what the coordinator has, and by nothing else."""
    chosen = options(tmp_path)
    given = bench.world(chosen)
    alone, again, taught = (
        bench.federated(chosen, given, public, given.choices, given.owners)
        for public in (Public(), Public(validation=given.labelled), given.public)
    )
    for sid in given.ids:
        assert alone.test[sid].tobytes() == again.test[sid].tobytes()
        assert alone.test[sid].tobytes() != taught.test[sid].tobytes()
    assert "not checked" in alone.guard
    assert "60 held-out labels" in again.guard


def test_samples_of_another_domain_are_brought_to_the_shape(tmp_path: Path) -> None:
    path = tmp_path / "other.npz"
    np.savez(path, x=np.random.default_rng(0).integers(0, 255, (50, 28, 28), dtype=np.uint8))
    made = bench.foreign(str(path), DataContract(input_shape=(3, 8, 8), classes=4), 20, seed=1)
    assert made.shape == (20, 3, 8, 8)
    assert made.dtype == np.float32
    assert abs(float(made.mean())) < 1e-5
    assert float(made.std()) == pytest.approx(1.0, abs=1e-4)


def test_the_report_has_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = options(tmp_path)
    given = bench.world(chosen)
    ended = {("family", -1): bench.run_arm(("family", -1, chosen, given))}
    ended |= {(name, 0): bench.run_arm((name, 0, chosen, given)) for name in ("all", "centralised")}
    found = bench.summary(chosen, given, ended)
    bench.table(found)
    assert json.loads(json.dumps(found)) == found
    assert set(found["ensemble"]) == set(ENSEMBLES)
    assert set(found["fedavg_all"]) == set(found["centralised"]) == {given.ids[0]}
    assert found["best_member"]["accuracy"] == max(found["fedavg_family"].values())
    assert found["default_method"]["name"] == "label_free"
    assert (tmp_path / "weights.png").stat().st_size > 0
    assert "majority_vote" in capsys.readouterr().out
