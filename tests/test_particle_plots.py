import xml.etree.ElementTree as ET

import numpy as np
import pytest

from volumejax import particle_plots, plots


def words(figure):
    root = ET.fromstring(plots.render(figure, "svg"))
    return [element.text for element in root.iter() if element.tag.endswith("}text") and element.text]


@pytest.fixture
def particle_run(make_row, make_run, make_tether, make_particles):
    return make_run(
        make_row("isotropic", "isotropic", [-9000.0, -9100.0]), make_tether("tether, star"), make_particles()
    )


def test_particles_and_the_chains_beside_them_are_drawn(particle_run, chain_free_run):
    (figure,) = particle_plots.figures(particle_run).values()
    shown = words(figure)
    assert {"from the prior", "tether, star", "share of draws from the prior", "chance under the prior"} <= set(shown)
    assert "isotropic" not in shown
    drawn = plots.render(figure, "svg").decode()
    assert plots.COLOURS["particles"] in drawn and plots.COLOURS["tether"] in drawn
    assert particle_plots.figures(chain_free_run) == {}


@pytest.fixture
def chain_free_run(make_run, make_tether):
    return make_run(make_tether("tether, star"))


def test_points_that_are_hardly_known_are_hollow(make_run, make_particles):
    sure = make_particles()
    sure = sure.model_copy(update={"chains": {**sure.chains, "curve_std_error": np.full(9, 0.1)}})
    counts = []
    for row in (make_particles(), sure):
        (axis,) = particle_plots.figures(make_run(row))["guessing"].axes
        hollow = [line for line in axis.lines if line.get_marker() == "o"]
        counts.append(sum(len(line.get_xdata()) for line in hollow))
    assert counts[0] == 4 and counts[1] == 0


def test_chains_that_have_not_mixed_are_named(make_run, make_particles, make_tether):
    figure = particle_plots.figures(make_run(make_tether("tether, star", kind="not_mixed"), make_particles()))[
        "guessing"
    ]
    assert "tether, star, not mixed" in words(figure) and "tether, star" not in words(figure)


def test_nothing_lies_outside_the_figure(particle_run):
    figure = particle_plots.figures(particle_run)["guessing"]
    box = figure.get_tightbbox()
    assert box.x0 >= -0.01 and box.y0 >= -0.01
    assert box.x1 <= figure.get_figwidth() + 0.01 and box.y1 <= figure.get_figheight() + 0.01


def test_prior_draws_are_shown_as_far_as_ten_of_them_pass(make_run, make_particles):
    row = make_particles()
    (axis,) = particle_plots.figures(make_run(row))["guessing"].axes
    (crosses,) = (line for line in axis.lines if line.get_marker() == "x")
    x, y = np.asarray(crosses.get_xdata()), np.asarray(crosses.get_ydata())
    share = np.mean(row.chains["prior_costs"][None, :] <= x[:, None], axis=1)
    np.testing.assert_allclose(10.0**y, share)
    assert len(x) and np.all(share * 64 >= 10)
