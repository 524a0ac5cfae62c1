import jax.numpy as jnp
import numpy as np

from cwcl_jax.losses import labels
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
