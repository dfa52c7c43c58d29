"""Cavelight trains, runs and serves DeepSeek-V3-style language models and shows what happens inside them.

Names are looked up when first used, so `import cavelight` itself costs nothing and brings no torch.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "Engine",
    "Request",
    "Sampling",
    "Transformer",
    "generate",
    "generate_tokens",
    "load",
    "preset",
    "read_config",
    "save",
    "train",
]

if TYPE_CHECKING:
    from cavelight.api import (
        Engine,
        Request,
        Sampling,
        Transformer,
        generate,
        generate_tokens,
        load,
        preset,
        read_config,
        save,
        train,
    )


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'cavelight' has no attribute {name!r}")
    from cavelight import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
