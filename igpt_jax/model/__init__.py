"""Image GPT: dims, layers, attention, objectives, features, sampling, export."""
