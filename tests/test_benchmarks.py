"""The benchmarks' own models and figures, on tiny data that is made up here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from accelerando.metric import named
from benchmarks import ett, spoken, sst2
from benchmarks.cases import _against_best
from benchmarks.peers import Standing, standing
from benchmarks.rivals import ProjectedBlock, halved, projected
from benchmarks.training import Course, learned, score

SPEECH = np.random.default_rng(0).integers(-9000, 9000, 9000).astype(np.int16)


# --- training, and what is kept of it -----------------------------------------------------------------------------


def line(rows: int = 64) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(0).standard_normal((rows, 3)).astype(np.float32)
    return x, x @ np.float32([[1], [-2], [3]])


def fresh(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(3, 1)


def test_a_module_learns_and_is_not_taught_the_same_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERANDO_BENCH_FOLDER", str(tmp_path))
    course = Course(epochs=30, batch=16, rate=0.3, decay=0.0)
    first = learned("line", fresh(), line(), course, F.l1_loss)
    assert score(first, line(), "mae") < 0.2 < score(fresh(), line(), "mae")
    assert not first.training
    assert capsys.readouterr().out.count("epoch") == 30
    again = learned("line", fresh(), line(), course, F.l1_loss)
    assert capsys.readouterr().out == ""
    assert torch.equal(first.weight, again.weight)


@pytest.mark.parametrize("change", ["course", "weights", "rows", "loss", "augment"])
def test_whatever_changes_what_is_learned_is_learned_anew(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERANDO_BENCH_FOLDER", str(tmp_path))
    learned("line", fresh(), line(), Course(epochs=1), F.l1_loss)
    learned(
        "line",
        fresh(1 if change == "weights" else 0),
        line(63 if change == "rows" else 64),
        Course(epochs=2 if change == "course" else 1),
        F.mse_loss if change == "loss" else F.l1_loss,
        (lambda given: given) if change == "augment" else None,
    )
    assert len(list(tmp_path.iterdir())) == 2


# --- spoken digits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 255, 3000, 9000])
def test_a_spectrogram_has_one_size_however_long_the_clip_is(samples: int) -> None:
    found = spoken.spectrogram(SPEECH[:samples])
    assert found.shape == (spoken.BANDS, spoken.FRAMES)
    assert found.dtype == np.float32
    assert np.isfinite(found).all()


def test_a_tone_is_seen_in_the_band_of_its_pitch() -> None:
    time = np.arange(6000) / spoken.RATE
    bands = [spoken.spectrogram((9000 * np.sin(2 * np.pi * f * time)).astype(np.int16)).sum(1) for f in (300, 3000)]
    assert bands[0].argmax() < spoken.BANDS / 3 < spoken.BANDS * 2 / 3 < bands[1].argmax()


def test_takes_are_learned_from_or_judged_and_never_both(tmp_path: Path) -> None:
    lengths = np.arange(300, 300 + 50)
    offset = np.concatenate([[0], lengths.cumsum()])
    np.savez(
        tmp_path / "spoken_digits.npz",
        audio=np.resize(SPEECH, offset[-1]),
        offset=offset,
        label=(np.arange(50) % 10).astype(np.uint8),
        take=np.arange(50).astype(np.uint8),
    )
    train, judged = spoken.rows(tmp_path)
    assert train[0].shape == judged[0].shape == (25, 1, spoken.BANDS, spoken.FRAMES)
    assert judged[1].tolist() == [i % 10 for i in range(25)]
    assert train[1].tolist() == [i % 10 for i in range(25, 50)]


def test_a_disturbed_clip_is_another_of_the_same_shape() -> None:
    x = torch.ones(5, 1, spoken.BANDS, spoken.FRAMES)
    (found,) = spoken.disturb((x,))
    assert found.shape == x.shape
    assert not torch.equal(found, x)
    assert spoken.SpeechNet((4, 8), 1).eval()(found).shape == (5, 10)


# --- sentences ----------------------------------------------------------------------------------------------------


def test_sentences_become_numbers_by_the_words_of_the_training_file(tmp_path: Path) -> None:
    (tmp_path / "sst2").mkdir()
    for name, lines in {
        "train": ["a good film\t1", "a bad film\t0", "good good\t1"],
        "dev": ["a dull film\t0"],
        "test": ["good\t1"],
    }.items():
        (tmp_path / "sst2" / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    train, judged = sst2.rows(tmp_path)
    good, a, film = 2, 3, 4
    assert train[0].shape == (3, sst2.LENGTH)
    assert train[0][1, :4].tolist() == [a, sst2.UNKNOWN, film, sst2.PADDING]
    assert judged[0][:, :4].tolist() == [[a, sst2.UNKNOWN, film, 0], [good, 0, 0, 0]]
    assert judged[1].tolist() == [0, 1]


def test_padding_does_not_change_an_answer() -> None:
    reader = sst2.Reader(20, width=8, depth=2, heads=2, hidden=8).eval()
    ids = torch.tensor([[5, 6, 7] + [0] * (sst2.LENGTH - 3)])
    with torch.inference_mode():
        torch.testing.assert_close(reader(ids), reader(ids[:, :3]))
        assert torch.isfinite(reader(torch.zeros_like(ids))).all()
        assert not torch.allclose(reader(ids), reader(ids + (ids == 7)))


def test_forgotten_words_become_unknown_and_padding_stays() -> None:
    ids = torch.tensor([[5] * 40 + [0] * 24] * 50)
    (found,) = sst2.forget((ids,))
    assert set(found[:, :40].unique().tolist()) == {sst2.UNKNOWN, 5}
    assert (found[:, 40:] == 0).all()
    assert sst2._forget_and_cut((ids,))[0].shape == (50, 40)


# --- a forecast ---------------------------------------------------------------------------------------------------


def test_windows_are_followed_by_what_comes_next() -> None:
    table = np.arange(130 * ett.COLUMNS, dtype=np.float32).reshape(130, ett.COLUMNS)
    past, ahead = ett.windows(table)
    assert past.shape == (11, ett.PAST, ett.COLUMNS)
    assert ahead.shape == (11, ett.AHEAD, ett.COLUMNS)
    assert np.array_equal(np.concatenate([past[3], ahead[3]]), table[3 : 3 + ett.PAST + ett.AHEAD])


def test_what_is_judged_comes_after_what_is_learned(tmp_path: Path) -> None:
    hours = 20 * ett.MONTH
    lines = [",".join(["2016", *[str(i)] * ett.COLUMNS]) for i in range(hours)]
    (tmp_path / "ETTh1.csv").write_text("\n".join(["date,a,b,c,d,e,f,g", *lines]), encoding="utf-8")
    train, judged = ett.rows(tmp_path)
    assert len(judged[1]) == 2857
    assert train[1].max() < judged[0].min()
    assert abs(float(train[0].mean())) < 0.1


def test_the_forecaster_starts_from_where_each_column_is() -> None:
    forecaster = ett.Forecaster(width=8, depth=1, heads=2, hidden=8).eval()
    x = torch.randn(3, ett.PAST, ett.COLUMNS)
    with torch.inference_mode():
        found = forecaster(x)
        assert found.shape == (3, ett.AHEAD, ett.COLUMNS)
        torch.testing.assert_close(forecaster(x + 5), found + 5)


# --- the rival that torch-pruning makes ---------------------------------------------------------------------------


class PaddedBlock(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside)
        self.conv2, self.bn2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside)
        self.stride, self.extra = stride, outside - inside

    def forward(self, x: Any) -> Any:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        half = self.extra // 2
        padded = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.extra - half))
        return F.relu(y + padded)


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, 1, 1)
        self.blocks = nn.Sequential(PaddedBlock(16, 16, 1), PaddedBlock(16, 32, 2))
        self.linear = nn.Linear(32, 10)

    def forward(self, x: Any) -> Any:
        return self.linear(self.blocks(self.conv(x)).mean((2, 3)))


def test_a_projected_resnet_answers_as_before() -> None:
    model, x = Padded().eval(), torch.randn(2, 3, 8, 8)
    found = projected(model)
    assert isinstance(found.blocks[1], ProjectedBlock)
    assert isinstance(found.blocks[0], PaddedBlock)
    torch.testing.assert_close(found(x), model(x))


def test_a_halved_resnet_has_half_the_channels_and_all_the_classes() -> None:
    model, x = Padded().eval(), torch.randn(2, 3, 8, 8)
    found = halved(model, x)
    assert found.conv.out_channels == 8
    assert found.blocks[1].conv2.out_channels == 16
    assert found(x).shape == (2, 10)
    assert model.conv.out_channels == 16


# --- what is said of a contest ------------------------------------------------------------------------------------


def standings(**right: float) -> dict[str, Standing]:
    """Each contestant a tenth faster than the one before; of 1,000 answers this share is right."""
    rng = np.random.default_rng(0)
    scores = {name: (np.arange(1000) < 1000 * share).astype(float)[:, None] for name, share in right.items()}
    seen = {name: 1.1**-i + 1e-3 * rng.random(20) for i, name in enumerate(right)}
    return {name: standing(name, seen, scores, named("accuracy")) for name in right}


def test_a_drop_is_relative_to_eager_and_has_an_upper_bound() -> None:
    found = standings(eager=0.8, tool=0.76, ours=0.8)
    assert found["tool"].drop.mid == pytest.approx(0.05)
    assert found["tool"].drop.high > 0.05
    assert found["ours"].drop.mid == 0.0


def test_a_lower_error_is_no_drop() -> None:
    seen = {name: np.ones(20) for name in ("eager", "ours")}
    scores = {"eager": np.full((50, 1), 0.5), "ours": np.full((50, 1), 0.4)}
    assert standing("ours", seen, scores, named("mae")).drop.mid == pytest.approx(-0.2)


def test_sabotage_a_tool_that_loses_quality_is_not_the_best_one() -> None:
    found = standings(eager=0.8, honest=0.799, lossy=0.7, ours=0.8)
    said = _against_best(found, 2.0)
    assert "(honest)" in said
    assert "not reached" in said
    assert "not reached" not in _against_best(found, 1.05)
