"""How the axes of curves are scaled, as data. To add a way: one row in YS.

Nothing here needs matplotlib, so that help is fast.
"""

YS = {  # scales of loss and of error, as matplotlib and the page call them
    "paper": ("log", "linear"),
    "log": ("log", "log"),
    "linear": ("linear", "linear"),
}
