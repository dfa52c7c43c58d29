"""The model beside transformers', part by part: the first layer and part that differ, by how much, and why.

Both run in float32, in lockstep: each of our layers is given what transformers' layer was given, rotary angles
included. So rounding does not add up, a difference is seen where it arises, and only one layer's parts are held at a
time. Both models are held whole, 8 bytes a parameter together. Half of the tokens stand far out, since mistakes in
YaRN never show at position 0.

Letters: T tokens, D hidden size, R rotary width, E experts, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cavelight.doctor.findings import Finding, failed, passed, warned
from cavelight.doctor.record import PARTS, Record, TheirLayers, our_record
from cavelight.doctor.suspects import Scene, Suspicion, alike, eps_of, in_our_order, suspect, suspect_angles
from cavelight.doctor.witness import Witness, open_transformers, own_attention, quiet_transformers, version
from cavelight.memory import check_memory
from cavelight.model.block import Block
from cavelight.model.moe import MoE
from cavelight.model.mtp import MTPModule
from cavelight.model.transformer import Transformer
from cavelight.run.settle import SCORE_TIE, route_margin
from cavelight.spec.config import ModelConfig
from cavelight.spec.cost import total_parameters
from cavelight.spec.events import Event, Phase
from cavelight.weights.names import is_mtp
from cavelight.weights.snapshot import read_checkpoint

TOKENS = 128
FARTHEST = 16384  # positions; float32 angles grow blunt beyond
ROUNDING = 2e-5  # of a part's largest value: float32's 1.2e-7 through sums of thousands, with a wide margin
ANGLE_ROUNDING = 2.5e-7  # radians a position, from frequencies that are rounded in their own ways
MODEL = "the model"  # the place of what belongs to no layer
AFTER_SOFTMAX = PARTS[PARTS.index("mixed values") :]
BY_CHOICE = PARTS[PARTS.index("gate weights") :]
NOT_THE_SAME = Suspicion(None, "the weights are not the same: one of the two did not take them from the checkpoint")


@dataclass(frozen=True)
class Difference:
    """A part that differs: by how much at most, absolutely and as a share of its largest value."""

    place: str
    part: str
    absolute: float
    relative: float
    suspicion: Suspicion


def against_transformers(
    folder: Path,
    tokens_T: Sequence[int] | Tensor | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    open_theirs: Callable[[Path, ModelConfig], Witness] = open_transformers,
) -> list[Finding]:
    """Run a checkpoint here and in transformers on the same tokens, and name the first part that differs.

    tokens_T: ids, of which 128 are used; random ones unless given. open_theirs: how the other side is opened.
    Raises UserError where transformers is missing, too old or refuses the checkpoint, where memory is too small, and
    where we cannot read the checkpoint.
    """
    check_memory(
        8 * total_parameters(ModelConfig.read(folder), mtp=True),
        "the model twice in float32",
        "compare on a larger machine, or a smaller model of the same layout",
    )
    with quiet_transformers():
        ours = read_checkpoint(folder, torch.float32, packed=False)
        on_event(Phase("opening in transformers", 0, 1, "models"))
        theirs = open_theirs(folder, ours.config)
        on_event(Phase("opening in transformers", 1, 1, "models"))
        comparison = Comparison(ours, theirs, _some(tokens_T, ours.config), on_event)
        comparison.run()
    return [*_loading(theirs, ours.config), comparison.finding(), *_mtp(theirs, ours.config)]


@dataclass
class Comparison:
    """One run of both sides. `differences` holds the first part that differs in each place, in order of computation.

    `cos_sin` [T, R/2] are the rotary angles that our layers get, None until the first layer of a run has shown theirs;
    `worst` is the largest relative difference that was taken for rounding, and where.
    """

    ours: Transformer
    theirs: Witness
    tokens_T: Tensor
    on_event: Callable[[Event], None]
    differences: list[Difference] = field(default_factory=list)
    worst: tuple[float, str] = (0.0, "")
    positions_T: Tensor = field(default_factory=lambda: torch.empty(0))
    cos_sin: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def run(self) -> None:
        watch = TheirLayers(self.ours.config, own_attention(), self._compare_layer)
        self.theirs.attend_by(watch.attention)
        hidden_TD = self._run_trunk(watch)
        if self.theirs.predictors is not None:
            self._run_predictors(watch, hidden_TD)
        layers = self.ours.config.num_layers_with_mtp
        self.on_event(Phase("comparing", layers, layers, "layers"))

    def _run_trunk(self, watch: TheirLayers) -> Tensor:
        """Their hidden states after the final norm [T, D]."""
        model, seen, tokens_1T = self.theirs.model, Record(), self.tokens_T[None]
        self.positions_T, self.cos_sin = spread(len(self.tokens_T), self.ours.config), None

        def compare_embedding(_: nn.Module, __: object, embedding_1TD: Tensor) -> None:
            ours_TD = self.ours.model.embed_tokens(self.tokens_T)
            self._compare(MODEL, "embedding", ours_TD, embedding_1TD[0], lambda: NOT_THE_SAME)

        with ExitStack() as hooks:
            hooks.callback(model.model.embed_tokens.register_forward_hook(compare_embedding).remove)
            _keep(hooks, model.model.norm, "norm", seen)
            hooks.enter_context(watch.watching(dict(enumerate(model.model.layers))))
            mask_1T = torch.ones_like(tokens_1T)  # without one, gaps between positions would part documents
            options = {"position_ids": self.positions_T[None], "use_cache": False}
            logits_TV = model(tokens_1T, attention_mask=mask_1T, **options).logits[0]
        self._compare_head(MODEL, self.ours.model.norm, seen, logits_TV)
        return seen["norm"]

    def _run_predictors(self, watch: TheirLayers, hidden_TD: Tensor) -> None:
        predictors, trunk = self.theirs.predictors, self.ours.config.num_hidden_layers
        for depth, (layer, module) in enumerate(zip(predictors.layers, self.ours.mtp, strict=True)):
            assert isinstance(module, MTPModule)
            seen, next_T = Record(), self.tokens_T[depth + 1 :]
            self.positions_T, self.cos_sin = torch.arange(len(next_T)), None

            def compare_input(
                _: nn.Module, __: object, projected_1TD: Tensor, d: int = depth, s: Record = seen
            ) -> None:
                self._compare_input(d, s, projected_1TD[0])

            with ExitStack() as hooks:
                for name in ("enorm", "hnorm"):
                    _keep(hooks, getattr(layer, name), name, seen)
                _keep(hooks, layer.post_norm, "norm", seen)
                hooks.callback(layer.eh_proj.register_forward_hook(compare_input).remove)
                hooks.enter_context(watch.watching({trunk + depth: layer.mtp_block}))
                hidden_1TD = hidden_TD[None, : len(next_T)]
                hidden_TD = predictors.forward_layer(
                    depth, hidden_1TD, self.positions_T[None], None, input_ids=next_T[None]
                )[0]
            self._compare_head(f"MTP module {depth + 1}", module.norm, seen, self.theirs.model.lm_head(hidden_TD))

    def _compare_layer(self, number: int, theirs: Record, angles: Any) -> None:
        """Run our layer on what theirs was given, and note the first part that differs."""
        config, trunk = self.ours.config, self.ours.config.num_hidden_layers
        self.on_event(Phase("comparing", number, config.num_layers_with_mtp, "layers"))
        module = self.ours.mtp[number - trunk] if number >= trunk else None
        block = module.block if isinstance(module, MTPModule) else self.ours.model.layers[number]
        assert isinstance(block, Block)
        if self.cos_sin is None:
            self.cos_sin = self._compare_angles(angles)
        ours = our_record(block, theirs["layer input"], self.cos_sin, config)
        bias_E = block.mlp.gate.e_score_correction_bias if isinstance(block.mlp, MoE) else None
        scene = Scene(ours, theirs, config, self.cos_sin, bias_E)
        place = f"layer {number}" if number < trunk else f"MTP module {number - trunk + 1}"
        all(self._compare_part(place, part, scene) for part in PARTS if part in ours)  # up to the first that differs

    def _compare_part(self, place: str, part: str, scene: Scene) -> bool:
        """Whether the two agree; tokens whose experts hang on rounding are left out from the choice on."""
        ours, theirs, rounding = scene.ours[part], scene.theirs[part], ROUNDING
        if part in AFTER_SOFTMAX:  # an error e of a score is a factor of exp(e) behind the softmax
            rounding *= max(1.0, float(scene.ours["attention scores"].abs().max()))
        if part.startswith("rotary"):
            theirs = in_our_order(theirs, ours)
        elif part == "chosen experts":
            biased_TE = scene.ours["gate scores"] + (0 if scene.bias_E is None else scene.bias_E)
            clear_T = route_margin(biased_TE, scene.config) >= SCORE_TIE
            ours, theirs = ours[clear_T], theirs[clear_T]
        elif part in BY_CHOICE and "chosen experts" in scene.ours:
            same_T = (scene.ours["chosen experts"] == scene.theirs["chosen experts"]).all(dim=1)
            ours, theirs = ours[same_T], theirs[same_T]
        return self._compare(place, part, ours, theirs, lambda: suspect(part, scene), rounding)

    def _compare_angles(self, angles: Any) -> tuple[Tensor, Tensor]:
        """cos and sin for our layers [T, R/2]: theirs if they agree with ours, so that rounding does not count."""
        cos, sin = self.ours.rotary(self.positions_T)
        if isinstance(angles, Tensor):  # V2's are complex
            their_cos, their_sin = angles[0].real, angles[0].imag
        else:
            their_cos, their_sin = (t[0, :, : t.shape[-1] // 2] for t in angles)
        ours, theirs = torch.cat([cos, sin], dim=-1), torch.cat([their_cos, their_sin], dim=-1)
        allowed_T1 = ROUNDING + ANGLE_ROUNDING * self.positions_T[:, None]
        if bool(((ours - theirs).abs() <= allowed_T1).all()):
            return their_cos, their_sin
        suspicion = suspect_angles((their_cos, their_sin), self.positions_T, self.ours.config)
        self._compare(MODEL, "rotary angles", ours, theirs, lambda: suspicion, rounding=0.0)
        return cos, sin

    def _compare_input(self, depth: int, seen: Record, projected_TD: Tensor) -> None:
        """An MTP module's two norms and its projection, which come before its layer."""
        place, module = f"MTP module {depth + 1}", self.ours.mtp[depth]
        assert isinstance(module, MTPModule)
        embedding_TD, hidden_TD = module.enorm(seen["enorm before"]), module.hnorm(seen["hnorm before"])
        ours_TD = module.eh_proj(torch.cat([embedding_TD, hidden_TD], dim=-1))
        swapped_TD = module.eh_proj(torch.cat([hidden_TD, embedding_TD], dim=-1))
        why = NOT_THE_SAME
        if alike(projected_TD, swapped_TD):
            why = Suspicion(6, "it gives eh_proj [hidden ; embedding], released checkpoints want [embedding ; hidden]")
        if self._compare(place, "norm of the embedding", embedding_TD, seen["enorm"], lambda: NOT_THE_SAME):
            self._compare(place, "norm of the hidden state", hidden_TD, seen["hnorm"], lambda: NOT_THE_SAME)
            self._compare(place, "projection", ours_TD, projected_TD, lambda: why)

    def _compare_head(self, place: str, norm: nn.Module, seen: Record, logits_TV: Tensor) -> None:
        x_TD, normed_TD = seen["norm before"], seen["norm"]
        ours_TD = norm(x_TD)
        eps = eps_of(normed_TD, ours_TD, x_TD, self.ours.config.rms_norm_eps)
        why = NOT_THE_SAME if eps is None else Suspicion(None, f"their eps is about {eps:.1g}")
        self._compare(place, "final norm", ours_TD, normed_TD, lambda: why)
        our_logits_TV = F.linear(normed_TD, self.ours.lm_head.weight)
        self._compare(place, "logits", our_logits_TV, logits_TV, lambda: NOT_THE_SAME)

    def _compare(
        self,
        place: str,
        part: str,
        ours: Tensor,
        theirs: Tensor,
        why: Callable[[], Suspicion],
        rounding: float = ROUNDING,
    ) -> bool:
        """Whether the two agree within rounding; if not, that is noted, unless the place has differed before."""
        if not ours.numel():
            return True
        absolute = float((ours - theirs).abs().max())
        relative = absolute / max(float(theirs.abs().max()), 1e-30)
        if relative <= rounding:
            self.worst = max(self.worst, (relative, f"{part} of {place}"))
            return True
        if place == MODEL or all(one.place != place for one in self.differences):
            self.differences.append(Difference(place, part, absolute, relative, why()))
        return False

    def finding(self) -> Finding:
        """What the run has shown."""
        check, config, engine = "against-transformers", self.ours.config, f"transformers {version()}"
        if not self.differences:
            layers = f"{config.num_hidden_layers} layers"
            if self.theirs.predictors is not None:
                layers += f" and {config.num_nextn_predict_layers} for MTP"
            farthest, (relative, where) = int(spread(len(self.tokens_T), config)[-1]), self.worst
            said = (
                f"{engine} computes the same: {layers}, {len(self.tokens_T)} tokens at positions up to {farthest:,}; "
                f"most apart is the {where}, by {relative:.0e} of its largest value."
            )
            return passed(check, said, relative=relative, part=where)
        first, others = self.differences[0], self.differences[1:]
        trap, why = first.suspicion.trap, first.suspicion.why
        return failed(
            check,
            f"The first part that differs from {engine} is the {first.part} of {first.place}, by {first.absolute:.2g} "
            f"({first.relative:.1%} of its largest value). Likely{f' trap {trap}' if trap else ''}: {why}."
            + (f" In {len(others)} more places something differs by itself." if others else ""),
            trap,
            place=first.place,
            part=first.part,
            absolute=first.absolute,
            relative=first.relative,
            why=why,
            others=[{"place": other.place, "part": other.part, "relative": other.relative} for other in others],
        )


def spread(count: int, config: ModelConfig) -> Tensor:
    """So many positions: half from 0 on, half at the far end of the context."""
    end = min(config.max_position_embeddings, FARTHEST)
    near = (count + 1) // 2
    return torch.cat([torch.arange(near), torch.arange(end - (count - near), end)])


def _some(tokens_T: Sequence[int] | Tensor | None, config: ModelConfig) -> Tensor:
    count = min(TOKENS, config.max_position_embeddings)
    if tokens_T is None or len(tokens_T) < 8:
        return torch.randint(config.vocab_size, (count,), generator=torch.Generator().manual_seed(0))
    return torch.as_tensor(tokens_T)[:count].long()


def _keep(hooks: ExitStack, module: nn.Module, name: str, seen: Record) -> None:
    """Keep what goes in and out of a module, without the batch axis."""

    def keep(_: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        seen[f"{name} before"], seen[name] = inputs[0][0], out[0]

    hooks.callback(module.register_forward_hook(keep).remove)


def _loading(theirs: Witness, config: ModelConfig) -> Iterator[Finding]:
    if theirs.missing:
        said = f"transformers finds no weights for {_few(theirs.missing)} and fills them at random."
        yield failed("against-loading", said, missing=list(theirs.missing))
    unread = [name for name in theirs.unread if not is_mtp(name, config)]
    if unread:
        yield warned("against-loading", f"transformers does not take {_few(unread)}.", unread=unread)


def _mtp(theirs: Witness, config: ModelConfig) -> Iterator[Finding]:
    if theirs.without_mtp:
        yield warned("against-mtp", f"The MTP modules were not compared: {theirs.without_mtp}.")
    elif theirs.predictors is not None and config.mtp_hidden == "pre_norm":
        said = "transformers feeds MTP after the norm, config.json says pre_norm: there fewer drafts will be accepted."
        yield warned("against-mtp", said, 6)


def _few(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")
