"""Measures checkpoints: exact loss over a split, per-pixel loss maps, linear probes."""
