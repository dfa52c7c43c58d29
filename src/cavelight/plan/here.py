"""What `cavelight train` and `cavelight generate` take on one machine: the process's peak of resident memory. No torch.

A walk through what the program does: what stands throughout, and on top of it the largest of its phases. In a training
step that is the walk forward and back through the model's sections, each of which leaves what autograd keeps and, on
the way back, its gradients. What is counted is what the code of model/, kernels/, train/ and run/ allocates.

Letters: T tokens that go through together, S rows of the cache that they look at, b bytes of the model's numbers
(masters, statistics and logits always have four); D hidden size, H heads, N / R / U widths of a head without position,
rotary, of values, W the wider of N + R and U; C and Q latent ranks, I dense FFN width, E experts, K experts a token,
P = T * K pairs of token and expert, F expert width, V vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from typing import Literal

from cavelight.plan.memory import Memory
from cavelight.spec.config import ModelConfig
from cavelight.spec.shapes import Parameter, parameters

Dtype = Literal["float32", "bfloat16"]

# As the program has them; tests hold these numbers to the code's own.
EVALUATED_AT_ONCE, LOGITS_AT_ONCE = 4096, 512  # train.evaluate: tokens of a batch, and of the head
DECODING_RUNTIME = 274 * 10**6
RUNTIME = 365 * 10**6  # Python, torch's libraries as far as they are touched, threads: measured by bench/memory.py
HOLES = 0.7
CHUNK, ROOM = 512, 256  # run.generate: prompt tokens at once; new ones that the cache has room for at first
ROW_MULTIPLE, ROWS_TO_PAD = 64, 64  # kernels.experts: an expert's rows are padded in bfloat16 from so many tokens on


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the model in the order of the forward pass; all in bytes.

    kept: from the forward to the backward pass. forward, backward: the most besides, while it is under way.
    gradients: of its parameters, which then stay to the step's end.
    """

    kept: int
    forward: int
    backward: int
    gradients: int


def walk(sections: Iterable[Section]) -> int:
    """The most bytes at any moment of one micro-batch's way forward and back."""
    done, live, most = [], 0, 0
    for section in sections:
        most = max(most, live + section.kept + section.forward)
        live += section.kept
        done.append(section)
    for section in reversed(done):
        most = max(most, live + section.backward + section.gradients)
        live += section.gradients - section.kept
    return max(most, live)


def sections(config: ModelConfig, rows: int, row: int, dtype: Dtype) -> list[Section]:
    """The sections of `train.loss.losses` on `rows` rows of `row` tokens, in order."""
    T, b = rows * row, _width(dtype)
    count = _Counter(config, T, b)
    table = parameters(config)
    weights = {p.name: b * p.size for p in table if p.role != "routing_bias"}

    def gradients(prefix: str) -> int:
        return sum(size for name, size in weights.items() if name.startswith(prefix))

    def layer(number: int, at: str) -> tuple[Section, Section]:
        routed = gradients(f"{at}.mlp.experts")
        return count.attention(gradients(f"{at}.self_attn")), count.ffn(number, gradients(f"{at}.mlp"), routed)

    head, embedding = gradients("lm_head"), gradients("model.embed")
    made = [Section(count.rotary(), 0, 0, embedding)]
    for n in range(config.num_hidden_layers):
        made += layer(n, f"model.layers.{n}")
    modules = config.num_nextn_predict_layers
    made.append(count.loss(0 if modules else head, head if modules else 0))
    for module in range(modules):
        made.append(count.join(gradients(f"mtp.{module}.eh_proj"), embedding))
        made += layer(config.num_hidden_layers + module, f"mtp.{module}.block")
        made.append(count.loss(head, 0) if module == modules - 1 else count.loss(0, head))
    return made


def kept_bytes(config: ModelConfig, rows: int, row: int, dtype: Dtype) -> int:
    """What autograd keeps of one micro-batch between its forward and its backward pass."""
    return sum(section.kept for section in sections(config, rows, row, dtype))


def training_here(
    config: ModelConfig,
    *,
    row: int,
    rows: int,
    micro_rows: int | None = None,
    threads: int = 1,
    dtype: Dtype = "float32",
    runtime: int = RUNTIME,
) -> Memory:
    """The peak of `cavelight train`: rows of `row` tokens, `rows` a step, `micro_rows` at once on each of `threads`.

    runtime: what the same program takes with next to no model, on the machine in question.
    """
    b, table = _width(dtype), parameters(config)
    elements = sum(p.size for p in table if p.role != "routing_bias")
    micro_rows = micro_rows or rows
    count = rows // micro_rows
    side = min(threads, count)
    gradients = 4 * elements if count > side else 0  # summed up while further micro-batches are under way
    step = gradients + side * walk(sections(config, micro_rows, row, dtype))
    if b == 2:
        step = max(step, (4 + 2 * side) * elements)  # the first sums are float32 copies, made before the others go
    evaluation = threads * forward_bytes(config, EVALUATED_AT_ONCE, dtype)
    churn = max(step, evaluation)
    parts = {
        "weights": b * elements,
        "masters": 4 * elements if b == 2 else 0,
        "optimizer": 8 * elements,
        "activations and gradients": churn,
        "holes": round(HOLES * side * 4 * elements),
        "runtime": runtime,
    }
    return Memory(parts, "the evaluation" if evaluation > step else "a step")


def forward_bytes(config: ModelConfig, tokens: int, dtype: Dtype) -> int:
    """The most at any moment of evaluating one batch: nothing is kept from layer to layer but the stream of states."""
    count, D = _Counter(config, tokens, _width(dtype)), config.hidden_size
    layers = [count.passing(layer) for layer in range(config.num_hidden_layers)]
    logits = min(tokens, LOGITS_AT_ONCE) * config.vocab_size * (4 + 4)  # and their log-softmax
    return max(*layers, logits + count.b * D * tokens)


@dataclass(frozen=True, slots=True)
class _Counter:
    """Bytes of the parts of a model of which autograd keeps what `model/` makes it keep."""

    config: ModelConfig
    T: int
    b: int

    def rotary(self) -> int:
        return 4 * self.config.qk_rope_head_dim * self.T  # cos and sin

    def loss(self, gradients: int, again: int) -> Section:
        """The norm, logits in float32, and their gradient, made with the loss and let go as soon as it is multiplied.

        The head's gradient comes with its last use, the first on the way back; `again`, those of its other uses.
        """
        logits = 4 * self.config.vocab_size * self.T
        kept = self._norm(self.config.hidden_size) + logits + 9 * self.T
        return Section(kept, logits, max(logits - gradients, again), gradients)

    def join(self, gradients: int, again: int) -> Section:
        """A prediction module's input: both norms, side by side (V3 report, eq. 21)."""
        D = self.config.hidden_size
        norms = 3 if self.config.mtp_hidden == "post_norm" else 2
        kept = self.rotary() + norms * self._norm(D, used=False) + 2 * self.b * D * self.T
        if self.b == 4:
            kept -= 4 * D * self.T  # the hidden state is kept already, by the norm before the head
        return Section(kept, 2 * self.b * D * self.T, again, gradients)

    def _norm(self, width: int, used: bool = True) -> int:
        """Its input in float32, 1 / rms, the normalised values, and its output where a product follows."""
        return (4 * width + 4 + self.b * width * (1 + used)) * self.T

    def attention(self, gradients: int) -> Section:
        c, b = self.config, self.b
        H, N, R, U = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
        C, D, W = c.kv_lora_rank, c.hidden_size, max(N + R, U)
        latents = b * (C + R) + (4 * R if b == 4 else 0)  # in float32 its norm keeps the whole row it is a part of
        heads = 4 * b * H * W + (b * H * U if U < W else 0) + 4 * H  # queries, keys, values, output, logsumexp
        kept = self._norm(D) + self._norm(C, used=False) + (latents + heads) * self.T
        kept += self._norm(c.q_lora_rank) if c.q_lora_rank else 0
        return Section(kept, 3 * b * H * W * self.T, b * (D + 6 * H * W) * self.T, gradients)

    def ffn(self, layer: int, gradients: int, routed: int) -> Section:
        """`routed`: the part of the gradients that belongs to the routed experts; they are made one after another."""
        c, b, T = self.config, self.b, self.T
        D, E, K, F = c.hidden_size, c.n_routed_experts or 0, c.num_experts_per_tok, c.moe_intermediate_size
        if not c.is_moe(layer):
            I = c.intermediate_size
            return Section(self._norm(D) + 4 * b * I * T, b * D * T, b * (D + 3 * I) * T, gradients)
        R = self.expert_rows()
        router = (8 * E + 16 * K + 16) * T + (4 * D * (T + E) if b == 2 else 0)  # the bfloat16 gate's float32 copies
        kept = b * R * (D + 2 * F) + b * K * D * T + 8 * (R + K * T)
        kept += 4 * b * (c.n_shared_experts or 0) * F * T
        gathered = b * (2 * R * D + K * T * D + 4 * R * F) - routed * 2 // 3  # with one of three gradients made
        finished = b * (2 * R * D + T * D + 4 * R * F)
        return Section(self._norm(D) + router + kept, b * R * (D + F), max(gathered, finished), gradients)

    def passing(self, layer: int) -> int:
        """The most that a layer takes where no gradient is wanted."""
        c, b, T = self.config, self.b, self.T
        D, H, N, U = c.hidden_size, c.num_attention_heads, c.qk_nope_head_dim, c.v_head_dim
        W = max(N + c.qk_rope_head_dim, U)
        stream = 2 * b * D * T  # the residual and the normalised one
        attention = b * H * (5 * W + N + 2 * U) * T
        if not c.is_moe(layer):
            return stream + max(attention, 3 * b * c.intermediate_size * T)
        R, K, F = self.expert_rows(), c.num_experts_per_tok, c.moe_intermediate_size
        return stream + max(attention, b * (2 * R * D + K * D * T + 3 * R * F))

    def expert_rows(self) -> int:
        """Pairs of token and expert, and padding: half of the multiple for each expert on average."""
        pairs = self.T * self.config.num_experts_per_tok
        padded = self.b == 2 and self.T >= ROWS_TO_PAD
        return pairs + (ROW_MULTIPLE // 2 * (self.config.n_routed_experts or 0) if padded else 0)


def _width(dtype: Dtype) -> int:
    return 2 if dtype == "bfloat16" else 4


def decoding_here(
    config: ModelConfig,
    *,
    prompt: int,
    new: int,
    dtype: Dtype = "float32",
    stored: Dtype | None = None,
    settles: bool | None = None,
    runtime: int = DECODING_RUNTIME,
) -> Memory:
    """The peak of `cavelight generate`: `prompt` tokens in chunks, then `new` ones.

    stored: the checkpoint's numbers, where they differ. settles: whether near-ties are computed anew, in a cache of
    their own; greedy float32 decoding of a model with prediction modules does so unless told.
    """
    b = _width(dtype)
    weights = sum((4 if p.dtype == "float32" else b) * p.size for p in parameters(config))
    row = b * config.num_layers_with_mtp * config.cache_width
    settles = b == 4 and config.num_nextn_predict_layers > 0 if settles is None else settles
    chunks = ((min(CHUNK, prompt - start), min(start + CHUNK, prompt)) for start in range(0, prompt, CHUNK))
    before, after = _capacities(config, prompt, new)
    phases = {
        "loading": {"read": config.vocab_size * config.hidden_size * _width(stored or dtype)},
        "prefill": {
            "cache": row * (prompt + min(new, ROOM)),
            "activations": max(_chunk_bytes(config, T, S, b) for T, S in chunks),
        },
        "decoding": {"cache": row * (before + after), "cache of settlements": row * (prompt + new) * settles},
    }
    where = max(phases, key=lambda phase: sum(phases[phase].values()))
    return Memory({"weights": weights, **phases[where], "runtime": runtime}, where)


def _capacities(config: ModelConfig, prompt: int, new: int) -> tuple[int, int]:
    """Rows of the cache before and after it last grew; both are there while it does. 0 before, where it never does."""
    before, after = 0, prompt + min(new, ROOM)
    need = min(prompt + new, config.max_position_embeddings)
    while after < need:
        before, after = after, min(2 * after, config.max_position_embeddings)
    return before, after


def _chunk_bytes(config: ModelConfig, T: int, S: int, b: int) -> int:
    """The most that a layer takes for T tokens of a prompt that look at S rows, the form of attention as it is picked."""
    c = config
    H, N, R, U, C = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.kv_lora_rank
    W, L = max(N + R, U), C + R
    queries = b * T * H * (N + 2 * R)
    if _absorbs(T, S, H, N, R, U, C):
        attention = queries + b * T * H * (C + L) + (8 if b == 4 else 10) * T * H * S
    else:
        raised = b * S * H * (N + U + W + (W if U < W else 0) + (W if N + R < W else 0))
        attention = queries + b * T * H * (N + R + W) + raised + (T * S * (2 + b) if 1 < T < S else 0)
    stream = 3 * b * T * c.hidden_size
    count = _Counter(config, T, b)
    return max(stream + attention, *(count.passing(layer) for layer in range(c.num_hidden_layers)))


def _absorbs(T: int, S: int, H: int, N: int, R: int, U: int, C: int) -> bool:
    """kernels.attend.absorbed_is_cheaper, which is not to be had without torch."""
    return H * (T * C * (N + U) + T * S * (2 * C + R)) < H * (S * C * (N + U) + T * S * (N + R + U))
