"""Measurements of clusters on hosts in network namespaces: Slurm jobs, tunnels, `ray up`, training over nodes."""
