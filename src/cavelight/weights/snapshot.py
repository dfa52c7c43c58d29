"""Whole checkpoints as Hugging Face folders: configuration, weights, tokenizer and generation settings, MTP included.

Reading is strict: every tensor is accounted for, none is skipped silently. Writing is all or nothing.
"""

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cavelight.disk import folder_beside
from cavelight.errors import UserError
from cavelight.model.transformer import Transformer
from cavelight.spec.config import ModelConfig
from cavelight.spec.shapes import parameters
from cavelight.weights.files import SHARD_BYTES, Entry, Safetensors, abbreviated, write_safetensors
from cavelight.weights.names import check_fit, hf_tensors, is_mtp

# A checkpoint may replace a folder that holds nothing else.
CHECKPOINT_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "*token*.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# Keys of a config.json that describe files which are not written: packed weights, Python code.
OF_OTHER_FILES = {"quantization_config", "auto_map"}


class SavesTokenizer(Protocol):
    """What writing needs of a tokenizer."""

    def save(self, folder: Path) -> None:
        """Write the files that Hugging Face's AutoTokenizer reads into an existing folder."""
        ...


@torch.no_grad()
def read_checkpoint(
    path: str | Path, dtype: torch.dtype | None = None, *, check_finite: bool = True, without_mtp: bool = False
) -> Transformer:
    """Build the model of a checkpoint folder, written by us, released, or saved with transformers.

    dtype: of the weights; unless told, bfloat16 where the checkpoint holds nothing else, and float32 otherwise, which
    loses nothing. Routing biases are float32 in any case. check_finite: refuse NaN and infinity. without_mtp: leave
    the MTP modules out, whether or not the checkpoint holds them.

    Raises UserError for files that are missing or broken, for any missing, left-over or misshapen tensor, for MTP
    modules that the configuration announces and the files lack (or the reverse), and for weights that are not finite.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(
            f"There is no folder {folder}",
            why="a checkpoint is a folder with config.json and *.safetensors",
            do="give the path of one; a model on the Hugging Face hub has to be downloaded first",
        )
    config = ModelConfig.read(folder)
    if without_mtp:
        config = config.replace(num_nextn_predict_layers=0)
    files = Safetensors(folder)
    wanted = hf_tensors(config)
    found = {name: entry for name, entry in files.entries.items() if not (without_mtp and is_mtp(name, config))}
    check_fit(wanted, {name: entry.shape for name, entry in found.items()}, config)
    wanted = tuple(tensor for tensor in wanted if tensor.name in found)
    if dtype is None:
        stored = {found[tensor.name].dtype for tensor in wanted if tensor.dtype == "model"}
        dtype = torch.bfloat16 if stored == {torch.bfloat16} else torch.float32
    ours = {
        p.name: torch.empty(p.shape, dtype=dtype if p.dtype == "model" else torch.float32) for p in parameters(config)
    }
    for tensor in wanted:
        theirs = files.tensor(tensor.name)
        if check_finite:
            _check_finite(tensor.name, theirs)
        tensor.unpack(theirs, ours)
    model = Transformer(config, dtype, device=torch.device("meta"))
    model.load_state_dict(ours, assign=True)
    return model


@torch.no_grad()
def write_checkpoint(
    model: Transformer,
    path: str | Path,
    tokenizer: SavesTokenizer | None = None,
    generation: dict[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a Hugging Face folder that other engines open, MTP included, and `read_checkpoint` reads to the bit.

    generation: further keys for generation_config.json. The folder appears at once and complete; an older checkpoint
    there is replaced only then. Raises UserError when the disk is full or `path` holds anything but a checkpoint.
    """
    path = Path(path).resolve()
    _check_replaceable(path)
    ours, dtypes = model.state_dict(), {"float32": torch.float32, "model": model.lm_head.weight.dtype}
    extra = {key: value for key, value in model.config.extra.items() if key not in OF_OTHER_FILES}
    config = model.config.replace(torch_dtype=str(dtypes["model"]).removeprefix("torch."), extra=extra)
    token_ids = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    settings = {key: token for key, token in token_ids.items() if token is not None} | (generation or {})
    tensors = {tensor.name: tensor for tensor in hf_tensors(config)}
    entries = [Entry(tensor.name, tensor.shape, dtypes[tensor.dtype]) for tensor in tensors.values()]

    def packed(name: str) -> Tensor:
        return tensors[name].pack(ours).to(dtypes[tensors[name].dtype])

    with folder_beside(path) as folder:
        _write_json(folder / "config.json", config.to_hf())
        _write_json(folder / "generation_config.json", settings)
        write_safetensors(folder, entries, packed, shard_bytes)
        if tokenizer is not None:
            tokenizer.save(folder)


def _check_finite(name: str, tensor: Tensor) -> None:
    least, most = tensor.aminmax()  # NaN and infinity come through; one pass, no scratch memory
    if not (least.isfinite() and most.isfinite()):
        bad = int((~tensor.isfinite()).sum())
        raise UserError(
            f"{name} holds numbers that are not finite",
            got=f"{bad:,} of {tensor.numel():,} are NaN or infinite",
            why="a single one of them spoils every output",
            do="use an earlier checkpoint; to look at this one all the same, read it with check_finite=False",
        )


def _check_replaceable(path: Path) -> None:
    """Replacing a folder deletes what is in it: only what a checkpoint consists of may go."""
    if not path.exists():
        return
    strangers = [path.name]
    if path.is_dir():
        strangers = [f.name for f in path.iterdir() if not any(fnmatch(f.name, known) for known in CHECKPOINT_FILES)]
    if strangers:
        raise UserError(
            f"{path} holds something other than a checkpoint",
            got=abbreviated(sorted(strangers)),
            why="saving replaces the whole folder",
            do="choose a new folder",
        )


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
