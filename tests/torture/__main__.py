"""Kill, fill, damage and fuzz everything, and print one table of what was lost: nothing may be.

    python -m torture [kills|fuzzing|generation|disk ...] [--write FILE]

from the folder `tests`, or `make torture` for all of it. --write puts the table between the two marks of a Markdown file.
"""

import argparse
import os
import platform
import sys
import time
from pathlib import Path

from torture import disk, fuzzing, generation, kills
from torture.outcome import Outcome

PARTS = {"kills": kills, "generation": generation, "disk": disk, "fuzzing": fuzzing}
MARKS = "<!-- torture: begin -->\n", "<!-- torture: end -->\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all, if none is given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):  # choices= would refuse that none is given
        parser.error(f"no such part: {', '.join(sorted(unknown))}; give some of {', '.join(PARTS)}")
    started, outcomes = time.monotonic(), []
    for name in arguments.parts or PARTS:
        for outcome in PARTS[name].run(seed=arguments.seed):
            outcomes.append(outcome)
            print(f"{outcome.what}: {outcome.lost} of {outcome.tried} lost {outcome.detail}", flush=True)
    text = table(outcomes, time.monotonic() - started, arguments.seed)
    print(f"\n{text}")
    if arguments.write:
        page = arguments.write.read_text()
        head, tail = page.split(MARKS[0])[0], page.split(MARKS[1])[1]
        arguments.write.write_text(head + MARKS[0] + text + MARKS[1] + tail)
    sys.exit(any(outcome.lost for outcome in outcomes))


def table(outcomes: list[Outcome], seconds: float, seed: int) -> str:
    """The outcomes in Markdown."""
    rows = [f"| {o.what} | {o.tried} | {o.lost} | {o.seconds:.0f} | {o.detail} |" for o in outcomes]
    tried, lost = sum(o.tried for o in outcomes), sum(o.lost for o in outcomes)
    where = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, seed {seed}"
    rows.append(f"| **all**, {where} | **{tried}** | **{lost}** | **{seconds:.0f}** | |")
    head = "| what | tried | lost | seconds | |\n|---|---|---|---|---|\n"
    return head + "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
