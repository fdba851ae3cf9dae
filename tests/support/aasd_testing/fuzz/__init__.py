"""A fuzzer of real engines: random requests and events from a seed, what must come of them, and small reproductions."""
