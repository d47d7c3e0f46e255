"""The one exception whose text is shown to a user as it stands, without a traceback."""

from __future__ import annotations


class ConfigError(ValueError):
    """A mistake of the user's: one sentence that says what is wrong, where, and what would do."""
