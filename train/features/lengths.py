"""Texts in groups of like lengths, so that a forward of several pads little."""

from collections.abc import Sequence

FORWARD = 128  # tokens that cost as much as one more forward: the weights are read again


def alike(lengths: Sequence[int], *, forward: int = FORWARD) -> list[list[int]]:
    """Indices of texts in the groups that cost least, where a text counts as long as its group's longest.

    Args:
        lengths: tokens of each text.
        forward: what each group costs besides, in tokens.
    """
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    costs, starts = [0], [0]  # of the best groups of the shortest texts, and where the last of the groups begins
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        each = [costs[start] + forward + (end - start) * longest for start in range(end)]
        costs.append(min(each))
        starts.append(each.index(costs[-1]))
    groups, end = [], len(order)
    while end:
        groups.append(order[starts[end] : end])
        end = starts[end]
    return groups[::-1]
