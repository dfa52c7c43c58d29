"""The average of the weights: by hand, lent to the model and taken back, kept and put back."""

from copy import deepcopy

import pytest
import torch

from cavelight.model.transformer import Transformer
from cavelight.spec.presets import preset
from cavelight.train.ema import Ema
from cavelight.train.optim import initialise

CONFIG = preset("nano").replace(num_hidden_layers=1, num_nextn_predict_layers=0)


def some_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> Transformer:
    model = Transformer(CONFIG, dtype)
    initialise(model, 0.05, seed)
    return model


def masters_after(model: Transformer, step: int) -> dict[str, torch.Tensor]:
    return {name: p.detach().float() + 0.01 * (step + 1) for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_average_by_hand(dtype: torch.dtype) -> None:
    """At step t it keeps min(decay, (1 + t) / (10 + t)), and of the float32 masters, not of the rounded weights."""
    model = some_model(dtype)
    ema = Ema(model, decay=0.5)
    wanted = {name: p.detach().double() for name, p in model.named_parameters()}
    for step in range(12):
        masters = masters_after(model, step)
        ema.update(masters, step)
        stays = min(0.5, (1 + step) / (10 + step))
        wanted = {name: stays * w + (1 - stays) * masters[name].double() for name, w in wanted.items()}
    for name, average in ema.state().items():
        assert average.dtype == torch.float32
        torch.testing.assert_close(average.double(), wanted[name], atol=1e-6, rtol=1e-6, msg=name)


def test_a_long_average_forgets_where_it_began() -> None:
    """With a decay of 0.999 a plain average would hold 90 % of its beginning after 100 steps."""
    model = some_model()
    ema = Ema(model, decay=0.999)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(100):
        ema.update({name: weight + 1 for name, weight in start.items()}, step)
    for name, average in ema.state().items():
        torch.testing.assert_close(average, start[name] + 1, atol=1e-4, rtol=0, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_average_is_lent_and_taken_back_to_the_bit(dtype: torch.dtype) -> None:
    model, tokens_T = some_model(dtype), torch.arange(9)
    ema = Ema(model, decay=0.9)
    ema.update(masters_after(model, 0), 0)
    own, averaged = deepcopy(model.state_dict()), some_model(dtype)
    averaged.load_state_dict(own | {name: t.to(dtype) for name, t in ema.state().items()})
    kept = deepcopy(ema.state())
    with torch.no_grad():
        before = model.logits(tokens_T)
        with pytest.raises(KeyboardInterrupt), ema.swapped(model):
            within = model.logits(tokens_T)
            raise KeyboardInterrupt
        assert torch.equal(within, averaged.logits(tokens_T))
        assert not torch.equal(within, before)
        assert torch.equal(model.logits(tokens_T), before)
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, kept[name]) for name, tensor in ema.state().items())


def test_training_goes_on_as_if_nothing_had_been_lent() -> None:
    """The optimizer writes to the very weights that were swapped out."""
    model = some_model()
    ema, weight = Ema(model, decay=0.9), model.lm_head.weight
    place = weight.data_ptr()
    with ema.swapped(model):
        assert model.lm_head.weight is weight and weight.data_ptr() != place
    assert weight.data_ptr() == place
    with torch.no_grad():
        weight.add_(1.0)
    assert not torch.equal(ema.state()["lm_head.weight"], weight)


def test_a_kept_average_goes_on_to_the_same_bits() -> None:
    model = some_model(torch.bfloat16)
    ema, again = Ema(model, decay=0.9), Ema(some_model(torch.bfloat16, seed=7), decay=0.9)
    ema.update(masters_after(model, 0), 0)
    again.load_state(deepcopy(ema.state()))
    for average in (ema, again):
        average.update(masters_after(model, 1), 1)
    assert all(torch.equal(tensor, again.state()[name]) for name, tensor in ema.state().items())
