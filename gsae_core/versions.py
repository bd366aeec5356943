"""What is installed, asked without importing it: a page opens before torch could load."""

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "gsae-core",
    "streamlit",
    "torch",
    "transformers",
    "transformer-lens",
    "huggingface-hub",
    "safetensors",
    "plotly",
    "numpy",
    "pandas",
)


def versions() -> dict[str, str]:
    """Return the version of this package, of Python and of what the results depend on."""
    found = {"python": platform.python_version(), "system": platform.platform(terse=True)}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
