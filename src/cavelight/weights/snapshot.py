"""Whole checkpoints as Hugging Face folders: configuration, weights, tokenizer and generation settings, MTP included.

Reading is strict: every tensor is accounted for, none is skipped silently. Writing is all or nothing.
"""

import json
import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cavelight.disk import folder_beside
from cavelight.errors import UserError
from cavelight.model.transformer import Transformer
from cavelight.spec.shapes import parameters
from cavelight.weights.bias import for_export
from cavelight.weights.files import SHARD_BYTES, SWITCH, Entry, abbreviated, empty, write_safetensors
from cavelight.weights.names import HFTensor, by_parameter, check_fit, hf_tensors, is_mtp
from cavelight.weights.stored import Checkpoint
from cavelight.weights.swap import is_packed, swap

CONVERSION = "conversion.json"  # what weights.convert did; `files` lists what it took over from the source
# A checkpoint may replace a folder that holds nothing else.
CHECKPOINT_FILES = (
    CONVERSION,
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "*token*.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# Keys of a config.json that describe files which are not written: packed weights, Python code and the name it goes by.
OF_OTHER_FILES = {"quantization_config", "auto_map", "model_type"}


class SavesTokenizer(Protocol):
    """What writing needs of a tokenizer."""

    def save(self, folder: Path) -> None:
        """Write the files that Hugging Face's AutoTokenizer reads into an existing folder."""
        ...


@torch.no_grad()
def read_checkpoint(
    path: str | Path,
    dtype: torch.dtype | None = None,
    *,
    check_finite: bool = True,
    without_mtp: bool = False,
    packed: bool | None = None,
    mapped: bool | None = None,
) -> Transformer:
    """Build the model of a checkpoint folder, written by us, released, or saved with transformers.

    dtype: of the weights, and with it of what is computed; unless told, bfloat16 where the checkpoint holds nothing
    else, and float32 otherwise, which loses nothing. Routing biases are float32 in any case. check_finite: refuse NaN
    and infinity. without_mtp: leave the MTP modules out, whether or not the checkpoint holds them. packed: keep packed
    matrices as they are stored, for running only (see weights.swap); unless told, integers are kept, which is what they
    are for, and block-fp8 is unpacked, which can then be trained and saved. mapped: weights that lie in their files as
    they are wanted stay there, and processes share them (see weights.files.Safetensors.mapped); False reads them into
    memory, as does CAVELIGHT_MAPPED=0 in the environment unless told.

    Raises UserError for files that are missing or broken, for any missing, left-over or misshapen tensor, for MTP
    modules that the configuration announces and the files lack (or the reverse), and for weights that are not finite.
    """
    mapped = os.environ.get(SWITCH) != "0" if mapped is None else mapped
    checkpoint = Checkpoint(Path(path))
    config = checkpoint.config
    if without_mtp:
        config = config.replace(num_nextn_predict_layers=0)
    found = {n: shape for n, shape in checkpoint.shapes.items() if not (without_mtp and is_mtp(n, config))}
    wanted = hf_tensors(config)
    check_fit(wanted, found, config)
    wanted = tuple(tensor for tensor in wanted if tensor.name in found)
    if dtype is None:
        stored = {checkpoint.dtype(tensor.name) for tensor in wanted if tensor.dtype == "model"}
        dtype = torch.bfloat16 if stored == {torch.bfloat16} else torch.float32
    model = Transformer(config, dtype, device=torch.device("meta"))
    keep = checkpoint.format.kind == "int" if packed is None else packed
    gone = swap(model, checkpoint, wanted, mapped) if keep else set()
    dtypes = {"model": dtype, "float32": torch.float32}
    lying = _lying(checkpoint, wanted, dtypes) if mapped else {}
    ours = lying | {
        p.name: empty(p.shape, dtypes[p.dtype], p.name) for p in parameters(config) if p.name not in gone | lying.keys()
    }
    for tensor in wanted:
        if tensor.parts[0].name in gone and (checkpoint.format.kind == "int" or not check_finite):
            continue  # integers are finite if their scales are, which is checked when they are read
        if tensor.parts[0].name in lying and not tensor.is_copy:
            theirs = tensor.pack(ours)
        else:  # in the wanted dtype before it is checked: float16 makes infinities of what it cannot hold
            theirs = checkpoint.tensor(tensor.name, dtypes[tensor.dtype])
        if check_finite:
            _check_finite(tensor.name, theirs)
        if tensor.is_copy or tensor.parts[0].name not in gone | lying.keys():
            tensor.unpack(theirs, ours)
    missing, unexpected = model.load_state_dict(ours, strict=False, assign=True)
    assert not unexpected and not any(tensor.is_meta for tensor in model.state_dict().values()), missing
    return model


@torch.no_grad()
def write_checkpoint(
    model: Transformer,
    path: str | Path,
    tokenizer: SavesTokenizer | None = None,
    generation: dict[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
    *,
    shift_biases: bool | None = None,
) -> None:
    """Write a Hugging Face folder that other engines open, MTP included, and `read_checkpoint` reads to the bit.

    generation: further keys for generation_config.json. shift_biases: False writes routing biases to the bit too; else
    those of a layer that has negative ones (with True, of all layers) are moved so that engines agree, which changes
    no choice (weights/bias.py). The folder appears at once and complete; an older checkpoint
    there is replaced only then. Raises UserError when the disk is full, `path` holds anything but a checkpoint, or the
    model's weights are packed.
    """
    if is_packed(model):
        raise UserError(
            "A model with packed weights cannot be saved",
            why="it was read for running; saved it would lose what its file says of the format",
            do="copy the folder that it came from, convert that with `cavelight convert`, or load it with packed=False",
        )
    path = Path(path).resolve()
    check_replaceable(path)
    ours, dtypes = model.state_dict(), {"float32": torch.float32, "model": model.lm_head.weight.dtype}
    extra = {key: value for key, value in model.config.extra.items() if key not in OF_OTHER_FILES}
    config = model.config.replace(torch_dtype=str(dtypes["model"]).removeprefix("torch."), extra=extra)
    token_ids = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    settings = {key: token for key, token in token_ids.items() if token is not None} | (generation or {})
    tensors = {tensor.name: tensor for tensor in hf_tensors(config)}
    entries = [Entry(tensor.name, tensor.shape, dtypes[tensor.dtype]) for tensor in tensors.values()]

    def packed(name: str) -> Tensor:
        values = tensors[name].pack(ours).to(dtypes[tensors[name].dtype])
        return for_export(values, shift_biases) if tensors[name].parts[0].role == "routing_bias" else values

    with folder_beside(path) as folder:
        write_json(folder / "config.json", config.to_hf())
        write_json(folder / "generation_config.json", settings)
        write_safetensors(folder, entries, packed, shard_bytes)
        if tokenizer is not None:
            tokenizer.save(folder)


def _lying(checkpoint: Checkpoint, wanted: Sequence[HFTensor], dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Views of the parameters that lie in a file as they are wanted, a layer's experts one behind the other."""
    found = {}
    for name, tensors in by_parameter(wanted).items():
        stored, parameter = [tensor.name for tensor in tensors], tensors[0].parts[0]
        if any(map(checkpoint.is_packed, stored)) or checkpoint.dtype(stored[0]) != dtypes[parameter.dtype]:
            continue
        view = checkpoint.files.mapped(stored)
        if view is not None:
            found[name] = view.view(parameter.shape)
    return found


def _check_finite(name: str, tensor: Tensor) -> None:
    least, most = tensor.aminmax()  # NaN and infinity come through; one pass, no scratch memory
    if not (least.isfinite() and most.isfinite()):
        bad = int((~tensor.isfinite()).sum())
        raise UserError(
            f"{name} holds numbers that are not finite",
            got=f"{bad:,} of {tensor.numel():,} are NaN or infinite as {str(tensor.dtype).removeprefix('torch.')}",
            why="a single one of them spoils every output",
            do="use an earlier checkpoint, or bfloat16 where float16 is too narrow; to look at this one all the same, "
            "read it with check_finite=False",
        )


def check_replaceable(path: Path) -> None:
    """Replacing a folder deletes what is in it: only what a checkpoint consists of may go."""
    if not os.path.lexists(path):
        return
    if path.is_mount():
        raise UserError(
            f"{path} is where a disk is mounted, which cannot be replaced", do="choose a new folder inside it"
        )
    strangers = {path.name}
    if path.is_dir():
        files = {file.name for file in path.iterdir() if not file.is_dir()}
        strangers = {name for name in files if not any(fnmatch(name, known) for known in CHECKPOINT_FILES)}
        strangers -= _taken_over(path / CONVERSION) if strangers else set()
        strangers |= {file.name for file in path.iterdir()} - files
    if strangers:
        raise UserError(
            f"{path} holds something other than a checkpoint",
            got=abbreviated(sorted(strangers)),
            why="saving replaces the whole folder",
            do="choose a new folder",
        )


def _taken_over(record: Path) -> set[str]:
    """Files that a conversion copied from its source beside the weights: licences, code."""
    if not record.is_file():
        return set()
    try:
        return set(json.loads(record.read_bytes())["files"])
    except (ValueError, TypeError, KeyError):
        return set()


def write_json(file: Path, content: dict[str, Any]) -> None:
    """An object as text that people can read."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
