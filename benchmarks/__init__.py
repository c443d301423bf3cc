"""How fast ekd_ray is, always beside something else in the same run: see `benchmarks.run`."""
