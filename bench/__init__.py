"""Scripts behind the figures of README and docs; `python -m bench.NAME --help` explains each."""
