"""How work is cut: every ray once, whatever the number of lanes, with draws that depend on nothing but key and index.

Mutations these catch: the last chunk dropped or repeated, lanes filled up with index 0, keys split by position in the
chunk; cores counted that belong to other jobs, devices asked for when JAX has begun.
"""

import os
import subprocess
import sys
import threading

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import Mesh

from volumejax import tree
from volumejax.parallel import (
    ABSENT,
    Launcher,
    cut,
    default_batch_size,
    launchers,
    local_mesh,
    local_mesh_for_both,
    num_cores,
    num_devices,
    require_threefry,
    spread,
)
from volumejax.proposals import Dense, Diagonal, Isotropic

PARAMS = {"w": jnp.zeros((2, 3)), "b": jnp.zeros(())}
FACTOR = np.linalg.cholesky(np.eye(7) + 0.3)


@pytest.fixture(autouse=True)
def _strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


def test_chunks_by_hand():
    assert cut(np.arange(5), 2).tolist() == [[0, 1], [2, 3], [4, ABSENT]]
    assert cut(np.array([3, 9]), 2).tolist() == [[3, 9]]
    assert cut(np.arange(2), 3).tolist() == [[0, 1, ABSENT]]
    assert cut(np.arange(0), 3).shape == (0, 3)


@hypothesis.given(st.integers(0, 100), st.integers(0, 70), st.integers(1, 70))
def test_every_index_is_in_exactly_one_lane(first, count, lanes):
    chunks = cut(np.arange(first, first + count), lanes)
    assert chunks.dtype == np.int32 and chunks.shape == (-(-count // lanes), lanes)
    flat = chunks.ravel()
    assert flat[:count].tolist() == list(range(first, first + count))
    assert np.all(flat[count:] == ABSENT) and len(flat) - count < lanes


def test_an_absent_lane_is_out_of_range_and_dropped():
    kept = jnp.zeros(3).at[jnp.array([1, ABSENT])].set(jnp.ones(2), mode="drop")
    assert kept.tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("proposal", [Isotropic(), Diagonal(0.7), Dense(FACTOR)], ids=lambda p: type(p).__name__)
def test_the_same_rays_in_1_7_or_64_lanes(proposal):
    key = jax.random.key(3)

    @jax.jit
    def directions(indices):
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(indices)
        return jax.vmap(lambda key: proposal.draw(key, PARAMS).direction)(keys)

    runs = []
    for lanes in (1, 7, 64):
        chunks = [directions(row) for row in cut(np.arange(20), lanes)]
        runs.append(jax.tree.map(lambda *leaves: np.concatenate(leaves)[:20], *chunks))
    # A matrix product is rounded differently for one column than for many.
    rounding = 1e-6 if isinstance(proposal, Dense) else 0.0
    for one, other in ((runs[0], runs[1]), (runs[0], runs[2])):
        for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=rounding)
    alone = tree.normal_like(jax.random.fold_in(key, 13), PARAMS)
    if isinstance(proposal, Isotropic):
        assert all(np.array_equal(a, b[13]) for a, b in zip(*map(jax.tree.leaves, (alone, runs[1])), strict=True))


def test_legacy_keys_are_accepted():
    for old in (jax.random.PRNGKey(5), np.asarray(jax.random.PRNGKey(5))):
        key = require_threefry(old)
        assert jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        assert jax.random.key_data(key).tolist() == jax.random.key_data(jax.random.key(5)).tolist()
    typed = jax.random.key(5)
    assert require_threefry(typed) is typed


def test_keys_are_checked_under_transformations():
    data = jax.jit(lambda key: jax.random.key_data(require_threefry(key)))
    assert data(jax.random.key(1)).tolist() == data(jax.random.PRNGKey(1)).tolist()
    keys = jax.random.split(jax.random.key(0), 3)
    assert jax.vmap(data)(keys).shape == (3, 2)
    with pytest.raises(ValueError, match="threefry"):
        data(jax.random.key(1, impl="rbg"))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (jax.random.key(0, impl="rbg"), r"threefry key, whose draws do not depend on vmap: jax.random.key\(0"),
        (jax.random.key(0, impl="unsafe_rbg"), "threefry"),
        (jax.random.split(jax.random.key(0), 3), r"single key, got keys of shape \(3,\); vmap over them"),
        (jax.random.split(jax.random.PRNGKey(0), 3), r"got uint32 of shape \(3, 2\)"),
        (jnp.zeros(2), r"got float32 of shape \(2,\)"),
        (0, "key must be a JAX random key such as .*, got int"),
        (None, "got NoneType"),
    ],
    ids=["rbg", "unsafe rbg", "several", "several legacy", "floats", "seed", "none"],
)
def test_other_keys_are_refused(key, message):
    with pytest.raises(ValueError, match=message):
        require_threefry(key)


def test_automatic_batches_fit_the_memory():
    assert default_batch_size(1) > 1
    assert default_batch_size(3 * 10**9) == 1
    sizes = [default_batch_size(10**k) for k in range(11)]
    assert sizes == sorted(sizes, reverse=True)
    assert all(isinstance(size, int) for size in sizes)


@pytest.mark.parametrize(("lanes", "count"), [(12, 6), (7, 7), (11, 1), (3, 3), (1, 1)])
def test_a_local_mesh_takes_devices_that_divide_the_lanes(monkeypatch, lanes, count):
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices() * 8)
    mesh = local_mesh(lanes)
    assert num_devices(mesh) == count and (mesh is None) == (count == 1)


@pytest.mark.parametrize(("lanes", "count"), [(1, 2), (2, 4), (3, 6), (4, 8), (5, 5), (8, 8), (9, 3)])
def test_a_local_mesh_has_room_for_both_where_devices_do(monkeypatch, lanes, count):
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices() * 8)
    assert num_devices(local_mesh_for_both(lanes)) == count


class TestLauncher:
    """Mutations: the precision of the caller's context lost in the thread, one thread for all."""

    @pytest.mark.parametrize("own_thread", [True, False])
    def test_a_launch_knows_the_callers_precision(self, own_thread):
        def seen():
            return jnp.ones(1).dtype, jax.config.jax_default_matmul_precision, threading.get_ident()

        with jax.enable_x64(True), jax.default_matmul_precision("highest"):
            launcher = Launcher(None, own_thread=own_thread)
            dtype, precision, thread = launcher.launch(seen).result()
        assert dtype == np.float64 and precision == "highest"
        assert (thread != threading.get_ident()) == own_thread
        assert launcher.launch(lambda x, y: x + y, 1, 2).result() == 3
        plain = Launcher(None, own_thread=own_thread).launch(seen).result()
        assert plain[:2] == (np.float32, None)

    def test_each_has_its_own_thread(self):
        one, two = (Launcher(None, own_thread=True) for _ in range(2))
        threads = [launcher.launch(threading.get_ident).result() for launcher in (one, two, one)]
        assert threads[0] == threads[2] != threads[1]

    @pytest.mark.parametrize("own_thread", [True, False])
    def test_errors_reach_whoever_waits(self, own_thread):
        def fail():
            raise ValueError("no such rung")

        with pytest.raises(ValueError, match="no such rung"):
            Launcher(None, own_thread=own_thread).launch(fail).result()

    @pytest.mark.parametrize(("lanes", "sizes"), [(1, [3, 3]), (3, [3, 3]), (4, [7]), (7, [7])])
    def test_a_mesh_is_halved_where_there_is_room(self, lanes, sizes):
        devices = np.array(jax.devices() * 7)
        meshes = [launcher.mesh for launcher in launchers(Mesh(devices.reshape(1, 7), ("model", "rays")), lanes)]
        assert [mesh.shape for mesh in meshes] == [{"model": 1, "rays": size} for size in sizes]

    def test_without_a_mesh_there_is_one(self):
        (alone,) = launchers(None, 1)
        assert alone.mesh is None


def test_a_mesh_needs_an_axis_of_rays():
    mesh = jax.make_mesh((1, 1), ("rays", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    assert num_devices(None) == num_devices(mesh) == 1
    assert np.array_equal(spread(jnp.arange(4), mesh), np.arange(4))
    # The axes that JAX makes unless asked otherwise are explicit ones.
    assert np.array_equal(jax.jit(lambda i: spread(i, jax.make_mesh((1,), ("rays",))))(jnp.arange(4)), np.arange(4))
    other = jax.make_mesh((1,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(
        ValueError, match=r"mesh has the axes \('batch',\); name the one that rays are spread over 'rays'"
    ):
        num_devices(other)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system does not bind processes to cores")
def test_cores_of_other_jobs_do_not_count():
    mine = os.sched_getaffinity(0)
    assert num_cores() == len(mine)
    try:
        os.sched_setaffinity(0, {min(mine)})
        assert num_cores() == 1
    finally:
        os.sched_setaffinity(0, mine)


@pytest.mark.parametrize(("environment", "devices"), [({}, 3), ({"JAX_NUM_CPU_DEVICES": "2"}, 2)])
def test_each_core_is_a_device_unless_the_environment_says_otherwise(environment, devices):
    program = """
import jax
from volumejax import config, parallel, records, report, terminal
parallel.num_cores = lambda: 3
parallel.use_every_core()
print(len(jax.devices()))
"""
    unset = {k: v for k, v in os.environ.items() if k not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")}
    made = subprocess.run(
        [sys.executable, "-c", program], env=unset | environment, capture_output=True, text=True, check=True
    )
    assert made.stdout.split() == [str(devices)]
