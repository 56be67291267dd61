"""The load generator: seeded workloads, run against a live server or the engine in this process, and their report."""
