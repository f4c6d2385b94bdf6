"""Hydra configuration: every default in ``base_config.yaml``, a file per choice in the groups."""
