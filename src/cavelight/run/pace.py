"""How many drafts pay, by what steps cost and by how many drafts were kept.

A draft more makes a step longer by a token, and takes time to be made. It is worth that as long as it adds more tokens,
in proportion, than time. How likely it is to be kept falls with depth and is each generation's own; what it costs
depends on the company: where a step is long because it reads weights, a token more is cheap, and where many sequences
share those weights it costs as much as any other.
"""

from dataclasses import dataclass

from cavelight.spec.config import ModelConfig

MOST = 4  # drafts, if there are fewer modules: the last one makes those beyond, with less and less success
FORGET = 0.97  # what a step counts after the next one
HOPE = 2.0  # rounds that every depth is taken to have kept half of, to begin with
AGAIN = 64  # tokens after which a draft is tried once more where none pays


class Chances:
    """Of one generation: how likely its first draft, its first two, ... are to be kept. Fades."""

    def __init__(self, drafts: int) -> None:
        self.proposed = [HOPE] * drafts
        self.kept = [HOPE * 0.5 ** (depth + 1) for depth in range(drafts)]

    def note(self, drafts: int, kept: int) -> None:
        """A round that verified `drafts` and kept so many of them."""
        for depth in range(drafts):
            self.proposed[depth] = self.proposed[depth] * FORGET + 1
            self.kept[depth] = self.kept[depth] * FORGET + (depth < kept)

    def all(self) -> list[float]:
        """Depth by depth, never growing."""
        found: list[float] = []
        for kept, proposed in zip(self.kept, self.proposed, strict=True):
            found.append(min([kept / proposed, *found[-1:]]))
        return found


@dataclass
class _Line:
    """Seconds against tokens: a fading least-squares line."""

    n: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def note(self, x: float, y: float) -> None:
        for name, value in (("n", 1.0), ("x", x), ("y", y), ("xx", x * x), ("xy", x * y)):
            setattr(self, name, getattr(self, name) * FORGET + value)

    def slope(self) -> float | None:
        """None as long as nothing speaks for one: too few steps, or all of one size."""
        spread = self.n * self.xx - self.x**2
        if self.n < 3 or spread < 1e-3 * self.x**2:
            return None
        return max(0.0, (self.n * self.xy - self.x * self.y) / spread)

    def at(self, x: float, slope: float) -> float:
        return self.y / self.n + slope * (x - self.x / self.n)


class Pace:
    """By the clock: the output does not hang on how many drafts there are."""

    def __init__(self, config: ModelConfig) -> None:
        self.modules = config.num_nextn_predict_layers
        self.most = max(self.modules, MOST) if self.modules else 0
        self._steps = _Line()
        self._guess = 0.0  # seconds that a draft takes to make

    def drafts(self, chances: Chances, tokens: int, company: int) -> int:
        """For a generation that made `tokens` so far, among `company` that decode, itself included."""
        by = chances.all()
        if not by:
            return 0
        costs = self._costs(len(by), company)
        if costs is None:  # nothing known yet: all that the modules were trained for, then none, to see what both cost
            return min(len(by), self.modules) * (tokens % 2)
        made = [1.0]
        for chance in by:
            made.append(made[-1] + chance)
        best = max(range(len(made)), key=lambda drafts: made[drafts] / costs[drafts])
        return best or int(tokens % AGAIN == 0)

    def note(self, tokens: int, seconds: float, guesses: int, drafting: float) -> None:
        """A step in which all decoded: its tokens and time, and the drafts made after it and theirs."""
        self._steps.note(tokens, seconds)
        if guesses:
            self._guess += (1 - FORGET if self._guess else 1.0) * (drafting / guesses - self._guess)

    def _costs(self, most: int, company: int) -> list[float] | None:
        """Of a step in which all make 0, 1, ... drafts, next to one without; None while unknown."""
        slope = self._steps.slope()
        if slope is None:
            return None
        plain = max(self._steps.at(company, slope), 1e-9)
        return [1 + (slope + self._guess) * drafts * company / plain for drafts in range(most + 1)]
