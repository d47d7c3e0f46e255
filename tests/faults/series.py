"""Every series of faults, in the short form that CI runs and in the long one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.faults.clock import NoCompilerError, jump
from tests.faults.damage import damage_cheap, damage_real
from tests.faults.disk import MOST_PAGES, NoDiskError, fill_disks, read_only
from tests.faults.kills import kill_drivers, kill_members
from tests.faults.limits import misbehave
from tests.faults.stops import stop
from tests.faults.tally import Tally

SEED = 9
SHORT_PAGES = (0, 1, 4, 12, 24, 48)
REAL_PAGES = (100, 500, 1500, 3000)
UNABLE = (NoDiskError, NoCompilerError)
"""What a series raises that this machine does not let run."""

Form = Callable[[Path], Tally]


def _kills() -> dict[str, tuple[Form, Form]]:
    drivers, members = partial(kill_drivers, seed=SEED), partial(kill_members, seed=SEED)
    return {
        "kill-driver": (partial(drivers, count=8), partial(drivers, count=70)),
        "kill-child": (
            partial(members, role="child", count=14),
            partial(members, role="child", count=65),
        ),
        "kill-server": (
            partial(members, role="server", count=6),
            partial(members, role="server", count=50),
        ),
        "kill-real": (
            partial(drivers, count=2, real=True),
            partial(drivers, count=15, real=True),
        ),
    }


def _files() -> dict[str, tuple[Form, Form]]:
    cheap, real = partial(damage_cheap, seed=SEED), partial(damage_real, seed=SEED)
    return {
        "disk-full": (
            partial(fill_disks, pages=SHORT_PAGES),
            partial(fill_disks, pages=range(MOST_PAGES)),
        ),
        "disk-full-real": (
            partial(fill_disks, pages=REAL_PAGES[:1], real=True),
            partial(fill_disks, pages=REAL_PAGES, real=True),
        ),
        "read-only": (read_only, read_only),
        "clock": (partial(jump, count=3, seed=SEED), partial(jump, count=10, seed=SEED)),
        "damage": (partial(cheap, most=24), partial(cheap, most=None)),
        "damage-real": (partial(real, most=12), partial(real, most=None)),
    }


def _others() -> dict[str, tuple[Form, Form]]:
    stops = partial(stop, seed=SEED)
    return {
        "limits": (misbehave, misbehave),
        "stops": (partial(stops, count=1), partial(stops, count=3)),
    }


SERIES: dict[str, tuple[Form, Form]] = {**_kills(), **_files(), **_others()}
"""Name -> short and long form."""
