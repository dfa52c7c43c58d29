"""Looking inside a checkpoint: the numbers are those of plain computations, and what is planted is found and told."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.looked import FAMILIES, FULL, Weights, mismatched, planted, written
from tests.reference.random_weights import random_weights

from cavelight.errors import UserError
from cavelight.see.experts import expert_norms, routing_bias
from cavelight.see.latents import latent, query_latent
from cavelight.see.magnitudes import norm_weights, parameters_table, weight_spread
from cavelight.see.measure import Measures, Summary, measure
from cavelight.see.prediction import halves, mtp_against_trunk, norm_cosine
from cavelight.see.spectrum import effective_rank, energy_rank, participation_ratio
from cavelight.spec.formats import FP8, INT4, Format
from cavelight.weights.stored import Checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return written(tmp_path_factory.mktemp("full"), FULL, random_weights(FULL))


@pytest.fixture(scope="module")
def found(checkpoint: Checkpoint) -> Measures:
    return measure(checkpoint)


def test_sums_over_every_tensor_are_those_of_plain_sums(found: Measures) -> None:
    for name, tensor in random_weights(FULL).items():
        summary, wide = found.summaries[name], tensor.double()
        assert summary.count == tensor.numel() and not summary.not_finite
        assert summary.norm == pytest.approx(float(wide.norm()), rel=1e-6)
        assert summary.std == pytest.approx(float(wide.std(correction=0)), rel=1e-5)
        assert (summary.low, summary.high) == (float(tensor.min()), float(tensor.max()))
    pooled = torch.cat([random_weights(FULL)[f"model.layers.2.mlp.experts.{e}.up_proj.weight"] for e in range(8)])
    assert found.pooled(2, "experts' up_proj").std == pytest.approx(float(pooled.std(correction=0)), rel=1e-5)


def test_a_summary_in_blocks_leaves_out_what_is_not_finite() -> None:
    values = torch.tensor([1.0, -3.0, float("nan"), float("inf"), 2e20, 5.0], dtype=torch.float64)
    summary = Summary()
    for block in values.split(2):
        summary.add(block)
    assert (summary.count, summary.not_finite, summary.low, summary.high) == (6, 2, -3.0, 2e20)
    assert summary.std == pytest.approx(float(values[[0, 1, 4, 5]].std(correction=0)), rel=1e-12)
    assert np.isnan(summary.norm)
    large = Summary()
    large.add(torch.tensor([3e30, 4e30]))
    assert large.norm == pytest.approx(5e30)


@pytest.mark.parametrize("family", ["V3 with MTP", "V2"])
def test_singular_values_are_those_of_the_whole_maps(tmp_path: Path, family: str) -> None:
    config = FAMILIES[family]
    weights = {name: tensor.double() for name, tensor in random_weights(config).items()}
    found = measure(written(tmp_path, config, random_weights(config)))
    assert sorted(found.latents) == list(range(config.num_layers_with_mtp))
    assert sorted(found.query_latents) == (sorted(found.latents) if config.q_lora_rank else [])
    for kept, kind, down in ((found.latents, "kv", "kv_a_proj_with_mqa"), (found.query_latents, "q", "q_a_proj")):
        for layer, spectra in kept.items():
            at = f"model.layers.{layer}.self_attn"
            norm = weights[f"{at}.{kind}_a_layernorm.weight"]
            into = weights[f"{at}.{down}.weight"][: len(norm)] * weights[f"model.layers.{layer}.input_layernorm.weight"]
            out = weights[f"{at}.{kind}_b_proj.weight"]
            for values, whole in (
                (spectra.written, norm[:, None] * into),
                (spectra.read, out * norm),
                (spectra.through, (out * norm) @ into),
            ):
                plainly = torch.linalg.svdvals(whole)[: len(norm)].numpy()
                np.testing.assert_allclose(values, plainly, rtol=1e-6, atol=1e-7 * plainly[0])


def test_ranks_of_spectra_that_one_knows() -> None:
    even, single, nothing = np.ones(12), np.array([3.0, 0.0, 0.0]), np.zeros(4)
    for rank in (effective_rank, participation_ratio, energy_rank):
        assert rank(even) == pytest.approx(12)
        assert rank(single) == pytest.approx(1)
        assert rank(nothing) == 0
        assert np.isnan(rank(np.full(3, np.nan)))
    assert participation_ratio(np.array([2.0, 1.0])) == pytest.approx(25 / 17)
    assert energy_rank(np.array([9.95, 0.5, 0.5])) == 1 and energy_rank(np.array([9.0, 1.0, 1.0])) == 2 + 1
    shares = np.array([0.75, 0.25])
    assert effective_rank(np.array([3.0, 1.0])) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


def test_a_latent_of_low_rank_is_named(tmp_path: Path) -> None:
    def narrow(weights: Weights) -> None:
        up = weights["model.layers.1.self_attn.kv_b_proj.weight"]
        weights["model.layers.1.self_attn.kv_b_proj.weight"] = up[:, :3] @ torch.randn(3, up.shape[1])

    found = planted(tmp_path, narrow)
    ranks = {layer: energy_rank(spectra.through) for layer, spectra in found.latents.items()}
    assert ranks[1] <= 3 < min(rank for layer, rank in ranks.items() if layer != 1)
    figure = latent(found)
    assert re.match(r"Layer 1 uses least: an effective rank of [12]\.\d+ of 16, ", figure.finding)
    query = query_latent(found)
    assert query is not None and " of 24, " in query.finding


def test_biases_below_zero_and_their_spread_are_told(tmp_path: Path) -> None:
    biases = {f"model.layers.{layer}.mlp.gate.e_score_correction_bias": torch.full((8,), 2.0) for layer in (1, 2, 3)}
    biases["model.layers.2.mlp.gate.e_score_correction_bias"][5] = -0.25
    figure = routing_bias(planted(tmp_path / "one", lambda weights: weights.update(biases)))
    assert figure is not None
    assert figure.finding.startswith("1 of 24 biases is negative, the lowest −0.25 (expert 5 of layer 2);")
    assert figure.finding.endswith("Experts differ most in layer 2, by 2.25.")
    heat = figure.panels[0]
    assert heat.rows == ("layer 1", "layer 2", "MTP") and np.argwhere(heat.marks).tolist() == [[1, 5]]
    assert heat.shades[1, 5] == -1 and (np.delete(heat.shades[1], 5) == 0).all()

    biases["model.layers.2.mlp.gate.e_score_correction_bias"][5] = 2.5
    figure = routing_bias(planted(tmp_path / "none", lambda weights: weights.update(biases)))
    assert figure is not None and figure.finding.startswith("No bias is negative; the lowest is 2 ")
    zero = {name: torch.zeros(8) for name in biases}
    figure = routing_bias(planted(tmp_path / "zero", lambda weights: weights.update(zero)))
    assert figure is not None and figure.finding.startswith("All biases are zero")


def test_dead_and_outsize_experts_are_told(tmp_path: Path, found: Measures) -> None:
    def spoil(weights: Weights) -> None:
        weights["model.layers.1.mlp.experts.3.down_proj.weight"].zero_()
        weights["model.layers.3.mlp.experts.6.gate_proj.weight"] *= 20

    figure = expert_norms(planted(tmp_path, spoil))
    assert figure is not None
    assert figure.finding.startswith("2 experts stand out: expert 3 of layer 1 is dead (down_proj at 0 times")
    assert re.search(r"expert 6 of MTP is outsize \(gate_proj at \d\d\.\d times the median\)\.$", figure.finding)
    gate, _, down, router, _ = figure.panels
    assert np.argwhere(gate.marks).tolist() == [[2, 6]] and np.argwhere(down.marks).tolist() == [[0, 3]]
    assert (gate.shades[2, 6], down.shades[0, 3]) == (1, -1) and not router.marks.any()

    figure = expert_norms(found)
    assert figure is not None and figure.finding.startswith("No expert is dead or outsize: all lie between ")
    weights = random_weights(FULL)
    norms = [float(weights[f"model.layers.2.mlp.experts.{e}.up_proj.weight"].norm()) for e in range(8)]
    np.testing.assert_allclose(figure.panels[1].values[1], np.array(norms) / np.median(norms), rtol=1e-5)
    rows = weights["model.layers.1.mlp.gate.weight"].norm(dim=1)
    np.testing.assert_allclose(figure.panels[3].values[0], rows / rows.quantile(0.5), rtol=1e-5)


def test_what_mtp_takes_and_how_it_resembles_the_trunk(tmp_path: Path, found: Measures) -> None:
    weights = {name: tensor.double() for name, tensor in random_weights(FULL).items()}
    at, D = "model.layers.3", FULL.hidden_size
    joined = weights[f"{at}.eh_proj.weight"]
    embedding, hidden = (
        joined[:, :D] * weights[f"{at}.enorm.weight"],
        joined[:, D:] * weights[f"{at}.hnorm.weight"],
    )
    assert halves(found, 3) == pytest.approx((float(embedding.norm()), float(hidden.norm())), rel=1e-6)
    both = weights[f"{at}.shared_head.norm.weight"], weights["model.norm.weight"]
    assert norm_cosine(found, 3) == pytest.approx(float(torch.cosine_similarity(*both, dim=0)), rel=1e-6)
    assert set(found.copies.values()) == {0} and len(found.copies) == 2
    share = float(hidden.norm() ** 2 / (hidden.norm() ** 2 + embedding.norm() ** 2))
    figure = mtp_against_trunk(found)
    assert figure is not None and figure.finding.startswith(f"MTP takes {share:.0%} of its input from the hidden state")

    def deaf(weights: Weights) -> None:
        weights[f"{at}.eh_proj.weight"][:, D:] = 0
        weights[f"{at}.embed_tokens.weight"][2, 3] += 1

    figure = mtp_against_trunk(planted(tmp_path, deaf))
    assert figure is not None
    assert figure.finding.startswith("MTP takes 0% of its input from the hidden state and 100% from the embedding")
    assert figure.finding.endswith("Not the copies that they should be: model.layers.3.embed_tokens.weight.")
    rows = {row[0]: row[1] for row in figure.panels[2].rows}
    assert (rows["copy of the embedding"], rows["copy of the head"]) == ("other in 1 element", "equal")


def test_fresh_and_trained_weights_are_told_apart(tmp_path: Path, found: Measures) -> None:
    assert weight_spread(found).finding.startswith("Against initializer_range 0.02, the largest is ")

    def fresh(weights: Weights) -> None:
        for name, tensor in weights.items():
            if tensor.dim() == 2:
                weights[name] = (tensor - tensor.mean()) * (0.02 / tensor.std(correction=0))
            elif "norm" in name:
                tensor.fill_(1)
        for name, original in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
            weights[f"model.layers.3.{name}.weight"] = weights[f"{original}.weight"]

    untrained = planted(tmp_path, fresh)
    assert weight_spread(untrained).finding.endswith("this model looks untrained.")
    assert norm_weights(untrained).finding == "All weights are exactly 1: these norms were never trained."


def test_a_loud_norm_is_named(tmp_path: Path) -> None:
    def loud(weights: Weights) -> None:
        weights["model.layers.2.post_attention_layernorm.weight"][7] = 40
        weights["model.layers.1.self_attn.kv_a_layernorm.weight"] *= 0.01

    finding = norm_weights(planted(tmp_path, loud)).finding
    assert finding.startswith("The largest single weight is 40 (post_attention_layernorm of layer 2);")
    assert "the smallest are those of self_attn.kv_a_layernorm of layer 1, " in finding


def test_the_table_adds_up(checkpoint: Checkpoint, found: Measures) -> None:
    roles, layers = parameters_table(found).panels
    whole = sum(file.stat().st_size for file in checkpoint.folder.glob("*.safetensors"))
    assert 0 <= whole - sum(found.stored_bytes.values()) < 40_000  # the header
    assert sum(found.stored_bytes.values()) == sum(4 * tensor.numel() for tensor in random_weights(FULL).values())
    assert roles.rows[-1][0] == "all" and roles.rows[-1][-1] == "32"
    assert [row[0] for row in layers.rows] == ["layer 0", "layer 1 to 2, each", "MTP"]


@pytest.mark.parametrize("form", [FP8, INT4], ids=["fp8", "int4"])
def test_packed_weights_are_seen_as_what_they_stand_for(tmp_path: Path, found: Measures, form: Format) -> None:
    packed = measure(written(tmp_path, FULL, random_weights(FULL), form))
    for name, summary in packed.summaries.items():
        assert summary.norm == pytest.approx(found.summaries[name].norm, rel=0.05), name
    name = "model.layers.1.mlp.experts.0.up_proj.weight"  # [16, 32]
    assert packed.stored_bytes[name] == {"fp8": 16 * 32 + 4, "int": 16 * 32 // 2 + 16 * 4 + 16}[form.kind]
    roles = {row[0]: row for row in parameters_table(packed).panels[0].rows}
    assert float(roles["routed experts"][-1]) < 9 and roles["embedding"][-1] == "32"
    np.testing.assert_allclose(packed.latents[1].through, found.latents[1].through, rtol=0.2, atol=0.1)


def test_modules_that_are_announced_or_not_and_there_or_not(tmp_path: Path) -> None:
    without = FULL.replace(num_nextn_predict_layers=0)
    trunk = random_weights(without)
    found = measure(mismatched(tmp_path / "announced", FULL, trunk))
    assert found.config.num_nextn_predict_layers == 0 and found.notes[0].startswith("config.json announces MTP")
    found = measure(mismatched(tmp_path / "silent", without, random_weights(FULL)))
    assert not any(".layers.3." in name for name in found.summaries)
    assert "of an MTP layer that config.json does not announce" in found.notes[0]
    del trunk["model.layers.1.mlp.experts.3.up_proj.weight"]
    with pytest.raises(UserError, match=r"1 missing \(model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight\)"):
        measure(mismatched(tmp_path / "holes", without, trunk))
