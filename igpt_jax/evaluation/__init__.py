"""Exact loss over a split, loss maps, features and linear probes."""
