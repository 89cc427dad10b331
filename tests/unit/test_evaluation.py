"""Scores of classes, held to scikit-learn's published examples and to its definitions, counted by hand."""

import numpy as np
import pytest

from hosl.evaluation import by_class, evaluate
from hosl.tasks import Example
from hosl.tasks.classification import ClassificationTask


class Client:
    def forward(self, batch):
        return batch.input_ids


class Server:
    """Scores under which a row's first token is the prediction."""

    def losses(self, activations, targets):
        raise NotImplementedError

    def scores(self, activations, targets):
        return np.log(np.eye(5, dtype=np.float32)[activations[:, 0]] + np.float32(1e-3))


def scored(truth, predicted, labels=("a", "b", "c")):
    examples = [Example(rows=((p,),), label=t) for t, p in zip(truth, predicted, strict=True)]
    task = ClassificationTask("words", labels, examples, examples, examples, pad_id=0)
    return evaluate(Client(), Server(), task, examples, rows_per_batch=2)


@pytest.mark.parametrize(
    ("truth", "predicted", "macro"),
    [
        ([0, 1, 2, 0, 1, 2], [0, 2, 1, 0, 0, 1], 0.26666666),  # the documentation of sklearn.metrics.f1_score
        ([0, 1, 2, 2, 2], [0, 0, 2, 2, 1], 0.48888888),  # that of classification_report: 0.67, 0.00, 0.80
        ([1, 1, 1], [1, 1, 0], 0.4),  # a class that is only predicted counts, with 0: (0.8 + 0) / 2
        ([0, 0, 0], [0, 0, 0], 1.0),  # one that neither occurs nor is predicted does not
    ],
)
def test_macro_f1_is_that_of_scikit_learn(truth, predicted, macro):
    assert scored(truth, predicted).f1_macro == pytest.approx(macro, abs=1e-7)


def test_each_class_has_scikit_learns_precision_recall_and_support():
    """The example of classification_report in scikit-learn's documentation."""
    found = scored([0, 1, 2, 2, 2], [0, 0, 2, 2, 1])
    assert found.confusion.tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 2]]
    rows = by_class(("a", "b", "c"), found.confusion)
    assert [[round(row[name], 2) for name in ("precision", "recall", "f1", "support")] for row in rows] == [
        [0.5, 1.0, 0.67, 1], [0.0, 0.0, 0.0, 1], [1.0, 0.67, 0.8, 3],
    ]  # fmt: skip


def test_the_confusion_matrix_has_truth_in_rows_and_all_classes():
    found = scored([0, 1, 2, 0, 0], [0, 2, 2, 1, 3], labels=("a", "b", "c", "d", "never"))
    counted = np.zeros((5, 5), dtype=int)
    for truth, predicted in ((0, 0), (1, 2), (2, 2), (0, 1), (0, 3)):
        counted[truth][predicted] += 1
    assert np.array_equal(found.confusion, counted)
    assert found.numbers() == {
        "accuracy": 0.4, "f1_macro": pytest.approx((0.5 + 0 + 2 / 3 + 0) / 4), "loss_nats": found.loss_nats,
        "examples": 5,
    }  # fmt: skip
