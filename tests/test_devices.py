"""Rays over eight devices: the same rays and the same weights as on one.

The tests marked `devices` run in a process of their own, since the number of simulated devices is fixed when
JAX starts.
"""

import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import volumejax as vj
from volumejax.parallel import num_devices, spread

COUNT = 8
ROOT = pathlib.Path(__file__).parent.parent
NUM_RAYS = 21
PARAMS = {"w": jnp.linspace(-0.5, 0.5, 16).reshape(8, 2), "b": jnp.zeros(8)}
PROPOSAL = vj.Diagonal({"w": 0.5, "b": 1.0})

on_devices = [
    pytest.mark.devices,
    pytest.mark.skipif(jax.device_count() < COUNT, reason="one device; test_on_eight_simulated_devices runs this"),
]


def cost(params):
    w = params["w"] - jnp.linspace(-0.5, 0.5, 16).reshape(8, 2)
    return 0.5 * jnp.sum(w * w) + 0.05 * jnp.sum(params["b"] ** 2) + 0.1 * jnp.sum(params["b"] ** 4)


def measure(params, mesh=None):
    """21 rays, which no number of devices but 1 divides."""
    return vj.ray_volume(
        jax.random.key(3), cost, params, vj.Gaussian(1.0),
        cutoff=0.02, proposal=PROPOSAL, num_rays=NUM_RAYS, batch_size=2, audit_fraction=0.25, mesh=mesh,
    )  # fmt: skip


def make_mesh(shape, names):
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))


def assert_same(estimate, other):
    """Sums over parameters and rays may be rounded in another order; nothing else may differ."""
    np.testing.assert_allclose(estimate.trace.log_weight, other.trace.log_weight, rtol=0, atol=1e-3)
    np.testing.assert_allclose(estimate.trace.radius, other.trace.radius, rtol=1e-4)
    assert np.array_equal(estimate.trace.status, other.trace.status)
    assert np.array_equal(estimate.trace.audited, other.trace.audited)
    assert abs(float(estimate.log_mass) - float(other.log_mass)) < 1e-3


def test_on_eight_simulated_devices():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "devices", "tests/test_devices.py"]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={COUNT}"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout) and "skipped" not in done.stdout


class TestEightDevices:
    pytestmark = on_devices

    def test_directions_are_bit_identical(self):
        mesh = make_mesh((COUNT,), ("rays",))
        assert num_devices(mesh) == COUNT

        def directions(indices, mesh=None):
            keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(3), i))(spread(indices, mesh))
            return jax.vmap(lambda key: PROPOSAL.draw(key, PARAMS).direction)(keys)

        here = jax.jit(directions)(jnp.arange(16))
        there = jax.jit(lambda indices: directions(indices, mesh))(jnp.arange(16))
        for one, many in zip(*map(jax.tree.leaves, (here, there)), strict=True):
            assert len(many.sharding.device_set) == COUNT and many.addressable_shards[0].data.shape[0] == 2
            assert np.array_equal(one, many)

    def test_a_number_of_rays_that_the_devices_do_not_divide(self):
        estimate = measure(PARAMS, make_mesh((COUNT,), ("rays",)))
        assert estimate.trace.log_weight.shape == (NUM_RAYS,)
        assert_same(estimate, measure(PARAMS))

    def test_parameters_spread_over_a_second_axis(self):
        mesh = make_mesh((2, 4), ("rays", "model"))
        spread_out = jax.device_put(PARAMS, NamedSharding(mesh, PartitionSpec("model")))
        assert_same(measure(spread_out, mesh), measure(PARAMS))

    @pytest.mark.parametrize("optimizer", [optax.adam(0.1), optax.adafactor(0.1, min_dim_size_to_factor=2)])
    def test_moments_of_spread_parameters(self, optimizer):
        def moments(params):
            _, state = optimizer.update(params, optimizer.init(params), params)
            return vj.second_moments(state, params)

        mesh = make_mesh((2, 4), ("rays", "model"))
        there = moments(jax.device_put(PARAMS, NamedSharding(mesh, PartitionSpec("model"))))
        assert all(len(leaf.sharding.device_set) == COUNT for leaf in jax.tree.leaves(there))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), there, moments(PARAMS))

    def test_chains_are_spread_and_say_the_same(self):
        def measure_chains(mesh=None):
            return vj.tether_volume(
                jax.random.key(3), cost, PARAMS, vj.Gaussian(1.0),
                cutoff=0.02, num_chains=COUNT, effort=0.005, decades=0.5, mesh=mesh,
            )  # fmt: skip

        mesh = jax.make_mesh((COUNT,), ("rays",))
        many, one = measure_chains(mesh), measure_chains()
        # A rounding error may turn a decision of a chain, and then the two are independent.
        assert abs(many.log_mass - one.log_mass) <= 4.0 * np.hypot(many.std_error, one.std_error)
        indices = jnp.arange(COUNT, dtype=jnp.int32)
        assert len(jax.jit(lambda i: spread(i, mesh))(indices).sharding.device_set) == COUNT

    def test_one_program_serves_the_pilot_and_both_passes(self, caplog):
        """Though the pilot has more chains than a pass, and the heating pass begins with some of them."""
        mesh = Mesh(np.array(jax.devices()[:2]), ("rays",))
        with jax.log_compiles():
            vj.tether_volume(
                jax.random.key(3), cost, PARAMS, vj.Gaussian(1.0),
                cutoff=0.02, num_chains=2, effort=0.005, decades=0.0, mesh=mesh,
            )  # fmt: skip
        compiled = [record.getMessage().split() for record in caplog.records]
        assert sum(words[:2] == ["Compiling", "jit(_travel)"] for words in compiled) == 1

    @pytest.mark.parametrize(("devices", "chains"), [(2, 1), (8, 3)])
    def test_passes_side_by_side_say_the_same(self, caplog, devices, chains):
        """Each on half of the devices, with a program of its own; three chains do not fill four devices."""

        def measure_chains(chains, mesh=None):
            return vj.tether_volume(
                jax.random.key(3), cost, PARAMS, vj.Gaussian(1.0),
                cutoff=0.02, num_chains=chains, effort=0.04, decades=0.0, mesh=mesh,
            )  # fmt: skip

        # A context would not reach the threads that launch them.
        jax.config.update("jax_log_compiles", True)
        try:
            many = measure_chains(chains, Mesh(np.array(jax.devices()[:devices]), ("rays",)))
        finally:
            jax.config.update("jax_log_compiles", False)
        compiled = [record.getMessage() for record in caplog.records]
        assert sum(text.startswith("Finished XLA compilation of jit(_travel)") for text in compiled) == 2
        filled = -(-chains // (devices // 2)) * (devices // 2)
        assert many.trace.num_chains == filled
        one = measure_chains(filled)
        assert many.kind == vj.Kind.ESTIMATE
        assert abs(many.log_mass - one.log_mass) <= 4.0 * np.hypot(many.std_error, one.std_error)

    def test_islands_are_spread_and_say_the_same(self):
        def measure_islands(mesh=None):
            return vj.temper_volume(
                jax.random.key(3), cost, vj.Gaussian(1.0), PARAMS,
                cutoff=0.5, num_particles=40, num_islands=10, effort=0.3, mesh=mesh,
            )  # fmt: skip

        many, one = measure_islands(make_mesh((COUNT,), ("rays",))), measure_islands()
        assert len(many.trace.log_weights) == 10, "which eight devices do not divide"
        assert abs(many.log_mass - one.log_mass) <= 4.0 * np.hypot(many.std_error, one.std_error)
        np.testing.assert_allclose(many.trace.betas[:4], one.trace.betas[:4], rtol=1e-3)
