"""Deep residual networks with identity mappings (He, Zhang, Ren, Sun 2016, arXiv:1603.05027)."""

__version__ = "0.1.0"
