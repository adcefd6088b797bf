"""Which held-out scans stand for all: everybody once before anybody twice, in no order of names."""

import numpy as np

from ldm3d.evaluation.selection import in_turn


def test_everybody_comes_once_before_anybody_comes_twice():
    people = ["a"] * 5 + ["b"] * 2 + ["c"] * 3
    order = in_turn(people, 0)
    assert sorted(order) == list(range(10))
    rounds = [sorted(people[i] for i in part) for part in (order[:3], order[3:6], order[6:8], order[8:9], order[9:])]
    assert rounds == [["a", "b", "c"], ["a", "b", "c"], ["a", "c"], ["a"], ["a"]]
    assert in_turn(people, 0) == order != in_turn(people, 1)
    assert in_turn([], 0) == []


def test_sites_that_stand_in_names_are_drawn_as_often_as_they_have_people():
    """30 sites of 20 people with one to four visits, sorted by name: of 200 drawn, every site has some, as by chance."""
    people = [f"{site:02d}S{k:03d}" for site in range(30) for k in range(20) for _ in range(1 + (site + k) % 4)]
    first = [people[i] for i in in_turn(people, 3)[:200]]
    assert len(set(first)) == 200
    count = np.bincount([int(name[:2]) for name in first], minlength=30)
    assert count.min() >= 1 and count.std() < 4  # 2.1 expected


def test_those_with_many_scans_do_not_come_first_and_every_scan_may_be_theirs():
    people = ["many"] * 9 + list(range(9))
    orders = [in_turn(people, seed) for seed in range(200)]
    places = [[people[i] for i in order].index("many") for order in orders]
    assert 3.5 < np.mean(places) < 5.5  # of 0 to 9
    assert len({order[place] for order, place in zip(orders, places)}) == 9
