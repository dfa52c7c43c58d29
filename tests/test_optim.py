"""What the optimizer writes: AdamW by hand, Muon beside torch's, states kept and put back."""

from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from torch import nn

from cavelight.errors import UserError
from cavelight.model.transformer import Transformer
from cavelight.spec.presets import preset
from cavelight.spec.recipe import Recipe
from cavelight.spec.sections import BFLOAT16_MOVES, TrainSection
from cavelight.spec.shapes import parameters
from cavelight.train.adamw import AdamW
from cavelight.train.muon import Muon, orthogonal
from cavelight.train.optim import Optimizer, initialise

RATES = TrainSection(steps=3, learning_rate=0.01, weight_decay=0.1, embedding_rate=5.0, head_rate=2.0, init_std=0.05)
MUON = RATES.model_copy(update={"optimizer": "muon"})
SMALL = preset("nano").replace(num_hidden_layers=2, q_lora_rank=None)  # MLA, a dense FFN, experts, an MTP module


def some_gradients(model: Transformer, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator).to(p.dtype) * 0.01 for p in model.parameters()]


def fresh(recipe: TrainSection, dtype: torch.dtype = torch.float32) -> tuple[Transformer, Optimizer]:
    model = Transformer(SMALL, dtype)
    initialise(model, recipe.init_std, seed=0)
    return model, Optimizer(model, recipe)


def one_step(optimizer: Optimizer, gradients: list[torch.Tensor], clip_norm: float = 1.0) -> None:
    optimizer.add(gradients)
    optimizer.step(RATES.learning_rate, clip_norm, optimizer.gradient_norm())


# Initialisation


def test_initialisation_goes_by_role() -> None:
    model = Transformer(preset("nano"))
    initialise(model, 0.05, seed=1, stds={"embedding": 0.5, "gate": 0.0})
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for parameter in parameters(model.config):
        tensor = tensors[parameter.name]
        if parameter.role == "norm":
            assert torch.equal(tensor, torch.ones_like(tensor))
        elif parameter.role in ("routing_bias", "gate"):
            assert not tensor.any()
        else:
            wanted = 0.5 if parameter.role == "embedding" else 0.05
            assert float(tensor.detach().std()) == pytest.approx(wanted, rel=0.15), parameter.name
            assert abs(float(tensor.detach().mean())) < 6 * wanted / tensor.numel() ** 0.5


def test_a_seed_means_the_same_model_in_every_dtype_and_whatever_deviations_roles_have() -> None:
    whole, narrow, other = Transformer(SMALL), Transformer(SMALL, torch.bfloat16), Transformer(SMALL)
    initialise(whole, 0.05, seed=3)
    initialise(narrow, 0.05, seed=3)
    initialise(other, 0.05, seed=3, stds={"embedding": 0.5})
    for (name, weight), rounded, others in zip(
        whole.named_parameters(), narrow.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(weight.bfloat16(), rounded), name
        assert torch.equal(weight, others) != ("embed_tokens" in name), name


# AdamW


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_steps_equal_adamw_by_hand(dtype: torch.dtype) -> None:
    """Norms do not decay, embedding and head have their rates, narrow weights are rounded masters."""
    model = Transformer(preset("nano"), dtype)
    initialise(model, RATES.init_std, seed=0)
    masters = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    moments = {name: (torch.zeros_like(m), torch.zeros_like(m)) for name, m in masters.items()}
    optimizer = Optimizer(model, RATES)
    for t in (1, 2):
        parts = [some_gradients(model, 10 * t), some_gradients(model, 10 * t + 1)]
        total = {n: sum(g[i].double() for g in parts) for i, (n, _) in enumerate(model.named_parameters())}
        norm = torch.stack([g.square().sum() for g in total.values()]).sum().sqrt()
        clip = min(1.0, 0.5 / float(norm))
        for part in parts:
            optimizer.add(part)
        assert float(optimizer.gradient_norm()) == pytest.approx(float(norm), rel=1e-4)
        optimizer.step(RATES.learning_rate, 0.5, optimizer.gradient_norm())
        for name, w in masters.items():
            g, (m, v) = total[name] * clip, moments[name]
            rate = RATES.learning_rate * (5.0 if "embed_tokens" in name else 2.0 if "lm_head" in name else 1.0)
            decay = 0.0 if w.ndim == 1 else RATES.learning_rate * RATES.weight_decay
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.95).add_(0.05 * g.square())
            w.mul_(1 - decay).sub_(rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8))
    for name, weight in model.named_parameters():
        torch.testing.assert_close(optimizer.masters[name].double(), masters[name], atol=2e-5, rtol=1e-4, msg=name)
        assert torch.equal(weight, optimizer.masters[name].to(dtype)), name


@pytest.mark.parametrize("recipe", [RATES, MUON], ids=["adamw", "muon"])
def test_a_gradient_that_lies_otherwise_in_memory_counts_the_same(recipe: TrainSection) -> None:
    written = []
    for transposed in (False, True):
        model, optimizer = fresh(recipe)
        gradients = some_gradients(model, 1)
        one_step(optimizer, [g.mT.contiguous().mT if transposed and g.ndim > 1 else g for g in gradients])
        written.append(model.state_dict())
    for name, tensor in written[0].items():
        assert torch.equal(tensor, written[1][name]), name


def test_bfloat16_moments_are_rounded_ones_and_are_kept() -> None:
    """One step from rest equals that of float32 moments, since both are widened alike; then only rounding differs."""
    narrow = RATES.model_copy(update={"moments": "bfloat16"})
    (model, optimizer), (twin, wide) = fresh(narrow), fresh(RATES)
    for each, its in ((model, optimizer), (twin, wide)):
        one_step(its, some_gradients(each, 1))
    for (name, weight), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(weight, other), name
    for parameter, moments in optimizer.adamw.moments.items():
        name = next(name for name, master in optimizer.masters.items() if master is parameter)
        for kind in ("exp_avg", "exp_avg_sq"):
            assert moments[kind].dtype == torch.bfloat16
            assert torch.equal(moments[kind], wide.adamw.moments[wide.masters[name]][kind].bfloat16()), name
    kept = deepcopy(optimizer.state())
    again_model, again = fresh(narrow)
    again.load_state(kept)
    for each, its in ((model, optimizer), (again_model, again)):
        one_step(its, some_gradients(each, 2))
    for (name, weight), other in zip(model.named_parameters(), again_model.parameters(), strict=True):
        assert torch.equal(weight, other), name


def test_a_state_of_torchs_adamw_goes_on_and_what_no_gradient_had_reached_begins_anew() -> None:
    """Saves of earlier versions hold such states."""
    start = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    theirs, ours = ([nn.Parameter(value.clone()) for value in start] for _ in range(2))
    groups = [{"params": theirs[:1], "weight_decay": 0.0}, {"params": theirs[1:], "weight_decay": 0.1}]
    witness = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), fused=True)
    adamw = AdamW([ours[:1], ours[1:]], (0.9, 0.95))

    def gradients(parameters: list[nn.Parameter], reached: list[int], seed: int) -> None:
        drawn = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed))
        for place, parameter in enumerate(parameters):
            parameter.grad = drawn[place].clone() if place in reached else None

    gradients(theirs, [0, 2], seed=1)
    witness.step()
    for moments in adamw.moments.values():  # of a run that had gone on when it goes back
        for tensor in moments.values():
            tensor.fill_(7)
    adamw.load_state(deepcopy(witness.state_dict()))
    for one, other in zip(ours, theirs, strict=True):
        one.data.copy_(other.data)
    for seed, reached in ((2, [0, 1, 2]), (3, [1])):
        for each in (ours, theirs):
            gradients(each, reached, seed)
        witness.step()
        adamw.step([0.01, 0.01], [0.0, 0.1])
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_a_run_may_go_on_with_other_moments() -> None:
    """Rounded, or widened without a loss."""
    narrow = RATES.model_copy(update={"moments": "bfloat16"})
    model, optimizer = fresh(RATES)
    one_step(optimizer, some_gradients(model, 1))
    _, rounded = fresh(narrow)
    rounded.load_state(deepcopy(optimizer.state()))
    _, widened = fresh(RATES)
    widened.load_state(deepcopy(rounded.state()))
    every = (its.adamw.moments.values() for its in (optimizer, rounded, widened))
    for first, second, third in zip(*every, strict=True):
        assert first["step"] == second["step"] == third["step"] == 1
        for kind in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(second[kind], first[kind].bfloat16())
            assert torch.equal(third[kind], second[kind].float())


def test_all_of_a_parameters_state_lies_where_it_lies() -> None:
    """Its count of steps too, which torch's kernel of an accelerator reads there."""
    parameter = nn.Parameter(torch.empty(2, 3, device="meta"))
    moments = AdamW([[parameter]], (0.9, 0.95)).moments[parameter]
    assert {tensor.device.type for tensor in moments.values()} == {"meta"}


@pytest.mark.parametrize("name", ["beta1", "beta2"])
def test_bfloat16_moments_that_would_stand_still_are_refused(name: str) -> None:
    """A step without a gradient moves whatever a moment may be up to the largest beta, and not all of it beyond."""
    values = torch.arange(1.0, 2.0, 2**-7).bfloat16()
    for beta, moves in ((BFLOAT16_MOVES, True), (0.997, False)):
        parameter = nn.Parameter(torch.zeros_like(values, dtype=torch.float32))
        adamw = AdamW([[parameter]], (beta, beta), torch.bfloat16)
        for kind in ("exp_avg", "exp_avg_sq"):
            adamw.moments[parameter][kind].copy_(values)
        parameter.grad = torch.zeros_like(parameter)
        adamw.step([0.1], [0.0])
        for kind in ("exp_avg", "exp_avg_sq"):
            assert bool((adamw.moments[parameter][kind] < values).all()) == moves, (beta, kind)
        told = {"data": {"row_length": 64}, "train": {"steps": 1, name: beta}}
        Recipe.build(told)
        with nullcontext() if moves else pytest.raises(UserError, match=f"stand still: a step of {name} above 0.996"):
            Recipe.build(told, ["train.moments=bfloat16"])


# Muon


@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40), (3, 2, 12, 30), (5, 30, 12)])
def test_an_update_is_orthogonal_and_keeps_its_directions(shape: tuple[int, ...]) -> None:
    """U S V^T becomes nearly U V^T: singular values near 1, and what the matrix is multiplied with stays positive."""
    u, _, vh = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(2)), full_matrices=False)
    s = torch.linspace(0.1, 1.0, u.shape[-1])
    found = orthogonal(u * s @ vh)
    core = u.mT @ found @ vh.mT
    values = core.diagonal(dim1=-2, dim2=-1)
    assert float(values.min()) > 0.65 and float(values.max()) < 1.25
    torch.testing.assert_close(core, torch.diag_embed(values), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.linalg.svdvals(found).sort().values, values.sort().values, atol=1e-4, rtol=0)


def test_scale_means_nothing_and_nothing_stays_nothing() -> None:
    matrices = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(orthogonal(matrices * 1024), orthogonal(matrices))
    matrices[1] = 0
    found = orthogonal(matrices)
    assert not found[1].any() and found.isfinite().all()


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_two_steps_equal_torchs_muon(shape: tuple[int, int]) -> None:
    """In bfloat16, which torch's always computes in, and for each matrix of a stack as for one."""
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(3, *shape, generator=generator)
    single = [nn.Parameter(matrix.clone()) for matrix in stack]
    witness = torch.optim.Muon(single, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    ours = Muon({"stack": stack, "first": (first := stack[0].clone())}, torch.bfloat16)
    for _ in range(2):
        gradient = torch.randn(3, *shape, generator=generator)
        ours.step({"stack": gradient, "first": gradient[0]}, 0.02, 0.1)
        for parameter, part in zip(single, gradient, strict=True):
            parameter.grad = part.clone()
        witness.step()
    wanted = torch.stack([p.detach() for p in single])
    torch.testing.assert_close(stack, wanted, atol=2e-4, rtol=0)
    torch.testing.assert_close(first, wanted[0], atol=2e-4, rtol=0)


def test_muon_takes_the_matrices_of_the_layers_and_adamw_the_rest() -> None:
    """Heads of an up-projection are one matrix, experts are many; embedding, head, gates and norms go on as before."""
    (model, muon), (twin, adamw) = fresh(MUON), fresh(RATES)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    one_step(muon, some_gradients(model, 1))
    one_step(adamw, some_gradients(model, 1))
    after, plain = dict(model.named_parameters()), dict(twin.named_parameters())
    roles = {parameter.name: parameter.role for parameter in parameters(SMALL)}
    for name, weight in before.items():
        now = after[name].detach()
        if roles[name] in ("embedding", "head", "gate", "norm"):
            assert torch.equal(now, plain[name]), name
            continue
        update = (weight * (1 - RATES.learning_rate * RATES.weight_decay) - now) / RATES.learning_rate
        matrices = update.flatten(0, 1) if name.endswith(("k_up", "v_up")) else update
        rows, columns = matrices.shape[-2:]
        assert matrices.ndim == (3 if ".experts." in name else 2)
        values = torch.linalg.svdvals(matrices / (0.2 * max(rows, columns) ** 0.5))
        assert float(values.median()) == pytest.approx(0.95, abs=0.25), name
        assert float(values.max()) < 1.3, name
        assert 0.1 < float(update.square().mean().sqrt()) < 0.25, name  # about as large as AdamW's


# Both


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recipe", [RATES, MUON], ids=["adamw", "muon"])
def test_a_kept_state_goes_on_to_the_same_bits(recipe: TrainSection, dtype: torch.dtype) -> None:
    model, optimizer = fresh(recipe, dtype)
    one_step(optimizer, some_gradients(model, 1))
    kept = deepcopy(optimizer.state())
    one_step(optimizer, some_gradients(model, 2))
    other = Transformer(SMALL, dtype)
    initialise(other, 0.5, seed=9)
    again = Optimizer(other, recipe)
    again.load_state(kept)
    one_step(again, some_gradients(model, 2))
    for (name, weight), same in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(weight, same), name
        assert torch.equal(optimizer.masters[name], again.masters[name]), name


@pytest.mark.parametrize("recipe", [RATES, MUON], ids=["adamw", "muon"])
def test_forgotten_gradients_change_nothing(recipe: TrainSection) -> None:
    (model, optimizer), (other, untouched) = fresh(recipe), fresh(recipe)
    one_step(optimizer, some_gradients(model, 1))
    one_step(untouched, some_gradients(model, 1))
    optimizer.add(some_gradients(model, 2))
    optimizer.forget()
    one_step(optimizer, some_gradients(model, 3))
    one_step(untouched, some_gradients(model, 3))
    for (name, weight), same in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(weight, same), name


@pytest.mark.parametrize("recipe", [RATES, MUON], ids=["adamw", "muon"])
def test_rates_and_decay_of_a_resumed_run_are_the_recipes(recipe: TrainSection) -> None:
    """A state carries no settings: without gradients, only the new decay moves a matrix."""
    model, optimizer = fresh(recipe)
    zeros = [torch.zeros_like(p) for p in model.parameters()]  # clipped or summed, they stay what they are
    one_step(optimizer, zeros)
    other, again = fresh(recipe.model_copy(update={"weight_decay": 0.5, "embedding_rate": 1.0}))
    again.load_state(deepcopy(optimizer.state()))
    before = {name: p.detach().clone() for name, p in other.named_parameters()}
    one_step(again, zeros)
    for name, weight in other.named_parameters():
        wanted = before[name] * (1.0 if weight.ndim == 1 else 1 - 0.01 * 0.5)
        torch.testing.assert_close(weight.detach(), wanted, atol=1e-8, rtol=1e-6, msg=name)
