"""One model's variants that are to be compared with it: another attention, as many parameters."""

from cavelight.errors import UserError
from cavelight.spec.config import ModelConfig
from cavelight.spec.cost import total_parameters

CLOSE = 0.01  # share by which two counts may differ and still be called equal


def with_plain_attention(config: ModelConfig, key_value_heads: int) -> ModelConfig:
    """The model with plain attention of so many key-value heads in the place of MLA, and as many parameters.

    Heads stay as many, and nothing outside attention changes; the heads' common width, an even number, makes the counts
    equal. Raises UserError where no width does so within a hundredth of the whole model's parameters.
    """
    config.check_latent("A variant with plain attention")

    def of_width(width: int) -> ModelConfig:
        return config.replace(
            attention="gqa",
            num_key_value_heads=key_value_heads,
            q_lora_rank=None,
            kv_lora_rank=0,
            qk_nope_head_dim=0,
            qk_rope_head_dim=width,
            v_head_dim=width,
        )

    wanted = total_parameters(config, mtp=True)
    step = total_parameters(of_width(4), mtp=True) - total_parameters(of_width(2), mtp=True)
    most = wanted - total_parameters(of_width(2), mtp=True)
    found = of_width(2 + 2 * max(round(most / step), 0))
    if abs(total_parameters(found, mtp=True) - wanted) > CLOSE * wanted:
        raise UserError(
            f"No width of {config.num_attention_heads} heads gives plain attention MLA's number of parameters",
            got=f"{total_parameters(found, mtp=True):,} for {wanted:,} at a width of {found.v_head_dim}",
            do="choose a larger model, or other ranks and head widths of MLA",
        )
    return found
