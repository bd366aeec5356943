"""What the package says of a mistake."""

from collections.abc import Callable
from typing import Any

import pytest

from gsae_core.cli.main import MISTAKE, main
from gsae_core.errors import InputError


def refusal(act: Callable[..., object], *args: Any, **named: Any) -> str:
    """Return the sentence with which `act` refuses; fail if it does not."""
    with pytest.raises(InputError) as caught:
        act(*args, **named)
    return str(caught.value)


def mistake(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one sentence of a command that ends with the exit code of a mistake."""
    capsys.readouterr()
    assert main(argv) == MISTAKE
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    return shown.splitlines()[-1].removeprefix("gsae_core: ")
