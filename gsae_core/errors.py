"""The one exception for mistakes of a caller; the command line and the pages show its sentence."""


class InputError(ValueError):
    """What was expected, what came, and what to do: one sentence, fit to show as it stands."""
