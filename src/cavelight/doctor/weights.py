"""Checks of the weights' values: finite, alive, in range, and none twice."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from statistics import median

from cavelight.doctor.case import Case
from cavelight.doctor.findings import Finding, failed, passed, warned
from cavelight.doctor.statistics import Statistics, Summary
from cavelight.weights.headers import abbreviated
from cavelight.weights.names import is_mtp

FEW = 3  # names in a sentence
LOUD, QUIET = 10.0, 1e-5  # root mean squares that no trained or fresh matrix has; fp8 codes without scales have 100
DEAD = 1e-3  # of the median of a layer's experts
FAR = 100.0  # times the median of a norm's weights
TRAINED = 0.01  # spread of a norm's weights that training leaves; fresh ones are all 1


def readable(case: Case, found: Statistics) -> Iterator[Finding]:
    """Tensors whose bytes or scales could not be read at all."""
    if found.refused:
        first = next(iter(found.refused.values()))
        yield failed("readable", f"{len(found.refused):,} tensors cannot be read, the first because: {first}", 9)


def finite(case: Case, found: Statistics) -> Iterator[Finding]:
    """NaN and infinity."""
    bad = [summary for summary in found.tensors.values() if summary.bad]
    if bad:
        named = [f"{summary.name}: {summary.bad:,} of {summary.size:,}" for summary in bad]
        yield failed(
            "finite",
            f"{len(bad):,} tensors hold NaN or infinity ({abbreviated(named, FEW)}), and one of them spoils every "
            "output: use an earlier checkpoint or convert again.",
            tensors={summary.name: summary.bad for summary in bad[:100]},
        )
    else:
        yield passed("finite", f"All numbers of {len(found.tensors):,} tensors are finite.")


def scale_values(case: Case, found: Statistics) -> Iterator[Finding]:
    """Trap 9: fp8 values reach 448 in every block, so 448 scales is what a block's largest weight becomes."""
    if not found.scales:
        return
    largest = {name: 448 * scale for name, scale in found.scales.items()}
    inverted = [name for name, most in largest.items() if most > 100 and 448**2 / most < 100]
    if inverted:
        name = inverted[0]
        yield failed(
            "scale-values",
            f"Scales look inverted in {len(inverted):,} of {len(largest):,} fp8 matrices: {name} would reach "
            f"{largest[name]:.3g} when multiplied, {448**2 / largest[name]:.3g} when divided; weight_scale_inv has to "
            "hold what multiplies: store the reciprocals.",
            9,
            inverted=len(inverted),
        )
    else:
        usual = median(largest.values())
        yield passed("scale-values", f"fp8 scales multiply to weights of up to {usual:.3g}, as they should.", 9)


def loudness(case: Case, found: Statistics) -> Iterator[Finding]:
    """Matrices so large or so small that scales were lost or applied the wrong way on the path to this file."""
    matrices = [s for s in found.tensors.values() if len(s.shape) == 2 and s.moments[1] and s.name not in found.scales]
    odd = [s for s in matrices if s.rms > LOUD or s.rms < QUIET]
    if odd:
        named = [f"{s.name}: {s.rms:.3g}" for s in odd]
        yield failed(
            "loudness",
            f"{len(odd):,} matrices have a root mean square that no model has ({abbreviated(named, FEW)}), as when fp8 "
            "values are converted without their scales or divided by them: convert again from the original.",
            9,
        )
    elif matrices:
        least, most = min(s.rms for s in matrices), max(s.rms for s in matrices)
        yield passed("loudness", f"Root mean squares of matrices lie between {least:.2g} and {most:.2g}.", 9)


def alive(case: Case, found: Statistics) -> Iterator[Finding]:
    """Matrices that are one number throughout, and experts that are next to nothing beside their neighbours."""
    flat = [s for s in found.tensors.values() if len(s.shape) == 2 and s.size > 1 and s.is_constant]
    if flat:
        named = [f"{s.name}: {s.least:g}" for s in flat]
        yield failed(
            "alive",
            f"{len(flat):,} matrices hold one and the same number throughout ({abbreviated(named, FEW)}): they were "
            "never written; convert or train again.",
        )
    dead = sorted(_dead_experts(found, {s.name for s in flat}))
    if dead:
        yield warned(
            "dead-experts",
            f"{len(dead):,} expert matrices are a thousand times smaller than their layer's others "
            f"({abbreviated(dead, FEW)}): these experts say nothing; see whether tokens still reach them.",
            experts=dead[:100],
        )
    if not flat and not dead:
        yield passed("alive", "No matrix is constant, and no expert is dead.")


def _dead_experts(found: Statistics, flat: set[str]) -> Iterator[str]:
    layers: defaultdict[str, list[Summary]] = defaultdict(list)
    for name, summary in found.tensors.items():
        if match := re.fullmatch(r"(.*\.mlp\.experts\.)\d+(\..*)", name):
            layers[match[1] + match[2]].append(summary)
    for experts in layers.values():
        usual = median(summary.rms for summary in experts)
        yield from (s.name for s in experts if s.rms < DEAD * usual and s.name not in flat)


def twins(case: Case, found: Statistics) -> Iterator[Finding]:
    """Matrices that are equal to the last bit and should not be, as after a loop that copies into the wrong place."""
    groups: defaultdict[tuple[object, ...], list[str]] = defaultdict(list)
    for name, summary in found.tensors.items():
        tensor = case.wanted.get(name)
        if len(summary.shape) == 2 and not summary.is_constant and not (tensor and tensor.is_copy):
            groups[summary.fingerprint].append(name)
    equal = [names for names in groups.values() if len(names) > 1]
    tied = [names for names in equal if set(names) == {"model.embed_tokens.weight", "lm_head.weight"}]
    drafts = [names for names in equal if case.config and any(is_mtp(name, case.config) for name in names)]
    others = [names for names in equal if names not in tied and names not in drafts]
    if tied:
        yield warned(
            "twins",
            "lm_head equals the embedding, while this architecture does not tie them: was the head lost on the way?",
        )
    if drafts:
        yield warned(
            "twins",
            f"{len(drafts):,} matrices of MTP equal others ({abbreviated(drafts[0], FEW)}): a module that began as a "
            "copy of a layer and was not trained since drafts badly; train it or leave it out.",
            6,
        )
    if others:
        named = abbreviated([" = ".join(names[:2]) for names in others], FEW)
        yield failed(
            "twins",
            f"{len(others):,} groups of matrices are equal to the bit ({named}): something wrote one into several "
            "places; convert again.",
            groups=[names[:10] for names in others[:20]],
        )
    if not equal:
        yield passed("twins", "No two matrices are the same.")


def norms(case: Case, found: Statistics) -> Iterator[Finding]:
    """Weights of the norms: there, in range, and either all trained or all fresh."""
    weights = {name: found.tensors[name] for name in norm_names(case) if name in found.tensors}
    if not weights:
        return
    zero = [name for name, s in weights.items() if s.is_constant and s.least == 0]
    if zero:
        yield failed(
            "norms",
            f"{len(zero)} norms are zero throughout ({abbreviated(zero, FEW)}), so nothing passes them: they were "
            "never written, or are stored as differences from 1; convert again.",
        )
    far = [name for name, s in weights.items() if _is_far(s)]
    if far:
        yield warned(
            "norms",
            f"{len(far)} norms have weights over {FAR:g} times their median ({abbreviated(far, FEW)}): a spike in "
            "training, or a broken file; look at these channels.",
        )
    negative = [name for name, s in weights.items() if s.values is not None and float(s.values.median()) < 0]
    if negative:
        yield warned(
            "norms",
            f"{len(negative)} of {len(weights)} norms are mostly negative ({abbreviated(negative, FEW)}), while "
            "training begins at 1 and stays positive: perhaps they are stored as differences from 1; compare with the "
            "original.",
        )
    trunk = {name: s for name, s in weights.items() if case.config and not is_mtp(name, case.config)}
    fresh = [name for name, s in trunk.items() if s.is_constant and s.least == 1]
    if fresh and len(fresh) < len(trunk) and trained(trunk):
        yield warned(
            "norms",
            f"{len(fresh)} of {len(trunk)} norms are exactly 1 while the others are trained ({abbreviated(fresh, FEW)}"
            "): they were probably lost on the way and made anew; compare with the original.",
        )
    elif not (zero or far or negative):
        state = "all exactly 1, as in a model that was never trained" if len(fresh) == len(trunk) else "in range"
        yield passed("norms", f"The weights of {len(weights)} norms are {state}.")


def norm_names(case: Case) -> list[str]:
    """Names of all norms' weights."""
    return [name for name, tensor in case.wanted.items() if tensor.parts[0].role == "norm"]


def trained(weights: Mapping[str, Summary]) -> bool:
    """Whether the norms that are not constant have gone far enough from 1 to have been trained."""
    spreads = [float(s.values.std()) for s in weights.values() if s.values is not None and not s.is_constant]
    return bool(spreads) and median(spreads) > TRAINED


def _is_far(summary: Summary) -> bool:
    if summary.values is None:
        return False
    sizes = summary.values.abs()
    usual = float(sizes.median())
    return usual > 0 and float(sizes.max()) > FAR * usual


CHECKS = (readable, finite, scale_values, loudness, alive, twins, norms)
