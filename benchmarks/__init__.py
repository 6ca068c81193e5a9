"""Benchmarks: suites that pytest runs, the peers they measure against, committed rows, and the report of them."""
