"""A fuzzer of real servers: random requests, events and faults from a seed, and checks of every response."""
