"""Runs a job as one process among others: launchers, start-up, missing peers, signals, the watchdog, exit codes."""
