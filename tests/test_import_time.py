"""Importing the package is cheap: counted in modules, since seconds depend on the machine."""

import subprocess
import sys

import pytest

import gsae_core

HEAVY = {"torch", "transformers", "transformer_lens", "datasets", "pandas", "streamlit", "plotly"}


def loaded(statement: str) -> set[str]:
    """Return the top-level packages that a fresh interpreter holds after `statement`."""
    code = f"{statement}; import sys; print(*{{m.partition('.')[0] for m in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_reading_configs_runs_and_command_lines_loads_no_heavy_package() -> None:
    light = ["", ".presets", ".runs.run", ".runs.jobs.worker", ".analysis.pareto", ".cli.main"]
    assert not loaded("import " + ", ".join(f"gsae_core{name}" for name in light)) & HEAVY


def test_a_name_brings_its_module_on_first_use() -> None:
    assert "torch" in loaded("from gsae_core import GatedSAE")


def test_the_python_names_are_the_modules_own() -> None:
    from gsae_core.checkpoints.checkpoint import load_sae
    from gsae_core.lm.model import load_model
    from gsae_core.runs.run import open_run
    from gsae_core.sae.architectures import GatedSAE, ReluSAE

    assert gsae_core.GatedSAE is GatedSAE
    assert gsae_core.ReluSAE is ReluSAE
    assert gsae_core.load_model is load_model
    assert gsae_core.load_sae is load_sae
    assert gsae_core.open_run is open_run
    assert set(gsae_core.__all__) <= set(dir(gsae_core))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'gsae_core' has no attribute 'TopK'"):
        gsae_core.TopK  # noqa: B018
