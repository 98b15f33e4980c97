"""What has gone and is still shown, so that Prometheus sees its last numbers: versions of each model, and models.

The page is asked what is shown, so that whatever was counted late, by a request that outlived its model, goes too. Each
worker forgets for itself, in its turn; what the first of them forgets is hidden by the board before that, since the sum
of those that have not forgotten yet would look like a counter that has fallen.
"""

from collections.abc import Collection, Mapping

from app.board import Board, Name
from app.errors import UnavailableError
from app.metrics import Metrics

SHOWN_GONE = 5
"""Versions of each model, and models, that are gone and still shown."""


class Gone:
    """The models and versions that are gone and still shown, in the order in which they went."""

    def __init__(self, metrics: Metrics, board: Board | None = None) -> None:
        """Settle the page of `metrics`; `board`: of all workers, None: this one is alone."""
        self._metrics = metrics
        self._board = board or Board()
        self._models: list[str] = []
        self._versions: dict[str, list[str]] = {}

    def settle(self, there: Mapping[str, Collection[str]]) -> None:
        """Forget all but the last few of what has gone; call when something has come or gone.

        What comes back while it is shown goes on where it was.

        Args:
            there: the models that are there, and the versions of each that count.
        """
        shown = self._metrics.models()
        hidden = self._hide(self._surplus(shown, there, self._board.hidden()), there)
        for name, *version in hidden:
            if name not in shown:
                continue
            if not version:
                self._metrics.forget_model(name)
            elif version[0] in shown[name]:
                self._metrics.forget(name, version[0])

    def _surplus(
        self, shown: Mapping[str, set[str]], there: Mapping[str, Collection[str]], hidden: Collection[Name]
    ) -> list[Name]:
        """Return what is gone, not hidden, and more than is still shown of that."""
        gone = {name for name in shown if name not in there and (name,) not in hidden}
        self._models, surplus = _last(self._models, gone)
        names: list[Name] = [(name,) for name in surplus]
        versions = {}
        for name in shown.keys() & there.keys():
            # Series without a version are the model's own.
            gone = {number for number in shown[name] - {"", *there[name]} if (name, number) not in hidden}
            kept, surplus = _last(self._versions.get(name, []), gone)
            names += [(name, number) for number in surplus]
            if kept:
                versions[name] = kept
        self._versions = versions
        return names

    def _hide(self, names: list[Name], there: Mapping[str, Collection[str]]) -> list[Name]:
        try:
            return self._board.hide(names, there)
        except UnavailableError:  # the board is full: each worker by itself, then
            return names


def _last(before: list[str], gone: Collection[str]) -> tuple[list[str], list[str]]:
    """Return what is gone and still shown, and what is not any more; `before`: what was shown, the oldest first."""
    order = [one for one in before if one in gone] + sorted(one for one in gone if one not in before)
    return order[-SHOWN_GONE:], order[:-SHOWN_GONE]
