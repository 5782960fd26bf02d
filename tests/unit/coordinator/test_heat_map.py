"""A heat map shows every weight, in a picture and on a page that needs nothing else."""

import re
import struct
from pathlib import Path

import pytest

from liberatai_coordinator.client.views import EnsembleView
from liberatai_coordinator.pictures import heat_map
from liberatai_core.errors import ConfigError, DiskError

VIEW = EnsembleView(
    method="stacking",
    members=("cnn-width16", "<mlp>"),
    weights=((0.75, 0.0, -0.25), (0.25, 1.0, 0.5)),
    bias=(-0.1, 0.0, 0.2),
)


def many(classes: int) -> EnsembleView:
    return EnsembleView(method="uniform", members=("a", "b"), weights=((0.5,) * classes,) * 2, kind="linear")


def test_a_page_has_every_weight_and_needs_no_script_no_file_and_no_network() -> None:
    page = heat_map.page(VIEW, "digits <3>")
    assert re.findall(r">(-?\d\.\d\d)</td>", page) == ["0.75", "0.00", "-0.25", "0.25", "1.00", "0.50"]
    assert "<h1>digits &lt;3&gt;</h1>" in page
    assert "&lt;mlp&gt;" in page
    assert "<mlp>" not in page
    assert not re.search(r"<script|<img|<link|https?:|src=|url\(|@import", page)


def test_colours_begin_white_and_tell_the_sign() -> None:
    assert heat_map.colour(0.0, 2.0) == "#ffffff"
    assert heat_map.colour(2.0, 2.0) == "#005c97"
    assert heat_map.colour(-2.0, 2.0) == "#c45400"
    assert heat_map.spread(VIEW) == 1.0
    assert heat_map.spread(EnsembleView(method="uniform", members=("a",), weights=((0.0, 0.0),))) == 1.0


def test_many_classes_run_down_the_page() -> None:
    page = heat_map.table(many(heat_map.MAX_LABELS + 1))
    assert page.count("<tr>") == 1 + heat_map.MAX_LABELS + 1
    assert page.splitlines()[1] == "<tr><th>class</th><th>a</th><th>b</th></tr>"


@pytest.mark.parametrize("classes", [2, 10, 17, 500])
def test_a_picture_is_a_png_that_grows_with_the_classes(classes: int) -> None:
    pytest.importorskip("matplotlib")
    content = heat_map.png(many(classes), "title")
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    assert 900 <= width <= 2400
    assert 300 <= height <= 600


def test_the_end_of_the_name_decides_and_others_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    heat_map.write(VIEW, "t", tmp_path / "a.HTML")
    assert (tmp_path / "a.HTML").read_text() == heat_map.page(VIEW, "t")
    heat_map.write(VIEW, "t", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ConfigError, match=r"must end in \.png or \.html"):
        heat_map.write(VIEW, "t", tmp_path / "a.jpg")
    with pytest.raises(DiskError, match="cannot be written"):
        heat_map.write(VIEW, "t", tmp_path / "none" / "a.html")


def test_the_sentence_says_when_the_weights_are_not_used() -> None:
    assert heat_map.sentence(VIEW) == (
        "stacking, weights of log-probabilities per structure and class, and -0.10 to +0.20 added per class"
    )
    fallen = EnsembleView(method="uniform", members=("a",), weights=((1.0,),), kind="vote", use="a")
    assert heat_map.sentence(fallen) == (
        "uniform, weights of votes per structure and class; not used: the guard fell back to a"
    )
