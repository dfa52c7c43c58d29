"""The one error that is the user's to mend: one sentence each for what, got, why and do."""

from collections.abc import Iterable


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


def check_options(what: str, options: object, rules: Iterable[tuple[str, bool, str]]) -> None:
    """Raises UserError with all that is wrong: of each option its name, whether it is fine, and what it must be."""
    wrong = [(name, must) for name, fine, must in rules if not fine]
    if wrong:
        raise UserError(
            what,
            got=", ".join(f"{name} = {getattr(options, name)!r}" for name, _ in wrong),
            why="; ".join(f"{name} must be {must}" for name, must in wrong),
        )
