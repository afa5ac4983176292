"""The mailbox keeps events in order, adds ages to heartbeats, and answers them with the standing commands."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from tandem.observability.events import Notice, Step
from tandem.train.supervision.commands import DumpStacks, SaveCheckpoint, StandingCommands, StopTraining
from tandem.train.supervision.heartbeat import Heartbeat
from tandem.train.supervision.mailbox import Mailbox
from tandem.train.supervision.outcome import Refused

BEAT = Heartbeat(rank=1, node="n", pid=7, process_started_at=0.0, step=3, phase="step")


async def test_events_are_taken_once_in_order():
    mailbox = Mailbox()
    await mailbox.put(Step(step=1))
    await mailbox.put(Notice(message="hello"))
    assert await mailbox.take(1) == [Step(step=1), Notice(message="hello")]
    assert await mailbox.take(0.01) == []


async def test_a_heartbeat_is_answered_with_all_commands_so_far():
    mailbox = Mailbox()
    assert await mailbox.heartbeat(BEAT) == StandingCommands()
    await mailbox.command(SaveCheckpoint(2))
    await mailbox.command(DumpStacks())
    assert await mailbox.heartbeat(BEAT) == StandingCommands(save_request=2, dump_stacks=True)
    await mailbox.command(StopTraining())
    assert await mailbox.heartbeat(BEAT) == StandingCommands(stop=True, save_request=2, dump_stacks=True)


async def test_progress_is_a_new_step_or_phase():
    mailbox = Mailbox()
    await mailbox.heartbeat(BEAT)
    mailbox._progressed_at[1] -= 50
    await mailbox.heartbeat(BEAT)
    (same,) = await mailbox.heartbeats()
    assert same.since_progress_s >= 50 > same.since_heartbeat_s
    await mailbox.heartbeat(replace(BEAT, phase="save"))
    (moved,) = await mailbox.heartbeats()
    assert moved.since_progress_s < 50 and moved.phase == "save"


async def test_the_first_fatal_error_counts():
    mailbox = Mailbox()
    assert await mailbox.fatal_error() is None
    for message in ("first", "second"):
        await mailbox.report_fatal(Refused(error="DataError", message=message))
    assert await mailbox.fatal_error() == Refused(error="DataError", message="first")


async def test_events_count_as_recorded_when_the_driver_asks_for_the_next():
    mailbox = Mailbox()
    await asyncio.wait_for(mailbox.recorded(), 1)  # nothing to wait for
    await mailbox.put(Step(step=1))
    recorded = asyncio.create_task(mailbox.recorded())
    await asyncio.sleep(0)
    await mailbox.put(Step(step=2))
    assert len(await mailbox.take(1)) == 2
    await asyncio.sleep(0.01)
    assert not recorded.done()  # taken, but the driver may be killed before it writes them
    await mailbox.put(Step(step=3))
    assert await mailbox.take(1) == [Step(step=3)]
    await asyncio.wait_for(recorded, 1)
