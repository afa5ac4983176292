"""Limits of keys and tenants: requests and tokens in a minute, requests at once, tokens in a day."""

from tandem.limits.ledger import Admit, LimitLedger, Refusal, Reservation, Restore, Settle, Subject, Verdict

__all__ = ["Admit", "LimitLedger", "Refusal", "Reservation", "Restore", "Settle", "Subject", "Verdict"]
