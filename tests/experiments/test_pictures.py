"""What pictures share: styles, room at the edges, faithful colours; and yardsticks of grids."""

import io
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from experiments._framework import curves, heat_map
from experiments._framework import experiment as framework
from tests.helpers import counted
from unrollgrad.diagnostics import styles


def test_a_minimum_is_measured_again():
    """The luckiest cell is chosen by its own episodes, and its number comes from others."""
    lucky = {0.0: 5.0, 1.0: 0.1, 2.0: 3.0}

    def search(thetas: Any) -> Any:
        return np.array([lucky[float(x)] for x in thetas])

    def fresh(thetas: Any) -> Any:
        return np.array([10 + float(x) for x in thetas])

    objective = heat_map.Objective(search, fresh)
    lines = []
    with counted() as programs:
        heat_map.write_grid(objective, {"log_rate": np.arange(3.0)}, lines.append)
    assert programs == [0]
    *cells, last = lines
    assert [cell["J"] for cell in cells] == [5.0, 0.1, 3.0]
    assert [cell["log_rate"] for cell in cells] == [0, 1, 2]
    assert last == {"estimator": "grid", "minimum": 11.0}


def test_axes_of_a_grid_over_two_numbers():
    axes = heat_map.logarithms(((1.0, 100.0), (1.0, 8.0)), (3, 4))
    assert list(axes) == list(heat_map.NAMES)
    np.testing.assert_allclose(np.exp(axes["log_theta0"]), [1, 10, 100])
    np.testing.assert_allclose(np.exp(axes["log_theta1"]), [1, 2, 4, 8])


def test_an_estimator_looks_the_same_in_every_picture():
    known = list(styles.STYLES)
    assert len({marker for _, marker in styles.STYLES.values()}) == len(known)
    assert len({color for color, _ in styles.STYLES.values()}) == len(known)
    for names in (["pes", "mine", "tbptt", "yours"], ["tbptt", "pes"]):
        found = styles.styles(names)
        assert list(found) == names
        assert found["pes"] == styles.Style("C1", "s", "-")
        assert found["tbptt"].dash == "--"
        assert len({(style.color, style.marker) for style in found.values()}) == len(names)
    (call,) = styles.styles(["pes(sigma=0.1)"]).values()
    assert call == styles.Style("C1", "s", "-")
    twice = styles.styles(["pes(sigma=0.1)", "pes(sigma=1.0)", "pes"])
    assert len(set(twice.values())) == 3
    assert twice["pes"] == call


def test_an_axis_from_zero_has_room_above():
    axis = Figure().subplots()
    axis.plot([0, 1], [0.13, 0.147], "o")
    curves.from_zero(axis)
    low, high = axis.get_ylim()
    assert low == 0
    assert high > 1.04 * 0.147


def test_a_small_picture_keeps_the_lines_colours():
    """Lines in four colours over a map of greys, which has far more colours and pixels."""
    figure = Figure(figsize=(5, 4))
    axis = figure.subplots()
    axis.pcolormesh(np.random.default_rng(0).random((40, 40)), cmap="Greys")
    for i in range(4):
        axis.plot([0, 40], [8 * i + 4, 8 * i + 8], color=f"C{i}", lw=2)
    full = io.BytesIO()
    figure.savefig(full, dpi=150)
    wanted, found = (
        np.asarray(Image.open(picture).convert("RGB"), int)
        for picture in (full, io.BytesIO(framework.small_picture(figure)))
    )
    assert wanted.shape == found.shape
    for color in ((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40)):
        line = np.all(wanted == color, axis=-1)
        assert line.sum() > 500
        assert found[line].mean(axis=0) == pytest.approx(color, abs=10)
