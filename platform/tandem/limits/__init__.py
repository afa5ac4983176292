"""Limits of keys and tenants: requests and tokens in a minute, requests at once, tokens in a day."""

from tandem.limits.ledger import LimitLedger
from tandem.limits.records import (
    Admit,
    Answer,
    DayTotals,
    Exchange,
    Moment,
    Refusal,
    Reservation,
    Settle,
    Subject,
    Verdict,
)

__all__ = [
    "Admit",
    "Answer",
    "DayTotals",
    "Exchange",
    "LimitLedger",
    "Moment",
    "Refusal",
    "Reservation",
    "Settle",
    "Subject",
    "Verdict",
]
