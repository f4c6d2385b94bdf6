"""Hydra configuration: every default in ``base_config.yaml``, one file per choice in the groups, types in ``schema``."""
