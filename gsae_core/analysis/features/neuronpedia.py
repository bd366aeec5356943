"""Features as the JSON that Neuronpedia's importer reads: a batch as SAEDashboard writes it.

What this package does not compute (alignment with neurons, histograms of logits) is left empty,
which the format allows. Activations come in groups: the strongest (`bin_min` and `bin_contains` are
-1), then slices of the firings with their range and share.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float64

from gsae_core.analysis.features.examples import Example
from gsae_core.analysis.features.index import cosines
from gsae_core.files import write_json

if TYPE_CHECKING:
    from gsae_core.analysis.features.index import Feature

EMPTY = (
    "neuron_alignment_indices",
    "neuron_alignment_values",
    "neuron_alignment_l1",
    "correlated_neurons_indices",
    "correlated_neurons_l1",
    "correlated_neurons_pearson",
    "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values",
    "decoder_weights_dist",
)
# Its dashboards show 20 strongest examples and 5 of each of 10 groups.
N_TOP, N_GROUPS, N_IN_GROUP = 20, 10, 5


def batch(features: Sequence["Feature"], *, model_id: str, sae_set: str) -> dict[str, Any]:
    """Return features of one index as one batch.

    Args:
        model_id: Neuronpedia's name of the model.
        sae_set: Neuronpedia's name of the set of SAEs.
    """
    layer = features[0].index.manifest.layer if features else 0
    found = [_feature(feature) for feature in features]
    return {"model_id": model_id, "layer": layer, "sae_set": sae_set, "features": found}


def write_batch(
    features: Sequence["Feature"], path: Path | str, *, model_id: str, sae_set: str
) -> Path:
    """Write `batch` to a file (the importer looks for `batch-0.json` and so on); return its path.

    Raises:
        InputError: if the disk is full or the place cannot be written.
    """
    path = Path(path)
    write_json(path, batch(features, model_id=model_id, sae_set=sae_set))
    return path


def _feature(feature: "Feature") -> dict[str, Any]:
    manifest, row = feature.index.manifest, feature.stats
    histogram, logits = feature.histogram, feature.logits
    middles = (histogram.edges[:-1] + histogram.edges[1:]) / 2
    alike = feature.co_firing["feature"].to_numpy()
    cosine = cosines(feature, feature.index)[alike]
    return {name: [] for name in EMPTY} | {
        "feature_index": feature.number,
        "correlated_features_indices": alike.tolist(),
        # Its writer puts cosines of decoder directions under this name.
        "correlated_features_l1": cosine.astype(float).round(3).tolist(),
        "correlated_features_pearson": correlations(feature).round(3).tolist(),
        "neg_str": [each.text for each in logits.bottom],
        "neg_values": [round(each.effect, 3) for each in logits.bottom],
        "pos_str": [each.text for each in logits.top],
        "pos_values": [round(each.effect, 3) for each in logits.top],
        "frac_nonzero": float(row["density"]),
        "freq_hist_data_bar_values": middles.round(3).tolist(),
        "freq_hist_data_bar_heights": histogram.counts.tolist(),
        "n_prompts_total": sum(split.n_sequences for split in manifest.splits),
        "n_tokens_in_prompt": manifest.n_ctx,
        "dataset": manifest.text,
        "activations": _activations(feature),
    }


def correlations(feature: "Feature") -> Float64[np.ndarray, " companions"]:
    """Return Pearson's correlation of firing or not, with each of `feature.co_firing`."""
    together = feature.co_firing
    n = feature.index.n_tokens / feature.index.manifest.companion_stride
    both = together["both"].to_numpy(float)
    # lift = both n / (a b), jaccard = both / (a + b - both): a + b and a b follow.
    product = both * n / together["lift"].to_numpy(float)
    total = both / together["jaccard"].to_numpy(float) + both
    spread = product * (n * n - n * total + product)
    return (n * both - product) / np.sqrt(spread)


def _activations(feature: "Feature") -> list[dict[str, Any]]:
    if feature.is_dead:
        return []
    top = [
        _activation(example, low=-1.0, high=float(feature.values[0]), share=-1.0)
        for example in feature.top(N_TOP)
    ]
    groups = feature.quantiles(N_GROUPS, k=N_IN_GROUP)
    fired = len(feature.values)
    return top + [
        _activation(example, low=group.low, high=group.high, share=group.n_fired / fired)
        for group in groups
        for example in group.examples
    ]


def _activation(example: Example, *, low: float, high: float, share: float) -> dict[str, Any]:
    return {
        "bin_min": low,
        "bin_max": high,
        "bin_contains": share,
        "tokens": list(example.tokens),
        "values": [round(value, 3) for value in example.values],
    }
