"""One pass over a checkpoint's weights, a block of rows at a time: the numbers that the figures are made of.

Memory is that of one block and of some small matrices, whatever the size of the checkpoint. Letters: V vocabulary,
D hidden size, C and Q ranks of the latents of key-values and queries, E experts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import inf, isfinite, nan, sqrt

import numpy as np
import torch
from torch import Tensor

from cavelight.see.figure import Floats
from cavelight.see.spectrum import Spectra, gram, spectra
from cavelight.spec.config import ModelConfig
from cavelight.spec.events import Event, Note, Phase
from cavelight.weights.names import DERIVED, HFTensor, check_fit, hf_tensors, is_mtp
from cavelight.weights.stored import Checkpoint

REPORTS = 1000  # of progress, at most
LARGE = 1e15  # squares of larger numbers leave float32


@dataclass(slots=True)
class Summary:
    """What is kept of one tensor: sums over its finite elements, their extremes, and how many are not finite."""

    count: int = 0
    not_finite: int = 0
    total: float = 0.0
    squares: float = 0.0
    low: float = inf
    high: float = -inf

    def add(self, rows: Tensor) -> None:
        """Take one more block of the tensor into account."""
        if not rows.numel():
            return
        low, high = (float(end) for end in rows.aminmax())
        self.count += rows.numel()
        if not (isfinite(low) and isfinite(high)):
            finite = rows.isfinite()
            self.not_finite += int((~finite).sum())
            rows = rows[finite]
            if not rows.numel():
                return
            low, high = (float(end) for end in rows.aminmax())
        wide = torch.float64 if rows.dtype == torch.float64 or max(-low, high) > LARGE else torch.float32
        self.total += float(rows.sum(dtype=wide))
        self.squares += float(torch.linalg.vector_norm(rows, dtype=wide)) ** 2
        self.low, self.high = min(self.low, low), max(self.high, high)

    @property
    def finite(self) -> int:
        return self.count - self.not_finite

    @property
    def norm(self) -> float:
        """The Frobenius norm; NaN as soon as one element is not finite."""
        return nan if self.not_finite else sqrt(self.squares)

    @property
    def std(self) -> float:
        """Standard deviation of the finite elements; NaN where there is none."""
        if not self.finite:
            return nan
        return sqrt(max(self.squares / self.finite - (self.total / self.finite) ** 2, 0.0))

    @property
    def rms(self) -> float:
        """Root mean square of the finite elements; NaN where there is none."""
        return sqrt(self.squares / self.finite) if self.finite else nan

    def join(self, other: "Summary") -> None:
        """Take in what is known of another tensor, as if both were one."""
        self.count, self.not_finite = self.count + other.count, self.not_finite + other.not_finite
        self.total, self.squares = self.total + other.total, self.squares + other.squares
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)


@dataclass
class Measures:
    """The numbers of one checkpoint, by the names of its plain tensors.

    vectors: norms' weights and routing biases, whole. row_norms: of the routers, [E]. column_squares: of eh_proj, [2D].
    copies: how many elements of an MTP layer's copy differ from the original. stored_bytes: of values and scales as
    they lie in the files.
    """

    config: ModelConfig
    tensors: Mapping[str, HFTensor]
    stored_bytes: Mapping[str, int]
    notes: tuple[str, ...] = ()
    summaries: dict[str, Summary] = field(default_factory=dict)
    vectors: dict[str, Floats] = field(default_factory=dict)
    row_norms: dict[str, Floats] = field(default_factory=dict)
    column_squares: dict[str, Floats] = field(default_factory=dict)
    copies: dict[str, int] = field(default_factory=dict)
    latents: dict[int, Spectra] = field(default_factory=dict)
    query_latents: dict[int, Spectra] = field(default_factory=dict)

    @property
    def layers(self) -> range:
        """All layers, those of the prediction modules last."""
        return range(self.config.num_layers_with_mtp)

    def layer_name(self, layer: int) -> str:
        """What a layer is called: by its number, or as prediction module."""
        module, modules = layer - self.config.num_hidden_layers, self.config.num_nextn_predict_layers
        if module < 0:
            return f"layer {layer}"
        return f"MTP {module + 1}" if modules > 1 else "MTP"

    def of(self, layer: int, name: str) -> Summary | None:
        """The summary of a layer's tensor `name`; None where the layer has none."""
        return self.summaries.get(f"model.layers.{layer}.{name}")

    def vector(self, layer: int, name: str) -> Floats | None:
        return self.vectors.get(f"model.layers.{layer}.{name}")

    def pooled(self, layer: int, kind: str) -> Summary:
        """All of a layer's matrices of one kind as one (see kind_of); an empty summary where it has none."""
        return self._pools.get((layer, kind), Summary())

    def pooled_role(self, layer: int, role: str) -> Summary:
        """All of a layer's matrices of one role as one."""
        return self._pools.get((layer, f"role {role}"), Summary())

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of matrices in the layers, in the order of the shape table."""
        return tuple(dict.fromkeys(kind for name in self.tensors if (kind := kind_of(name))))

    @cached_property
    def _pools(self) -> dict[tuple[int, str], Summary]:
        pools: dict[tuple[int, str], Summary] = {}
        for name, tensor in self.tensors.items():
            if kind := kind_of(name):
                layer = int(name.split(".")[2])
                for pool in (kind, f"role {tensor.parts[0].role}"):
                    pools.setdefault((layer, pool), Summary()).join(self.summaries[name])
        return pools

    @property
    def not_finite(self) -> dict[str, int]:
        """How many elements are NaN or infinite, of the tensors that hold such."""
        return {name: summary.not_finite for name, summary in self.summaries.items() if summary.not_finite}


def kind_of(name: str) -> str | None:
    """What a layer's matrix is called in figures, such as "kv_b_proj" or "experts' up_proj"; None for all else."""
    match name.removesuffix(".weight").split("."):
        case ["model", "layers", _, "self_attn", matrix] if matrix.endswith(("_proj", "_mqa")):
            return matrix.removesuffix("_with_mqa")
        case ["model", "layers", _, "mlp", "experts", _, matrix]:
            return f"experts' {matrix}"
        case ["model", "layers", _, "mlp", "shared_experts", matrix]:
            return f"shared {matrix}"
        case ["model", "layers", _, "mlp", "gate"]:
            return "router"
        case ["model", "layers", _, "mlp", matrix]:
            return f"dense {matrix}"
        case ["model", "layers", _, "eh_proj"]:
            return "eh_proj"
    return None


@torch.no_grad()
def measure(checkpoint: Checkpoint, on_event: Callable[[Event], None] = lambda event: None) -> Measures:
    """Read all weights once. NaN and infinity are counted, not refused.

    Raises UserError for tensors that are missing, left over or misshapen; prediction modules that are announced and
    not there, or there and not announced, are left out, and `notes` say so.
    """
    config, wanted, notes = _present(checkpoint)
    tensors = {tensor.name: tensor for tensor in wanted}
    found = Measures(config, tensors, {name: _stored_bytes(checkpoint, name) for name in tensors}, notes)
    for note in notes:
        on_event(Note(note))
    reader = _Reader(checkpoint, found)
    done, told, total = 0, -1, sum(found.stored_bytes.values())
    for name, tensor in tensors.items():
        if told < 0 or done - told >= total / REPORTS:
            on_event(Phase("reading weights", done, total, "B"))
            told = done
        reader.read(tensor)
        done += found.stored_bytes[name]
    on_event(Phase("reading weights", total, total, "B"))
    return found


def _present(checkpoint: Checkpoint) -> tuple[ModelConfig, list[HFTensor], tuple[str, ...]]:
    """The configuration of what the files hold, its tensors, and what had to be left out."""
    config, shapes, notes = checkpoint.config, dict(checkpoint.shapes), []
    modules = config.num_nextn_predict_layers
    stored = [name for name in shapes if is_mtp(name, config) and not DERIVED.fullmatch(name)]
    if modules and not stored:
        config = config.replace(num_nextn_predict_layers=0)
        notes.append(f"config.json announces MTP (num_nextn_predict_layers is {modules}), but the files hold none.")
    elif stored and not modules:
        shapes = {name: shape for name, shape in shapes.items() if name not in stored}
        notes.append(f"{len(stored):,} tensors of an MTP layer that config.json does not announce are left out.")
    wanted = hf_tensors(config)
    check_fit(wanted, shapes, config)
    return config, [tensor for tensor in wanted if tensor.name in shapes], tuple(notes)


def _stored_bytes(checkpoint: Checkpoint, name: str) -> int:
    """Bytes of a plain tensor in the files: its own, or those of the packed values and scales in its place."""
    parts = checkpoint.parts(name).values() if checkpoint.is_packed(name) else [name]
    return sum(checkpoint.files.entries[part].nbytes for part in parts)


class _Reader:
    """Reads tensor after tensor, in the order of the shape table, and keeps what a layer's latents need meanwhile."""

    def __init__(self, checkpoint: Checkpoint, found: Measures) -> None:
        self.checkpoint, self.found = checkpoint, found
        self.down: dict[str, Tensor] = {}  # Gram matrices of the projections into a latent, until that out of it comes

    def read(self, tensor: HFTensor) -> None:
        name, role, found = tensor.name, tensor.parts[0].role, self.found
        summary = found.summaries[name] = Summary()
        last = name.split(".")[-2]
        if tensor.is_copy:
            self._compare(tensor, summary)
        elif role in ("norm", "routing_bias"):
            vector = self.checkpoint.tensor(name)
            summary.add(vector)
            found.vectors[name] = vector.double().numpy()
        elif last in ("kv_a_proj_with_mqa", "q_a_proj"):
            self._into_latent(name, summary, found.config.kv_lora_rank if last[0] == "k" else None)
        elif last in ("kv_b_proj", "q_b_proj"):
            self._out_of_latent(name, summary)
        else:
            self._matrix(tensor, summary)

    def _matrix(self, tensor: HFTensor, summary: Summary) -> None:
        name, role, found = tensor.name, tensor.parts[0].role, self.found
        for start, rows in self.checkpoint.blocks(name):
            summary.add(rows)
            if role == "gate":
                norms = torch.linalg.vector_norm(rows.double(), dim=1).numpy()
                found.row_norms.setdefault(name, np.full(tensor.shape[0], nan))[start : start + len(norms)] = norms
            elif role == "mtp_projection":
                squares = found.column_squares.setdefault(name, np.zeros(tensor.shape[1]))
                squares += rows.double().square().sum(dim=0).numpy()

    def _compare(self, tensor: HFTensor, summary: Summary) -> None:
        """Count the elements of a copy that are not the original's; NaN equals NaN."""
        original, different = tensor.parts[0].name, 0
        for start, rows in self.checkpoint.blocks(tensor.name):
            summary.add(rows)
            twin = self.checkpoint.rows(original, start, start + len(rows))
            if not torch.equal(rows, twin):
                different += int(((rows != twin) & ~(rows.isnan() & twin.isnan())).sum())
        self.found.copies[tensor.name] = different

    def _into_latent(self, name: str, summary: Summary, width: int | None) -> None:
        """kv_a_proj or q_a_proj: its latent rows, taken together with the norm before it. The rotary rows stay out."""
        matrix = self.checkpoint.tensor(name)
        summary.add(matrix)
        at = name.split(".self_attn.")[0]
        before = torch.from_numpy(self.found.vectors[f"{at}.input_layernorm.weight"])
        self.down[f"{at}.{name.split('.')[-2][0]}"] = gram((matrix[:width].double() * before).T)

    def _out_of_latent(self, name: str, summary: Summary) -> None:
        """kv_b_proj or q_b_proj: with it all is there that the latent's singular values need."""
        at, kind = name.split(".self_attn.")[0], name.split(".")[-2].split("_")[0]
        up: Tensor | float = 0.0
        for _, rows in self.checkpoint.blocks(name):
            summary.add(rows)
            up = up + gram(rows.double())
        norm = torch.from_numpy(self.found.vectors[f"{at}.self_attn.{kind}_a_layernorm.weight"])
        assert isinstance(up, Tensor)
        kept = self.found.latents if kind == "kv" else self.found.query_latents
        kept[int(at.rpartition(".")[2])] = spectra(self.down.pop(f"{at}.{kind[0]}"), norm, up)
