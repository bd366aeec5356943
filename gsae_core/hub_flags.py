"""The flags of `pull` and `push`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import FlagCreatePairsOff, Positional, arg

from gsae_core.config import SITES, Site


def _plain(text: str, metavar: str | None = None) -> Any:
    return arg(help=text, metavar=metavar, help_behavior_hint="")


@dataclass(frozen=True)
class Pull:
    """Fetch an SAE from the Hub and make a run of it, to evaluate and explore like any other.

    Says what it fetches and how large that is, goes on where an interrupted download stopped, and
    keeps to the commit it began with. The token is the environment's (HF_TOKEN) or that of
    `hf auth login`.
    """

    address: Annotated[
        Positional[str],
        arg(
            help="OWNER/NAME; after a colon the SAE's folder or file in it; after an @ a branch, "
            "tag or commit.",
            metavar="REPO[:PATH][@REV]",
        ),
    ]
    to: Annotated[
        Path | None, _plain("New folder for the run; without it, one under runs/.", "DIR")
    ] = None
    list: Annotated[
        FlagCreatePairsOff[bool], _plain("Only list the SAEs there and their sizes.")
    ] = False
    model: Annotated[
        str | None, _plain("Language model of the SAE, where its files do not say.", "NAME")
    ] = None
    layer: Annotated[int | None, _plain("Its block, where its files do not say.", "INT")] = None
    site: Annotated[
        Site | None,
        _plain("Its place in the block, where its files do not say.", f"{{{','.join(SITES)}}}"),
    ] = None


@dataclass(frozen=True)
class Push:
    """Send finished SAEs of a run to the Hub, with a card, in one commit.

    A new repository is private unless --public says otherwise; an existing one stays as it is.
    """

    run: Annotated[Positional[Path], arg(help="Folder of the run.", metavar="RUN")]
    sae: Annotated[tuple[str, ...], _plain("Names of the SAEs to send.", "NAME [NAME ...]")]
    to: Annotated[str, _plain("Repository on the Hub, made if it is not there.", "OWNER/NAME")]
    public: Annotated[
        FlagCreatePairsOff[bool], _plain("Let everybody see a repository that is made for it.")
    ] = False
