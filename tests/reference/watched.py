"""What watches a loop: a function of what each step found; counts the steps that began."""


class Watched:
    """Its ``end`` is a given function."""

    def __init__(self, end):
        self.end, self.begun = end, 0

    def begin(self):
        """A step begins."""
        self.begun += 1
