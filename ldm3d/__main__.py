"""`python -m ldm3d` is `ldm3d`: for launchers that start modules, such as torchrun."""

from ldm3d.cli import main

if __name__ == "__main__":  # worker processes import this module, too
    main()
