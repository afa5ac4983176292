"""Jobs of every kind in the native API: state, events, logs, metrics, lineage and the queue."""
