"""The error of an import that does not fit, with lists of what does not."""

from collections.abc import Sequence


class WeightsMismatch(ValueError):
    """A file and a tower that do not fit each other. Nothing was allocated or changed."""

    def __init__(
        self,
        source: str,
        what: str,
        *,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        wrong: Sequence[str] = (),
        remedy: str,
    ) -> None:
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.wrong = tuple(wrong)
        self._arguments = (source, what, remedy)
        parts = [f"{source}: {what}"]
        for name, entries in (
            ("wrong", self.wrong),
            ("missing", self.missing),
            ("unexpected", self.unexpected),
        ):
            if entries:
                shown = ", ".join(entries[:5]) + (", ..." if len(entries) > 5 else "")
                parts.append(f"{name} ({len(entries)}): {shown}")
        super().__init__("; ".join([*parts, remedy]))

    def explained(self, reason: str) -> "WeightsMismatch":
        """Returns the same error with a more precise remedy, if `reason` is not empty."""
        source, what, remedy = self._arguments
        kind = WrongSettings if reason else WeightsMismatch
        return kind(
            source,
            what,
            missing=self.missing,
            unexpected=self.unexpected,
            wrong=self.wrong,
            remedy=reason or remedy,
        )


class WrongSettings(WeightsMismatch):
    """The files next to the weights name other settings than the tower."""
