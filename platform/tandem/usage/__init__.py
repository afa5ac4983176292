"""Usage: requests and tokens by hour, key, tenant, model, adapter and route."""

from tandem.usage.records import UsageCounts, UsageKey, UsageLabels
from tandem.usage.store import UsageStore
from tandem.usage.writer import UsageWriter

__all__ = ["UsageCounts", "UsageKey", "UsageLabels", "UsageStore", "UsageWriter"]
