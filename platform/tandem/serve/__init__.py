"""Ray Serve as the control plane: engine replicas, the directory that knows them, and the app made of both."""
