"""Health of a cluster's nodes: readers of hardware and settings, reports, and cordons that keep a node out."""
