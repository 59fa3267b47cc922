"""The negative controls: systems that are wrong on purpose are found out by the checker that finds nothing in ours."""

from __future__ import annotations

from tests.chaos.naive import counting_epochs, naive_writer, time_epochs


async def test_a_writer_without_a_fence_is_found_out() -> None:
    """Two workers write one log with `XADD *`: spliced words in every dialect."""
    found, _ = await naive_writer()
    for dialect in ("native", "text", "chat_completions", "responses", "ui_messages"):
        assert [one for one in found if one.startswith(f"p1 {dialect} ") and "spliced" in one], dialect


async def test_counting_epochs_are_found_out_in_a_failover_that_lost_the_tail() -> None:
    """The promoted replica hands out an epoch again, and readers splice two attempts."""
    found, _ = await counting_epochs()
    for dialect in ("native", "text", "chat_completions", "responses", "ui_messages"):
        assert [one for one in found if one.startswith(f"p1 {dialect} ") and "spliced" in one], dialect


async def test_epochs_from_the_clock_hold_in_the_same_failover() -> None:
    """The control differs in one line of a script only, and shows nothing."""
    found, events = await time_epochs()
    assert not found
    assert events > 100
