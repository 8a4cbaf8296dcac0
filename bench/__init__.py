"""Benchmarks: `make bench` measures, prints a table and writes bench.json."""
