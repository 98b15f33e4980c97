"""Translation of published weights: from their names to ours, with nothing missing and nothing left over."""

import re
from collections.abc import Callable, Collection

from torch import Tensor

from training.errors import WeightsError

Weights = dict[str, Tensor]
PublishedName = Callable[[str], str]
"""Our name of a tensor → its publisher's."""

COUNTER = "num_batches_tracked"
"""A counter that PyTorch's normalisation has had since 2018, older files have not, and evaluation does not need."""


def translate(published: Weights, ours: Collection[str], name_of: PublishedName, network: str) -> Weights:
    """Translate a published state dict.

    Args:
        published: their names.
        ours: the names in our network's state dict.
        name_of: our name → theirs.
        network: what the network is called, for sentences.

    Raises:
        WeightsError: a tensor is missing, or one would not be used.
    """
    left = {_as_today(name): tensor for name, tensor in published.items()}
    translated = {}
    for name in ours:
        theirs = name_of(name)
        if theirs in left:
            translated[name] = left.pop(theirs)
        elif not name.endswith(COUNTER):
            raise WeightsError(f"The published weights lack '{theirs}', which {network} needs.")
    if left:
        raise WeightsError(f"The published weights hold '{min(left)}', which {network} has no place for.")
    return translated


def is_published(weights: Collection[str], ours: Collection[str], name_of: PublishedName) -> bool:
    """Tell whether more of the names are the publisher's than ours; some may be both."""
    names = set(map(_as_today, weights))
    return len(names & set(map(name_of, ours))) > len(names & set(ours))


def _as_today(name: str) -> str:
    """In torchvision's files of DenseNets a layer has `norm.1`, which its code has called `norm1` since 2018."""
    return re.sub(r"(\.denselayer\d+\.(?:norm|conv))\.(?=[12]\.)", r"\1", name)
