"""Scaling studies: runs at equal FLOPs, fits of scaling laws, the best size for a budget."""
