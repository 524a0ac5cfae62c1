import jax.numpy as jnp
import numpy as np

import cwcl_jax
from cwcl_jax.losses import labels
from cwcl_jax.losses.labels import exact_labels
from cwcl_jax.losses.options import LossConfig
from tests.losses import oracle


def test_sets_of_labels_are_compared_as_sets():
    rows = np.array([[1, 2, -1], [2, 1, 1], [2, 3, -1], [4, -1, -1], [-1, -1, -1], [3, 2, 1]])
    sets = labels.label_sets(jnp.asarray(rows))
    equal, overlap = oracle.label_matrices(rows)
    np.testing.assert_array_equal(labels.same_labels(sets, sets), equal)
    found = labels.label_weights(sets, sets, 0.25, jnp.dtype("float32"))
    np.testing.assert_array_equal(found, np.maximum(equal, 0.25 * overlap))
    # An empty set is like none, not even another empty one.
    assert not np.asarray(found)[4].any()


def test_ids_of_64_bits_are_told_apart():
    """1 and 2^32 + 1 have the same lower half, which is all that jax keeps."""
    ids = np.array([1, 2, 2**32 + 1, 2], np.int64)
    assert exact_labels(ids).tolist() == [0, 1, 2, 1]
    assert exact_labels(np.array([[2**40, -1], [5, 2**40]])).tolist() == [[2, -1], [1, 2]]
    small = np.array([3, -1])
    assert exact_labels(small) is small
    rows = jnp.eye(4, 8)

    def loss(ids):
        config = LossConfig(name="contrastive", duplicates="positives")
        value, _ = cwcl_jax.contrastive_loss(
            rows, rows[jnp.array([2, 1, 0, 3])], logit_scale=3.0, labels=ids, config=config
        )
        return float(value)

    assert loss(ids) == loss(np.array([1, 2, 7, 2])) != loss(np.array([1, 2, 1, 2]))
