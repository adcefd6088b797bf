"""Which held-out scans stand for all where not all are used: to generate for, to score, to pair, to show."""

from collections import Counter
from collections.abc import Hashable, Sequence

import torch

from ldm3d.randomness import generator


def in_turn(people: Sequence[Hashable], seed: int) -> list[int]:
    """All scans in a random order in which everybody comes once before anybody comes twice.

    The names of people sort by site, and one person may have many visits: the first scans of a table are of one
    scanner and of few people. So people are shuffled and one scan of each is drawn, then a second one in the same manner, and
    so on.

    Args:
        people: whom each of N scans shows.
        seed: the order follows from it and the number of scans alone.

    Returns:
        Numbers of scans, each once, (N,).
    """
    scans = torch.randperm(len(people), generator=generator("held-out scans", seed)).tolist()
    persons = dict.fromkeys(people)
    order = torch.randperm(len(persons), generator=generator("held-out people", seed)).tolist()
    place = dict(zip(persons, order))  # of their own, or those with many scans would tend to come first
    turn, seen = {}, Counter()
    for scan in scans:
        turn[scan] = seen[people[scan]]
        seen[people[scan]] += 1
    return sorted(scans, key=lambda scan: (turn[scan], place[people[scan]]))
