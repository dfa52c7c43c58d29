"""What our own engine allocates while tokens go through the model: forward alone, or forward and back. No torch.

Counted from the code of model/, kernels/ and train/loss.py, tensor by tensor; tests hold it to what autograd keeps. The
way of training on accelerators, which keep less, is in activations.py.

Letters: T tokens that go through together, b bytes of the model's numbers (statistics and logits always have four);
D hidden size, H heads, N / R / U widths of a head without position, rotary, of values, W the wider of N + R and U;
C latent rank, I dense FFN width, E experts, K experts a token, F expert width, P the rows that experts get: T * K pairs
of token and expert, and padding.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from cavelight.spec.config import ModelConfig
from cavelight.spec.shapes import parameters

Dtype = Literal["float32", "bfloat16"]

TOKEN_ID = 8  # bytes
LOGITS_IN_TRAINING, FEWEST_TOKENS = 1 << 22, 64  # kernels.cross_entropy: numbers at once, for so many tokens at least
LOGITS_AT_ONCE = 512  # train.evaluate: tokens of the head; this and the next number are theirs, tests hold them equal
RAISED_AT_ONCE = (
    2048  # kernels.causal: tokens of whole sequences that have keys and values at a time, or one sequence's
)
HIDDEN_AT_ONCE, ROWS_AT_ONCE = 1 << 19, 1024  # kernels.swiglu, kernels.experts: numbers, and rows, at a time
PADDED_ROWS = (
    64  # kernels.experts: in bfloat16, from so many tokens on, an expert's rows are padded to a multiple of it
)


def width(dtype: Dtype) -> int:
    """Bytes of a number."""
    return 2 if dtype == "bfloat16" else 4


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
    T, b = rows * row, width(dtype)
    through = Pass(config, T, b)
    table = parameters(config)
    weights = {p.name: b * p.size for p in table if p.role != "routing_bias"}

    def gradients(prefix: str) -> int:
        return sum(size for name, size in weights.items() if name.startswith(prefix))

    def layer(number: int, at: str) -> tuple[Section, Section]:
        return through.attention(gradients(f"{at}.self_attn"), row), through.ffn(number, gradients(f"{at}.mlp"))

    head, embedding = gradients("lm_head"), gradients("model.embed")
    modules = config.num_nextn_predict_layers
    # Gradients of what is used several times come with its last use, the first on the way back; others are added.
    made = [Section(TOKEN_ID * through.T, 0, *((embedding, 0) if modules else (0, embedding)))]
    for n in range(config.num_hidden_layers):
        made += layer(n, f"model.layers.{n}")
    made.append(through.loss(0 if modules else head, head if modules else 0))
    for module in range(modules):
        last = module == modules - 1
        joining = gradients(f"mtp.{module}.eh_proj")
        made.append(through.join(joining + embedding, 0) if last else through.join(joining, embedding))
        made += layer(config.num_hidden_layers + module, f"mtp.{module}.block")
        made.append(through.loss(head, 0) if last else through.loss(0, head))
    return made


def kept_bytes(config: ModelConfig, rows: int, row: int, dtype: Dtype) -> int:
    """What autograd keeps of one micro-batch between its forward and its backward pass."""
    return sum(section.kept for section in sections(config, rows, row, dtype))


def forward_bytes(config: ModelConfig, tokens: int, row: int, dtype: Dtype) -> int:
    """The most at any moment of evaluating a batch of such rows: between layers only the stream of states stays."""
    through = Pass(config, tokens, width(dtype))
    layers = [through.ffn_alone(layer) for layer in range(config.num_hidden_layers)]
    logits = min(tokens, LOGITS_AT_ONCE) * config.vocab_size * (4 + 4)  # and their log-softmax
    return max(through.attention_alone(row), *layers, logits + through.b * config.hidden_size * tokens)


@dataclass(frozen=True, slots=True)
class Pass:
    """T tokens through one part of the model after another, in numbers of b bytes."""

    config: ModelConfig
    T: int
    b: int

    def loss(self, gradients: int, again: int) -> Section:
        """The norm; the gradients of its output and of the head, made with the loss (kernels.cross_entropy).

        They are scaled on the way back. `again`: the head's gradient, where it is added to one that there is.
        """
        D, V, b, T = self.config.hidden_size, self.config.vocab_size, self.b, self.T
        at_once = min(T, max(LOGITS_IN_TRAINING // V, FEWEST_TOKENS))
        made = 4 * V * at_once  # logits become their softmax, and that the gradient
        if (
            b == 2
        ):  # Logits and their gradient stand beside them; then a part of the head's gradient, whose sum is float32
            # and rounded at the end. Where bfloat16 is emulated, the product that makes the part is float32 before.
            made = max(8 * V * at_once - 2 * V * D, 4 * V * at_once + 4 * V * D) + 4 * V * D
        kept = self._norm(D, used=False) + b * D * (V + T)
        return Section(kept, made + b * D * T, again + b * D * T, gradients)

    def join(self, gradients: int, again: int) -> Section:
        """A prediction module's input: both norms, side by side (V3 report, eq. 21)."""
        D = self.config.hidden_size
        norms = 3 if self.config.mtp_hidden == "post_norm" else 2
        kept = norms * self._norm(D, used=False) + (2 * self.b * D + TOKEN_ID) * self.T
        if self.b == 4:
            # The hidden state is kept already, by the norm before the head; if that is what is joined, it is made anew.
            kept -= 4 * D * self.T * (norms - 1)
        return Section(kept, 2 * self.b * D * self.T, again, gradients)

    def _norm(self, width: int, used: bool = True) -> int:
        """Its input in float32 and 1 / rms; in bfloat16 normalised values too, and its output if a product follows.

        In float32 that output is made anew.
        """
        return (4 * width + 4 + (2 * width * (used + 1) if self.b == 2 else 0)) * self.T

    def attention(self, gradients: int, row: int) -> Section:
        """Norm, latents, expanded keys and values, and the heads' output, of rows of `row` tokens."""
        c, b, T = self.config, self.b, self.T
        H, N, R, U = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
        C, D, X = c.kv_lora_rank, c.hidden_size, N + R
        W = max(X, U)
        latents = b * (C + R) + 8 * R  # in float32 the norm keeps the whole row it is a part of; two rotations
        kept = self._norm(D) + (self._norm(C, used=False) if b == 2 else 4 * T) + (latents + 4 * H) * T
        kept += self._norm(c.q_lora_rank) if c.q_lora_rank else 0
        turned = b * H * (X + R) * T  # queries, and what RoPE makes of them, while heads are computed
        if b == 2:  # kernels.attend.expanded: queries, keys, values and output, all of one width
            kept += 2 * H * (4 * W + (U if U < W else 0)) * T
            forward = turned + 2 * H * (N + (2 * X if X < W else 0)) * T
            return Section(kept, forward, 2 * (D + 4 * H * W) * T, gradients)
        # kernels.causal: queries, output and the rotary key; keys and values of t tokens are raised at a time.
        kept += 4 * (H * (W + U) + R) * T
        t = self.raised(row)
        queries = X if t < T else 0  # copied, where they are a part of all
        forward = turned + 4 * D * T + 4 * H * (max(N + U, W) + 2 * W) * t
        backward = 4 * (D + H * (X + U)) * T + 4 * H * (queries + 3 * (X + U)) * t
        return Section(kept, forward, backward, gradients)

    def ffn(self, layer: int, gradients: int) -> Section:
        """The norm, and the dense feed-forward or router, routed and shared experts."""
        c, b, T = self.config, self.b, self.T
        D, E, K, F = c.hidden_size, c.n_routed_experts or 0, c.num_experts_per_tok, c.moe_intermediate_size
        hidden = 2 if b == 4 else 4  # products with gate and up; in bfloat16 silu and its product with up as well
        if not c.is_moe(layer):
            wide = b * c.intermediate_size * T
            scratch = min(5 * wide, 20 * HIDDEN_AT_ONCE) if b == 4 else 3 * wide
            return Section(self._norm(D) + hidden * wide, b * D * T, 2 * b * D * T + scratch, gradients)
        P = self.expert_rows()
        router = (8 * E + 12 * K + 16) * T + (4 * D * (T + E) if b == 2 else 0)  # the bfloat16 gate's float32 copies
        kept = self._norm(D) + router + b * P * (2 * F + 1) + 8 * (P + K * T)
        kept += hidden * b * (c.n_shared_experts or 0) * F * T
        some = min(P, max(ROWS_AT_ONCE, P // max(E, 1)))  # rows of experts at a time
        return Section(kept, 4 * D * T + b * some * (D + F), (4 + b) * D * T + b * some * (2 * D + 5 * F), gradients)

    def attention_alone(self, row: int) -> int:
        """The most that attention over rows of `row` tokens takes where no gradient is wanted."""
        c, b, T = self.config, self.b, self.T
        H, N, R, U = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
        X, W = N + R, max(N + R, U)
        stream = 2 * b * c.hidden_size * T  # the residual and the normalised one
        if b == 2:
            widened = (W if U < W else 0) + (2 * W if X < W else 0)
            return stream + 2 * H * (3 * X + R + N + U + W + widened) * T
        t = self.raised(row)
        return stream + 4 * H * ((X + R + W + U) * T + (max(N + U, W) + 2 * W) * t)

    def ffn_alone(self, layer: int) -> int:
        """The most that a layer's feed-forward takes where no gradient is wanted."""
        c, b, T = self.config, self.b, self.T
        stream = 3 * b * c.hidden_size * T  # the layer's input, the residual and the normalised one
        if not c.is_moe(layer):  # in bfloat16 a product is float32 before, where it is emulated
            return stream + (3 if b == 4 else 4) * b * c.intermediate_size * T
        P, F = self.expert_rows(), c.moe_intermediate_size
        some = min(P, max(ROWS_AT_ONCE, P // max(c.n_routed_experts or 1, 1)))
        return stream + 4 * c.hidden_size * T + b * (2 * P * F + some * (c.hidden_size + F))

    def raised(self, row: int) -> int:
        """Tokens that have keys and values at a time, in float32: of whole rows (kernels.causal)."""
        return min(self.T, row * max(RAISED_AT_ONCE // row, 1))

    def expert_rows(self) -> int:
        """Pairs of token and expert, and padding: half of the multiple for each expert on average."""
        pairs = self.T * self.config.num_experts_per_tok
        padded = self.b == 2 and self.T >= PADDED_ROWS
        return pairs + (PADDED_ROWS // 2 * (self.config.n_routed_experts or 0) if padded else 0)
