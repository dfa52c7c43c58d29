"""The sections of a recipe: every key that a run knows, its default, and what it means. No torch."""

from typing import Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from cavelight.spec.shapes import Role

Recompute = Literal["none", "selective", "full"]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSection(Section):
    """A preset, any field of its ModelConfig to change, and perhaps weights to begin with."""

    preset: str = "demo"
    overrides: dict[str, Any] = Field(default_factory=dict)
    weights: str | None = Field(
        default=None, min_length=1
    )  # a checkpoint or a run to begin from: its configuration and tokenizer come along


class SourceSection(Section):
    """One source of a mixture: "stdlib", or a file, a folder or a glob."""

    corpus: str = Field(min_length=1)
    weight: PositiveFloat = 1.0  # rows are drawn in proportion to the weights
    text_key: str = "text"  # where a line of JSONL or a row of Parquet holds its text


class DataSection(Section):
    corpus: str | tuple[SourceSection, ...] = Field(default="stdlib", min_length=1)  # one source, or a mixture
    text_key: str = "text"  # of a corpus that is one source
    held_out_every: int = Field(default=20, ge=2)  # one document in so many is never trained on
    tokenizer: str | None = Field(
        default=None, min_length=1
    )  # a tokenizer.json or a folder with one; otherwise trained on the corpus
    row_length: PositiveInt = 512  # tokens that see one another at most
    mask_documents: bool = False  # whether attention stops at a document's end; V3's pre-training did not
    split_line_ends: float = Field(default=0.1, ge=0, le=1)  # share of "signs, line end" tokens that are met as two
    fim_rate: float = Field(default=0.1, ge=0, le=1)  # share of documents that are met as prefix, suffix, middle

    @property
    def sources(self) -> tuple[SourceSection, ...]:
        if isinstance(self.corpus, str):
            return (SourceSection(corpus=self.corpus, text_key=self.text_key),)
        return self.corpus


class Stage(Section):
    """A part of the schedule: for `share` of the run the learning rate goes to `to` times its peak."""

    share: float = Field(gt=0, le=1)
    to: NonNegativeFloat
    shape: Literal["constant", "cosine", "linear"] = "constant"  # constant: at once


# 14.8T tokens: constant, cosine from 10T on, and two constant tails (V3 report, section 4.2).
V3_SCHEDULE = (
    Stage(share=10.0 / 14.8, to=1.0),
    Stage(share=4.3 / 14.8, to=0.1, shape="cosine"),
    Stage(share=0.333 / 14.8, to=0.1),
    Stage(share=0.167 / 14.8, to=7.3e-6 / 2.2e-4),
)


BFLOAT16_MOVES = 1 - 2**-8  # a moment that a step shrinks by less is rounded back to what it was


class TrainSection(Section):
    """Optimisation and losses. Defaults are the report's (V3, section 4.2), where it names them.

    A share of the run counts from its first step to its last, by steps or by time, whichever is further.
    """

    steps: PositiveInt | None = None
    minutes: PositiveFloat | None = None  # a budget of time instead, or as well: whichever ends first
    rows_per_step: PositiveInt = 8
    rows_per_microbatch: PositiveInt | None = None  # rows that one core takes at once; the gradient is the same
    ramp_from_rows: PositiveInt | None = None  # rows of the first step, which grow evenly to rows_per_step
    ramp_share: float = Field(default=0.0317, ge=0, le=1)  # within this share of the run
    seed: int = Field(default=0, ge=0, lt=2**63)

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of weights and activations; masters are always float32
    fp8: bool = False  # matrix products of E4M3 tiles and blocks (V3 report, section 3.3); emulated where need be
    recompute: Recompute = "none"  # what the backward pass makes anew instead of keeping

    init_std: PositiveFloat = 0.006
    init_stds: dict[str, NonNegativeFloat] = Field(default_factory=dict)  # other deviations, by role of the shape table
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of the layers; AdamW for what is left
    learning_rate: PositiveFloat = 2.2e-4  # at its peak
    embedding_rate: PositiveFloat = 1.0  # the embedding learns at so many times the learning rate,
    head_rate: PositiveFloat = 1.0  # and the head at so many: in a short run most of their rows are met rarely
    warmup_steps: int = Field(default=2000, ge=0)
    schedule: tuple[Stage, ...] = Field(default=V3_SCHEDULE, min_length=1)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    moments: Literal["float32", "bfloat16"] = "float32"  # AdamW's two; the report kept bfloat16 ones (section 3.3.3)
    weight_decay: NonNegativeFloat = 0.1
    clip_norm: PositiveFloat = 1.0
    ema_decay: float | None = Field(default=None, gt=0, lt=1)  # keep an average of the weights, and export it too

    mtp_weight: NonNegativeFloat = 0.3  # lambda,
    mtp_weight_late: NonNegativeFloat = 0.1  # and what it becomes
    mtp_late_from: float = Field(default=0.6757, ge=0, le=1)  # from this share of the run
    balance_alpha: NonNegativeFloat = 1e-4  # of the sequence-wise balance loss
    bias_speed: NonNegativeFloat = 1e-3  # gamma; 0 turns the bias balancing off
    bias_until: float = Field(default=0.9662, ge=0, le=1)  # share of the run after which gamma is 0
    expert_alpha: NonNegativeFloat = 0.0  # V2's three auxiliary losses: of experts,
    device_alpha: NonNegativeFloat = 0.0  # of devices,
    communication_alpha: NonNegativeFloat = 0.0  # and of what devices send one another,
    balance_devices: PositiveInt = 8  # over so many devices
    batch_alpha: NonNegativeFloat = 0.0  # of a batch-wise balance loss (V3 report, section 4.5.3)

    on_spike: Literal["skip", "back", "nothing"] = "skip"  # leave the step out, or return to the last save
    spike_factor: PositiveFloat = 10.0  # deviations of recent losses above their mean that make a spike
    evaluate_every: PositiveInt | None = 100  # steps between looks at held-out text
    evaluate_bytes: PositiveInt = 32_768  # how much held-out text such a look reads; the last one reads all
    sample_tokens: NonNegativeInt = 0  # tokens of a sample that such a look writes; 0 for none
    save_every: PositiveInt | None = 500
    save_minutes: PositiveFloat | None = None
    keep_saves: PositiveInt = 2  # the newest, to go back to
    keep_every: PositiveInt | None = None  # saves at multiples of so many steps stay for good
    tensorboard: bool = False

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        total = sum(stage.share for stage in self.schedule)
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the schedule's shares add up to {total:.6g}, not to 1")
        return self

    @model_validator(mode="after")
    def _check_moments(self) -> Self:
        slow = [name for name in ("beta1", "beta2") if getattr(self, name) > BFLOAT16_MOVES]
        if self.moments == "bfloat16" and slow:
            raise ValueError(
                f"moments in bfloat16 would stand still: a step of {' and '.join(slow)} above {BFLOAT16_MOVES:.3f} is "
                "less than half of their last digit; take smaller ones, or moments in float32"
            )
        return self

    @field_validator("init_stds")
    @classmethod
    def _check_roles(cls, stds: dict[str, float]) -> dict[str, float]:
        drawn = set(get_args(Role)) - {"norm", "routing_bias"}
        if unknown := sorted(set(stds) - drawn):
            raise ValueError(
                f"no weights of the role {', '.join(unknown)} are drawn; roles are {', '.join(sorted(drawn))}"
            )
        return stds
