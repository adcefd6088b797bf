"""Categories read off features, where it is known who is who."""

import numpy as np
import pytest

from ldm3d.errors import InputError
from ldm3d.rulers.categories import Reader, count_hits


def volumes(n: int, seed: int, apart: float):
    """Three categories whose means lie `apart` deviations from each other's, one of them rare."""
    rng = np.random.default_rng(seed)
    which = rng.choice(3, n, p=(0.5, 0.4, 0.1))
    return rng.standard_normal((n, 5)) + apart * np.eye(5)[which], ["abc"[i] for i in which]


def test_reader_tells_what_can_be_told():
    features, values = volumes(200, 0, 8)
    reader = Reader(features, values, range(200))
    tested, asked = volumes(100, 1, 8)
    assert np.mean([a == b for a, b in zip(reader(tested), asked)]) > 0.97


def test_reader_says_the_commonest_where_nothing_can_be_told():
    features, values = volumes(200, 2, 0)
    said = Reader(features, values, range(200))(volumes(100, 3, 0)[0])
    assert max(said.count(one) for one in "abc") > 60 and said.count("c") == 0


def test_hits_are_counted_by_category_with_their_interval():
    asked = ["F"] * 60 + ["M"] * 40
    said = ["F"] * 54 + ["M"] * 6 + ["M"] * 20 + ["F"] * 20
    found = count_hits("sex", "real", said, asked, range(100))
    assert (found.n, found.share, found.commonest) == (100, pytest.approx(0.74), pytest.approx(0.6))
    assert found.by_category == {"F": pytest.approx(0.9), "M": pytest.approx(0.5)}
    assert found.interval == pytest.approx((0.74 - 1.96 * 0.0439, 0.74 + 1.96 * 0.0439), abs=0.012)


def test_a_reader_that_learnt_from_reconstructions_too_is_not_misled_by_smoothness():
    """A decoder moves all volumes to where, on originals, one category lies: a reader of originals calls all of them that."""
    features, values = volumes(300, 4, 6)
    tested, asked = volumes(200, 5, 6)
    moved = 6 * np.eye(5)[0]  # towards "a"
    alone = Reader(features, values, range(300))
    both = Reader(np.concatenate([features, features + moved]), values * 2, [*range(300)] * 2)

    def right(reader, shown):
        return np.mean([a == b for a, b in zip(reader(shown), asked)])

    assert right(alone, tested + moved) < 0.85 < 0.93 < right(both, tested + moved)
    assert right(both, tested) > 0.93


def test_one_category_is_nothing_to_tell():
    with pytest.raises(InputError, match="vary"):
        Reader(np.random.default_rng(0).standard_normal((30, 4)), ["F"] * 30, range(30))
