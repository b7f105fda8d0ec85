"""The confusion matrix as it is drawn: torchmetrics' counts, and no image lost where not all classes are shown."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from torchmetrics.functional.classification import multiclass_confusion_matrix

from vitdemo import Evaluation
from vitdemo.plots import plot_confusion

CLASSES = 6


def an_evaluation(labels, answers, unread=()):
    rows = pd.DataFrame({"label": labels, "predicted_1": pd.array(answers, dtype="Int64"), "error": ""})
    rows.loc[list(unread), "predicted_1"] = pd.NA
    rows["correct"] = rows["predicted_1"].eq(rows["label"]).fillna(False).astype("int64")
    return Evaluation(rows, {}, None, None, SimpleNamespace(class_names=[f"class {k}, word" for k in range(CLASSES)]))


def drawn(figure) -> tuple[list[str], list[str], np.ndarray]:
    (ax,) = figure.axes
    rows, columns = ([tick.get_text() for tick in ticks] for ticks in (ax.get_yticklabels(), ax.get_xticklabels()))
    counts = np.zeros((len(rows), len(columns)), dtype=int)
    for text in ax.texts:
        counts[text.get_position()[1], text.get_position()[0]] = int(text.get_text())
    return rows, columns, counts


def test_the_counts_are_torchmetrics():
    labels, answers = np.random.default_rng(0).integers(0, CLASSES, (2, 200))
    names, columns, counts = drawn(plot_confusion(an_evaluation(labels, answers)))
    assert names == columns == [f"class {k}" for k in range(CLASSES)]
    oracle = multiclass_confusion_matrix(torch.tensor(answers), torch.tensor(labels), CLASSES)
    assert np.array_equal(counts, oracle.numpy())


def test_the_classes_mixed_up_most_are_shown_and_every_row_adds_up():
    labels = [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5
    answers = [0, 0, 0, 0, 5] + [3, 3, 3, 1, 1] + [2] * 5 + [3, 1, 1, 3, 0]
    names, columns, counts = drawn(plot_confusion(an_evaluation(labels, answers, unread=[9]), most=2))
    assert names == ["class 1", "class 3"] and columns == [*names, "another, or none"]
    assert counts.tolist() == [[1, 3, 1], [2, 2, 1]]


def test_of_a_class_without_images_there_is_a_column_and_no_row():
    names, columns, counts = drawn(plot_confusion(an_evaluation([0, 0, 1], [0, 4, 1])))
    assert names == ["class 0", "class 1"] and columns == ["class 0", "class 1", "class 4"]
    assert counts.tolist() == [[1, 0, 1], [0, 1, 0]]


def test_a_model_without_mistakes_has_a_diagonal():
    names, columns, counts = drawn(plot_confusion(an_evaluation([0, 1, 1], [0, 1, 1])))
    assert names == columns == ["class 0", "class 1"] and counts.tolist() == [[1, 0], [0, 2]]
