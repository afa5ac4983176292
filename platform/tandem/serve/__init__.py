"""Ray Serve as the control plane: engine replicas, the directory of replicas, and deployment options."""
