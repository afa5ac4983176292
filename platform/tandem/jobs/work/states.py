"""States of jobs and queue items, and the legal transitions of each kind. Pure.

A job that waits is `queued`, `held` (until somebody releases it) or `paused`. A dispatcher makes it `starting`, then `running`.
A request to leave makes it `pausing`, `preempting`, `stopping` or `expiring`, until nothing of it runs any more. Where the end of
the run comes before that (`finished`), the end counts. `dead` is a job whose attempts all failed.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

from tandem.errors import IllegalTransitionError


class JobKind(StrEnum):
    """Kind of work."""

    TRAIN = "train"
    SWEEP = "sweep"
    BATCH = "batch"
    EVALUATE = "evaluate"
    EXPORT = "export"
    GENERATE = "generate"
    """A queue item: one request to a model."""


class State(StrEnum):
    """State of a job or a queue item."""

    QUEUED = "queued"
    HELD = "held"
    PAUSED = "paused"
    STARTING = "starting"
    RUNNING = "running"
    PAUSING = "pausing"
    PREEMPTING = "preempting"
    STOPPING = "stopping"
    EXPIRING = "expiring"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    DEAD = "dead"

    @property
    def ended(self) -> bool:
        """Whether the work is over; only `requeue` and `adopt` make another state of it."""
        return self in ENDED

    @property
    def active(self) -> bool:
        """Whether a process may be running it: its row then has a lease."""
        return self in ACTIVE

    @property
    def leaving(self) -> bool:
        """Whether its process has to be stopped."""
        return self in LEAVING


ENDED = frozenset({State.FINISHED, State.FAILED, State.CANCELLED, State.EXPIRED, State.DEAD})
LEAVING = frozenset({State.PAUSING, State.PREEMPTING, State.STOPPING, State.EXPIRING})
ACTIVE = LEAVING | {State.STARTING, State.RUNNING}


class Action(StrEnum):
    """Request of a client or operator, decision of the scheduler, or report about a run."""

    HOLD = "hold"
    RELEASE = "release"
    PAUSE = "pause"
    RESUME = "resume"
    CANCEL = "cancel"
    EXPIRE = "expire"
    """The deadline has passed."""
    REQUEUE = "requeue"
    """Once more, after an end without success."""
    ADOPT = "adopt"
    """A command has started it, without the dispatcher."""

    START = "start"
    """A dispatcher or worker has claimed it."""
    PREEMPT = "preempt"
    """Stop, and wait in the queue again: something more urgent needs the resources."""

    STARTED = "started"
    FINISH = "finish"
    FAIL = "fail"
    """An error that another attempt would repeat."""
    RETRY = "retry"
    """The attempt failed, and attempts are left."""
    GIVE_UP = "give_up"
    """The attempt failed, and it was the last."""
    STOPPED = "stopped"
    """It was told to leave, and nothing of it runs any more."""


REQUESTED = "requested by a client"
"""Reason of a transition that a client has asked for."""

Transitions = Mapping[tuple[State, Action], State]

_JOB: dict[State, dict[Action, State]] = {
    State.QUEUED: {
        Action.HOLD: State.HELD,
        Action.PAUSE: State.PAUSED,
        Action.START: State.STARTING,
        Action.CANCEL: State.CANCELLED,
        Action.EXPIRE: State.EXPIRED,
    },
    State.HELD: {Action.RELEASE: State.QUEUED, Action.CANCEL: State.CANCELLED, Action.EXPIRE: State.EXPIRED},
    State.PAUSED: {Action.RESUME: State.QUEUED, Action.CANCEL: State.CANCELLED, Action.EXPIRE: State.EXPIRED},
    State.STARTING: {
        Action.STARTED: State.RUNNING,
        Action.FINISH: State.FINISHED,
        Action.FAIL: State.FAILED,
        Action.RETRY: State.QUEUED,
        Action.GIVE_UP: State.DEAD,
        Action.PAUSE: State.PAUSING,
        Action.PREEMPT: State.PREEMPTING,
        Action.CANCEL: State.STOPPING,
        Action.EXPIRE: State.EXPIRING,
    },
    State.RUNNING: {
        Action.FINISH: State.FINISHED,
        Action.FAIL: State.FAILED,
        Action.RETRY: State.QUEUED,
        Action.GIVE_UP: State.DEAD,
        Action.PAUSE: State.PAUSING,
        Action.PREEMPT: State.PREEMPTING,
        Action.CANCEL: State.STOPPING,
        Action.EXPIRE: State.EXPIRING,
    },
    State.PAUSING: {
        Action.STOPPED: State.PAUSED,
        Action.FINISH: State.FINISHED,
        Action.FAIL: State.FAILED,
        Action.RETRY: State.PAUSED,
        Action.GIVE_UP: State.DEAD,
        # It is being told to stop already; afterwards it goes on by itself.
        Action.RESUME: State.PREEMPTING,
        Action.CANCEL: State.STOPPING,
        Action.EXPIRE: State.EXPIRING,
    },
    State.PREEMPTING: {
        Action.STOPPED: State.QUEUED,
        Action.FINISH: State.FINISHED,
        Action.FAIL: State.FAILED,
        Action.RETRY: State.QUEUED,
        Action.GIVE_UP: State.DEAD,
        Action.PAUSE: State.PAUSING,
        Action.CANCEL: State.STOPPING,
        Action.EXPIRE: State.EXPIRING,
    },
    # Whoever asked for the end gets it, also where the run fails on the way.
    State.STOPPING: {
        Action.STOPPED: State.CANCELLED,
        Action.FINISH: State.FINISHED,
        Action.FAIL: State.CANCELLED,
        Action.RETRY: State.CANCELLED,
        Action.GIVE_UP: State.CANCELLED,
    },
    State.EXPIRING: {
        Action.STOPPED: State.EXPIRED,
        Action.FINISH: State.FINISHED,
        Action.FAIL: State.EXPIRED,
        Action.RETRY: State.EXPIRED,
        Action.GIVE_UP: State.EXPIRED,
        Action.CANCEL: State.STOPPING,
    },
    State.FINISHED: {},
    **{state: {Action.REQUEUE: State.QUEUED} for state in (State.FAILED, State.CANCELLED, State.EXPIRED, State.DEAD)},
}
for _state in (State.QUEUED, State.HELD, State.PAUSED, *sorted(ENDED)):
    _JOB[_state][Action.ADOPT] = State.RUNNING
# A worker that holds an item learns of its end when it renews the lease, so that no state between is needed.
_ITEM: dict[State, dict[Action, State]] = {
    State.QUEUED: {
        Action.HOLD: State.HELD,
        Action.START: State.RUNNING,
        Action.CANCEL: State.CANCELLED,
        Action.EXPIRE: State.EXPIRED,
    },
    State.HELD: {Action.RELEASE: State.QUEUED, Action.CANCEL: State.CANCELLED, Action.EXPIRE: State.EXPIRED},
    State.RUNNING: {
        Action.FINISH: State.FINISHED,
        Action.FAIL: State.FAILED,
        Action.RETRY: State.QUEUED,
        Action.GIVE_UP: State.DEAD,
        Action.CANCEL: State.CANCELLED,
        Action.EXPIRE: State.EXPIRED,
    },
    State.FINISHED: {},
    **{state: {Action.REQUEUE: State.QUEUED} for state in (State.FAILED, State.CANCELLED, State.EXPIRED, State.DEAD)},
}
_NO_CHANGE: dict[Action, frozenset[State]] = {
    Action.CANCEL: ENDED | {State.STOPPING},
    Action.EXPIRE: ENDED | {State.STOPPING, State.EXPIRING},
    Action.PAUSE: frozenset({State.PAUSED, State.PAUSING}),
    Action.RESUME: frozenset({State.QUEUED, State.STARTING, State.RUNNING, State.PREEMPTING}),
    Action.HOLD: frozenset({State.HELD}),
    Action.RELEASE: frozenset({State.QUEUED, State.STARTING, State.RUNNING}),
    Action.PREEMPT: frozenset({State.PREEMPTING}),
    # Its handle is recorded, whatever was asked of it meanwhile.
    Action.STARTED: LEAVING | {State.RUNNING},
}
"""Actions that are in effect already, or come too late to change anything: the state stays as it is."""
_NEVER: dict[JobKind, frozenset[Action]] = {
    JobKind.TRAIN: frozenset(),
    JobKind.SWEEP: frozenset(),
    JobKind.BATCH: frozenset({Action.ADOPT}),
    # They have no checkpoint. An evaluation starts again from its beginning when it is preempted; an export is short.
    JobKind.EVALUATE: frozenset({Action.PAUSE, Action.RESUME, Action.ADOPT}),
    JobKind.EXPORT: frozenset({Action.PAUSE, Action.RESUME, Action.PREEMPT, Action.ADOPT}),
    JobKind.GENERATE: frozenset({Action.PAUSE, Action.RESUME, Action.PREEMPT, Action.STARTED, Action.STOPPED}),
}
"""Actions that a kind does not have."""


def _transitions(kind: JobKind) -> Transitions:
    moves = _ITEM if kind is JobKind.GENERATE else _JOB
    table = {(state, action): state for action, states in _NO_CHANGE.items() for state in states if state in moves}
    table |= {(state, action): target for state, actions in moves.items() for action, target in actions.items()}
    return MappingProxyType({key: target for key, target in table.items() if key[1] not in _NEVER[kind]})


TRANSITIONS: Mapping[JobKind, Transitions] = MappingProxyType({kind: _transitions(kind) for kind in JobKind})
"""The state after an action, by kind, for each pair of state and action that is legal."""


def next_state(kind: JobKind, state: State, action: Action) -> State:
    """The state after an action, the same one where nothing changes; IllegalTransitionError for one that is not legal."""
    target = TRANSITIONS[kind].get((state, action))
    if target is None:
        legal = sorted(
            each
            for (before, each), after in TRANSITIONS[kind].items()
            if before is state and after is not state and each is not Action.ADOPT
        )
        raise IllegalTransitionError(
            f"{action.value!r} is not possible for work of kind {kind.value!r} in state {state.value!r}. "
            + (f"Possible are {', '.join(legal)}." if legal else "It has ended; submit it anew.")
        )
    return target


def is_legal(kind: JobKind, state: State, action: Action) -> bool:
    """Whether `next_state` has an answer."""
    return (state, action) in TRANSITIONS[kind]
