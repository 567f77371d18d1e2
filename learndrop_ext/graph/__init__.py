"""From a model to its chain of layers, and the surgery that freezes a prefix and trains the rest."""
