"""The paper's argument, checked by numbers: a module for each topic, listed in ``topics``."""
