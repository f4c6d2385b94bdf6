"""Malformed inputs of every kind, and what is tried with them."""
