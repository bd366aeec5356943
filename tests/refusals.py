"""What the package says of a mistake."""

from collections.abc import Callable
from typing import Any

import pytest

from gsae_core.errors import InputError


def refusal(act: Callable[..., object], *args: Any, **named: Any) -> str:
    """Return the sentence with which `act` refuses; fail if it does not."""
    with pytest.raises(InputError) as caught:
        act(*args, **named)
    return str(caught.value)
