"""The hash of n-grams, the same in every implementation: an n-gram's is lengthened by one token at a time."""

HASH_MULTIPLIER = 0x9E3779B97F4A7C15
"""An odd multiplier with well-mixed high bits (Knuth, TAOCP 6.4: 2^64 / golden ratio)."""
