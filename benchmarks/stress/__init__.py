"""The parts of `benchmarks/torture.py`: faults in runs, files, disks and processes."""
