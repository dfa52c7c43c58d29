"""What devices send each other, in seconds: experts' all-to-all, tensor parallelism's sums, gradients.

Speeds are those of one device in one direction. Link and network carry traffic at the same time.
"""

from math import comb

from cavelight.plan.devices import Device
from cavelight.plan.layout import Layout
from cavelight.spec.config import ModelConfig

# DeepEP's own table (H800, hidden 7168, top-8): 153-158 of 160 GB/s by link, 50 of 50 by network. Its low-latency
# kernels' twelve times come out within a tenth, but one, with these two fixed costs.
LINK, NETWORK = 0.97, 1.0
LINK_SECONDS, NETWORK_SECONDS = 30e-6, 50e-6


def message(device: Device, inside: bool) -> tuple[float, float]:
    """Bytes per second and fixed seconds of sending inside a node or between nodes."""
    return (device.link * LINK, LINK_SECONDS) if inside else (device.network * NETWORK, NETWORK_SECONDS)


def low_latency(config: ModelConfig, device: Device, ep: int, tokens: float, bytes_each: float) -> float:
    """Seconds of one all-to-all of a decoding step: each token straight to each of its K experts.

    tokens: of one device. bytes_each: of an element, 1 when dispatching fp8, 2 when combining bf16.
    """
    if ep == 1 or not config.n_routed_experts:
        return 0.0
    sent = tokens * config.num_experts_per_tok * config.hidden_size * bytes_each
    near = min(device.per_node, ep)
    speed, fixed = message(device, inside=True)
    if ep <= device.per_node:
        return sent / speed + fixed
    far_speed, far_fixed = message(device, inside=False)
    return max(sent * near / ep / speed, sent * (1 - near / ep) / far_speed) + far_fixed


def forwarded(config: ModelConfig, device: Device, ep: int, tokens: float, bytes_each: float) -> float:
    """Seconds of one all-to-all of training or prefill: once to each node by network, then on by link.

    A token reaches as many nodes as hold its experts, at most the topk_group groups that its gate is limited to
    (V3 report, section 3.2.2: four nodes a token).
    """
    if ep == 1 or not config.n_routed_experts:
        return 0.0
    speed, fixed = message(device, inside=True)
    devices = (ep - 1) * (1 - (1 - 1 / ep) ** config.num_experts_per_tok)  # others that hold one of its experts
    by_link = tokens * devices * config.hidden_size * bytes_each / speed
    nodes = ep / device.per_node
    if nodes <= 1:
        return by_link + fixed
    far_speed, far_fixed = message(device, inside=False)
    by_network = tokens * other_nodes(config, nodes) * config.hidden_size * bytes_each / far_speed
    return max(by_link, by_network) + far_fixed


def other_nodes(config: ModelConfig, nodes: float) -> float:
    """Nodes beside its own that a token is sent to on average, experts lying evenly over `nodes`."""
    groups = config.n_group if config.topk_method != "greedy" else 1
    chosen = config.topk_group
    if groups > 1 and chosen < groups:
        # Of the groups, `here` lie on a node (less than one where a group spans several nodes).
        here = groups / nodes
        if here >= 1:
            whole = round(here)
            hit = nodes * (1 - comb(groups - whole, chosen) / comb(groups, chosen))
        else:
            spread = nodes / groups  # nodes of a group
            per_group = config.num_experts_per_tok / chosen
            hit = chosen * spread * (1 - (1 - 1 / spread) ** per_group)
    else:
        hit = nodes * (1 - (1 - 1 / nodes) ** config.num_experts_per_tok)
    return hit * (1 - 1 / nodes)


def tensor_sums(config: ModelConfig, device: Device, tp: int, tokens: float) -> float:
    """Seconds of a layer's two sums over tensor ranks (as reduce-scatter and all-gather, in bf16)."""
    if tp == 1:
        return 0.0
    speed, fixed = message(device, inside=tp <= device.per_node)
    return 2 * (2 * (tp - 1) / tp * tokens * config.hidden_size * 2 / speed + fixed)


def hand_over(config: ModelConfig, device: Device, layout: Layout, tokens: float) -> float:
    """Seconds of passing hidden states in bf16 to the next stage of a pipeline: by network, unless all is one node."""
    if layout.pp == 1:
        return 0.0
    speed, fixed = message(device, inside=layout.devices <= device.per_node)
    return tokens * config.hidden_size * 2 / speed + fixed


def gradients(device: Device, layout: Layout, common: float, expert: float, bytes_each: float = 6.0) -> float:
    """Seconds of a step's gradient sum and of handing out new weights, none of it overlapped.

    common, expert: elements of one device. Of each, gradients go out in float32 and weights come back in bf16 (ZeRO's
    reduce-scatter and all-gather); ZeRO-3 fetches weights twice more, before the forward and the backward pass.
    """
    seconds = 0.0
    for size, copies in ((common, layout.dp * layout.cp), (expert, layout.ranks // layout.ep)):
        if copies > 1:
            speed, _ = message(device, inside=layout.ranks * layout.pipeline <= device.per_node)
            seconds += size * (bytes_each + (4 if layout.zero == 3 else 0)) * (copies - 1) / copies / speed
    return seconds
