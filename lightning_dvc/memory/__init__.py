"""What is remembered between rounds: gradient cache, LSH index, statistics, sample history."""
