"""The published methods, written plainly from their papers: what the benchmarks compare with."""
