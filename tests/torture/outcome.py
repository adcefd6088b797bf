"""What one part of the torture has found."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """A row of the table.

    Args:
        what: was tried.
        tried: how often.
        lost: of those, how many lost something, or ended in another way than they should.
        seconds: it all took.
        detail: what was lost; what else is worth knowing.
    """

    what: str
    tried: int
    lost: int
    seconds: float
    detail: str = ""
