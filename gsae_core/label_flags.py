"""The flags of `label`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg


def _plain(text: str, metavar: str | None = None, name: str | None = None) -> Any:
    return arg(help=text, metavar=metavar, help_behavior_hint="", name=name)


@dataclass(frozen=True)
class Label:
    """Let a language model write labels of features, and score how well each tells where it fires.

    A label is kept beside the feature index with the model that wrote it and its score, of which
    0.5 is guessing. What has a label already keeps it, so the same command goes on where it was
    interrupted. No text leaves this machine without --remote.
    """

    run: Annotated[Positional[Path], arg(help="Folder of the run.", metavar="RUN")]
    sae: Annotated[str | None, _plain("Name of the SAE; without it the only one.", "NAME")] = None
    features: Annotated[tuple[int, ...], _plain("Numbers of features.", "INT [INT ...]")] = ()
    most: Annotated[
        int | None, _plain("In place of numbers: the INT features that fire most often.", "INT")
    ] = None
    with_: Annotated[
        str | None,
        _plain(
            "Model that writes: a folder, or the name of one on this machine; with --remote the "
            "name of one at the address in OPENAI_BASE_URL.",
            "MODEL",
            "with",
        ),
    ] = None
    remote: Annotated[
        FlagCreatePairsOff[bool],
        _plain(
            "Send texts of the index to the address in OPENAI_BASE_URL, which speaks OpenAI's chat "
            "completions, with the token in OPENAI_API_KEY if there is one."
        ),
    ] = False
    score: Annotated[
        Literal["detection", "fuzzing", "none"],
        arg(
            help="How: by telling texts in which it fires from others, or marked tokens on which "
            "it fires from others; none leaves labels unscored.",
        ),
    ] = "detection"
    again: Annotated[
        FlagCreatePairsOff[bool],
        _plain("Also label what has a label; the old one stays in labels.jsonl."),
    ] = False
    device: Annotated[
        str | None, _plain("Where a model on this machine works; without it as the run.", "NAME")
    ] = None
