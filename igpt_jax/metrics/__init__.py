"""What a run records: progress, throughput, phase timing, writers, profiles, figures."""
