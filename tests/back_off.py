"""The oracle of language models: the recursion of back-off over a dictionary of n-grams."""

import math


def by_symbols(model, length):
    """Each n-gram of a length -> log10 of its probability and of its back-off weight."""
    rows = model.members(length).tolist()
    names = [tuple(model.symbols[number] for number in row) for row in rows]
    ngrams = model.orders[length - 1]
    return dict(zip(names, zip(ngrams.log10_p.tolist(), ngrams.log10_back_off.tolist(), strict=True), strict=True))


class BackOff:
    """log10 p(symbol | context); a symbol that the model does not have is <unk>."""

    def __init__(self, model):
        self.symbols, self.order = set(model.symbols), model.order
        self.values = {}
        for length in range(1, model.order + 1):
            self.values |= by_symbols(model, length)

    def __call__(self, context, symbol):
        known = [text if text in self.symbols else "<unk>" for text in (*context, symbol)]
        return self._back_off(tuple(known[-self.order :]))

    def _back_off(self, gram):
        if gram in self.values:
            return self.values[gram][0]
        if len(gram) == 1:
            return -math.inf
        return self.values.get(gram[:-1], (0, 0.0))[1] + self._back_off(gram[1:])
