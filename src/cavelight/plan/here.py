"""What `cavelight train` and `cavelight generate` take on one machine: the process's peak of resident memory. No torch.

What stands throughout, and on top of it the largest of the program's phases. What its tensors take is counted, from the
code of model/, train/ and run/ (see passes.py); measured are the program itself (RUNTIME) and what the heap loses to
holes (HOLES). docs/results/memory.md holds the sum to real runs.

Letters: T tokens that go through together, S rows of the cache that they look at, b bytes of a number; H heads, N / R /
U widths of a head without position, rotary, of values, W the wider of N + R and U; C latent rank, L = C + R.
"""

from cavelight.plan.memory import Memory
from cavelight.plan.passes import Dtype, Pass, forward_bytes, sections, walk, width
from cavelight.spec.config import ModelConfig
from cavelight.spec.shapes import parameters

# Measured by bench/memory.py with next to no model, on one machine (x86-64, two cores, glibc 2.36): Python, what is
# touched of torch's libraries, threads. Pass a machine's own.
RUNTIME = 365 * 10**6  # of train
DECODING_RUNTIME = 292 * 10**6  # of generate
# Fitted to the runs of bench/memory.py: blocks below 32 MB come from glibc's heap, where freed gradients leave holes
# that larger activations cannot use. A share of the float32 gradients, for each micro-batch under way.
HOLES = 0.4

# Numbers of files that import torch; tests hold them equal.
EVALUATED_AT_ONCE = 4096  # train.evaluate: tokens of a batch
CHUNK, ROOM = 512, 256  # run.generate: prompt tokens at once; new ones that the cache has room for at first


def training_here(
    config: ModelConfig,
    *,
    row: int,
    rows: int,
    micro_rows: int | None = None,
    threads: int = 1,
    dtype: Dtype = "float32",
    moments: Dtype = "float32",
    runtime: int = RUNTIME,
) -> Memory:
    """The peak of `cavelight train`: rows of `row` tokens, `rows` a step, `micro_rows` at once on each of `threads`.

    dtype, moments: as `train` of a recipe has them; AdamW takes all parameters. runtime: what the same program takes
    with next to no model, on the machine in question.
    """
    b = width(dtype)
    sizes = [p.size for p in parameters(config) if p.role != "routing_bias"]
    elements, both = sum(sizes), 2 * width(moments)
    micro_rows = micro_rows or rows
    count = rows // micro_rows
    side = min(threads, count)
    summed = 4 * elements if count > side else 0  # gradients of micro-batches that are through
    step = summed + side * walk(sections(config, micro_rows, row, dtype))
    if b == 2:
        step = max(step, (4 + 2 * side) * elements)  # the first sums are float32 copies, made before the others go
    if moments == "bfloat16":
        step = max(step, 4 * elements + 8 * max(sizes))  # a parameter's moments are widened beside all gradients
    evaluation = threads * forward_bytes(config, EVALUATED_AT_ONCE, row, dtype)
    churn = max(step, evaluation)
    parts = {
        "weights": b * elements,
        "masters": 4 * elements if b == 2 else 0,
        "optimizer": both * elements,
        "save under way": (4 + both) * elements,  # a copy of masters and moments, written while training goes on
        "export under way": b * elements if b == 2 else 0,  # the model made of it; in float32 it is that copy
        "activations and gradients": churn,
        "holes": round(HOLES * side * 4 * elements),
        "runtime": runtime,
    }
    return Memory(parts, "the evaluation" if evaluation > step else "a step")


def decoding_here(
    config: ModelConfig,
    *,
    prompt: int,
    new: int,
    dtype: Dtype = "float32",
    stored: Dtype | None = None,
    settles: bool = False,
    runtime: int = DECODING_RUNTIME,
) -> Memory:
    """The peak of `cavelight generate`: `prompt` tokens in chunks, then `new` ones.

    stored: the checkpoint's numbers, where they differ. settles: near-ties are met and computed anew (run/settle.py),
    which takes a cache of its own. Of the cache only rows that were written are resident.
    """
    b = width(dtype)
    weights = sum((4 if p.dtype == "float32" else b) * p.size for p in parameters(config))
    row = b * config.num_layers_with_mtp * config.cache_width
    chunks = ((min(CHUNK, prompt - start), min(start + CHUNK, prompt)) for start in range(0, prompt, CHUNK))
    written = min(prompt + new, config.max_position_embeddings)
    phases = {
        "loading": {"read": _read_bytes(config, dtype, stored or dtype)},
        "prefill": {"cache": row * prompt, "activations": max(_chunk_bytes(config, T, S, b) for T, S in chunks)},
        "decoding": {
            "cache": row * max(written, 2 * _grown_from(prompt, written)),  # while it grows, it is there twice
            "cache of settlements": row * written * settles,
            "activations": _chunk_bytes(config, 1 + config.num_nextn_predict_layers, written, b),
        },
    }
    where = max(phases, key=lambda phase: sum(phases[phase].values()))
    return Memory({"weights": weights, **phases[where], "runtime": runtime}, where)


def _read_bytes(config: ModelConfig, dtype: Dtype, stored: Dtype) -> int:
    """What is in hand when the last large tensor of a checkpoint is read, and all weights are there.

    That is the head or, with a prediction module, its copy of the head: beside it the copy of the embedding that was
    read before, or this one in the model's numbers, to be compared.
    """
    table = config.vocab_size * config.hidden_size
    if config.num_nextn_predict_layers == 0:
        return table * width(stored)
    return table * (width(stored) + max(width(stored), 0 if dtype == stored else width(dtype)))


def _grown_from(prompt: int, written: int) -> int:
    """Rows of the cache when it last had to grow, to at least twice as many; 0 where it never has."""
    before, capacity = 0, prompt + min(written - prompt, ROOM)
    while capacity < written:
        before, capacity = capacity, 2 * capacity
    return before


def _chunk_bytes(config: ModelConfig, T: int, S: int, b: int) -> int:
    """The most that a layer takes for T tokens of a prompt that look at S rows, in the form that run.cache picks."""
    c = config
    H, N, R, U, C = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.kv_lora_rank
    W, L = max(N + R, U), C + R
    queries = b * T * H * (N + 2 * R)
    if _absorbs(T, S, N, R, U, C):
        scores = (8 if b == 4 else 10) * T * H * S  # twice in float32, once more in bfloat16
        attention = queries + b * T * H * (C + L) + scores + (3 * T * S if T > 1 else 0)
    else:
        raised = b * S * H * (N + U + W + (W if U < W else 0) + (W if N + R < W else 0))
        attention = queries + b * T * H * (N + R + W) + raised + (T * S * (2 + b) if 1 < T < S else 0)
    stream = 3 * b * T * c.hidden_size
    through = Pass(config, T, b)
    return max(stream + attention, *(through.ffn_alone(layer) for layer in range(c.num_hidden_layers)))


def _absorbs(T: int, S: int, N: int, R: int, U: int, C: int) -> bool:
    """kernels.attend.absorbed_is_cheaper, which is not to be had without torch."""
    return T * C * (N + U) + T * S * (2 * C + R) < S * C * (N + U) + T * S * (N + R + U)
