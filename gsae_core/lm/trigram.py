"""An interpolated trigram model: the yardstick the bundled language model is held against."""

from collections import Counter
from itertools import pairwise, product

import numpy as np


def trigram_ce(train: np.ndarray, held_out: np.ndarray, vocabulary: int) -> float:
    """Return the held-out cross-entropy, in nats per token, of an interpolated trigram model.

    p(c | a, b) mixes trigram, bigram, add-one unigram and uniform frequencies (Jelinek and Mercer
    1980) with the weights that do best on the last tenth of `train`.

    Args:
        train: token ids; the first nine tenths are counted.
        held_out: token ids to predict, each from the two before it.
        vocabulary: number of token ids there are.
    """
    cut = len(train) * 9 // 10
    counts = _Counts(train[:cut].tolist(), vocabulary)
    tuning = counts.probabilities(train[cut:][:200_000].tolist())
    weights = [
        np.array([third, second, 0.99 - third - second, 0.01])
        for third, second in product(np.arange(0.0, 0.96, 0.05), repeat=2)
        if third + second <= 0.98
    ]
    best = max(weights, key=lambda w: np.log(tuning @ w).mean())
    return float(-np.log(counts.probabilities(held_out.tolist()) @ best).mean())


class _Counts:
    def __init__(self, ids: list[int], vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.n = len(ids)
        self.one, self.two = Counter(ids), Counter(pairwise(ids))
        self.three = Counter(zip(ids, ids[1:], ids[2:], strict=False))

    def probabilities(self, ids: list[int]) -> np.ndarray:
        """Return (len(ids) - 2, 4): trigram, bigram, unigram and uniform for each next token."""
        rows = np.empty((len(ids) - 2, 4))
        for i, (a, b, c) in enumerate(zip(ids, ids[1:], ids[2:], strict=False)):
            pair, single = self.two[a, b], self.one[b]
            rows[i, 0] = self.three[a, b, c] / pair if pair else 0.0
            rows[i, 1] = self.two[b, c] / single if single else 0.0
            rows[i, 2] = (self.one[c] + 1) / (self.n + self.vocabulary)
        rows[:, 3] = 1 / self.vocabulary
        return rows
