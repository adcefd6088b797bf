"""The order in which held-out scans are used if not all are: for requests, likelihoods, pairs and pictures."""

from collections import Counter
from collections.abc import Hashable, Sequence

import torch

from ldm3d.randomness import generator


def in_turn(people: Sequence[Hashable], seed: int) -> list[int]:
    """All scans in a random order in which every person occurs once before any person occurs twice.

    The names of people sort by site, and one person may have many visits: the first scans of a table are often of one scanner
    and of few people. So people are shuffled and one scan of each is drawn, then a second one of each, and so on.

    Args:
        people: the person in each of N scans.
        seed: the order follows from it and the number of scans alone.

    Returns:
        Numbers of scans, each once, (N,).
    """
    scans = torch.randperm(len(people), generator=generator("held-out scans", seed)).tolist()
    persons = dict.fromkeys(people)
    order = torch.randperm(len(persons), generator=generator("held-out people", seed)).tolist()
    rank = dict(zip(persons, order))  # independent of the scans, or people with many scans would tend to come first
    turn, drawn = {}, Counter()
    for scan in scans:
        turn[scan] = drawn[people[scan]]
        drawn[people[scan]] += 1
    return sorted(scans, key=lambda scan: (turn[scan], rank[people[scan]]))
