"""Jobs of every kind as the native API tells them: state, events, logs, metrics, lineage and the queue."""
