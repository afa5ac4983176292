"""Program that checks one content: `python -m tandem.files.checks PURPOSE LOCATION [ENDPOINT]` prints a Report as JSON."""

from __future__ import annotations

import sys

from tandem.files.checks import check_content
from tandem.files.content import read_chunks
from tandem.files.records import Purpose

if __name__ == "__main__":
    purpose, location, *endpoint = sys.argv[1:]
    print(check_content(Purpose(purpose), read_chunks(location), *endpoint).to_json())
