"""Where the pilot leaves its chains: the heating pass begins with them.

Mutations these catch: ends that go back up with the chains; a wall as many deviations off, however large λ is.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from volumejax.ensemble import ensemble_of
from volumejax.frames import frame_of
from volumejax.pilot import fly
from volumejax.priors import Gaussian

D = 40


@pytest.mark.parametrize("chains", [2, 4])
def test_its_ends_are_chains_at_the_end_of_the_way_down(chains):
    """Half the parameters are free there, and as wide as the prior; at the top of the way all are a hundredth of it."""
    params = jnp.zeros(D)
    ensemble = ensemble_of(lambda w: 0.5 * jnp.sum(w[: D // 2] ** 2), frame_of(Gaussian(1.0), params), cutoff=1e-2)
    pilot = fly(
        ensemble, jax.random.key(0), chains=chains, budget=2_000.0, anchor_cost=0.0, beta_factor=1.0, batch_size=None,
        mesh=None, on_progress=lambda share: None,
    )  # fmt: skip
    ends = np.asarray(pilot.ends.displacement, np.float64)
    assert ends.shape == (chains, D)
    assert pilot.survey.x[0] > 4.0 and pilot.survey.x[-1] == 0.0
    assert len(pilot.survey.slope[-1][0]) == 4, "chains whose moments it measures"
    # A chain of 20 free directions has Σδ² = 20 ± 6.3.
    assert np.all(np.abs(np.sum(ends[:, D // 2 :] ** 2, axis=1) - D // 2) < 18.0)
    assert np.all(np.sum(ends[:, : D // 2] ** 2, axis=1) < 2e-2)


@pytest.mark.parametrize(("dimension", "above"), [(40, 1.0 + 3.5 / np.sqrt(20) + 3.0 / 20), (3000, 1.25)])
def test_the_wall_is_further_off_than_the_energy_varies_or_lags(dimension, above):
    """Where all is confined λ is D/2, and the last stop's β is so many times the natural one."""
    ensemble = ensemble_of(lambda w: 0.5 * jnp.sum(w**2), frame_of(Gaussian(100.0), jnp.zeros(dimension)), cutoff=0.01)
    pilot = fly(
        ensemble, jax.random.key(0), chains=4, budget=1_000.0, anchor_cost=0.0, beta_factor=1.0, batch_size=None,
        mesh=None, on_progress=lambda share: None,
    )  # fmt: skip
    assert pilot.survey.beta / pilot.survey.natural_beta == pytest.approx(above, rel=0.1)
    assert pilot.survey.natural_beta == pytest.approx(0.5 * dimension / 0.01, rel=0.1)
