"""How the cost of drafts is learned from pairs of steps, and how often a step probes another draft length for it."""

MAX_ERROR = 0.5
"""Largest error, in nats of time, that a single step may teach: a step ten times as long is an accident."""

PAIR_RATE = 0.1
"""Share of the error that a pair of neighboring steps corrects, once there were several."""

_FIRST_PROBES = 4


def bounded(error: float) -> float:
    """An error in nats of time, within `MAX_ERROR`."""
    return min(max(error, -MAX_ERROR), MAX_ERROR)


def steps_between_probes(num_probes: int, most: int) -> int:
    """After how many steps the next probe is due: more often at first, when nothing is known.

    Args:
        num_probes: made so far.
        most: steps between two probes in the long run.
    """
    return min(_FIRST_PROBES * (1 + num_probes), most)
