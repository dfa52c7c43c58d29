"""The checkpoint under examination, as far as it can be read: what every check is given."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cavelight.doctor.fit import Fit, fit
from cavelight.errors import UserError
from cavelight.spec.config import ModelConfig
from cavelight.spec.formats import PLAIN, Format
from cavelight.weights.headers import Entry, read_headers
from cavelight.weights.names import HFTensor, hf_tensors

MOST_MATRICES = 10**6  # experts of all layers


@dataclass(frozen=True)
class Case:
    """A folder and what of it can be read; None where it cannot be, and `refusals` then say why.

    `raw` is config.json as it stands, `config` what it means, `format` how matrices are stored, `entries` what the
    headers say of each stored tensor.
    """

    folder: Path
    raw: Mapping[str, Any]
    config: ModelConfig | None
    format: Format | None
    entries: Mapping[str, Entry] | None
    refusals: Mapping[str, UserError]  # "config", "format", "files"

    @cached_property
    def wanted(self) -> Mapping[str, HFTensor]:
        """The tensors that the configuration asks for, by name; none where it cannot be read."""
        return {} if self.config is None else {tensor.name: tensor for tensor in hf_tensors(self.config)}

    @cached_property
    def fit(self) -> Fit:
        """What is stored against what is wanted; nothing fits where either cannot be read."""
        return fit(self.wanted.values(), self.entries or {}, self.format or PLAIN)


def open_case(folder: Path) -> Case:
    """Read configuration and headers. Raises UserError where `folder` is no checkpoint at all: neither is there."""
    if not folder.is_dir():
        raise UserError(
            f"There is no folder {folder}",
            why="a checkpoint is a folder with config.json and *.safetensors",
            do="give the path of one, or owner/name of one on the Hugging Face hub",
        )
    if not (folder / "config.json").exists() and not any(folder.glob("*.safetensors*")):
        raise UserError(
            f"{folder} is no checkpoint",
            got="neither config.json nor *.safetensors",
            do="give the folder that holds them",
        )
    refusals: dict[str, UserError] = {}
    raw: Mapping[str, Any] = {}
    config, form, entries = None, None, None
    try:
        raw = _raw(folder)
        config = _of_a_size(ModelConfig.read(folder))
    except UserError as refusal:
        refusals["config"] = refusal
    try:
        form = Format.of(_section(raw, "quantization_config"))
    except UserError as refusal:
        refusals["format"] = refusal
    try:
        entries = read_headers(folder)
    except UserError as refusal:
        refusals["files"] = refusal
    return Case(folder, raw, config, form, entries, refusals)


def _raw(folder: Path) -> Mapping[str, Any]:
    """config.json as an object; an empty one where it is none, since ModelConfig.read then says what is wrong."""
    try:
        raw = json.loads((folder / "config.json").read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return raw if isinstance(raw, dict) else {}


def _of_a_size(config: ModelConfig) -> ModelConfig:
    """The configuration, unless listing its tensors would take all memory: a full-size V3 has 46,183."""
    count = config.num_layers_with_mtp * (config.n_routed_experts or 1)
    if count > MOST_MATRICES:
        raise UserError(
            "config.json describes a model larger than any",
            got=f"{config.num_layers_with_mtp:.6g} layers of {config.n_routed_experts or 1:.6g} experts",
            do="put back the original config.json",
        )
    return config


def _section(raw: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    section = raw.get(key)
    if section is None or isinstance(section, Mapping):
        return section
    raise UserError(f"{key} in config.json is no object", got=repr(section), do="put back the original config.json")
