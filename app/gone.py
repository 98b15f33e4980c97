"""What has gone and is still shown, so that Prometheus sees its last numbers: versions of each model, and models.

The page is asked what is shown, so that whatever was counted late, by a request that outlived its model, goes too.
"""

from collections.abc import Collection, Mapping

from app.metrics import Metrics

SHOWN_GONE = 5
"""Versions of each model, and models, that are gone and still shown."""


class Gone:
    """The models and versions that are gone and still shown, in the order in which they went."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._models: list[str] = []
        self._versions: dict[str, list[str]] = {}

    def settle(self, there: Mapping[str, Collection[str]]) -> None:
        """Forget all but the last few of what has gone; call when something has come or gone.

        What comes back while it is shown goes on where it was.

        Args:
            there: the models that are there, and the versions of each that count.
        """
        shown = self._metrics.models()
        self._models, forgotten = _last(self._models, shown.keys() - there.keys())
        for name in forgotten:
            self._metrics.forget_model(name)
        versions = {}
        for name in shown.keys() & there.keys():
            # Series without a version are the model's own.
            kept, forgotten = _last(self._versions.get(name, []), shown[name] - {"", *there[name]})
            for version in forgotten:
                self._metrics.forget(name, version)
            if kept:
                versions[name] = kept
        self._versions = versions


def _last(before: list[str], gone: Collection[str]) -> tuple[list[str], list[str]]:
    """Return what is gone and still shown, and what is not any more; `before`: what was shown, the oldest first."""
    order = [one for one in before if one in gone] + sorted(one for one in gone if one not in before)
    return order[-SHOWN_GONE:], order[:-SHOWN_GONE]
