"""The flags of `import`, `export` and `list`: SAEs out of other libraries' files, and into them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from gsae_core.config import SITES, Site


def _plain(text: str, metavar: str | None = None) -> Any:
    return arg(help=text, metavar=metavar, help_behavior_hint="")


@dataclass(frozen=True)
class Import:
    """Make a run of SAEs that another library wrote: evaluated and explored like one of ours.

    Reads SAELens, dictionary_learning, SAEBench, sparsify, Gemma Scope 1 and 2, Llama Scope,
    OpenAI's and BatchTopK's, recognised by what is in their files.
    """

    path: Annotated[
        Positional[Path], arg(help="File or folder of one SAE, or of several.", metavar="PATH")
    ]
    to: Annotated[Path, _plain("New folder for the run.", "RUN")]
    sae: Annotated[
        tuple[str, ...], _plain("Which of several to take; without it all.", "NAME [NAME ...]")
    ] = ()
    model: Annotated[
        str | None, _plain("Language model, where the files say none or another name.", "NAME")
    ] = None
    layer: Annotated[int | None, _plain("Block number, from 0, likewise.", "INT")] = None
    site: Annotated[
        Site | None, _plain("Place in the block, likewise.", f"{{{','.join(SITES)}}}")
    ] = None
    data: Annotated[
        str | None,
        _plain("Text to evaluate on; without it the Python standard library's.", "NAME"),
    ] = None


@dataclass(frozen=True)
class ExportSAE:
    """Write an SAE of a run for another library; it is read back and compared before it is there.

    `jumprelu` is SAELens' layout of the JumpReLU SAE that computes what a Gated one does.
    """

    run: Annotated[Positional[Path], arg(help="Folder of the run.", metavar="RUN")]
    to: Annotated[Path, _plain("New folder for the SAE.", "FOLDER")]
    sae: Annotated[str | None, _plain("Its name; without it the run's only one.", "NAME")] = None
    format: Annotated[
        Literal["saelens", "jumprelu", "dictionary_learning", "gsae_core"],
        _plain("Whose files to write."),
    ] = "saelens"


@dataclass(frozen=True)
class List:
    """Show the runs in a folder, the SAEs of a run, or those in any other folder or file."""

    path: Annotated[
        Positional[Path | None],
        arg(
            help="Folder of runs, a run, or files of any library; without it the folder of runs.",
            metavar="PATH",
            help_behavior_hint="",
        ),
    ] = None
