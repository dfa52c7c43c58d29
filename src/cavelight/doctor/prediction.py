"""Checks of MTP modules by their weights alone: copies, training, and the order of what they read.

Letters: D hidden size.
"""

from collections.abc import Iterator
from math import atanh, sqrt
from statistics import median

import torch
from torch import Tensor

from cavelight.doctor.case import Case
from cavelight.doctor.findings import Finding, failed, passed, warned
from cavelight.doctor.statistics import Statistics, Summary
from cavelight.doctor.weights import FEW, norm_names, trained
from cavelight.weights.headers import abbreviated
from cavelight.weights.names import is_mtp

CLEAR = 8.0  # standard deviations; channels are not quite independent of each other
ALIKE = 0.2  # correlation that is worth speaking of
UNEVEN, EVEN = 2.0, 1.3  # spread of row norms, in that of random numbers: six minutes of training leave 2 to 5


def copies(case: Case, found: Statistics) -> Iterator[Finding]:
    """Trap 8: the copies of embedding and head hold what the originals hold."""
    pairs = [(name, t.parts[0].name) for name, t in case.wanted.items() if t.is_copy]
    pairs = [pair for pair in pairs if all(name in found.tensors for name in pair)]
    different = [
        copy for copy, original in pairs if found.tensors[copy].fingerprint != found.tensors[original].fingerprint
    ]
    if different:
        yield failed(
            "mtp-copies",
            f"Copies differ from the trunk's ({abbreviated(different, FEW)}), which MTP shares by design: engines that "
            "load the copies and those that share draft differently; store the trunk's.",
            8,
        )
    elif pairs:
        yield passed("mtp-copies", "MTP's copies of embedding and head equal the originals.", 8)


def untrained(case: Case, found: Statistics) -> Iterator[Finding]:
    """Trap 6: a module that looks as initialisation left it beside a trunk that does not."""
    config = case.config
    if config is None or not config.num_nextn_predict_layers:
        return
    weights = {name: found.tensors[name] for name in norm_names(case) if name in found.tensors}
    trunk = {name: s for name, s in weights.items() if not is_mtp(name, config)}
    if not trained(trunk):
        return
    for layer in range(config.num_hidden_layers, config.num_layers_with_mtp):
        prefix = f"model.layers.{layer}."
        own = [s for name, s in weights.items() if name.startswith(prefix)]
        if own and all(s.is_constant for s in own):
            yield failed(
                "mtp-untrained",
                f"All norms of the MTP module in layer {layer} are constant while the trunk's are trained: the "
                "module is as initialisation left it and its drafts are noise; take it from the original or "
                "leave it out.",
                6,
            )
        elif median(unevenness(found, prefix)) < EVEN and _trunk_unevenness(case, found) > UNEVEN:
            yield warned(
                "mtp-untrained",
                f"The rows of attention in layer {layer}, an MTP module, are as even as random numbers, unlike the "
                "trunk's: the module looks hardly trained; measure its drafts with --level model.",
                6,
            )
        else:
            yield passed("mtp-untrained", f"The MTP module in layer {layer} has been trained.", 6)


def unevenness(found: Statistics, prefix: str) -> list[float]:
    """Of what makes a layer's queries and keys: the spread of the rows' squared norms, 1 for random normal numbers.

    Only these are compared, since other matrices stay more even in training, as eh_proj does.
    """
    values = [0.0]
    for name in ("q_proj", "q_b_proj", "kv_a_proj_with_mqa"):
        summary = found.tensors.get(f"{prefix}self_attn.{name}.weight")
        if summary is not None and summary.squares_I is not None and summary.moments[1]:
            spread = float(summary.squares_I.std() / summary.squares_I.mean())
            values.append(spread / sqrt(2 / summary.shape[1]))
    return values[1:] or values


def _trunk_unevenness(case: Case, found: Statistics) -> float:
    assert case.config is not None
    layers = range(case.config.num_hidden_layers)
    return median(value for layer in layers for value in unevenness(found, f"model.layers.{layer}."))


def halves(case: Case, found: Statistics) -> Iterator[Finding]:
    """Trap 6: which half of eh_proj reads the embedding.

    Training lets the columns of a matrix grow with the channels that feed them, and what feeds one half has gone
    through enorm, the other through hnorm: so the norms of a half's columns resemble the weights of its own norm.
    """
    config = case.config
    if config is None:
        return
    for layer in range(config.num_hidden_layers, config.num_layers_with_mtp):
        parts = [found.tensors.get(f"model.layers.{layer}.{name}.weight") for name in ("eh_proj", "enorm", "hnorm")]
        seen = [part for part in parts if part is not None and not part.bad and not part.is_constant]
        if len(seen) == 3:
            yield _order(layer, *seen)


def _order(layer: int, projection: Summary, enorm: Summary, hnorm: Summary) -> Finding:
    assert projection.squares_J is not None and enorm.values is not None and hnorm.values is not None
    D = len(enorm.values)
    first_D, second_D = projection.squares_J[:D], projection.squares_J[D:]
    embedding_D, hidden_D = enorm.values, hnorm.values
    straight = (likeness(first_D, embedding_D) + likeness(second_D, hidden_D)) / 2
    crossed = (likeness(first_D, hidden_D) + likeness(second_D, embedding_D)) / 2
    z = (atanh(crossed) - atanh(straight)) * sqrt(max(D - 3, 0))
    numbers = {"straight": straight, "crossed": crossed, "z": z}
    if z > CLEAR and crossed > ALIKE:
        return failed(
            "mtp-halves",
            f"The halves of eh_proj in layer {layer} look exchanged: its columns go with the other half's norm "
            f"(correlation {crossed:.2f}) and not with their own ({straight:.2f}); released checkpoints have "
            "[embedding ; hidden]: exchange the halves, and see --level model.",
            6,
            **numbers,
        )
    if -z > CLEAR and straight > ALIKE:
        said = f"eh_proj of layer {layer} reads [embedding ; hidden]: its columns go with their own norm's weights"
        return passed("mtp-halves", f"{said} (correlation {straight:.2f}, {crossed:.2f} crossed).", 6, **numbers)
    said = f"The weights of layer {layer} do not show which half of eh_proj reads the embedding; --level model does."
    return passed("mtp-halves", said, 6, **numbers)


def likeness(squares_D: Tensor, weights_D: Tensor) -> float:
    """Correlation of the logarithms, a little inside of -1..1."""
    pair = torch.stack([squares_D.double().clamp_min(1e-30).log(), weights_D.double().abs().clamp_min(1e-30).log()])
    value = float(torch.corrcoef(pair)[0, 1])
    return max(-0.999, min(0.999, value)) if value == value else 0.0


CHECKS = (copies, untrained, halves)
