"""Every error that a user can cause: one line that names the input and the mend, and the exit status it maps to."""

from __future__ import annotations


class AutointerpError(Exception):
    """Base of the errors that a user can cause or must act on. `str(error)` is the one line to print."""

    exit_status = 1

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


class InputError(AutointerpError):
    """Bad input: nothing was changed. Raise it where the wrong input is first seen, naming the input and the mend."""

    exit_status = 2


class PartialError(AutointerpError):
    """Some latents failed or were refused; the rest is stored."""

    exit_status = 3


class BudgetError(AutointerpError):
    """The budget (--max-usd) is reached; the same command with a larger budget goes on where it stopped."""

    exit_status = 4


class ProviderError(AutointerpError):
    """The provider stopped us for good: key, quota, retired model."""

    exit_status = 5
