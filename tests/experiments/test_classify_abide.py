"""ABIDE from files to tables: signal is found, none is found where there is none, and test subjects stay unseen."""

import dataclasses
import json
import sys

import numpy as np
import pytest

from experiments import classification, classify_abide
from experiments.classify_abide import Classify, Fold
from experiments.config import PMRL, ConfigError, Contrastive, Objective, Optimizer
from gramjax.data import abide
from tests.data import abide_files

SMALL = {
    "atlases": ("aal", "cc200"), "seeds": (0,), "folds": 2, "steps": 40, "batch_size": 24, "embed_dim": 8, "width": 16,
    "depth": 0, "input_dropout_rate": 0.0, "dropout_rate": 0.0, "optimizer": Optimizer(5e-3, warmup_steps=5),
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Seventy-two subjects of three institutions; some lack an atlas, a region, all files, an IQ."""
    made_up = abide_files.make_up(72, signal=2.0)
    for row in made_up.rows[3::12]:
        del made_up.series[row["FILE_ID"], "aal"]
    for row in made_up.rows[5::24]:
        made_up.series[row["FILE_ID"], "cc200"][:, 6] = 0.0
        row["FIQ"] = "-9999"
    made_up.rows[8]["FILE_ID"] = "no_filename"
    return abide_files.write(tmp_path_factory.mktemp("abide"), made_up)


@pytest.fixture(scope="module")
def config(root, tmp_path_factory):
    return Classify(root, run_dir=tmp_path_factory.mktemp("run"), supervision=0.5, **SMALL)


@pytest.fixture(scope="module")
def data(config):
    return classify_abide.read(config)


@pytest.fixture(scope="module")
def written(config, data):
    tables = classify_abide.classify(config, data)
    assert (config.run_dir / "results.md").read_text(encoding="utf-8") == tables
    return tables, json.loads((config.run_dir / "results.json").read_text(encoding="utf-8"))


def test_planted_signal_is_found(written):
    for protocol in ("leave-one-site-out", "k-fold"):
        for method in ("baseline", "probe", "head"):
            assert written[1]["summary"][protocol][method]["auc"]["mean"] > 0.85, (protocol, method)


def test_every_subject_is_tested_once_and_sites_stay_together(written, data):
    everyone = {subject.id: subject for subject in data.subjects}
    assert len(everyone) == 71
    for protocol, count in (("leave-one-site-out", 3), ("k-fold", 2)):
        folds = [fold for fold in written[1]["folds"] if fold["protocol"] == protocol]
        assert len(folds) == count
        assert sorted(name for fold in folds for name in fold["test_subjects"]) == sorted(everyone)
        for fold in folds:
            assert fold["labels"] == [everyone[name].autism for name in fold["test_subjects"]]
            assert fold["train_subjects"] + len(fold["test_subjects"]) == 71
            if protocol == "leave-one-site-out":
                assert {abide.institution(everyone[name].site) for name in fold["test_subjects"]} == {fold["fold"]}
    assert {fold["fold"] for fold in written[1]["folds"]} == {"PITT", "UCLA", "NYU", "0", "1"}


def test_results_agree_with_the_probabilities(written):
    tables, results = written
    folds = [fold for fold in results["folds"] if fold["protocol"] == "leave-one-site-out"]
    values = {}
    for method in ("baseline", "probe"):
        parts = [(np.array(fold["labels"]), np.array(fold["methods"][method]["probabilities"])) for fold in folds]
        values[method] = np.array([np.mean(labels == (p >= 0.5)) for labels, p in parts])
    summary = results["summary"]["leave-one-site-out"]
    for name, of in (*values.items(), ("probe - baseline", values["probe"] - values["baseline"])):
        spread = summary[name]["accuracy"]
        assert (spread["mean"], spread["std"], spread["folds"]) == pytest.approx((of.mean(), of.std(ddof=1), 3))
    cell = f"| {100 * values['probe'].mean():.1f} ± {100 * values['probe'].std(ddof=1):.1f} |"
    assert f"| logistic regression on embeddings {cell}" in tables
    assert "leave-one-site-out: per cent, mean ± standard deviation over 3 folds x 1 seed\n" in tables
    assert results["data"]["left_out"]["no functional data"] == ["50009"]
    assert results["data"]["lacking"] == {"aal": 6, "cc200": 0}


def test_finished_folds_are_kept(written, config, data, monkeypatch):
    def refuse(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(classify_abide, "run_fold", refuse)
    assert classify_abide.classify(config, data) == written[0]
    some = dataclasses.replace(config, protocols=("k-fold",))
    assert classify_abide.run(some, data) == [fold for fold in written[1]["folds"] if fold["protocol"] == "k-fold"]
    other_labels = dataclasses.replace(
        data, subjects=tuple(dataclasses.replace(one, autism=not one.autism) for one in data.subjects)
    )
    others = [(dataclasses.replace(config, steps=41), data), (config, other_labels)]
    for changed, of in others:
        with pytest.raises(AssertionError, match="trained again"):
            classify_abide.run(changed, of)


def test_shuffled_diagnoses_are_not_found(config, data):
    rng = np.random.default_rng(0)
    shuffled = rng.permutation(data.labels)
    subjects = tuple(dataclasses.replace(one, autism=bool(label)) for one, label in zip(data.subjects, shuffled))
    without = dataclasses.replace(config, protocols=("k-fold",))
    results = classify_abide.run(without, dataclasses.replace(data, subjects=subjects))
    for method, row in classify_abide.summarize(results)["k-fold"].items():
        if "-" not in method:
            assert 0.3 < row["auc"]["mean"] < 0.7, method


def test_embeddings_without_supervision_know_no_diagnosis_and_nothing_of_what_is_absent(config, data):
    unsupervised = dataclasses.replace(config, supervision=0.0, steps=8)
    rng = np.random.default_rng(0)
    train = np.arange(40)
    features = {name: abide.standardize(values, train) for name, values in data.features.items()}
    trainer = classify_abide.Trainer(unsupervised, {name: values.shape[1] for name, values in features.items()})
    z, _ = trainer(features, data.where, data.labels, train, 0)
    flipped, _ = trainer(features, data.where, 1 - data.labels, train, 0)
    noise = {name: rng.normal(size=values.shape).astype(np.float32) for name, values in features.items()}
    test = np.arange(len(data.subjects))[:, None] >= 40
    replaced = {
        name: np.where(data.where[name][:, None] & ~test, values, noise[name]) for name, values in features.items()
    }
    other, _ = trainer(replaced, data.where, data.labels, train, 0)
    for name, there in data.where.items():
        seen = np.flatnonzero(there[:40])
        np.testing.assert_array_equal(flipped[name], z[name])
        np.testing.assert_array_equal(other[name][seen], z[name][seen])
        np.testing.assert_allclose(np.linalg.norm(z[name], axis=1), 1, rtol=1e-5)
    moved = trainer(features, data.where, data.labels, np.arange(20, 60), 0)[0]
    assert np.abs(moved["aal"] - z["aal"]).max() > 0.01


class Recorder:
    """Stands for a trainer: keeps what it is given; its embeddings are some of the features."""

    def __call__(self, features, where, labels, train, seed):
        self.features, self.train = features, train
        embeddings = {name: values[:, :5] for name, values in features.items()}
        return embeddings, np.concatenate([values[:, :1] for values in features.values()], axis=1)


@pytest.mark.parametrize("what", ["features", "diagnoses"])
def test_what_test_subjects_have_changes_nothing_for_others(config, data, what):
    train = data.sites != "NYU"
    fold = Fold("leave-one-site-out", 0, "NYU", train)
    test = np.flatnonzero(~train)
    recorder, recorder_of_changed = Recorder(), Recorder()
    before = classify_abide.run_fold(recorder, config, data, fold)
    if what == "features":
        features = {name: values.copy() for name, values in data.features.items()}
        for values in features.values():
            values[test[1:]] = np.random.default_rng(0).normal(40, 9, size=values[test[1:]].shape)
        changed = dataclasses.replace(data, features=features)
    else:
        subjects = [dataclasses.replace(one, autism=one.autism == bool(t)) for one, t in zip(data.subjects, train)]
        changed = dataclasses.replace(data, subjects=tuple(subjects))
    after = classify_abide.run_fold(recorder_of_changed, config, changed, fold)
    np.testing.assert_array_equal(recorder.train, np.flatnonzero(train))
    for name, values in recorder.features.items():
        np.testing.assert_array_equal(recorder_of_changed.features[name][train], values[train])
    unchanged = slice(0, 1) if what == "features" else slice(None)
    for method in ("baseline", "probe", "head"):
        expected = before["methods"][method]["probabilities"][unchanged]
        assert after["methods"][method]["probabilities"][unchanged] == expected
        if what == "features":
            assert after["methods"][method]["probabilities"] != before["methods"][method]["probabilities"]


def test_batches_hold_every_training_subject_once_an_epoch():
    train = np.array([2, 3, 5, 7, 11, 13, 17])
    batches = list(classify_abide._batches(train, 3, 6, seed=0))
    assert [len(rows) for rows in batches] == [3] * 6
    for epoch in range(3):
        rows = np.concatenate(batches[2 * epoch : 2 * epoch + 2])
        assert len(set(rows)) == 6
        assert set(rows) <= set(train)


NONE = Objective()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"atlases": ("aal",)}, r"atlases must be two or more, or one and --phenotype, got \('aal',\)"),
        ({"atlases": ("aal", "aal")}, "atlases must be different ones"),
        ({"anchor": "phenotype"}, r"anchor must be one of \('aal', 'cc200'\), got 'phenotype'"),
        ({"protocols": ()}, "protocols must be different ones, at least one"),
        ({"seeds": (1, 1)}, "seeds must be different ones"),
        ({"seeds": (-1,)}, r"seeds must be in \[0, 2\*\*32\), got \(-1,\)"),
        ({"folds": 1}, "folds must be at least 2, got 1"),
        ({"steps": 5}, r"optimizer\.warmup_steps must be below steps = 5, got 5"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"width": 0}, "width must be an integer >= 1, got 0"),
        ({"input_dropout_rate": 1.0}, r"input_dropout_rate must lie in \[0, 1\), got 1\.0"),
        ({"supervision": -1.0}, "supervision must be finite and not negative"),
        ({"supervision": 0.0, "objective": NONE}, "objective has no term"),
        ({"objective": Objective(triangle=Contrastive(1.0))}, "triangle needs exactly three modalities"),
        ({"objective": Objective(pmrl=PMRL(-1.0))}, r"objective\.pmrl\.weight must be finite and not negative"),
    ],
)
def test_options_that_make_no_sense_are_refused(config, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes)


def test_data_that_cannot_be_divided_is_refused(config, data):
    for changes, of, message in (
        ({"batch_size": 50}, data, "batch_size must not exceed the 35 training subjects of the smallest fold"),
        ({"folds": 72}, data, "folds must not exceed the 71 subjects, got 72"),
        ({}, subset(data, data.sites == "NYU"), "needs two institutions or more, got NYU"),
        ({}, subset(data, data.labels == 1), "subjects of both diagnoses"),
        (
            {},
            subset(data, (data.labels == 1) | (data.sites == "NYU")),
            r"without NYU \(leave-one-site-out\) it has one",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            classify_abide.make_folds(dataclasses.replace(config, **changes), of)


def subset(data, rows):
    subjects = tuple(one for one, kept in zip(data.subjects, rows) if kept)
    return dataclasses.replace(data, subjects=subjects, features={k: v[rows] for k, v in data.features.items()})


def test_a_site_of_one_diagnosis_has_no_auc():
    rows = [classification.measure(np.array(labels), np.array([0.2, 0.6])) for labels in ([0, 1], [1, 1])]
    results = [{"protocol": "k-fold", "seed": 0, "methods": {"baseline": row, "probe": row}} for row in rows]
    summary = classify_abide.summarize(results)["k-fold"]
    assert summary["baseline"]["auc"] == {"mean": 1.0, "std": None, "folds": 1}
    assert summary["probe - baseline"]["specificity"] == {"mean": 0.0, "std": None, "folds": 1}
    assert "| 75.0 ± 35.4 | 100.0 |" in classify_abide.markdown(results, {"k-fold": summary})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "error: there is no nowhere/Phenotypic_V1_0b_preprocessed1.csv; it comes with the time series"),
        (["ROOT", "--strategy", "filt_global"], "error: there is no file of the atlas aal; looked for"),
        (["ROOT", "--atlases", "aal", "cc200", "--batch-size", "900"], "error: batch_size must not exceed the 35 "),
    ],
)
def test_the_command_line_says_what_is_wrong_in_a_line(root, tmp_path, monkeypatch, arguments, message):
    arguments = [str(root) if argument == "ROOT" else argument for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["classify_abide", *arguments, "--run-dir", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        classify_abide.main()
    assert str(stopped.value.code).startswith(message)
    assert "\n" not in str(stopped.value.code)


def test_phenotypes_are_a_modality_on_request(config):
    with_phenotype = dataclasses.replace(config, atlases=("cc200",), phenotype=True)
    data, recorder = classify_abide.read(with_phenotype), Recorder()
    classify_abide.run_fold(recorder, with_phenotype, data, Fold("k-fold", 0, "0", data.sites != "PITT"))
    assert list(recorder.features) == ["cc200", "phenotype"]
    age, male, iq = recorder.features["phenotype"].T
    train = data.sites != "PITT"
    unknown = np.isnan([subject.iq for subject in data.subjects])
    assert unknown.sum() == 3
    np.testing.assert_array_equal(iq[unknown], 0)
    for values in (age, male, iq[~unknown]):
        assert values.std() > 0.5
    assert abs(age[train].mean()) < 1e-6
