"""The GPU kernels without a GPU: in Triton's interpreter, through its compilers, where refused."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refusal
from test_sparse import random_sae
from torch import Tensor

from gsae_core.sae.architectures import BuiltinSAE, GatedSAE
from gsae_core.sae.gpu import step
from gsae_core.sae.gpu.step import available, kernel_step

FOLDER = Path(__file__).parent


@pytest.fixture(autouse=True)
def asked_anew() -> None:
    step._device_refusal.cache_clear()


def need_triton() -> Any:
    return pytest.importorskip("triton", reason="Triton has wheels for Linux alone")


def run_python(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    # Not what pytest tells its own workers: the other process may run pytest as well.
    inherited = {name: v for name, v in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, *words],
        cwd=FOLDER.parent,
        env=inherited | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_test_in_tritons_interpreter_passes() -> None:
    need_triton()
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels_interpreted.py"]
    done = run_python(*words, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


# Refusals


def test_without_triton_the_package_imports_and_says_what_is_missing() -> None:
    program = """
import sys
sys.modules["triton"] = None  # what an import meets where it is not installed
import torch
from gsae_core.sae.gpu.step import available
from gsae_core.sae.architectures import GatedSAE
print(available(torch.device("cuda"), GatedSAE(2, 3)))
"""
    done = run_python("-c", program)
    assert done.stderr == ""
    assert done.stdout.startswith("expected Triton for the sparse step on a GPU, got")
    assert done.stdout.endswith("; without it the dense step is taken\n")


def test_importing_the_kernels_imports_no_triton() -> None:
    program = "import sys, gsae_core.sae.gpu.step; print('triton' in sys.modules)"
    assert run_python("-c", program).stdout == "False\n"


SAE = GatedSAE(2, 3)


def test_a_cpu_is_refused() -> None:
    need_triton()
    sentence = (
        "expected an NVIDIA GPU of compute capability 8.0 or newer for the sparse step's kernels, "
        "got cpu; the dense step is taken"
    )
    assert available(torch.device("cpu"), SAE) == sentence
    said = refusal(kernel_step, SAE, torch.zeros(1, 2), sparsity_coeff=0.1, capacity=1)
    assert said == sentence


@pytest.mark.parametrize("cuda", ["13.0", None], ids=["old", "another make"])
def test_a_gpu_that_is_old_or_of_another_make_is_refused_by_its_name(
    cuda: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_triton()
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert available(torch.device("cuda"), SAE) == (
        "expected an NVIDIA GPU of compute capability 8.0 or newer for the sparse step's kernels, "
        "got Tesla T4; the dense step is taken"
    )


def test_a_gpu_on_which_nothing_runs_is_refused_with_the_cause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    need_triton()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    # No machine here has a GPU of this number, so that selecting it fails.
    reason = available(torch.device("cuda", 99), SAE)
    assert reason is not None
    assert reason.startswith("expected Triton to run a kernel, got ")
    assert reason.endswith("gcc python3-dev), else the dense step is taken")


# Triton's compilers, which need no GPU


KERNELS = ("encode_tiles", "place_entries", "decode_rows", "sum_latents")


class Launches:
    """Stands in for a kernel: notes what it would have been launched with, and runs nothing."""

    def __init__(
        self, kernel: Any, seen: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]
    ) -> None:
        self.kernel, self.seen = kernel, seen

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: self.seen.append((self.kernel, args, kwargs))


def launches(
    sae: BuiltinSAE,
    monkeypatch: pytest.MonkeyPatch,
    *,
    n_rows: int = 256,
    capacity: int = 4096,
    dead: Tensor | None = None,
) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Return every kernel of a step with its arguments."""
    from gsae_core.sae.gpu import kernels

    seen: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(step, "available", lambda device, sae: None)
        for name in KERNELS:
            patch.setattr(kernels, name, Launches(getattr(kernels, name), seen))
        x = torch.zeros(n_rows, sae.d_in)
        kernel_step(sae, x, sparsity_coeff=0.1, capacity=capacity, dead=dead)
    return seen


TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def compiled(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], capability: int) -> Any:
    """Compile as a launch with these arguments would on a GPU of this capability."""
    triton = need_triton()
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, aligned = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = values[name]
        # Triton itself compiles an argument of 1 in.
        if kernel.params[place].is_constexpr or _is_one_or_none(value):
            signature[name], constants[(place,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = TYPES[value.dtype]
            if name not in ("count_by_row", "count_by_latent"):
                aligned[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if isinstance(value, int) else "fp32"
            if isinstance(value, int) and value % 16 == 0:
                aligned[(place,)] = [["tt.divisibility", 16]]
    options = {name: kwargs[name] for name in ("num_warps", "num_stages") if name in kwargs}
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _is_one_or_none(value: Any) -> bool:
    return value is None or (isinstance(value, int) and value == 1)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_the_encoder_compiles_and_fits_into_shared_memory(
    capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_triton()
    seen = launches(GatedSAE(512, 1024), monkeypatch)
    binary = compiled(*seen[0], capability)
    # A block may have 99 KiB on Ada, the least of the three.
    assert binary.metadata.shared <= 99 * 1024
    # Float32 on ordinary cores: matrix units would round.
    assert not re.search("mma.sync|wgmma", binary.asm["ptx"])


@pytest.mark.slow
@pytest.mark.parametrize("switches", [{}, {"tie": "none", "recipe": "A"}, {"aux": "off"}])
@pytest.mark.parametrize("d_in", [5, 512, 16384])
def test_the_other_kernels_compile_at_every_width(
    d_in: int, switches: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    need_triton()
    seen = launches(random_sae("gated", d_in, 256, **switches).float(), monkeypatch)
    assert [kernel.fn.__name__ for kernel, _, _ in seen] == list(KERNELS)
    for launch in seen[1:]:
        assert len(compiled(*launch, 90).asm["cubin"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("kind", "switches", "names"),
    [("jumprelu", {}, KERNELS), ("topk", {"k": 8}, ("decode_rows", "decode_rows", "sum_latents"))],
)
def test_the_kernels_of_thresholds_ranks_and_dead_latents_compile(
    kind: str,
    switches: dict[str, Any],
    names: tuple[str, ...],
    capability: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    need_triton()
    sae = random_sae(kind, 512, 256, **switches).float()
    seen = launches(sae, monkeypatch, dead=torch.ones(256, dtype=torch.bool))
    assert [kernel.fn.__name__ for kernel, _, _ in seen] == list(names)
    for launch in seen:
        assert len(compiled(*launch, capability).asm["cubin"]) > 0


@pytest.mark.slow
def test_every_kernel_compiles_where_all_sizes_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    need_triton()
    seen = launches(GatedSAE(1, 1), monkeypatch, n_rows=1, capacity=1)
    assert len(seen) == 4
    for launch in seen:
        assert len(compiled(*launch, 90).asm["cubin"]) > 0
