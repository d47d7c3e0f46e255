"""What is fuzzed: a reader, the errors it may refuse with, and valid inputs to start from."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.guard import watched

Bytewise = Callable[[bytes, int], bytes]
"""From an input and the most bytes it may have to a changed one, at the level of bytes."""


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        name: as `python -m tests.fuzz.run NAME` takes it.
        read: puts an input into files of the folder it is given, and reads them.
        refusals: what the reader's docstring says that it raises.
        seeds: makes valid inputs with the project's own writers, in the folder it is given.
        mutate: changes an input by its structure (and repairs its digest); None: bytes alone.
        longest: most bytes of an input.
        setup: what `read` needs in its folder beside the input, made once.
    """

    name: str
    read: Callable[[bytes, Path], object]
    refusals: tuple[type[Exception], ...]
    seeds: Callable[[Path], Sequence[bytes]]
    mutate: Callable[[bytes, random.Random], bytes] | None = None
    longest: int = 4096
    setup: Callable[[Path], None] | None = None

    def execute(self, data: bytes, folder: Path) -> bool:
        """Return whether the reader took `data`; False: it refused as it says.

        Raises:
            EscapedError: it touched something outside `folder`.
            Exception: any other error, which is a finding.
        """
        with watched(folder):
            try:
                self.read(data, folder)
            except self.refusals as error:
                if not str(error):
                    raise AssertionError(f"{self.name} refuses without a word") from error
                return False
        return True

    def changed(
        self, data: bytes, most: int, seed: int, bytewise: Bytewise, seeds: Sequence[bytes]
    ) -> bytes:
        """Return an input made of `data` or of a seed: by its structure mostly, else by bytes."""
        generator = random.Random(seed)
        if generator.random() < FROM_A_SEED:
            data = generator.choice(seeds)
        if self.mutate is not None and generator.random() < BY_STRUCTURE:
            made = self.mutate(data, generator)
            if len(made) <= most:
                return made
        return bytewise(data, most)


FROM_A_SEED = 0.4
"""Share of the changes that begin with a valid input: what was kept for its coverage is broken."""
BY_STRUCTURE = 0.8
"""Share of the changes that keep the structure; the rest damages it."""
