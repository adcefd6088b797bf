"""How long 1,000 toy brains of 40x48x40 take, as a BIDS dataset on disk, with as many processes as there are cores."""

import tempfile
import time
from pathlib import Path

from protocol import write

from ldm3d.data.phantom_dataset import write_dataset


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        write_dataset(Path(folder) / "data", subjects=1000, shape=(40, 48, 40))
        seconds = time.perf_counter() - start
    print(f"1000 phantoms in {seconds:.1f} s")
    print(write("phantoms", [{"subjects": 1000, "shape": [40, 48, 40], "seconds": seconds}]))


if __name__ == "__main__":
    main()
