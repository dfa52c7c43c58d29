"""The one error that is the user's to mend: one sentence each for what, got, why and do."""


class UserError(Exception):
    """A mistake in input, configuration or files. The command line prints it and exits with 2.

    `what` says what is wrong, `got` what was given, `why` why that cannot work and `do` what to do.
    Anything else that escapes is a bug of ours and keeps its traceback.
    """

    def __init__(self, what: str, *, got: str = "", why: str = "", do: str = "") -> None:
        self.what, self.got, self.why, self.do = what, got, why, do
        parts = [what.rstrip(".") + "."]
        parts += [f"Got: {got.rstrip('.')}."] if got else []
        parts += [f"Why: {why.rstrip('.')}."] if why else []
        parts += [f"Do: {do.rstrip('.')}."] if do else []
        super().__init__(" ".join(parts))
