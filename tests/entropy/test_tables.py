"""Tables: rounding counts, parametric densities, the built-in bank, and banks as bytes."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from entropy_matrices import make_bank, make_matrix
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from cachegen.entropy import make_builtin, rans
from cachegen.entropy.tables import (
    BUILTIN_ROUNDING,
    BUILTIN_SHAPES,
    BUILTIN_TABLES,
    PROB_SUM,
    Density,
    TableBank,
    builtin_bank,
    builtin_index,
    builtin_sigma,
    density_bank,
    frequencies,
    from_counts,
    ideal_bits,
    quantizer_bins,
)
from cachegen.errors import CapacityError, InputError, ShapeError, TableError

few = settings(max_examples=60, deadline=None)


def cost(counts: np.ndarray, freqs: np.ndarray) -> float:
    seen = counts > 0
    return float((counts[seen] * (12 - np.log2(freqs[seen].astype(float)))).sum())


@few
@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=40).filter(any), st.integers(0, 1))
def test_frequencies_are_a_table_and_no_exchange_of_a_unit_betters_them_much(counts, floor) -> None:
    freqs = frequencies(counts, floor).astype(int)
    array = np.array(counts)
    assert freqs.sum() == PROB_SUM
    assert freqs.max() < PROB_SUM
    assert (freqs[array > 0] >= 1).all()
    if floor:
        assert (freqs >= 1).all()
    elif (array > 0).sum() > 1:
        assert (freqs[array == 0] == 0).all()
    if (array > 0).sum() < 2:
        return
    best = cost(array, freqs)
    for give in np.flatnonzero(freqs > 1):
        for take in np.flatnonzero((array > 0) & (freqs < PROB_SUM - 1)):
            if give != take:
                other = freqs.copy()
                other[give] -= 1
                other[take] += 1
                # Rounding down leaves a symbol short of less than one unit, which saves most going from 1 to 2.
                assert cost(array, other) >= best - 2 / PROB_SUM * array.sum()


def test_frequencies_are_fixed_for_ever() -> None:
    assert frequencies([5, 3, 0, 2]).tolist() == [2048, 1228, 1, 819]
    assert frequencies([0, 7, 0], floor=0).tolist() == [0, 4095, 1]
    assert frequencies([1] * 3).tolist() == [1366, 1365, 1365]


def test_counts_that_arent_are_refused() -> None:
    for bad in ([-1, 5], [0, 0], [0.5, 0.5], [7], [1 << 41, 1]):
        with pytest.raises(InputError):
            frequencies(bad)
    with pytest.raises(ShapeError):
        from_counts([1, 2, 3], 0)
    with pytest.raises(ShapeError):
        from_counts(np.ones((1, 300), int), 0)


def test_a_small_alphabet_is_widened_and_keeps_its_escape_last() -> None:
    bank = from_counts([[6, 3, 1]], 1, escape=True, recon=[[-1.1, 0.0, 9.0]], escape_bias=0.1)
    assert bank.alphabet == 16
    assert bank.freqs[0, [0, 1, 15]].min() > 0
    assert bank.freqs[0, 2:15].max() == 0
    q = torch.tensor([[-1, 0, 1, 1000]], dtype=torch.int32)
    spec = rans.MatrixSpec(1, 4, bank, np.zeros(4, np.uint16))
    out = torch.empty_like(q)
    rans.decode(rans.encode([q], [spec]), [spec], [out])
    assert torch.equal(out, q)


def test_banks_are_checked_and_cant_be_changed() -> None:
    bank = make_bank(16, True, True)

    def changed(**parts: object) -> TableBank:
        fields = {n: getattr(bank, n) for n in ("freqs", "offset", "low_bits", "escape", "recon", "escape_bias")}
        return TableBank(**{**fields, **parts})

    off_by_one = bank.freqs.copy()
    off_by_one[3, 2] += 1
    alone = np.zeros_like(bank.freqs)
    alone[:, 0] = PROB_SUM
    nan = np.full_like(bank.recon, np.nan)
    for parts in (
        {"freqs": off_by_one},
        {"freqs": alone},
        {"freqs": bank.freqs[:, :15]},
        {"freqs": bank.freqs.astype(np.int32)},
        {"low_bits": np.full(9, 13, np.uint8)},
        {"low_bits": bank.low_bits[:3]},
        {"offset": 16},
        {"offset": -1},
        {"recon": nan},
        {"recon": bank.recon[:2]},
    ):
        with pytest.raises(TableError):
            changed(**parts)
    with pytest.raises(ValueError, match="read-only"):
        bank.freqs[0, 0] = 3


def test_a_bank_as_bytes() -> None:
    bank = make_bank(32, True, True)
    data = bank.to_bytes()
    again = TableBank.from_bytes(data)
    assert again.to_bytes() == data
    assert again.digest() == bank.digest()
    assert (again.freqs == bank.freqs).all()
    assert (again.recon == bank.recon).all()
    for bad in (
        b"",
        data[:-1],
        data + b"\0",
        b"XXXX" + data[4:],
        data[:4] + b"\x09" + data[5:],
        data[:8] + b"\xff" * 4 + data[12:],
    ):
        with pytest.raises(TableError):
            TableBank.from_bytes(bad)
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 0x41
        with contextlib.suppress(TableError):
            assert TableBank.from_bytes(bytes(damaged)).digest() != bank.digest()


@pytest.mark.parametrize(
    ("density", "pdf"),
    [
        (Density.laplace(), stats.laplace(scale=0.5**0.5).pdf),
        (Density.gaussian(), stats.norm.pdf),
        (
            Density.gaussian_mixture([3, 1], [1, 4]),
            lambda x: (
                0.75 * stats.norm(scale=(4 / 19) ** 0.5).pdf(x) + 0.25 * stats.norm(scale=(64 / 19) ** 0.5).pdf(x)
            ),
        ),
    ],
)
def test_quantiser_bins_are_the_densitys_integrals(density, pdf) -> None:
    sigma, rounding = 1.7, 0.38
    inside, centroids = quantizer_bins(density, sigma, rounding, 40)
    assert inside[0] + 2 * inside[1:].sum() == pytest.approx(1, abs=1e-6)
    for m in (1, 2, 5):
        low, high = (m - rounding) / sigma, (m + 1 - rounding) / sigma
        mass = integrate.quad(pdf, low, high)[0]
        moment = integrate.quad(lambda x: x * pdf(x), low, high)[0]
        assert inside[m] == pytest.approx(mass, rel=1e-6)
        assert centroids[m] == pytest.approx(sigma * moment / mass, rel=1e-6)
    assert centroids[0] == 0


@pytest.mark.parametrize("sigma", [0.3, 1.0, 6.0, 100.0])
def test_a_density_bank_codes_its_density_near_the_entropy(sigma) -> None:
    rng = np.random.default_rng(0)
    x = rng.laplace(scale=sigma / 2**0.5, size=(256, 64))
    q = (np.sign(x) * np.floor(np.abs(x) + 0.38)).astype(np.int32)
    bank = density_bank(Density.laplace(), [sigma], 0.38)
    spec = rans.MatrixSpec(256, 64, bank, np.zeros(64, np.uint16))
    inside, _ = quantizer_bins(Density.laplace(), sigma, 0.38, 3000)
    p = np.concatenate([inside, inside[1:]])
    entropy = -(p[p > 0] * np.log2(p[p > 0])).sum()
    assert ideal_bits(torch.from_numpy(q), spec) / q.size == pytest.approx(entropy, abs=0.06)


def test_the_builtin_bank_is_the_committed_one() -> None:
    digests = {shape: builtin_bank(shape).digest().hex()[:32] for shape in BUILTIN_SHAPES}
    assert digests == {
        "laplace": "ba24ca52de1d445a815253a1010e7217",
        "general": "7abb59814c065e05353f8a648a4b528e",
        "gaussian": "ec0e85f9c599bd1d97b1685f7d1abfbf",
    }
    with pytest.raises(InputError):
        builtin_bank("cauchy")


@pytest.mark.parametrize("shape", BUILTIN_SHAPES)
def test_the_builtin_bank_is_what_the_script_makes(shape) -> None:
    """To a unit of frequency and a last place of a point: another scipy may round otherwise."""
    stored, some = builtin_bank(shape), [0, 5, 12, 19, 20, 28, 40]
    made = make_builtin.make(shape, some)
    assert np.abs(stored.freqs[some].astype(int) - made.freqs).max() <= 1
    assert (stored.low_bits[some] == made.low_bits).all()
    assert np.allclose(stored.recon[some], made.recon, rtol=1e-5, atol=1e-6)
    assert stored.escape_bias == pytest.approx(0.5 - BUILTIN_ROUNDING)


def test_scale_indices_are_a_quarter_octave_apart() -> None:
    sigmas = [builtin_sigma(i) for i in range(BUILTIN_TABLES)]
    assert sigmas[12] == 1
    assert np.allclose(np.diff(np.log2(sigmas)), 0.25)
    assert builtin_index(sigmas).tolist() == list(range(BUILTIN_TABLES))
    assert builtin_index([0.0, 1e-30, 1e30]).tolist() == [0, 0, BUILTIN_TABLES - 1]
    with pytest.raises(InputError):
        builtin_sigma(BUILTIN_TABLES)
    widest = builtin_bank("gaussian").low_bits
    assert widest[0] == 0
    assert widest[-1] == 12


def test_ideal_bits_count_symbols_low_bits_and_escapes() -> None:
    freqs = np.zeros((1, 16), np.uint16)
    freqs[0, [7, 8, 15]] = 2048, 1024, 1024
    bank = TableBank(freqs, 7, np.array([3], np.uint8), True, np.zeros((1, 16), np.float32))
    spec = rans.MatrixSpec(1, 3, bank, np.zeros(3, np.uint16))
    q = torch.tensor([[5, 8, 1000]], dtype=torch.int32)  # shifted: 0, 1, 125
    assert ideal_bits(q, spec) == pytest.approx((1 + 3) + (2 + 3) + (2 + 16 + 3))
    with pytest.raises(CapacityError):
        ideal_bits(torch.tensor([[0, 0, 1 << 30]], dtype=torch.int32), spec)
    spec, values = make_matrix(make_bank(64, True, True, floor=0), 64, 300, 3)
    coded = len(rans.encode([values], [spec])[0]) * 8
    assert 0 <= coded - ideal_bits(values, spec) <= 32 * 32
