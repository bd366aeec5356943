"""Planted features: where the truth is known, a recovered feature's index shows its planted tokens.

More sparse features than dimensions: each of 30 directions in 20 dimensions stands for a few words,
each word for two directions, and how strongly, if at all, depends on the word before
(arXiv:2404.16014v2, Appendix F, is the one-dimensional case of such a model).
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from index_cases import some_parts
from torch import Tensor

from gsae_core.analysis.features.build import build_index
from gsae_core.analysis.features.index import FeatureIndex, open_index
from gsae_core.config import Site, TrainConfig
from gsae_core.lm.model import LanguageModel
from gsae_core.sae.architectures import GatedSAE
from gsae_core.training.trainer import train

D_IN, N_PLANTED, D_SAE = 20, 30, 40
RECOVERED = 0.95


class Planted(LanguageModel):
    """A language model whose MLP neurons hold planted features and nothing else."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__(model.hf, model.tokenizer, name="planted")
        generator = torch.Generator().manual_seed(0)
        directions = torch.randn(N_PLANTED, D_IN, generator=generator)
        self.directions = directions / directions.norm(dim=1, keepdim=True)
        # Two features a token: each feature stands for two or three words, with other partners.
        self.holds = torch.zeros(40, N_PLANTED, dtype=torch.bool)
        for token in range(40):
            pair = [token % N_PLANTED, (7 * token + 1 + 11 * (token // N_PLANTED)) % N_PLANTED]
            self.holds[token, pair] = True

    def harvest(self, ids: Tensor, *, layer: int, site: Site) -> Tensor:
        if site != "mlp_hidden":
            return super().harvest(ids, layer=layer, site=site)
        before, feature = torch.roll(ids, 1, 1)[..., None], torch.arange(N_PLANTED)
        # From 0 to 1 by the word before, which differs from feature to feature; absent below 0.4.
        strength = (torch.sin(before * 12.9898 + feature * 78.233) * 43758.5453).frac().abs()
        strength = strength * (strength > 0.4)
        return (self.holds[ids] * strength) @ self.directions

    def words_of(self, feature: int) -> set[int]:
        return set(self.holds[:, feature].nonzero().flatten().tolist())


@dataclass
class Found:
    model: Planted
    index: FeatureIndex
    latent_of: dict[int, int]
    """Latent that recovered each planted feature."""


@pytest.fixture(scope="module")
def found(tiny_lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Found:
    model = Planted(tiny_lm)
    generator = torch.Generator().manual_seed(1)
    sae = GatedSAE(D_IN, D_SAE, seed=2)
    n_steps, batch = 1500, 256
    batches = (
        model.harvest(
            torch.randint(2, 40, (batch // 16, 16), generator=generator), layer=0, site="mlp_hidden"
        ).flatten(0, 1)
        for _ in range(n_steps)
    )
    recipe = TrainConfig(
        n_tokens=n_steps * batch,
        batch_size=batch,
        lr=3e-3,
        lr_warmup_steps=50,
        lr_decay_fraction=0.2,
        revive_every=300,
        revive_window=150,
        sparsity=(0.6,),
    )
    for _ in train([sae], batches, recipe):
        pass
    folder = tmp_path_factory.mktemp("planted")
    place: dict[str, Any] = {"layer": 0, "site": "mlp_hidden", "name": "planted", "text": "words"}
    for _ in build_index(model, sae, some_parts(200), folder, weights_sha256="0" * 64, **place):
        pass
    cosine = model.directions @ torch.nn.functional.normalize(sae.W_dec.detach(), dim=1).T
    best = cosine.max(1)
    latent_of = {
        planted: int(best.indices[planted])
        for planted in range(N_PLANTED)
        if best.values[planted] > RECOVERED
    }
    return Found(model, open_index(folder), latent_of)


@pytest.mark.slow
def test_most_planted_features_are_recovered(found: Found) -> None:
    assert len(found.latent_of) >= N_PLANTED * 3 // 4


@pytest.mark.slow
def test_the_index_of_a_recovered_feature_shows_its_planted_words(found: Found) -> None:
    for planted, latent in found.latent_of.items():
        feature = found.index.feature(latent)
        words = found.model.words_of(planted)
        # Weak firings may be interference, which an SAE of 1.5 features a dimension cannot avoid.
        ids = found.index.array("ids")
        assert all(ids[each.sequence, each.position] in words for each in feature.top(10)), planted
        assert feature.stats["top_tokens"][0] in words


@pytest.mark.slow
def test_a_planted_word_leads_to_its_features(found: Found) -> None:
    for word in range(2, 40):
        planted = found.model.holds[word].nonzero().flatten().tolist()
        expected = {found.latent_of[p] for p in planted if p in found.latent_of}
        firing = found.index.by_token(word)
        # A planted feature is absent from a word about four times in ten, by the word before.
        often = set(firing["feature"][firing["recall"] > 0.2])
        assert expected <= often, word
