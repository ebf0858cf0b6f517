"""When something happens: the loops, with one opening, one saving and one ending."""
