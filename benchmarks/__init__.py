"""Benchmarks of the services beside peers, each a ratio measured side by side in one run: `make bench`."""
