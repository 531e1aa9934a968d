"""One file per job: `run(config, workdir)` reads the config, calls the parts and returns the job's metrics."""
