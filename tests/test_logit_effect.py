"""Logit effects are the derivative of the model's own logits, for every family."""

import pytest
import torch
from families import CONFIGS, tiny
from torch import Tensor

from gsae_core.analysis.features.logit_effects import extremes, has_logit_map, logit_map
from gsae_core.config import Site
from gsae_core.lm.model import LanguageModel
from gsae_core.lm.taps import hooked

# Sites of the last layer whose direct path is the only one.
ALONE: tuple[Site, ...] = ("resid_post", "mlp_out", "mlp_hidden")
PARALLEL: tuple[Site, ...] = (*ALONE, "attn_out", "attn_z")
CASES = [
    (family, site) for family in CONFIGS for site in (PARALLEL if family == "gpt_neox" else ALONE)
]
# Norms compute in float32 whatever comes, so the step is far above its rounding, and the difference
# takes five points: off by STEP^4 of the fifth derivative.
STEP = 0.03


def language_model(family: str) -> LanguageModel:
    return LanguageModel(tiny(family), object(), name=family)


def some_ids(n_rows: int = 3) -> Tensor:
    return torch.randint(0, 40, (n_rows, 9), generator=torch.Generator().manual_seed(5))


def change_of_logits(
    model: LanguageModel, ids: Tensor, direction: Tensor, *, layer: int, site: Site
) -> Tensor:
    """Return the five-point difference of the logits, averaged over tokens, in float64."""
    model.hf.double()

    def logits(step: float) -> Tensor:
        tap = model._blocks[layer].taps[site]
        with torch.no_grad(), hooked(tap, lambda x: x + step * direction.double()):
            return model.hf(input_ids=ids, use_cache=False).logits

    near, far = logits(STEP) - logits(-STEP), logits(2 * STEP) - logits(-2 * STEP)
    found = (8 * near - far) / (12 * STEP)
    model.hf.float()
    return found.mean((0, 1))


@pytest.mark.parametrize(("family", "site"), CASES)
def test_at_the_last_layer_the_effect_is_the_change_of_the_logits(family: str, site: Site) -> None:
    model = language_model(family)
    direction = torch.randn(model.width(site), generator=torch.Generator().manual_seed(1))
    direction /= direction.norm()
    # One token: with a cap on the logits, the averages of its slope and the norm's are taken apart.
    ids = some_ids()[:1, :1] if family == "gemma2" else some_ids()
    effect = logit_map(model, ids, layer=1, site=site).effect(direction[None])[0]
    change = change_of_logits(model, ids, direction, layer=1, site=site)
    scale = float(change.abs().max())
    torch.testing.assert_close(effect.double(), change, rtol=0, atol=1e-4 * max(scale, 1))
    assert scale > 1e-3  # the direction does something


def test_with_a_cap_the_average_over_tokens_is_close() -> None:
    model = language_model("gemma2")
    direction = torch.randn(12, generator=torch.Generator().manual_seed(1))
    ids = some_ids()
    found = logit_map(model, ids, layer=1, site="resid_post")
    assert found.cap_slope is not None
    assert (found.cap_slope > 0).all()
    assert (found.cap_slope < 1).all()
    change = change_of_logits(model, ids, direction, layer=1, site="resid_post")
    effect = found.effect(direction[None])[0].double()
    assert float(torch.cosine_similarity(effect, change, dim=0)) > 0.99


def test_at_an_earlier_layer_it_is_the_direct_path_alone() -> None:
    model = language_model("gpt2")
    direction = torch.randn(12, generator=torch.Generator().manual_seed(1))
    ids = some_ids()
    early = logit_map(model, ids, layer=0, site="resid_post").effect(direction[None])
    late = logit_map(model, ids, layer=1, site="resid_post").effect(direction[None])
    # A residual stream hands the direction on: the map does not depend on the layer.
    torch.testing.assert_close(early, late)
    change = change_of_logits(model, ids, direction, layer=0, site="resid_post")
    # Block 1 reads it too, which the direct path leaves out.
    assert float((early[0].double() - change).abs().max()) > 1e-2


def test_the_models_own_weights_stay_as_they_are() -> None:
    model = language_model("gemma")
    before = {name: value.clone() for name, value in model.hf.state_dict().items()}
    logit_map(model, some_ids(), layer=0, site="attn_z")
    for name, value in model.hf.state_dict().items():
        assert torch.equal(before[name], value)
    assert all(p.grad is None for p in model.hf.parameters())


def test_extremes_are_the_ends_of_the_effect() -> None:
    model = language_model("llama")
    found = logit_map(model, some_ids(), layer=1, site="resid_post")
    directions = torch.randn(5, 12, generator=torch.Generator().manual_seed(2))
    effect = found.effect(directions)
    top, top_effect, bottom, _ = extremes(found, directions, k=3)
    order = effect.argsort(1)
    assert bottom.tolist() == order[:, :3].tolist()
    assert top.tolist() == order.flip(1)[:, :3].tolist()
    torch.testing.assert_close(top_effect, effect.gather(1, top))


def test_without_a_known_norm_there_are_no_logit_effects() -> None:
    hf = tiny("llama")
    assert has_logit_map(LanguageModel(hf, object(), name="with"))
    del hf.base_model.norm
    assert not has_logit_map(LanguageModel(hf, object(), name="without"))
