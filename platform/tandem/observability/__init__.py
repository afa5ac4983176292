"""Events and journals of jobs and sweeps."""
