"""One file per job. `run(config, workdir)` runs the job and returns its metrics. The module's docstring is its help."""
