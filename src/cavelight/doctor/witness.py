"""transformers' model of a checkpoint, opened as it opens it: the other side of the comparison.

transformers is an extra that only this needs, so it is imported here alone, and when asked for. It counts as untyped.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from cavelight.errors import UserError
from cavelight.spec.config import ModelConfig

OLDEST = (5, 20)  # whose layers have the parts that are watched
INSTALL = "pip install 'transformers>=5.20'"
ATTENTION = "cavelight_doctor"
# What it raises about files and configurations that it does not like; its own text says more than the kind.
REFUSALS = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError, StrictDataclassError)


@dataclass(frozen=True)
class Witness:
    """The model and, where transformers reads them, its MTP modules; else `without_mtp` says why not.

    `missing` are the tensors that it did not find and filled at random, `unread` those that it did not take.
    """

    model: Any
    predictors: Any = None
    without_mtp: str = ""
    missing: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    def attend_by(self, attention: Callable[..., Any]) -> None:
        """Let all attention go by way of this function, which is called as transformers' own are."""
        import_module("transformers").AttentionInterface.register(ATTENTION, attention)
        masks = import_module("transformers.masking_utils")
        masks.AttentionMaskInterface.register(ATTENTION, masks.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        for model in (self.model, self.predictors):
            if model is not None:
                model.set_attn_implementation(ATTENTION)


def own_attention() -> Callable[..., Any]:
    """What transformers computes attention with unless told otherwise."""
    attention: Callable[..., Any] = import_module("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS["sdpa"]
    return attention


def version() -> str:
    return str(import_module("transformers").__version__)


def open_transformers(folder: Path, config: ModelConfig) -> Witness:
    """transformers' own reading of a checkpoint folder, its config.json included, in float32, MTP modules as well.

    Raises UserError where it refuses the checkpoint.
    """
    trunk = open_trunk(folder, config, torch.float32)
    predictors, why = _open_predictors(trunk.model, config)
    return replace(trunk, predictors=predictors, without_mtp=why)


def open_trunk(folder: Path, config: ModelConfig, dtype: torch.dtype) -> Witness:
    """The same in any type of number, without the MTP modules."""
    name = "DeepseekV3ForCausalLM" if config.model_type == "deepseek_v3" else "DeepseekV2ForCausalLM"
    kind = getattr(import_module("transformers"), name)
    try:
        model, info = kind.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except REFUSALS as error:
        raise UserError(
            f"transformers cannot open {folder}",
            got=_in_short(error),
            do="if its weights are packed, convert them (`cavelight convert --to hf`) and compare the result",
        ) from error
    sizes = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    missing = tuple(sorted(name for name in info["missing_keys"] if sizes.get(name, 1)))  # no shared experts: size 0
    return Witness(model.eval(), missing=missing, unread=tuple(sorted(info["unexpected_keys"])))


def _open_predictors(model: Any, config: ModelConfig) -> tuple[Any, str]:
    """The MTP modules, or None and why not."""
    if not config.num_nextn_predict_layers:
        return None, ""
    if config.model_type != "deepseek_v3":
        return None, f"transformers reads no MTP modules of {config.model_type}"
    # By default it knows V3's layer 61 alone as an MTP layer.
    layers = "|".join(map(str, range(config.num_hidden_layers, config.num_layers_with_mtp)))
    model._keys_to_ignore_on_load_unexpected = {rf"model\.layers\.({layers})\."}
    try:
        return import_module("transformers.modeling_layers").MtpModel.from_pretrained(model).eval(), ""
    except REFUSALS as error:
        return None, f"transformers cannot read them ({_in_short(error)})"


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Neither progress bars nor warnings of its own. UserError where it is missing or too old."""
    if find_spec("transformers") is None:
        raise UserError("transformers is not installed", why="--against compares with it", do=INSTALL)
    if tuple(map(int, version().split(".")[:2])) < OLDEST:
        raise UserError("transformers is too old to be compared with", got=version(), do=INSTALL)
    logging = import_module("transformers.utils.logging")
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
