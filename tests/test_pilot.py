"""Where the pilot leaves its chains: the heating pass begins with them.

Mutations these catch: ends that go back up with the chains, a star's guide that does not look where its segments bulge,
one that looks again where they bulge nowhere else, a place between that is kept though it sees nothing, a lag of chains
that do not, one not counted for a unit of x.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from volumejax.ensemble import ensemble_of
from volumejax.frames import frame_of
from volumejax.parallel import Launcher
from volumejax.pilot import fly
from volumejax.priors import Gaussian
from volumejax.regions import Connected, Star

D = 40


def fly_from_zero(cost, cutoff, region, chains=4, dimension=D, factor=1.0, seed=0):
    ensemble = ensemble_of(cost, frame_of(Gaussian(1.0), jnp.zeros(dimension)), cutoff=cutoff, region=region)
    return fly(
        ensemble, jax.random.key(seed), chains=chains, budget=2_000.0, anchor_cost=0.0, beta_factor=factor,
        batch_size=None, launchers=[Launcher(None)], on_progress=lambda share: None,
    )  # fmt: skip


def half_free(w):
    return 0.5 * jnp.sum(w[: D // 2] ** 2)


@pytest.mark.parametrize("chains", [2, 4])
def test_its_ends_are_chains_at_the_end_of_the_way_down(chains):
    """Half the parameters are free there, and as wide as the prior; at the top of the way all are a hundredth of it."""
    pilot = fly_from_zero(half_free, 1e-2, Connected(), chains)
    ends = np.asarray(pilot.ends.displacement, np.float64)
    assert ends.shape == (chains, D)
    assert pilot.survey.x[0] > 4.0 and pilot.survey.x[-1] == 0.0
    assert pilot.survey.unseen == 0.0, "the cost is all that the region looks at"
    assert len(pilot.survey.slope[-1][0]) == 4, "chains whose moments it measures"
    # A chain of 20 free directions has Σδ² = 20 ± 6.3.
    assert np.all(np.abs(np.sum(ends[:, D // 2 :] ** 2, axis=1) - D // 2) < 18.0)
    assert np.all(np.sum(ends[:, : D // 2] ** 2, axis=1) < 2e-2)


@pytest.mark.parametrize(
    ("region", "factor", "natural", "above"),
    [(Connected(), 1.0, 1e4, 1.71), (Connected(), 0.7, 1e4, 1.2), (Star(), 1.0, 2e4 / (1.0 + 0.7**2), 1.71)],
)
def test_the_ladder_is_walked_far_above_the_natural_temperature_where_much_is_free(region, factor, natural, above):
    """λ = 100 of 1,200 dimensions: 0.85 · 100 · (1 − 200/1,200) nats of margin.

    The star's guide is the mean of the cost there and at 0.7 of the way.
    Mutations: the factor left out where chains settle, the way down's margin kept, the star's bulge left out.
    """
    confined = lambda w: 0.5 * jnp.sum(w[:200] ** 2)
    survey = fly_from_zero(confined, 1e-2, region, dimension=1_200, factor=factor).survey
    assert survey.natural_beta == pytest.approx(natural, rel=0.1)
    assert survey.beta / survey.natural_beta == pytest.approx(above, rel=0.03)


def test_a_star_whose_segments_scatter_is_walked_closer_to_the_natural_temperature(monkeypatch):
    """3.5 · 10 + 3 nats of margin: from a higher β its ridge has longer to go."""
    monkeypatch.setattr("volumejax.pilot._SCATTERED", 0.5)
    confined = lambda w: 0.5 * jnp.sum(w[:200] ** 2)
    survey = fly_from_zero(confined, 1e-2, Star(), dimension=1_200).survey
    # The guide is (1 + 0.7²)/2 of the largest cost, and β times it scatters by √λ = 10 nats.
    assert survey.unseen == pytest.approx(10.0 * (2.0 / 1.49 - 1.0), rel=0.2)
    assert survey.beta / survey.natural_beta == pytest.approx(1.38, rel=0.03)


def crest(width):
    """A cost with a crest at a fifth of the way to where most of the prior's mass is: |w| = √D. Width in log |w|."""

    def cost(w):
        way = jnp.sum(w**2) / D
        height = jnp.exp(-((0.5 * jnp.log(way / 0.04) / width) ** 2))
        return 0.02 * w[0] ** 2 + 0.3 * jnp.sum(w[1:4] ** 2) / 0.04 * height

    return cost


def test_the_guide_of_the_star_looks_between_where_it_did_and_where_its_segments_bulge():
    """Of three seeds one may see half as much again from there: four chains are looked at once."""
    pilots = [fly_from_zero(crest(0.7), 0.5, Star(), seed=seed) for seed in range(3)]
    between = [p.ensemble.guides[1] for p in pilots if len(p.ensemble.guides) == 2]
    assert len(between) >= 2 and all(0.25 < place < 0.5 for place in between)
    assert all(p.survey.unseen > 0.0 for p in pilots)


def test_the_guide_of_the_star_looks_at_both_places_where_one_between_sees_nothing():
    pilot = fly_from_zero(crest(0.2), 0.5, Star())
    assert pilot.ensemble.guides[:2] == (1.0, float(np.float32(0.7))) and len(pilot.ensemble.guides) == 3
    assert 0.1 < pilot.ensemble.guides[2] < 0.3


def test_the_guide_of_the_star_stays_where_segments_rise_to_their_ends():
    pilot = fly_from_zero(half_free, 1e-2, Star())
    assert pilot.ensemble.guides == (1.0, float(np.float32(0.7)))


def test_chains_that_have_settled_are_said_to_lag_by_two_standard_errors_at_most():
    """½a|δ|² of 1,200 free directions has a deviation of 24.5, so that 2 SE of 4 chains are 49 for each unit of x in
    steps of half an e-fold, and more by the scatter of what they settle to."""
    pilot = fly_from_zero(lambda w: half_free(w[:D]), 1e-2, Connected(), dimension=1200)
    x, lags = pilot.survey.x, pilot.survey.lags
    assert lags.shape == (len(x) - 1,)
    free = lags[(x[:-1] > 6.0) & (np.abs(np.diff(x)) > 0.3)]
    assert len(free) > 10 and 38.0 < np.mean(free) < 180.0
    assert np.all(np.isinf(fly_from_zero(half_free, 1e-2, Connected()).survey.lags)), "chains may be in different arms"
