"""The one exception a user can cause: one line that names what, where, and the remedy."""

from __future__ import annotations


class UserError(Exception):
    """Bad input. The command line prints the message on one line and exits with code 2."""
