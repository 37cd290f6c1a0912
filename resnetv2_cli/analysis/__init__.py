"""The paper's argument, checked on a network at work: what x, F and the gradient do along depth."""
