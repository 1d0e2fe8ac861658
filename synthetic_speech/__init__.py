"""A speech corpus synthesised with espeak-ng: for `make demo`, the tests and the benchmarks."""
