"""Programs around the package: the main job, its demonstration, measurements and benchmarks."""
