"""Everything that imports streamlit: the parts of the pages."""

from gsae_core.errors import extra

with extra("app"):
    import streamlit  # noqa: F401  (here alone a sentence says what is not installed)
