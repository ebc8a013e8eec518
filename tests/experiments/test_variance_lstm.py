"""``variance_lstm`` at smoke scale: a small LSTM, few pairs, all three texts."""

import dataclasses

import numpy as np
import pytest

from experiments._framework import experiment as framework
from experiments._framework import results
from experiments.estimators import variance_lstm, variance_lstm_figure
from experiments.problems.text_lstm import VOCABULARY, encode
from tests.helpers import present
from tests.stored import expect


@pytest.mark.experiments
def test_smoke(tmp_path, capsys):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the quick brown fox jumps over the lazy dog; " * 3)
    settings = dataclasses.replace(
        variance_lstm.SCALES["smoke"], corpus=corpus, out=tmp_path / "results"
    )
    folder = present(framework.execute(variance_lstm.EXPERIMENT, settings))
    summary = results.read_summary(folder)
    printed = capsys.readouterr().out
    assert all(f"{text:>9} {'pes':>10}  variance" in printed for text in variance_lstm_figure.TEXTS)
    claims = variance_lstm.claims(summary)
    assert len(claims) == 3 + 3 + 2 + 1 + 1
    assert claims[-1].holds  # sigma does not matter; one seed cannot decide the others
    assert {claim.holds for claim in claims[:-1]} == {None}
    numbers = {}
    for text in variance_lstm_figure.TEXTS:
        for name, unrolls in {"pes": "20", "es_single": "1"}.items():
            labels = {"text": text, "estimator": name, "unrolls": unrolls}
            numbers[f"{text} {name}"] = summary.find("exact", **labels)["mean"]
            measured, se = (
                summary.find(metric, **labels)["mean"] for metric in ("variance", "variance_se")
            )
            assert measured == pytest.approx(numbers[f"{text} {name}"], abs=5 * se)
            assert se < 0.15 * measured
    expect("variance_lstm experiment", numbers)


def test_the_texts():
    corpus = "abcdefghij\n"
    found = variance_lstm.texts(corpus, 30, 0)
    assert set(found) == set(variance_lstm_figure.TEXTS)
    steps = np.diff(found["real"] - encode("a")[0])
    letters = encode(corpus)
    assert set(found["real"]) == set(letters)
    assert np.all(
        (steps == 1) | (found["real"][1:] == encode("\n")) | (found["real"][:-1] == encode("\n"))
    )
    assert len(set(found["random"])) > 15
    assert found["random"].max() < VOCABULARY
    assert len(set(found["repeated"])) == 1
    assert {len(text) for text in found.values()} == {31}


def test_a_corpus_without_text(tmp_path):
    corpus = tmp_path / "empty"
    corpus.write_text("a")
    settings = dataclasses.replace(variance_lstm.SCALES["smoke"], corpus=corpus, out=tmp_path)
    with pytest.raises(ValueError, match="at least 2 characters"):
        framework.execute(variance_lstm.EXPERIMENT, settings)


def test_unrolls_that_do_not_fit(tmp_path):
    settings = dataclasses.replace(variance_lstm.SCALES["smoke"], num_windows=(1, 3), out=tmp_path)
    with pytest.raises(ValueError, match=r"20, which \[3\] do not divide"):
        framework.execute(variance_lstm.EXPERIMENT, settings)
