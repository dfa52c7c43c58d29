"""How much memory the machine has: what cannot fit is refused in time, before the system ends the process."""

import os

from cavelight.errors import UserError


def machine_memory() -> int:
    """Bytes of physical memory, whoever uses them."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_memory(needed: int, what: str, do: str) -> None:
    """Raises UserError if the machine has fewer than `needed` bytes, which are for `what`."""
    memory = machine_memory()
    if needed > memory:
        raise UserError(
            f"Memory is too small to hold {what}", got=f"{memory / 1e9:,.0f} GB for {needed / 1e9:,.0f} GB", do=do
        )
