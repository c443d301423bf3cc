"""`counter_hash` with Python's integers, which do not wrap around by themselves."""

MASK = (1 << 64) - 1


def splitmix(state: int, k: int) -> int:
    """Output k of SplitMix64 started at `state`."""
    z = (state + ((k & MASK) + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def counter_oracle(seed: int, *counters: int) -> int:
    state = splitmix(seed & MASK, 0)
    for counter in counters:
        state = splitmix(state, counter)
    return state
