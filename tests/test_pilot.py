"""Where the pilot leaves its chains: the heating pass begins with them.

Mutation this catches: ends that go back up with the chains.
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
