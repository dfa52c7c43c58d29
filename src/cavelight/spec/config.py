"""`ModelConfig`: everything that decides a model's mathematics and sizes, frozen and checked. No torch.

Fields carry the names of Hugging Face's config.json. A configuration that exists is one that can be built: whatever
is wrong with it is gathered and raised once, as one `UserError`.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from cavelight.errors import UserError
from cavelight.spec import hf

# The bounds are far beyond any model; without them a damaged file makes tables until memory is gone.
Size = Annotated[int, Field(gt=0, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Layers = Annotated[int, Field(gt=0, le=10_000)]
Experts = Annotated[int, Field(gt=0, le=10_000)]
Modules = Annotated[int, Field(ge=0, le=100)]
TokenId = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Some = TypeVar("Some")
OrNone = Annotated[Some | None, BeforeValidator(lambda value: None if value == 0 else value)]  # TOML has no null
_FROZEN = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Yarn(BaseModel):
    """YaRN's stretch of RoPE to `factor` times `original_max_position_embeddings` (arXiv 2309.00071).

    With m(s) = 0.1 s ln(factor) + 1, cos and sin are scaled by m(mscale) / m(mscale_all_dim) and the softmax scale
    by m(mscale_all_dim)^2.
    """

    model_config = _FROZEN

    factor: Annotated[float, Field(ge=1)]
    original_max_position_embeddings: Size
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    mscale: Positive = 1.0
    mscale_all_dim: Annotated[float, Field(ge=0)] = 0.0


class ModelConfig(BaseModel):
    """A DeepSeek-V2 or -V3 style language model.

    `attention` "gqa" puts plain attention in the place of MLA, to compare with: `num_key_value_heads` heads of keys and
    values for all query heads (MHA: as many, MQA: one), rotated in full. Its heads are qk_rope_head_dim and v_head_dim
    wide, and the sizes of what it does not have are 0: kv_lora_rank, qk_nope_head_dim (and q_lora_rank None).
    `mtp_hidden` says what a prediction module is fed: the hidden state after the final norm (for later modules: after
    the norm of the module before), or before it. `aux_loss_alpha` and `initializer_range` are carried along for other
    programs: training takes its own from the recipe. `extra` holds the harmless keys of a config.json that are no
    fields; they are written back.
    """

    model_config = _FROZEN

    model_type: Literal["deepseek_v2", "deepseek_v3"] = "deepseek_v3"
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Layers
    num_nextn_predict_layers: Modules = 0
    max_position_embeddings: Size

    attention: Literal["mla", "gqa"] = "mla"
    num_attention_heads: Size
    num_key_value_heads: Size | None = None
    q_lora_rank: Size | None
    kv_lora_rank: Count
    qk_nope_head_dim: Count
    qk_rope_head_dim: Size
    v_head_dim: Size
    rms_norm_eps: Positive = 1e-6
    rope_theta: Annotated[float, Field(gt=1)] = 10000.0
    rope_scaling: Yarn | None = None

    n_routed_experts: OrNone[Experts]
    n_shared_experts: OrNone[Size]
    num_experts_per_tok: Count
    moe_intermediate_size: Count
    first_k_dense_replace: Count
    moe_layer_freq: Size = 1
    n_group: Size = 1
    topk_group: Size = 1
    topk_method: Literal["noaux_tc", "greedy", "group_limited_greedy"] = "noaux_tc"
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    norm_topk_prob: bool
    routed_scaling_factor: Positive

    bos_token_id: TokenId | None = None
    eos_token_id: TokenId | Annotated[list[TokenId], Field(min_length=1)] | None = None
    pad_token_id: TokenId | None = None
    initializer_range: Positive = 0.02
    aux_loss_alpha: Annotated[float, Field(ge=0)] = 0.001
    seq_aux: bool = True
    torch_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    tie_word_embeddings: Literal[False] = False
    mtp_hidden: Literal["post_norm", "pre_norm"] = "post_norm"
    extra: dict[str, Any] = Field(default_factory=dict)

    def __hash__(self) -> int:
        """Of some fields: others may hold lists and dicts, which have no hash."""
        return hash((self.model_type, self.vocab_size, self.hidden_size, self.num_hidden_layers, self.kv_lora_rank))

    @property
    def qk_head_dim(self) -> int:
        """N + R: width of a head's query and key in the expanded form."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_width(self) -> int:
        """C + R: what one layer keeps of one token, in elements; keys and values of plain attention, g (R + U)."""
        if self.num_key_value_heads is not None:
            return self.num_key_value_heads * (self.qk_rope_head_dim + self.v_head_dim)
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def num_layers_with_mtp(self) -> int:
        """Attention layers, each with its own cache rows: the trunk's, then one per prediction module."""
        return self.num_hidden_layers + self.num_nextn_predict_layers

    def is_moe(self, layer: int) -> bool:
        """Whether `layer` has experts; prediction module i is like a layer num_hidden_layers + i."""
        if self.n_routed_experts is None:
            return False
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    def check_latent(self, who: str) -> None:
        """Raise UserError, in the name of `who` was asked, for a model without latent attention."""
        if self.attention != "mla":
            raise UserError(
                f"{who} knows latent attention alone",
                got=f"attention {self.attention}",
                why="plain attention is here to be compared with: such a model can be trained, evaluated and run",
                do="give a model whose attention is mla",
            )

    def replace(self, **changes: Any) -> Self:
        """This configuration with some fields changed, checked again."""
        return type(self).model_validate({**dict(self), **changes})

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], source: str = "the configuration") -> Self:
        """Read the content of a config.json of deepseek_v2, deepseek_v3 or kimi_k2, in either spelling.

        Raises UserError that lists everything wrong at once; `source` is what it calls the input.
        """
        fields, problems = hf.fields_of(raw, frozenset(cls.model_fields) - {"extra"})
        return cls.model_validate(fields, context={"problems": problems, "source": source})

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a config.json, given as that file or as the folder that holds it."""
        path = Path(path)
        file = path / "config.json" if path.is_dir() else path
        do = "give a config.json, a folder that holds one, or the name of a preset"
        try:
            raw = json.loads(file.read_bytes().decode("utf-8"))
        except FileNotFoundError:
            raise UserError(f"There is no {file}", do=do) from None
        except OSError as error:
            raise UserError(f"{file} cannot be read", got=error.strerror or str(error), do=do) from error
        except UnicodeDecodeError as error:
            got = f"{error.reason} at byte {error.start}"
            raise UserError(f"{file} is not text in UTF-8", got=got, do=do) from error
        except json.JSONDecodeError as error:
            got = f"{error.msg} at line {error.lineno}, column {error.colno}"
            raise UserError(f"{file} is not JSON", got=got, do=do) from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand brackets
            raise UserError(f"{file} is not JSON of a configuration", got=str(error), do=do) from error
        if not isinstance(raw, dict):
            raise UserError(f"{file} is not a JSON object", got=type(raw).__name__, do=do)
        return cls.from_hf(raw, source=str(file))

    def to_hf(self) -> dict[str, Any]:
        """The content of a config.json that transformers, vLLM, SGLang and llama.cpp's converter read."""
        return hf.hf_of(self.model_dump())

    @model_validator(mode="wrap")
    @classmethod
    def _all_problems_at_once(cls, data: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        context = info.context or {}
        problems: list[str] = list(context.get("problems", []))
        try:
            config = handler(data)
            problems += [sentence for check in _CHECKS if (sentence := check(config))]
        except ValidationError as error:
            problems += _sentences(error)
            problems += _problems_of_the_rest(cls, data, error)
        if problems:
            source = context.get("source", "the configuration")
            count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
            raise UserError(
                f"{source} has {count}:" + "".join(f"\n  - {sentence}." for sentence in problems),
                do="correct these keys; a preset shows a configuration that works",
            )
        return config


def _sentences(error: ValidationError) -> Iterator[str]:
    """One plain sentence for each field that pydantic refuses."""
    seen = set()
    for item in error.errors():
        # Both branches of `int | list[int]` complain, and name themselves in the location: the field is enough.
        depth = 2 if item["loc"][:1] == ("rope_scaling",) else 1
        name = ".".join(map(str, item["loc"][:depth]))
        if name in seen:
            continue
        seen.add(name)
        if item["type"] == "missing":
            yield f"{name} is missing"
        elif item["type"] == "extra_forbidden":
            known = Yarn.model_fields if name.startswith("rope_scaling.") else ModelConfig.model_fields
            yield hf.unknown(name, item["input"], known)
        else:
            yield f"{name} {item['msg'].removeprefix('Input ').rstrip('.')}, got {item['input']!r}"


def _problems_of_the_rest(cls: type[ModelConfig], data: Any, error: ValidationError) -> list[str]:
    """Run the checks across fields on those that are sound; a check that needs a broken field is passed over."""
    if not isinstance(data, Mapping):
        return []
    broken = {item["loc"][0] for item in error.errors() if item["loc"]}
    optional = {name: field for name, field in cls.model_fields.items() if not field.is_required()}
    defaults = {name: field.get_default(call_default_factory=True) for name, field in optional.items()}
    sound = {name: value for name, value in {**defaults, **data}.items() if name not in broken}
    if isinstance(sound.get("rope_scaling"), dict):
        sound["rope_scaling"] = Yarn(**sound["rope_scaling"])
    problems = []
    for check in _CHECKS:
        try:
            sentence = check(SimpleNamespace(**sound))
        except AttributeError:
            continue
        if sentence:
            problems.append(sentence)
    return problems


def _attention(c: Any) -> str | None:
    if c.attention == "mla":
        zero = [name for name in ("kv_lora_rank", "qk_nope_head_dim") if getattr(c, name) == 0]
        if zero:
            return f"{' and '.join(zero)} must be greater than 0 for latent attention"
        if c.num_key_value_heads is not None:
            return "num_key_value_heads is for attention gqa alone: latent attention has one per head"
        return None
    foreign = [name for name in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim") if getattr(c, name)]
    if foreign:
        return (
            f"attention is gqa, but {' and '.join(foreign)} belong to latent attention: q_lora_rank is null, others 0"
        )
    if c.num_key_value_heads is None or c.num_attention_heads % c.num_key_value_heads:
        return (
            f"num_key_value_heads is {c.num_key_value_heads}, but attention gqa shares each of them among equally many "
            f"of the {c.num_attention_heads} heads"
        )
    return None


def _rotary_pairs(c: Any) -> str | None:
    if c.qk_rope_head_dim % 2:
        return f"qk_rope_head_dim is {c.qk_rope_head_dim}, but rotary dimensions come in pairs"
    return None


def _yarn(c: Any) -> str | None:
    yarn = c.rope_scaling
    if yarn is None:
        return None
    if yarn.beta_fast < yarn.beta_slow:
        return f"rope_scaling.beta_fast ({yarn.beta_fast}) is less than beta_slow ({yarn.beta_slow})"
    # m(mscale) / m(0): DeepSeek's code takes m(mscale), transformers m(1); they agree only at mscale 1.
    if yarn.mscale_all_dim == 0 and yarn.mscale != 1:
        return (
            f"rope_scaling.mscale is {yarn.mscale} without mscale_all_dim, "
            "which DeepSeek's code and transformers compute differently"
        )
    return None


def _dense_first(c: Any) -> str | None:
    if c.first_k_dense_replace > c.num_hidden_layers:
        return f"first_k_dense_replace is {c.first_k_dense_replace}, but there are only {c.num_hidden_layers} layers"
    if c.n_routed_experts is None and c.first_k_dense_replace < c.num_hidden_layers:
        return (
            f"n_routed_experts is null, so all {c.num_hidden_layers} layers are dense, "
            f"but first_k_dense_replace is {c.first_k_dense_replace}"
        )
    return None


def _expert_sizes(c: Any) -> str | None:
    if c.n_routed_experts is None:
        return None
    zero = [name for name in ("moe_intermediate_size", "num_experts_per_tok") if getattr(c, name) == 0]
    return f"{' and '.join(zero)} must be greater than 0 where there are experts" if zero else None


def _groups(c: Any) -> str | None:
    if c.topk_group > c.n_group:
        return f"topk_group is {c.topk_group}, but n_group is only {c.n_group}"
    if c.n_routed_experts is not None and c.n_routed_experts % c.n_group:
        return f"n_routed_experts ({c.n_routed_experts}) does not divide into n_group ({c.n_group}) equal groups"
    return None


def _group_of_two(c: Any) -> str | None:
    if c.topk_method == "noaux_tc" and c.n_routed_experts is not None and 1 < c.n_group > c.n_routed_experts // 2:
        return (
            f"n_group is {c.n_group} for {c.n_routed_experts} experts, "
            "but noaux_tc scores a group by its two best experts, so groups need at least two"
        )
    return None


def _selectable(c: Any) -> str | None:
    if c.n_routed_experts is None:
        return None
    limited = c.topk_method != "greedy" and c.topk_group <= c.n_group
    selectable = c.n_routed_experts // c.n_group * c.topk_group if limited else c.n_routed_experts
    if c.num_experts_per_tok > selectable:
        return f"num_experts_per_tok is {c.num_experts_per_tok}, but a token can choose among {selectable} experts only"
    return None


def _gate(c: Any) -> str | None:
    """transformers computes the gate that belongs to the model_type, whatever else config.json says."""
    gate = (c.topk_method, c.scoring_func)
    fitting = {
        "deepseek_v2": [("greedy", "softmax"), ("group_limited_greedy", "softmax")],
        "deepseek_v3": [("noaux_tc", "sigmoid")],
    }[c.model_type]
    if gate not in fitting:
        known = " or ".join(f"{method} with {score}" for method, score in fitting)
        return f"topk_method and scoring_func are {gate[0]} with {gate[1]}, but {c.model_type} has {known}"
    return None


def _v2_weights(c: Any) -> str | None:
    # DeepSeek's V2 code then normalises instead of scaling, transformers scales and never normalises.
    if c.model_type == "deepseek_v2" and c.norm_topk_prob:
        return "norm_topk_prob is true, which DeepSeek's V2 code and transformers compute differently"
    return None


def _token_ids(c: Any) -> str | None:
    ends = c.eos_token_id if isinstance(c.eos_token_id, list) else [c.eos_token_id]
    ids = {"bos_token_id": [c.bos_token_id], "eos_token_id": ends, "pad_token_id": [c.pad_token_id]}
    outside = [
        f"{name} ({token})"
        for name, tokens in ids.items()
        for token in tokens
        if token is not None and token >= c.vocab_size
    ]
    return f"{' and '.join(outside)} must lie below vocab_size ({c.vocab_size})" if outside else None


def _extra(c: Any) -> str | None:
    foreign = sorted(c.extra.keys() - hf.HARMLESS - {"model_type"})
    return f"extra holds {', '.join(foreign)}, not known to be harmless" if foreign else None


_CHECKS: tuple[Callable[[Any], str | None], ...] = (
    _attention,
    _rotary_pairs,
    _yarn,
    _dense_first,
    _expert_sizes,
    _groups,
    _group_of_two,
    _selectable,
    _gate,
    _v2_weights,
    _token_ids,
    _extra,
)
