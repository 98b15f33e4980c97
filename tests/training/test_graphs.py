import pytest
import torch
from torch import Tensor, nn

from training.errors import ExportError
from training.graphs.exporter import make_graph


class Last(nn.Module):
    """The last state of an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(3, 4, batch_first=True)

    def forward(self, series: Tensor) -> Tensor:
        states, _ = self.recurrent(series)
        return states[:, -1]


class OfFive(nn.Module):
    """Takes series of five alone."""

    def forward(self, series: Tensor) -> Tensor:
        return series * torch.ones(5, 3) if series.shape[1] == 5 else series


SERIES = {"series": torch.zeros(2, 5, 3)}
FREE = {"series": ("n", "t", None)}


def test_dimensions_stay_free_at_the_second_export_too():
    """PyTorch caches how it takes an LSTM apart, and then unrolls it to the length of the example."""
    for _ in range(2):
        graph = make_graph(Last(), SERIES, "state", FREE)
        sizes = graph.graph.input[0].type.tensor_type.shape.dim
        assert [size.dim_param or size.dim_value for size in sizes] == ["n", "t", 3]


def test_a_dimension_that_cannot_be_free_is_told():
    with pytest.raises(ExportError, match="dimension 't' of 'series' came out fixed at 5"):
        make_graph(OfFive(), SERIES, "scaled", FREE)
