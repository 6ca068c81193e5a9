"""One file for each suite; its SUITE names the file of rows, benchmarks/results/<device>/<SUITE>.json."""
