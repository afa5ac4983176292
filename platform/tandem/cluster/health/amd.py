"""AMD GPUs: the JSON of `rocm-smi`, parsed and checked. Pure.

Written from the tool's documentation: no output of a real machine was at hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from tandem.cluster.health.report import Finding, amount

COMMAND = (
    "rocm-smi",
    "--showproductname",
    "--showtemp",
    "--showclocks",
    "--showretiredpages",
    "--showrasinfo",
    "--json",
)
HOT_C = 100.0
"""Junction temperature at which an Instinct GPU is close to lowering its clocks."""
ERRORS = re.compile(r"uncorrectable|uncorrected|\bue\b", re.IGNORECASE)
PAGES = re.compile(r"(pending|retired|unreservable) page", re.IGNORECASE)
JUNCTION = re.compile(r"temperature.*junction", re.IGNORECASE)


def parse_rocm(output: str) -> dict[str, dict[str, Any]]:
    """The values of each card (`card0`); ValueError if the output is no JSON."""
    # Warnings stand before the JSON where a counter is not supported.
    _, brace, rest = output.partition("{")
    values = json.loads(brace + rest) if brace else {}
    return {name: dict(card) for name, card in values.items() if name.startswith("card") and isinstance(card, Mapping)}


def check_cards(cards: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Findings about memory errors, retired pages and temperature; one for all cards where there is no problem."""
    found = []
    for name, card in sorted(cards.items()):
        for key, value in card.items():
            number = amount(str(value))
            if number is None:
                continue
            says, values = f"{name}: {key}: {value}", {"value": number}
            if ERRORS.search(key) and number > 0:
                fix = "Reset the GPU (`rocm-smi --gpureset -d N`) with nothing running on it."
                found.append(Finding(kind="gpu_ecc", severity="bad", says=says, fix=fix, values=values))
            elif PAGES.search(key) and number > 0:
                fix = "Watch whether it grows; reload the driver when the machine is idle."
                found.append(Finding(kind="gpu_ecc", severity="warning", says=says, fix=fix, values=values))
            elif JUNCTION.search(key) and number >= HOT_C:
                fix = "Check the machine's cooling."
                found.append(Finding(kind="gpu_clocks", severity="warning", says=says, fix=fix, values=values))
    if cards and not found:
        found = [Finding(kind="gpu_driver", severity="ok", says=f"{len(cards)} AMD GPUs: no errors")]
    return found
