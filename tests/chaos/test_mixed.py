"""The mixed run in its short form: real faults, every dialect, and not one broken promise."""

from __future__ import annotations

import pytest

from tests.chaos.mixed import Scale, mixed

SHORT = Scale(generations=40, faults=30, at_once=12, pause=0.9)


@pytest.mark.timeout(900)
async def test_no_reader_sees_a_promise_broken_whatever_breaks() -> None:
    """Workers, apis, the network and the store are hurt by a seeded schedule, each in every way the suite knows."""
    missed = [row for row in await mixed(print, SHORT, seed=20) if not row.met]
    assert not missed, missed
