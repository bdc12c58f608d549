"""A stress test of the promise that no run is lost: see `__main__`."""
