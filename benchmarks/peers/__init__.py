"""Programs to measure against, written in plain torch at its best practice; none imports tpmp_kernels."""
