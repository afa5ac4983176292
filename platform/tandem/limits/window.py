"""Sliding window: amounts of the last minute, whose reservations can be corrected. Pure: callers pass a monotonic clock.

Amounts are kept by second and count until the last moment of their second is a whole span old, so that no span of that length
has more than the limit.
"""

from __future__ import annotations

from collections import OrderedDict


class SlidingWindow:
    """Amounts of the last `span_s` seconds."""

    def __init__(self, span_s: int = 60) -> None:
        self._span_s = span_s
        self._amounts: OrderedDict[int, int] = OrderedDict()
        """By second, oldest first."""
        self._total = 0

    def total(self, now: float) -> int:
        """The sum of the span that ends now."""
        while self._amounts and (second := next(iter(self._amounts))) + 1 + self._span_s <= now:
            self._total -= self._amounts.pop(second)
        return self._total

    def add(self, amount: int, now: float) -> None:
        """Add an amount now; a time before the last one counts as that."""
        second = int(now)
        if self._amounts:
            second = max(second, next(reversed(self._amounts)))
        self._amounts[second] = self._amounts.get(second, 0) + amount
        self._total += amount

    def correct(self, amount: int, added_at: float, now: float) -> None:
        """Change what was added at a time by an amount, which may be negative; no effect once it is out of the window.

        More than was reserved counts from now on, so that a limit is not exceeded in the past.
        """
        if amount > 0:
            self.add(amount, now)
            return
        second = int(added_at)
        if second in self._amounts:
            change = max(amount, -self._amounts[second])
            self._amounts[second] += change
            self._total += change

    def wait_s(self, amount: int, limit: int, now: float) -> float:
        """Seconds until `amount` more fits into `limit`; 0: it does now; infinity: it never does."""
        if amount > limit:
            return float("inf")
        excess = self.total(now) + amount - limit
        if excess <= 0:
            return 0.0
        for second, second_amount in self._amounts.items():
            excess -= second_amount
            if excess <= 0:
                return max(0.0, second + 1 + self._span_s - now)
        return 0.0

    def empty_in_s(self, now: float) -> float:
        """Seconds until nothing of what it holds now counts any more."""
        if not self.total(now):
            return 0.0
        return max(0.0, next(reversed(self._amounts)) + 1 + self._span_s - now)
