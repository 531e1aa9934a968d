"""The demo: one self-contained page, served from this machine, on which a person plays with a model."""
