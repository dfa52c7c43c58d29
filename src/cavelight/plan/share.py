"""What one device holds of a model under a layout, summed by what happens to it: looked up, met by every token, chosen.

Sums over the table of parameters are kept per model, so that hundreds of layouts can be compared in a moment.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Literal

from cavelight.plan.layout import TENSOR_AXES, Layout, held
from cavelight.spec.config import ModelConfig
from cavelight.spec.cost import FORMATS
from cavelight.spec.formats import PACKED_ROLES
from cavelight.spec.shapes import Parameter

Form = Literal["fp32", "bf16", "fp8", "int8", "int4"]


@dataclass(frozen=True, slots=True)
class Share:
    """One device's part, in elements and bytes. Numbers are floats: an uneven cut is counted by its mean.

    table: of the embedding, of which a token reads a row. common: all that every token meets; the head counts once for
    each use in `common_products`, the multiply-adds of a token. experts: routed ones held here, over all layers;
    `experts_per_layer` of them in each of `moe_layers`, each of `expert_bytes` / (moe_layers * experts_per_layer).
    layers: attention layers, the prediction modules' too.
    """

    table_bytes: float
    common_bytes: float
    common_products: float
    expert_bytes: float
    expert_elements: float
    experts_per_layer: int
    moe_layers: int
    layers: int

    @property
    def bytes(self) -> float:
        return self.table_bytes + self.common_bytes + self.expert_bytes


def share(config: ModelConfig, layout: Layout, rank: int = 0, form: Form = "bf16", mtp: bool = True) -> Share:
    """The part of a device of one pipeline rank."""
    sums = _sums(config, Layout(pp=layout.pp, schedule=layout.schedule), rank, form, mtp)
    E, tp = config.n_routed_experts or 0, layout.tp
    here = ceil((E + layout.redundant) / layout.ep)
    part = here / E if E else 0.0
    return Share(
        table_bytes=sums.table_bytes / tp,
        common_bytes=sums.cut_bytes / tp + sums.whole_bytes,
        common_products=sums.cut_products / tp + sums.whole_products,
        expert_bytes=sums.expert_bytes * part,
        expert_elements=sums.expert_elements * part,
        experts_per_layer=here,
        moe_layers=sums.moe_layers,
        layers=sums.layers,
    )


@lru_cache(maxsize=16384)
def stored_bytes(p: Parameter, form: Form) -> float:
    """Bytes of a parameter in memory, in a checkpoint's format or in plain float32."""
    if form == "fp32" or p.dtype == "float32":
        return 4 * p.size
    return FORMATS[form].nbytes(p.shape) if p.role in PACKED_ROLES else 2 * p.size


@dataclass(slots=True)
class _Sums:
    table_bytes: float = 0
    cut_bytes: float = 0
    cut_products: float = 0
    whole_bytes: float = 0
    whole_products: float = 0
    expert_bytes: float = 0
    expert_elements: float = 0
    moe_layers: int = 0
    layers: int = 0


@lru_cache(maxsize=512)
def _sums(config: ModelConfig, pipeline: Layout, rank: int, form: Form, mtp: bool) -> _Sums:
    """The whole parameters of a pipeline rank, before tensor and expert parallelism cut them."""
    sums = _Sums()
    uses_of_head = 1 + config.num_nextn_predict_layers * mtp
    for p, _ in held(config, pipeline, rank, mtp):
        size, uses = stored_bytes(p, form), uses_of_head if p.role == "head" else 1
        products = 0 if p.role in ("norm", "routing_bias") else p.size * uses
        if p.role == "embedding":
            sums.table_bytes += size
        elif p.role == "expert":
            sums.expert_bytes += size
            sums.expert_elements += p.size
            sums.moe_layers += p.name.endswith("gate_proj")
        elif TENSOR_AXES.intersection(p.axes):
            sums.cut_bytes += size
            sums.cut_products += products
            sums.layers += p.name.endswith("o_proj.weight")
        else:
            sums.whole_bytes += size
            sums.whole_products += products
    return sums
