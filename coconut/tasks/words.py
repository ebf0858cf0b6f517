"""The names and concepts of ProsQA, which its tokenizer and other tasks use too."""

NAMES = tuple(
    """Alex Bob Carol Davis Eva Fae Gabriel Jack Max Oliver Polly Rex Sally Sam Stella Tom
    Wren""".split()
)
CONCEPTS = tuple(
    """bompus boompus brimpus chorpus dumpus felpus fompus gerpus gorpus grimpus gwompus hilpus
    impus jelpus jompus kerpus lempus lorpus numpus quimpus rempus rompus rorpus scrompus
    shumpus sterpus storpus terpus timpus tumpus vumpus worpus wumpus yerpus yimpus yumpus
    zhorpus zumpus""".split()
)
