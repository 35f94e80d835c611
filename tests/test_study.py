"""The studies: tables that resume, the toy network against plain training of all of it, learning
rates that are climbed on, verdicts, and the data sets that only they use.
"""

import gzip
import io
import json
import math
import os
import pickle
import statistics
import sys

import numpy as np
import pytest
import torch
from filelock import FileLock
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from benchmarks import common, data
from benchmarks.data import Images
from benchmarks.studies import figures, lm, toy, verdicts
from benchmarks.studies.__main__ import main as studies
from benchmarks.studies.table import Table, interval, run_missing

TOY = toy.Toy(width=48, r=4, batch=8, pretrain_steps=60, pretrain_lr=5e-3, steps=12)
GRID = {"sigmas": (1e-3, 0.1), "lrs": (1e-3, 1e-2)}


def random_images(seed: int, rows: int = 200) -> Images:
    """Images that tell their class, so that there is something to learn."""
    draw = np.random.default_rng(seed)
    patterns = draw.integers(0, 256, (10, 784))
    labels = [draw.integers(0, 10, count) for count in (rows, 70)]
    noisy = [np.clip(patterns[y] + draw.normal(0, 60, (len(y), 784)), 0, 255) for y in labels]
    train_y, test_y = (y.astype(np.uint8) for y in labels)
    train_x, test_x = (x.astype(np.uint8) for x in noisy)
    return Images(train_x, train_y, test_x, test_y)


@pytest.fixture(scope="module")
def images() -> tuple[Images, Images]:
    return random_images(0), random_images(1)


# The table.


def test_a_table_comes_back_as_it_was_and_sorted(tmp_path):
    table = Table(tmp_path / "t.csv", ("method", "lr"), ("loss", "note"))
    table.add([{"method": "b", "lr": 1e-3, "loss": 2 / 3, "note": ""}])
    table.add([{"method": "a", "lr": 0.5, "loss": math.inf, "note": "x"}])
    table.add([{"method": "a", "lr": 3e-4, "loss": 7, "note": "y"}])
    again = Table(tmp_path / "t.csv", ("method", "lr"), ("loss", "note"))
    assert again.rows == table.rows
    assert [(row["method"], row["lr"]) for row in again.rows] == [
        ("a", 3e-4),
        ("a", 0.5),
        ("b", 1e-3),
    ]
    assert again.select(method="b") == [{"method": "b", "lr": 1e-3, "loss": 0.666667, "note": ""}]
    assert again.missing([{"method": "a", "lr": 0.5}, {"method": "c", "lr": 0.5}]) == [
        {"method": "c", "lr": 0.5}
    ]


def test_a_table_of_other_columns_is_refused(tmp_path):
    (tmp_path / "t.csv").write_text("method,loss\nlora,1\n")
    with pytest.raises(ValueError, match="move it away"):
        Table(tmp_path / "t.csv", ("method", "lr"), ("loss",))


def test_what_was_yielded_before_a_failure_is_kept(tmp_path):
    table = Table(tmp_path / "t.csv", ("lr",), ("loss",))
    runs = [{"lr": lr} for lr in (1, 2, 3)]

    def failing(missing):
        yield [missing[0] | {"loss": 0.5}]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_missing(table, runs, failing)
    asked = []

    def rest(missing):
        asked.extend(missing)
        yield [run | {"loss": 1.0} for run in missing]

    run_missing(Table(table.path, ("lr",), ("loss",)), runs, rest)
    run_missing(Table(table.path, ("lr",), ("loss",)), runs, rest)
    assert asked == runs[1:]


def test_interval_is_students():
    # of 1, 2, 3: t(2 degrees) = 4.303, deviation 1
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.303 / math.sqrt(3)))
    assert interval([5.0]) == (5.0, math.inf)


# The toy study.


@pytest.mark.parametrize("init", toy.INITS)
def test_shared_features_train_as_the_whole_network_does(images, init):
    """Against the network as it is defined, with W₀ − B₀A₀ stored, in fp64 by autograd."""
    cell = {"init": init, "sigma": 0.1, "lr": 1e-2}
    backbone = toy.pretrain(TOY, images[0], seed=3)
    directions = toy.draw(TOY, seed=3)
    x, y = torch.from_numpy(images[1].train_x), torch.from_numpy(images[1].train_y).long()
    rows = torch.arange(TOY.batch * TOY.steps)
    seen = toy.features(backbone, directions, x, y, rows)
    A, B, taken = toy.fine_tune(TOY, backbone.w_out, seen, directions, cell)

    w_in, w, w_out = (weight.double() for weight in backbone)
    plain_A = (0.1 * directions.A.double()).requires_grad_()
    plain_B = 0.1 * directions.B.double() if init != "init_a" else torch.zeros_like(B).double()
    frozen = w - plain_B @ plain_A.detach() if init == "init_ab" else w
    plain_B.requires_grad_()
    optimizer = torch.optim.AdamW([plain_A, plain_B], lr=1e-2, weight_decay=0)

    def logits(x: torch.Tensor) -> torch.Tensor:
        h = F.relu(x.double() / 255 @ w_in.T)
        return F.relu(h @ (frozen + plain_B @ plain_A).T) @ w_out.T

    for part in rows.split(TOY.batch):
        optimizer.zero_grad()
        F.cross_entropy(logits(x[part]), y[part]).backward()
        optimizer.step()
    # Adam divides by |g|: where g is nothing but rounding, a step has any size up to lr.
    assert (A - plain_A).abs().median() < 1e-5
    assert (B - plain_B).abs().median() < 1e-5

    test = torch.from_numpy(images[1].test_x), torch.from_numpy(images[1].test_y).long()
    loss, accuracy = toy.evaluate(
        backbone.w_out, toy.features(backbone, directions, *test), A, B, taken
    )
    with torch.no_grad():
        expected = logits(test[0])
    assert loss == pytest.approx(float(F.cross_entropy(expected, test[1])), rel=1e-3)
    assert accuracy == pytest.approx(
        float((expected.argmax(1) == test[1]).double().mean()), abs=0.02
    )


def test_the_toy_study_resumes_to_the_same_table(images, tmp_path, monkeypatch):
    whole = toy.table(tmp_path / "whole.csv")
    toy.run(whole, TOY, *images, seeds=[0, 1], **GRID)
    assert len(whole.rows) == 2 * (3 * 4 + 2)
    kept = whole.path.read_text().splitlines(keepends=True)
    cut = toy.table(tmp_path / "cut.csv")
    cut.path.write_text("".join(kept[:6]))
    cut = toy.table(tmp_path / "cut.csv")
    toy.run(cut, TOY, *images, seeds=[0, 1], **GRID)
    assert cut.path.read_bytes() == whole.path.read_bytes()
    monkeypatch.setattr(toy, "pretrain", lambda *_: pytest.fail("nothing is missing"))
    toy.run(toy.table(cut.path), TOY, *images, seeds=[0, 1], **GRID)


def test_the_toy_studys_verdict_and_figure(images, tmp_path):
    results = toy.table(tmp_path / "toy.csv")
    toy.run(results, TOY, *images, seeds=[0, 1, 2], **GRID)
    verdict = verdicts.toy(results)
    found = {(row["pair"], row["score"]): row for row in verdict["rows"]}
    row = found["init_ab − init_a", "loss"]
    assert row["cells"] == 4
    mean = {
        (init, seed): statistics.fmean(r["loss"] for r in results.select(init=init, seed=seed))
        for init in toy.INITS
        for seed in range(3)
    }
    gains = [mean["init_ab", seed] - mean["init_a", seed] for seed in range(3)]
    assert row["all"] == pytest.approx(interval(gains))
    assert verdict["references"]["mnist"]["accuracy"][0] > 0.9  # it was pretrained
    assert "init_ab − init_a, accuracy: better in" in verdicts.toy_text(verdict)
    figures.toy(results, tmp_path / "toy.png")
    assert (tmp_path / "toy.png").read_bytes().startswith(b"\x89PNG")


def test_a_cell_counts_as_better_only_beyond_its_interval(tmp_path):
    results = toy.table(tmp_path / "toy.csv")
    # init_ab: sure of 0.1 more at lr 1, of 0.1 less at lr 2, and of nothing at lr 3
    gains = {1: (0.1, 0.1, 0.11), 2: (-0.1, -0.1, -0.11), 3: (0.1, -0.1, 0.0)}
    for seed in range(3):
        references = [("mnist", 0, 0, 0.0), ("none", 0, 0, 0.0)]
        cells = [
            (init, 1, lr, gains[lr][seed] * (init != "init_a"))
            for init in toy.INITS
            for lr in gains
        ]
        results.add(
            {"seed": seed, "init": i, "sigma": s, "lr": lr, "loss": 1 - gain, "accuracy": gain}
            for i, s, lr, gain in (*references, *cells)
        )
    for row in verdicts.toy(results)["rows"][:2]:
        assert (row["better"], row["worse"]) == (1, 1)
        assert row["best_cells"][0] == (1, 1)


# The language models.


def tiny_llama() -> lm.Task:
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    ids = torch.arange(7)[None] * torch.randint(1, 5, (64, 1)) % 40  # sequences with a rule
    rows = lm.Examples(ids, torch.ones_like(ids), ids)
    model = LlamaForCausalLM(config).eval()
    return lm.Task(model, ("q_proj", "v_proj"), rows, rows, rows, 4, 8, (1e-3, 1e-2))


def tiny_bert() -> lm.Task:
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    torch.manual_seed(0)
    ids = torch.randint(1, 40, (64, 9))
    mask = (torch.arange(9) < torch.randint(3, 9, (64, 1))).long()
    rows = lm.Examples(ids, mask, (ids[:, 0] > 20).long())
    model = BertForSequenceClassification(config).eval()
    head = {"head": ("classifier",), "head_lr": 1e-2}
    return lm.Task(model, ("query", "value"), rows, rows, rows, 4, 8, (1e-3, 1e-2), **head)


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert])
def test_the_language_model_study_resumes_to_the_same_table(make, tmp_path, monkeypatch):
    monkeypatch.setattr(lm, "LADDER", (1e-3, 1e-2))
    names = ["none", "lora", "pissa"]
    whole = lm.table(tmp_path / "whole.csv")
    task = make()
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    lm.run(whole, task, names, seeds=[0, 1])
    finals = lm.finals(whole)
    assert len(finals) == 2 * (1 + 2 + 2)
    assert {row["step"] for row in finals} == {8, 0} if make is tiny_llama else {8}
    assert all(torch.equal(before[n], tensor) for n, tensor in task.model.state_dict().items())

    half = lm.table(tmp_path / "half.csv")
    last = ("pissa", 0, 1e-2)  # of two runs with one start, trained alone
    half.add(r for r in whole.rows if (r["method"], r["seed"], r["lr"]) != last)
    lm.run(half, make(), names, seeds=[0, 1])
    assert half.path.read_bytes() == whole.path.read_bytes()
    monkeypatch.setattr(lm, "start", lambda *_: pytest.fail("nothing is missing"))
    lm.run(lm.table(half.path), task, names, seeds=[0, 1])


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert])
def test_methods_start_at_the_same_model_and_see_the_same_examples(make):
    task, order = make(), torch.arange(64)
    batch = task.train.batch(order[:4])
    with torch.no_grad():
        lora, pissa, none = (
            lm.start(task, lm.STARTS[name], order, seed=5)(**batch).logits
            for name in ("lora", "pissa", "none")
        )
    torch.testing.assert_close(lora, pissa, atol=1e-5, rtol=1e-4)
    assert torch.equal(lora, none)  # the head too is drawn from the seed


def test_only_adapters_and_the_head_are_trained():
    order = torch.arange(64)
    for name, kinds in (("lora", {"lora_A", "lora_B", "classifier"}), ("none", {"classifier"})):
        model = lm.start(tiny_bert(), lm.STARTS[name], order, seed=0)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained
        assert {next(k for k in kinds if k in n.split(".")) for n in trained} == kinds


def test_evaluate_is_the_mean_over_tokens_and_over_sentences():
    for task in (tiny_llama(), tiny_bert()):
        rows = task.test
        with torch.no_grad():
            output = task.model(input_ids=rows.ids, attention_mask=rows.mask, labels=rows.labels)
        loss, accuracy = lm.evaluate(task.model, rows)
        assert loss == pytest.approx(float(output.loss), rel=1e-5)
        guesses = output.logits.argmax(-1)
        if rows.labels.ndim == 2:
            right = guesses[:, :-1] == rows.labels[:, 1:]
        else:
            right = guesses == rows.labels
        assert accuracy == pytest.approx(float(right.double().mean()))


def results_of(path, losses: dict[str, dict[float, list[float]]]) -> Table:
    """A table with these validation losses by method, lr and seed; test scores follow them."""
    results = lm.table(path)
    results.add(
        {
            "method": method,
            "lr": lr,
            "seed": seed,
            "step": 8,
            "train_loss": loss,
            "val_loss": loss,
            "val_accuracy": 1 - loss,
            "test_loss": loss + 0.5,
            "test_accuracy": 0.9 - loss,
        }
        for method, by_lr in losses.items()
        for lr, values in by_lr.items()
        for seed, loss in enumerate(values)
    )
    return results


@pytest.mark.parametrize(
    ("by_lr", "expected"),
    [
        ({1e-3: [0.5], 3e-3: [0.4], 1e-2: [0.6]}, None),
        ({1e-3: [0.5], 3e-3: [0.4]}, 1e-2),
        ({1e-3: [0.3], 3e-3: [0.4]}, 3e-4),
        ({1e-2: [0.9], 3e-2: [0.8], 1e-1: [0.7]}, None),
        ({1e-3: [0.3], 3e-3: [math.nan], 1e-4: [0.4]}, None),
    ],
    ids=["inside", "up", "down", "top of the ladder", "diverged above"],
)
def test_the_ladder_is_climbed_while_the_best_is_at_an_end(tmp_path, by_lr, expected):
    assert lm.further_lr(results_of(tmp_path / "t.csv", {"lora": by_lr}), "lora") == expected


def test_a_learning_rate_of_fewer_seeds_is_not_the_best(tmp_path):
    results = results_of(tmp_path / "t.csv", {"lora": {1e-3: [0.5, 0.5], 3e-3: [0.4], 1e-2: [0.6]}})
    assert lm.best_lr(results, "lora") == 1e-3


def test_a_table_of_shorter_runs_is_refused(tmp_path):
    task = tiny_llama()
    results = results_of(tmp_path / "t.csv", {"lora": {1e-3: [0.5]}})
    results.rows[0]["step"] = task.steps - 1
    with pytest.raises(ValueError, match=r"has runs of \[7\] steps.*move it away"):
        lm.run(results, task, ["lora"], seeds=[0])


def test_a_methods_best_lr_is_found_by_running_further_rungs(tmp_path):
    results = lm.table(tmp_path / "t.csv")
    lm.run(results, tiny_llama(), ["lora"], seeds=[0, 1])
    tried = sorted({row["lr"] for row in results.rows})
    best = lm.best_lr(results, "lora")
    assert best in tried[1:-1] or best in (lm.LADDER[0], lm.LADDER[-1])
    assert all(row["seeds"] == 2 for row in verdicts.lm_rows(results))


def test_further_seeds_run_the_whole_ladder_that_was_climbed(tmp_path):
    results = lm.table(tmp_path / "t.csv")
    lm.run(results, tiny_llama(), ["lora"], seeds=[0])
    climbed = {row["lr"] for row in results.rows}
    assert climbed > set(tiny_llama().lrs)
    lm.run(results, tiny_llama(), ["lora"], seeds=[0, 1])
    assert {row["lr"] for row in results.select(seed=1)} >= climbed


def test_the_verdict_names_who_beats_lora_and_who_loses(tmp_path):
    results = results_of(
        tmp_path / "t.csv",
        {
            "lora": {1e-3: [0.50, 0.60, 0.55], 3e-3: [0.9, 0.9, 0.9]},
            "good": {1e-3: [0.9, 0.9, 0.9], 3e-3: [0.40, 0.50, 0.46]},
            "same": {1e-3: [0.45, 0.65, 0.55], 3e-3: [0.9, 0.9, 0.9]},
            "bad": {1e-3: [0.7, 0.8, 0.76], 3e-3: [math.nan, 0.1, 0.1]},
            "none": {0: [0.1, 0.1, 0.1]},
        },
    )
    rows = verdicts.lm_rows(results)
    assert [row["method"] for row in rows] == ["none", "good", "lora", "same", "bad"]
    good = rows[1]
    assert good["lr"] == 3e-3
    assert good["test_loss_over_lora"] == pytest.approx(interval([-0.1, -0.1, -0.09]))
    assert verdicts.lm_winners(rows) == [
        "test accuracy: better than lora beyond 95%: good; worse: bad",
        "test loss: better than lora beyond 95%: good; worse: bad",
    ]
    figures.lm_study(results, rows, "tiny", tmp_path / "t.png")
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


# The command.


def test_the_command_writes_all_of_the_toy_study(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "DATA", tmp_path)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(data, "mnist", lambda: images[0])
    monkeypatch.setattr(data, "fashion_mnist", lambda: images[1])
    monkeypatch.setattr(toy, "Toy", lambda: TOY)
    monkeypatch.setattr(torch, "set_flush_denormal", lambda _: True)  # it is of the whole process
    monkeypatch.setattr(sys, "argv", ["studies", "toy", "--seeds", "2", "--every", "6"])
    with FileLock(tmp_path / "study-toy.lock"), pytest.raises(SystemExit, match="another process"):
        studies()
    studies()
    (verdict,) = tmp_path.glob("study-toy-*.json")
    assert json.loads(verdict.read_text())["seeds"] == 2
    assert len(toy.table(tmp_path / "study-toy.csv").rows) == 2 * (3 * 2 * 2 + 2)
    assert (tmp_path / "study-toy.png").exists()
    assert "init_ab − init_a, loss: better in" in capsys.readouterr().out


# The data.


def test_a_pickle_of_arrays_runs_nothing_else(tmp_path):
    # An array of three int32 as Python 2 wrote it, with its bytes in a string.
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    minus_one = b"J\xff\xff\xff\xff"
    dtype = b"cnumpy\ndtype\nU\x02i4K\x00K\x01\x87R(K\x03U\x01<NNN" + 2 * minus_one + b"K\x00tb"
    content = np.array([1, -2, 200], "<i4").tobytes()
    state = b"(K\x01K\x03\x85" + dtype + b"\x89U\x0c" + content + b"tb"
    written = io.BytesIO(b"\x80\x02" + array + state + b".")
    np.testing.assert_array_equal(data.unpickle_arrays(written), [1, -2, 200])

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    with pytest.raises(pickle.UnpicklingError, match=r"must not ask for (posix|nt)\.mkdir"):
        data.unpickle_arrays(io.BytesIO(pickle.dumps(Evil())))
    assert not (tmp_path / "made").exists()


def test_idx_files_are_read(tmp_path):
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    header = bytes([0, 0, 8, 3]) + np.array(pixels.shape, ">u4").tobytes()
    (tmp_path / "x.gz").write_bytes(gzip.compress(header + pixels.tobytes()))
    np.testing.assert_array_equal(data.read_idx(tmp_path / "x.gz"), pixels.reshape(2, 12))
    header = bytes([0, 0, 8, 1]) + np.array([5], ">u4").tobytes()
    (tmp_path / "y.gz").write_bytes(gzip.compress(header + bytes(range(5))))
    np.testing.assert_array_equal(data.read_idx(tmp_path / "y.gz"), np.arange(5))


@pytest.mark.parametrize("fetch", [data.mnist, data.fashion_mnist])
def test_images_are_whole(fetch):
    try:
        images = fetch()
    except data.Unavailable as reason:
        pytest.skip(str(reason))
    assert [array.shape for array in images] == [(60000, 784), (60000,), (10000, 784), (10000,)]
    assert {array.dtype for array in images} == {np.dtype("uint8")}
    assert sorted(set(images.train_y)) == list(range(10))
    # the published mean pixels
    mean = 33.32 if fetch is data.mnist else 72.94
    assert images.train_x.mean() == pytest.approx(mean, abs=0.01)
