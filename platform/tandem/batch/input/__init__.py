"""Input of a batch run: rows read from files, checked, and divided into chunks."""
