"""What ``victims.py`` can do to a run before it starts."""


def nothing():
    """A run as it is."""
