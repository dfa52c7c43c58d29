"""The command line: thin commands over the library, a rich screen for people, `--json` for machines."""
