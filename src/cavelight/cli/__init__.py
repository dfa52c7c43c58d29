"""The command line: thin commands over the library, a rich screen for people, `--json` for machines."""

import os

# pydantic would search every installed package for plugins of its own: a tenth of the time that `plan` takes.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
