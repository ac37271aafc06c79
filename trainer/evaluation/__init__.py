"""A student solves held-out problems: decoding in slots, a shared queue of problems, scoring, one result."""
