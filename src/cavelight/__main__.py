"""`python -m cavelight`, the same as the command `cavelight`."""

from cavelight.cli.main import run

run()
