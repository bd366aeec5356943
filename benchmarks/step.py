"""Time one training step, ways against each other: `python benchmarks/step.py --help`.

Ways take turns, and what counts is CPU time of the one thread, so that other processes disturb
little. Each table gives milliseconds and multiples of the encoder's matrix product alone.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch

from gsae_core.sae.architectures import GatedSAE, ReluSAE
from gsae_core.sae.dense import manual_dense_step
from gsae_core.sae.losses import dense_step
from gsae_core.sae.sparse import sparse_step

SHAPES = ((2048, 256, 1024), (2048, 256, 1536), (4096, 256, 3072), (4096, 512, 16384))
L0S = (10, 20, 50, 100, 150)


def sae_with_l0(kind: type, x: torch.Tensor, d_sae: int, l0: float) -> GatedSAE | ReluSAE:
    """Return an SAE whose gates open on `l0` latents of an average row of `x`."""
    sae = kind(x.shape[1], d_sae)
    with torch.no_grad():
        pre = x[:512] @ (sae.W_gate if isinstance(sae, GatedSAE) else sae.W_enc)
        threshold = pre.flatten().sort().values[-round(l0 * len(pre))]
        for bias in (sae.b_gate, sae.b_mag) if isinstance(sae, GatedSAE) else (sae.b_enc,):
            bias.fill_(-threshold)
    return sae


def alternate(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return each way's median milliseconds of thread time, one warm-up round left out."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            start = time.thread_time()
            way()
            taken[name].append(time.thread_time() - start)
    return {name: 1e3 * median(times[1:]) for name, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--shape", type=int, nargs=3, action="append", metavar=("B", "D_IN", "D_SAE")
    )
    parser.add_argument("--l0", type=float, nargs="+", default=L0S)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--autograd", action="store_true", help="time autograd's dense step too")
    args = parser.parse_args()
    torch.set_num_threads(1)  # thread time sees one thread
    for n_rows, d_in, d_sae in args.shape or SHAPES:
        x = torch.randn(n_rows, d_in, generator=torch.Generator().manual_seed(0)) / d_in**0.5
        for kind in (GatedSAE, ReluSAE):
            for l0 in args.l0:
                sae = sae_with_l0(kind, x, d_sae, l0)
                W = sae.W_gate if isinstance(sae, GatedSAE) else sae.W_enc
                steps = {"sparse": sparse_step, "by hand": manual_dense_step}
                if args.autograd:
                    steps["autograd"] = dense_step
                ways: dict[str, Callable[[], object]] = {"encoder": lambda x=x, W=W: x @ W.detach()}
                for name, step in steps.items():
                    ways[name] = lambda s=step, sae=sae, x=x: s(sae, x, sparsity_coeff=0.1)
                times = alternate(ways, args.rounds)
                gemm = times["encoder"]
                print(
                    f"{kind.__name__:8} B={n_rows} d_in={d_in} d_sae={d_sae} L0={l0:g} "
                    f"({l0 / d_sae:.2%})  "
                    + "  ".join(f"{n} {t:.1f} ms ({t / gemm:.2f}x)" for n, t in times.items()),
                    flush=True,
                )


if __name__ == "__main__":
    main()
