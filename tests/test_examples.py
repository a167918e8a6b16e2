"""Examples: every one is seen exactly once, whatever the batch size; bad data is refused at the door."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from volumejax.examples import check_logits, make_examples, micro_batch, num_batches


@hypothesis.settings(max_examples=10, deadline=None)
@hypothesis.given(number=st.integers(1, 9), batch_size=st.integers(1, 9))
def test_batches_hold_every_example_once(number, batch_size):
    batch_size = min(batch_size, number)
    examples = make_examples({"x": np.arange(number), "y": np.arange(2 * number).reshape(number, 2)})
    seen = []
    for index in range(num_batches(examples, batch_size)):
        batch, fresh = micro_batch(examples, index, batch_size)
        assert len(batch) == batch_size
        np.testing.assert_array_equal(batch.inputs["y"][:, 0], 2 * batch.inputs["x"])
        seen += np.asarray(batch.inputs["x"])[np.asarray(fresh)].tolist()
    assert seen == list(range(number))


def test_data_is_converted():
    examples = make_examples(np.zeros((3, 2)), labels=np.array([0, 1, 2], np.uint8), mask=[1, 0, 2])
    assert len(examples) == 3 and examples.inputs.dtype == jnp.float32 and examples.labels.dtype == jnp.int32
    assert examples.mask.tolist() == [True, False, True]


def test_an_empty_mask_is_not_looked_for_under_jit():
    assert jax.jit(lambda mask: make_examples(jnp.ones(3), mask=mask).mask)(jnp.zeros(3, int)).tolist() == [False] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": []}, "common leading axis"),
        ({"inputs": [np.ones(3), np.float32(1.0)]}, "common leading axis"),
        ({"inputs": [np.ones(3), np.ones(4)]}, "common leading axis"),
        ({"inputs": np.ones((0, 2))}, "no examples"),
        ({"inputs": np.ones(3), "labels": np.ones(3)}, "labels must be integers"),
        ({"inputs": np.ones(3), "labels": np.ones(4, int)}, "labels have shape"),
        ({"inputs": np.ones(3), "mask": np.ones(3)}, "mask must be boolean"),
        ({"inputs": np.ones(3), "mask": np.ones(4, int)}, "mask has shape"),
        ({"inputs": np.ones(3), "mask": np.zeros(3, int)}, "no position"),
    ],
)
def test_bad_data_is_a_value_error(options, message):
    with pytest.raises(ValueError, match=message):
        make_examples(**options)


def test_logits_must_fit_labels_and_mask():
    logits = jax.ShapeDtypeStruct((3, 4, 5), jnp.float32)
    full = np.ones((3, 4), int)
    assert check_logits(logits, make_examples(np.ones(3), labels=full, mask=full)) == (3, 4, 5)
    for name in ("labels", "mask"):
        with pytest.raises(ValueError, match=f"{name} must have the shape of the logits"):
            check_logits(logits, make_examples(np.ones(3), **{name: full[:, 0]}))
