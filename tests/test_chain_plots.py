import io
import xml.etree.ElementTree as ET

import matplotlib
import matplotlib.image
import numpy as np
import pytest

from volumejax import chain_plots, plots


def pixels(figure):
    return matplotlib.image.imread(io.BytesIO(plots.render(figure, "png")))[..., :3]


def words(figure):
    root = ET.fromstring(plots.render(figure, "svg"))
    return [element.text for element in root.iter() if element.tag.endswith("}text") and element.text]


def colours(image):
    return {matplotlib.colors.to_hex(colour) for colour in np.unique(image.reshape(-1, 3), axis=0)}


@pytest.fixture
def chain_run(make_row, make_run, make_tether):
    """Rays, two finished tethers and an interrupted one."""
    return make_run(
        make_row("isotropic", "isotropic", [-9000.0, -9100.0]),
        make_tether("tether, star", region="star"),
        make_tether("tether, connected"),
        make_tether("cut", complete=False, kind="lower_bound", progress=0.4),
    )


def test_only_rows_of_chains_are_drawn(chain_run, example_run):
    drawn = chain_plots.figures(chain_run)
    assert list(drawn) == ["curve", "ladder"]
    assert chain_plots.figures(example_run) == {}
    for name, labels in {"curve": ["tether, star", "tether, connected"], "ladder": ["tether, star", "cut"]}.items():
        shown = words(drawn[name])
        assert set(labels) <= set(shown) and "isotropic" not in shown
    assert "cut" not in words(drawn["curve"])


def test_chains_that_have_not_mixed_are_no_estimate(make_run, make_tether):
    """A thin line without a band or marks, named so; nothing of what needs chains that have mixed."""
    stuck = make_tether("tether, star", kind="not_mixed")
    for rows, drawn in (((stuck,), 0), ((stuck, make_tether("tether, connected")), 1)):
        figure = chain_plots.figures(make_run(*rows))["curve"]
        upper, lower = figure.axes[0], figure.axes[1:]
        assert "tether, star, not mixed" in words(figure)
        assert len(lower) == drawn, "an empty panel, or none"
        assert [len(axis.collections) for axis in figure.axes] == [drawn] * (1 + drawn)
        assert len(upper.lines) == 1 + 2 * drawn and all(len(axis.lines) > 0 for axis in lower)


def test_chains_without_a_curve_have_their_ladder(make_run, make_tether):
    assert list(chain_plots.figures(make_run(make_tether("cut", complete=False)))) == ["ladder"]


def test_a_curve_of_the_cutoff_alone_is_none(make_run, make_tether):
    """As `decades: 0` asks for."""
    row = make_tether("t")
    alone = {name: values[-1:] if name.startswith("curve_") else values for name, values in row.chains.items()}
    assert list(chain_plots.figures(make_run(row.model_copy(update={"chains": alone})))) == ["ladder"]


@pytest.mark.parametrize("name", ["curve", "ladder"])
def test_nothing_lies_outside_the_figure(name, chain_run):
    figure = chain_plots.figures(chain_run)[name]
    assert plots.COLOURS["tether"] in colours(pixels(figure))
    box = figure.get_tightbbox()
    assert box.x0 >= -0.01 and box.y0 >= -0.01
    assert box.x1 <= figure.get_figwidth() + 0.01 and box.y1 <= figure.get_figheight() + 0.01


def test_axes_have_units(chain_run):
    drawn = chain_plots.figures(chain_run)
    assert {"log mass (nats)", "cutoff (nats)", "learning coefficient", "heat capacity"} <= set(words(drawn["curve"]))
    assert any("precision a" in text for text in words(drawn["ladder"]))
    assert {"cooling", "heating", "overlap of neighbouring levels"} <= set(words(drawn["ladder"]))


def test_the_curve_is_drawn_over_the_cutoff_with_a_band(make_run, make_tether):
    upper, lower = chain_plots.figures(make_run(make_tether("t")))["curve"].axes
    assert upper.get_xscale() == "log"
    line = max(upper.lines, key=lambda line: len(line.get_xdata()))
    np.testing.assert_allclose(line.get_xdata(), np.geomspace(1e-4, 1e-2, 9))
    np.testing.assert_allclose(line.get_ydata(), np.linspace(-1000, -600, 9))
    (band,) = upper.collections
    edge = band.get_paths()[0].get_extents()
    assert (edge.y0, edge.y1) == pytest.approx((-1000 - 1.96 * 20, -600 + 1.96 * 20))
    # Each temperature stands at the cutoff energy / beta; those far outside the curve are left out.
    slope = max(lower.lines, key=lambda line: len(line.get_xdata()))
    expected = 100.0 / np.geomspace(1e3, 1e5, 6)
    np.testing.assert_allclose(slope.get_xdata(), np.sort(expected[expected < 1.4e-2]))
    np.testing.assert_allclose(slope.get_ydata(), 100.0)
    assert any(np.allclose(line.get_ydata(), 110.0) for line in lower.lines)


def test_the_profile_is_the_distance_in_units_of_the_tether(make_run, make_tether):
    row = make_tether("t")
    precision = row.chains["precision"]
    square = 4810 * np.stack([0.5 / precision, 0.25 / precision])
    row = row.model_copy(update={"chains": {**row.chains, "mean_square": square}})
    upper, lower = chain_plots.figures(make_run(row))["ladder"].axes
    cooling, heating = upper.lines
    np.testing.assert_allclose(cooling.get_ydata(), 0.5)
    np.testing.assert_allclose(heating.get_ydata(), 0.25)
    np.testing.assert_allclose(np.sort(cooling.get_xdata()), np.sort(precision))
    left, right = upper.get_xlim()
    assert left > right and upper.get_xscale() == "log"
    overlap = lower.lines[-1]
    np.testing.assert_allclose(overlap.get_xdata(), np.sqrt(precision[:-1] * precision[1:]))
    np.testing.assert_allclose(overlap.get_ydata(), 0.9)


def test_rows_of_one_colour_differ_in_dash_and_mark(make_run, make_tether):
    figure = chain_plots.figures(make_run(*(make_tether(f"t{i}") for i in range(3))))["curve"]
    entries = figure.legends[0].get_lines()
    assert len({entry.get_marker() for entry in entries}) == 3
    assert len({str(entry.get_linestyle()) + str(entry._dash_pattern) for entry in entries}) == 3


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, -1.0])
@pytest.mark.parametrize("name", ["mean_square", "overlap", "energies", "heat_capacities", "curve_log_mass", "betas"])
def test_degenerate_chains_can_be_drawn(value, name, make_run, make_tether):
    row = make_tether("t")
    row = row.model_copy(update={"chains": {**row.chains, name: np.full_like(row.chains[name], value)}})
    for figure in chain_plots.figures(make_run(row)).values():
        assert len(np.unique(pixels(figure))) > 2


def test_a_flat_ladder_ends_without_a_tether(make_run, make_tether):
    row = make_tether("t")
    flat = row.model_copy(update={"chains": {**row.chains, "precision": np.r_[np.geomspace(1e3, 1e-2, 8), 0.0]}})
    figure = chain_plots.figures(make_run(flat))["ladder"]
    assert len(figure.axes[0].lines[0].get_xdata()) == 8
    assert len(np.unique(pixels(figure))) > 2


def test_many_levels_do_not_hide_each_other(make_run, make_tether):
    row = make_tether("t")
    long = {"precision": np.geomspace(1e4, 1, 300), "overlap": np.full(299, 0.9)}
    long |= {name: np.full((2, 300), 0.5) for name in ("mean_square", "acceptance")}
    figure = chain_plots.figures(make_run(row.model_copy(update={"chains": {**row.chains, **long}})))["ladder"]
    cooling, heating = figure.axes[0].lines
    assert len(cooling.get_xdata()) == 300 and 10 <= len(heating.get_xdata()) <= 24


def test_labels_are_taken_literally(make_run, make_tether):
    label = "$x_1$ <b> & \\frac"
    for figure in chain_plots.figures(make_run(make_tether(label))).values():
        assert label in words(figure)


def test_files_are_reproducible(chain_run):
    first, second = (plots.render(chain_plots.figures(chain_run)["curve"], "svg") for _ in range(2))
    assert first == second
