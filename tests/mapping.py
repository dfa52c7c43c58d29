"""Models saved as our writers leave them, and what of a model lies in its files."""

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from cavelight.model.transformer import Transformer
from cavelight.spec.formats import PLAIN, Format
from cavelight.weights.convert import convert
from cavelight.weights.snapshot import write_checkpoint

from .reference.tiny import tiny
from .run_models import random_model

CONFIG = tiny(num_nextn_predict_layers=1, kv_lora_rank=16, n_routed_experts=12)  # of which the 10th is not the 2nd
HUGE = Path("/sys/kernel/mm/transparent_hugepage").is_dir()
TOKENS = torch.tensor([3, 1, 4, 1, 5])
STACK, SHARED = "model.layers.1.mlp.experts.{}_proj", "model.layers.1.mlp.shared_experts.up_proj"


def saved(folder: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0, shard_bytes: int = 2**30) -> Path:
    write_checkpoint(random_model(CONFIG, seed, dtype), folder, shard_bytes=shard_bytes)
    return folder


def stored(folder: Path, format: Format, dtype: torch.dtype = torch.bfloat16, shard_bytes: int = 2**30) -> Path:
    """As our own writers leave it: of packed ones that is `convert`."""
    plain = saved(folder / "plain", dtype, shard_bytes=shard_bytes)
    if format == PLAIN:
        return plain
    convert(plain, folder / "packed", format, shard_bytes=shard_bytes)
    return folder / "packed"


def numbers(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def in_files(model: nn.Module, folder: Path) -> set[str]:
    """The model's tensors that lie in mapped files of a folder."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [re.match(r"(\w+)-(\w+) ", line) for line in lines if f"{folder.resolve()}/" in line]
    places = [range(int(found[1], 16), int(found[2], 16)) for found in ranges if found]
    return {name for name, t in numbers(model).items() if any(t.data_ptr() in place for place in places)}


def own_pages(folder: Path) -> int:
    """Bytes of mapped files that this process has of its own, because it wrote to them."""
    own, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-", line):
            ours = f"{folder.resolve()}/" in line
        elif ours and line.startswith("Private_Dirty:"):
            own += int(line.split()[1]) << 10
    return own


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def answer(model: Transformer) -> Tensor:
    with torch.inference_mode():
        return model.logits(TOKENS)
