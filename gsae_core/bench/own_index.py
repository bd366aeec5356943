"""Our ways of `bench index`: a whole index, and the reading and encoding it cannot do without."""

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from gsae_core.analysis.features import open_index
from gsae_core.analysis.index_build import build_index
from gsae_core.analysis.index_plan import Part
from gsae_core.bench.serve import Job, Work
from gsae_core.lm.corpus import SequenceSet
from gsae_core.lm.harvest import Harvest
from gsae_core.lm.model import load_model
from gsae_core.sae.codes import encode_sparse
from gsae_core.store.checkpoint import load_sae

SITE = "resid_post"


def _sequences(job: Job) -> SequenceSet:
    return SequenceSet(load_file(job["tokens_file"])["ids"].numpy())


def harvest_and_encode(job: Job) -> Work:
    """Read every token and find what fires on it, and keep nothing."""
    model, sequences = load_model(job["model"], device=job["device"]), _sequences(job)
    sae = load_sae(job["sae_folder"]).to(job["device"])
    source = Harvest(model, sequences, layer=job["layer"], site=SITE)

    def run() -> dict[str, Any]:
        n, fired, began = 0, 0, time.process_time()
        encoded = source.through(lambda x: encode_sparse(sae, x), np.arange(len(sequences)))
        for codes in encoded:
            n, fired = n + len(codes.row_offsets) - 1, fired + codes.latent.numel()
        return {"l0": fired / n, "processor_s": time.process_time() - began}

    return Work(run)


def index(job: Job) -> Work:
    """Build the whole index, and open it."""
    model, sequences = load_model(job["model"], device=job["device"]), _sequences(job)
    sae = load_sae(job["sae_folder"]).to(job["device"])
    part = Part("train", sequences, len(sequences))

    def run() -> dict[str, Any]:
        began = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            steps = build_index(
                model,
                sae,
                [part],
                Path(folder),
                layer=job["layer"],
                site=SITE,
                name="bench",
                text="stdlib",
            )
            for _ in steps:
                pass
            manifest = open_index(folder).manifest
        seconds = time.process_time() - began
        return {"l0": manifest.l0, "disk_bytes": manifest.n_bytes, "processor_s": seconds}

    return Work(run)
