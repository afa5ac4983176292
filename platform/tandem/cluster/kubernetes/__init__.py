"""Ray clusters on Kubernetes: manifests for the KubeRay operator, and the client that applies them."""
