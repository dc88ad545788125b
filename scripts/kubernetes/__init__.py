"""What deploy/kubernetes/ is checked for, without a cluster: `python -m scripts.kubernetes`."""
