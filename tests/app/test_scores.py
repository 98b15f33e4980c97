import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from app.scores import top_k


def test_best_first_with_label_and_index():
    found = top_k(np.array([0.1, 0.7, 0.2], np.float32), ["a", "b", "c"], 2)
    assert [(score.label, score.index, score.probability) for score in found] == [("b", 1, 0.7), ("c", 2, 0.2)]


@given(arrays(np.float32, st.integers(1, 40), elements=st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0])), st.integers(1, 50))
def test_equals_a_full_stable_sort(row, k):
    labels = [str(index) for index in range(len(row))]
    expected = np.argsort(-row, kind="stable")[:k].tolist()
    assert [score.index for score in top_k(row, labels, k)] == expected
