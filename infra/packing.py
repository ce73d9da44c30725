"""Packing: how items of different lengths share rows without padding."""


def pack(items, lengths, budget):
    """Splits items, in order, into rows of at most `budget` tokens -> list of lists of items.

    lengths: the tokens of each item. An item longer than the budget gets a row of its own.

    >>> pack(["a", "b", "c", "d"], [3, 4, 2, 9], 7)
    [['a', 'b'], ['c'], ['d']]
    """
    rows, tokens = [], 0
    for item, length in zip(items, lengths):
        if not rows or tokens + length > budget:
            rows.append([])
            tokens = 0
        rows[-1].append(item)
        tokens += length
    return rows
