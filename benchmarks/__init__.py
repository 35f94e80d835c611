"""Speed and quality, one file per op or job; benchmarks/results/ keeps what was measured."""
