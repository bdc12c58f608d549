"""What `benchmarks/torture.py` does to runs, files, disks and processes."""
