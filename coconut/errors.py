"""The one exception for input that the user can mend."""


class UserError(Exception):
    """Bad input: configuration, data, checkpoint or text.

    where: the file (and item) the problems lie in. problems: one line each, saying what is wrong
    and what to do. The command line prints the message without a traceback and exits with status 2.
    """

    def __init__(self, where: str, *problems: str) -> None:
        self.where = where
        self.problems = problems
        if len(problems) == 1:
            message = f"{where}: {problems[0]}"
        else:
            message = "\n  ".join([f"{where}: {len(problems)} problems", *problems])
        super().__init__(message)
