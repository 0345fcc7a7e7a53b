"""Studies on Kubernetes: the Argo workflow, Jobs, and the rules of a site."""
