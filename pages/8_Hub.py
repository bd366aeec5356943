"""Hub: SAEs of others to open here, and those made here to share."""

import streamlit as st

from gsae_core.app import shell
from gsae_core.app.hub_view import (
    catalogue,
    library,
    moving,
    offline,
    on_the_way,
    repository,
    share,
)

frame = shell.page(
    "Hub",
    icon="🤗",
    purpose="Open SAEs that others trained, and share your own.",
)
root = shell.runs_root()
offline()
busy = moving(root)
st.fragment(on_the_way, run_every=1.0 if busy else None)(root, busy)
find, own, here = st.tabs(["Find", "Export and send", "On this machine"])
with find:
    catalogue()
    repository(root)
with own:
    share(frame)
with here:
    library(frame)
