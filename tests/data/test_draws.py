import numpy as np

from cwcl_jax.data.draws import Draws, hash_integers, mix


def test_the_stream_is_splitmix64():
    # First outputs of the published generator for the state 1234567.
    draws = Draws(0)
    draws.state = 1234567
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [draws.below(1 << 64) for _ in range(3)] == expected


def test_values_do_not_change_between_releases():
    draws = Draws(1, 2, 3)
    assert [draws.below(1000) for _ in range(5)] == [484, 206, 418, 396, 543]


def test_the_order_of_the_key_matters():
    assert hash_integers(1, 2) != hash_integers(2, 1)
    assert hash_integers(0) != hash_integers(0, 0)


def test_mix_is_a_bijection_on_a_sample():
    assert len({mix(value) for value in range(10_000)}) == 10_000


def test_choices_are_equally_likely():
    draws = Draws(5)
    counts = np.bincount([draws.below(7) for _ in range(14_000)], minlength=7)
    # Five standard deviations of a count of 2000.
    assert np.abs(counts - 2000).max() < 5 * np.sqrt(2000)


def test_uniform_and_chance_have_the_asked_means():
    draws = Draws(6)
    assert abs(np.mean([draws.uniform(2, 4) for _ in range(4000)]) - 3) < 0.05
    assert abs(np.mean([draws.chance(0.2) for _ in range(4000)]) - 0.2) < 0.03
    assert not any(draws.chance(0.0) for _ in range(100))
    assert all(draws.chance(1.0) for _ in range(100))
