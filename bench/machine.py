"""What this machine can do, as a row for `cavelight plan --devices FILE`: memory, bandwidth, matrix products.

python -m bench.machine prints the row; every figure is the best of several tries, since others may use the machine.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench.provenance import leave_with, machine
from cavelight.model.transformer import Transformer
from cavelight.spec.presets import preset
from cavelight.train.optim import initialise

TRIES = 40
SIZE = 1 << 25  # elements that are read or copied: 134 MB, more than the caches hold


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure this machine for the planner.")
    parser.add_argument("--name", default="CPU-here", help="the row's name (default: CPU-here)")
    options = parser.parse_args(arguments)
    read, copy = bandwidths()
    rates = {dtype: product_rate(dtype) for dtype in (torch.float32, torch.bfloat16)}
    faster = rates[torch.bfloat16] > rates[torch.float32]
    print(f"# {machine(torch.float32)}")
    print(f"# read {read / 1e9:.1f} GB/s, copy {copy / 1e9:.1f} GB/s")
    print(f"# products: float32 {rates[torch.float32] / 1e12:.3f}, bfloat16 {rates[torch.bfloat16] / 1e12:.3f} Tflop/s")
    print(f"[{options.name}]")
    print(f"memory_gb = {memory_bytes() / 1e9:.0f}")
    print(f"bandwidth_gbs = {read / 1e9:.1f}")
    print(f"fp32_tflops = {rates[torch.float32] / 1e12:.3f}")
    print(f"bf16_tflops = {rates[torch.bfloat16] / 1e12:.3f}" if faster else "# bfloat16 is no faster: left out")
    print(f"layer_us = {small_layer() * 1e6:.0f}")
    print("runtime_gb = 0.365  # of our own process: bench/memory.py")
    print(f'measured = "{machine(torch.float32)}"')
    return 0


def best(act: Callable[[], object]) -> float:
    """Least seconds of several tries, after one that warms up."""
    act()
    seconds = []
    for _ in range(TRIES):
        before = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - before)
    return min(seconds)


def bandwidths() -> tuple[float, float]:
    """Bytes per second read by a sum, and moved (read and written) by a copy."""
    source, target = torch.ones(SIZE), torch.empty(SIZE)
    size = source.element_size() * SIZE
    return size / best(source.sum), 2 * size / best(lambda: target.copy_(source))


def product_rate(dtype: torch.dtype, width: int = 1024) -> float:
    """Operations per second of a square matrix product."""
    a, b = torch.ones(width, width, dtype=dtype), torch.ones(width, width, dtype=dtype)
    return 2 * width**3 / best(lambda: a @ b)


def small_layer() -> float:
    """Seconds of a layer of a model whose arithmetic takes next to none, on one token: what our engine takes itself."""
    config = preset("nano")
    model = Transformer(config)
    initialise(model, std=0.02, seed=0)
    tokens = torch.zeros(1, dtype=torch.long)
    torch.set_num_threads(1)  # a second thread would only wait
    with torch.inference_mode():
        return best(lambda: model.logits(tokens)) / config.num_hidden_layers


def memory_bytes() -> int:
    """Installed memory, from /proc/meminfo."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo says no MemTotal")


if __name__ == "__main__":
    leave_with(main)
