import io
import xml.etree.ElementTree as ET

import matplotlib
import matplotlib.image
import numpy as np
import pytest

from volumejax import plots

NAMES = ["summary", "log_mass", "radius"]


def pixels(figure):
    return matplotlib.image.imread(io.BytesIO(plots.render(figure, "png")))[..., :3]


def words(figure):
    root = ET.fromstring(plots.render(figure, "svg"))
    return [element.text for element in root.iter() if element.tag.endswith("}text") and element.text]


def settings():
    """Matplotlib's global settings; reading the backend would choose one."""
    return {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}


def colours(image):
    return {matplotlib.colors.to_hex(colour) for colour in np.unique(image.reshape(-1, 3), axis=0)}


@pytest.mark.parametrize("name", NAMES)
def test_figures_show_every_row_in_its_colour(name, example_run):
    figure = plots.figures(example_run)[name]
    image = pixels(figure)
    assert image.shape[0] > 400 and image.shape[1] > 900
    assert {plots.COLOURS["isotropic"], plots.COLOURS["adam"], plots.COLOURS["dense_ggn"]} <= colours(image)
    shown = words(figure)
    for row in example_run.rows:
        assert row.label in shown


@pytest.mark.parametrize("name", NAMES)
def test_nothing_lies_outside_the_figure(name, example_run):
    figure = plots.figures(example_run)[name]
    box = figure.get_tightbbox()
    assert box.x0 >= -0.01 and box.y0 >= -0.01
    assert box.x1 <= figure.get_figwidth() + 0.01 and box.y1 <= figure.get_figheight() + 0.01


def test_axes_have_units(example_run):
    drawn = plots.figures(example_run)
    assert "log mass (nats)" in words(drawn["summary"])
    assert "log mass per ray (nats)" in words(drawn["log_mass"])
    assert any("parameter units" in text for text in words(drawn["radius"]))


def test_bounds_are_arrows_and_estimates_have_an_interval(example_run):
    axes = plots.figures(example_run)["summary"].axes
    arrows = [sum(hasattr(child, "arrow_patch") for child in axis.get_children()) for axis in axes]
    assert arrows == [1, 1, 1, 0]
    assert [len(axis.containers) for axis in axes] == [0, 0, 0, 1]


def test_arrows_end_where_no_probability_is_larger(make_row, make_run, make_tether):
    row, far = make_tether("t", kind="not_mixed"), make_row("a", "isotropic", [-9e3, -9e3])
    (axis, _) = plots.figures(make_run(row, far))["summary"].axes
    (arrow,) = (child for child in axis.get_children() if hasattr(child, "arrow_patch"))
    low, high = axis.get_xlim()
    points = axis.get_position().width * 72.0 * axis.figure.get_figwidth()
    assert arrow.xyann[0] * (high - low) / points == pytest.approx(614.23, rel=0.01)


def test_tethers_are_intervals_with_a_tick_at_their_bound(make_row, make_run, make_tether):
    rows = (make_row("a", "adam", [-2.0, -2.0]), make_tether("t"), make_tether("stuck", kind="not_mixed"))
    drawn = plots.figures(make_run(*rows))
    axes = drawn["summary"].axes
    assert [len(axis.containers) for axis in axes] == [0, 1, 0]
    assert [sum(hasattr(child, "arrow_patch") for child in axis.get_children()) for axis in axes] == [1, 0, 1]
    spans = [(line.get_xdata()[0], line.get_xdata()[-1]) for line in axes[1].lines]
    assert (-614.23, -614.23) in spans and (-614.23, -600.0) in spans
    # The pale bar joins the two passes.
    assert any((line.get_alpha(), *line.get_xdata()) == (0.3, -601.0, -599.04) for line in axes[1].lines)
    (bars,) = axes[1].containers
    assert bars.has_xerr
    (interval,) = bars[2][0].get_segments()
    assert (interval[0][0], interval[1][0]) == pytest.approx((-603.92, -596.08))
    assert plots.COLOURS["tether"] in colours(pixels(drawn["summary"]))
    assert "certified" in words(drawn["summary"])
    assert len(drawn["log_mass"].axes) == len(drawn["radius"].axes) == 1


def test_what_rays_miss_is_drawn_from_the_best_of_them(make_row, make_run, make_tether):
    rays = (make_row("far", "isotropic", [-9000.0] * 2), make_row("near", "adam", [-7000.0] * 2))
    figure = plots.figures(make_run(*rays, make_tether("t")))["summary"]
    # The best rays show their bound, 3 nats below their log mean weight.
    assert "rays miss 6,403" in words(figure)
    stuck = make_tether("stuck", kind="not_mixed")
    assert "rays miss ≥ 6,389" in words(plots.figures(make_run(*rays, stuck))["summary"])
    assert any(tuple(line.get_xdata()) == (-7003.0, -600.0) for line in figure.axes[2].lines)
    nothing = plots.figures(make_run(make_row("near", "adam", [-500.0] * 2), make_tether("t")))["summary"]
    assert not any("miss" in text for text in words(nothing))


def test_no_pass_is_drawn_above_what_a_probability_can_be(make_run, make_tether):
    """Mutation: the spread to the heating pass's own value."""
    stuck = make_tether("stuck", kind="not_mixed", hysteresis_cooling=-900.0, hysteresis_heating=250.0, upper=0.0)
    (axis,) = plots.figures(make_run(stuck))["summary"].axes
    assert [-900.0, 0.0] in [list(line.get_xdata()) for line in axis.lines]


def test_a_run_of_chains_alone_has_no_figures_of_rays(make_run, make_tether):
    assert list(plots.figures(make_run(make_tether("t")))) == ["summary"]


def test_families_are_told_apart():
    assert len({*plots.COLOURS.values(), plots.OTHER_COLOUR}) == len(plots.COLOURS) + 1


def test_infinite_rays_are_counted_in_words(example_run):
    drawn = plots.figures(example_run)
    assert "5 no volume" in words(drawn["log_mass"])
    assert "3 never cross" in words(drawn["radius"])


@pytest.mark.parametrize("log_weight", [[-5.0], [-5.0] * 40, [-np.inf] * 40, [0.0], [-1e9, -1e9 + 1], [-5.0, np.nan]])
@pytest.mark.parametrize("radius", [0.0, np.inf, 3.0, 1e-8])
def test_degenerate_rays_can_be_drawn(log_weight, radius, make_row, make_run):
    row = make_row("row", "isotropic", log_weight, radius=[radius] * len(log_weight))
    for figure in plots.figures(make_run(row)).values():
        assert len(np.unique(pixels(figure))) > 2


def test_labels_are_taken_literally(make_row, make_run):
    label = "$x_1$ <b> & \\frac"
    for figure in plots.figures(make_run(make_row(label, "adam", [-5.0, -6.0]))).values():
        assert label in words(figure)


def test_many_rows_make_a_taller_figure(make_row, make_run):
    rows = [make_row(f"row {i}", "adam", [-5.0, -6.0]) for i in range(12)]
    few, many = (plots.figures(make_run(*some))["log_mass"] for some in (rows[:3], rows))
    assert many.get_figheight() > 2 * few.get_figheight()


def test_nothing_global_changes_and_files_are_reproducible(example_run):
    before = settings()
    first = plots.render(plots.figures(example_run)["summary"], "svg")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "text.usetex": True}):
        second = plots.render(plots.figures(example_run)["summary"], "svg")
    assert first == second
    assert settings() == before


def test_a_run_without_rows_cannot_be_drawn(make_run):
    with pytest.raises(ValueError, match="has no rows"):
        plots.figures(make_run())


@pytest.mark.parametrize(("low", "high"), [(-3.0, 5.0), (0.1, 0.2), (0.501, 0.502), (-8.1, -7.9), (0.0, 300.0)])
def test_logarithmic_ticks_are_few_and_round(low, high):
    ticks = plots._round_logs(low, high)
    assert len(ticks) <= 8 and all(low <= tick <= high for tick in ticks)
    assert ticks or high - low < 0.01
