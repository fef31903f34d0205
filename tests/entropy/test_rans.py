"""The native coder: what goes in comes out, on every ISA alike, and hostile bytes end in typed errors."""

from __future__ import annotations

import hashlib
import os

import numpy as np
import pytest
import torch
from entropy_matrices import input_types, make_bank, make_matrix
from hypothesis import given, settings
from hypothesis import strategies as st

from cachegen.entropy import rans, reference
from cachegen.entropy.rans import Dequant, MatrixSpec
from cachegen.entropy.tables import builtin_bank, ideal_bits
from cachegen.errors import (
    CapacityError,
    CorruptStream,
    DtypeError,
    FormatError,
    InputError,
    LayoutError,
    LimitExceeded,
    ShapeError,
    TableError,
    Truncated,
)

ISAS = os.environ.get("CACHEGEN_TEST_ISAS", ",".join(rans.available_isas())).split(",")
EXAMPLES = int(os.environ.get("CACHEGEN_TEST_EXAMPLES", "40"))
FLOATS = (torch.bfloat16, torch.float16, torch.float32)

banks = st.builds(
    make_bank,
    st.sampled_from([16, 32, 64, 256]),
    st.booleans(),
    st.booleans(),
    floor=st.sampled_from([0, 1]),
)
shapes = st.tuples(st.integers(1, 70), st.integers(1, 80))
few = settings(max_examples=EXAMPLES, deadline=None)


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.dtype is torch.float32 else torch.int16)


def expected_floats(q: torch.Tensor, spec: MatrixSpec, dequant: Dequant, dtype: torch.dtype) -> torch.Tensor:
    """What decode_dequant must give, by torch's own fp32 arithmetic and rounding."""
    bank, tokens = spec.bank, spec.tokens
    ids = np.repeat(np.broadcast_to(spec.table_ids, (spec.blocks, spec.components)), 32, axis=0)[:tokens]
    low_bits = bank.low_bits[ids].astype(np.int64)
    values = q.numpy().astype(np.int64)
    symbols = (values >> low_bits) + bank.offset
    direct = (symbols >= 0) & (symbols < bank.alphabet - bank.escape)
    direct &= bank.freqs[ids, np.where(direct, symbols, 0)] > 0
    raw = values.astype(np.float32) + np.float32(bank.escape_bias) * np.sign(values).astype(np.float32)
    points = bank.recon[ids, np.where(direct, symbols, 0)]
    v = torch.from_numpy(np.where(direct & (low_bits == 0), points, raw))
    if dequant.scale is not None:
        scale = dequant.scale
        v = v * (scale if scale.dim() == 1 else scale.repeat_interleave(32, dim=0)[:tokens])
    if dequant.token_scale is not None:
        v = v * dequant.token_scale[:, None]
    if dequant.bias is not None:
        v = v + dequant.bias
    return v.to(dtype)


# ------------------------------------------------------------------------------------------ round trips
@few
@given(banks, shapes, st.integers(0, 2**32), st.booleans())
def test_values_come_back_on_every_isa(bank, shape, seed, by_block) -> None:
    spec, q = make_matrix(bank, *shape, seed, by_block)
    expected = rans.encode([q], [spec], isa="scalar")[0]
    for isa in ISAS:
        for values in input_types(q, bank):
            assert rans.encode([values], [spec], isa=isa)[0] == expected, (isa, values.dtype)
            wide = torch.full((shape[0], shape[1] + 5), 77, dtype=values.dtype)
            rans.decode([expected], [spec], [wide[:, 2:-3]], isa=isa)
            assert torch.equal(wide[:, 2:-3], values), (isa, values.dtype)
            assert (wide[:, :2] == 77).all()
            assert (wide[:, -3:] == 77).all()


@few
@given(banks, shapes, st.integers(0, 2**32), st.sampled_from(FLOATS), st.integers(0, 11))
def test_dequantised_values_are_those_of_torch(bank, shape, seed, dtype, parts) -> None:
    spec, q = make_matrix(bank, *shape, seed)
    make = torch.Generator().manual_seed(seed % 2**31)
    scale_shape = (None, (spec.components,), (spec.blocks, spec.components))[parts % 3]
    dequant = Dequant(
        None if scale_shape is None else torch.randn(scale_shape, generator=make) * 3,
        torch.rand(spec.tokens, generator=make) if parts // 3 % 2 else None,
        torch.randn(spec.components, generator=make) if parts // 6 else None,
    )
    expected = bits_of(expected_floats(q, spec, dequant, dtype))
    data = rans.encode([q], [spec])
    for isa in ISAS:
        out = torch.full((spec.tokens, spec.components), 9.0, dtype=dtype)
        rans.decode_dequant(data, [spec], [dequant], [out], isa=isa)
        assert torch.equal(bits_of(out), expected), isa


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dim", [20, 64])
def test_dequantised_values_go_to_strided_heads_and_nowhere_else(isa, dim) -> None:
    bank = make_bank(32, True, True)
    spec, q = make_matrix(bank, 45, 3 * dim, 5)
    dequant = Dequant(torch.rand(spec.components))
    data = rans.encode([q], [spec])
    for dtype in FLOATS:
        memory = torch.full((3, 50, dim + 9), 5.0, dtype=dtype)
        out = memory[:, 2:47, 4 : 4 + dim].transpose(0, 1)
        rans.decode_dequant(data, [spec], [dequant], [out], isa=isa)
        expected = expected_floats(q, spec, dequant, dtype)
        assert torch.equal(bits_of(out.reshape(45, -1)), bits_of(expected))
        rest = memory.clone()
        rest[:, 2:47, 4 : 4 + dim] = 5.0
        assert (rest == 5.0).all()


@pytest.mark.parametrize("isa", ISAS)
def test_overflow_and_nan_round_as_stated(isa) -> None:
    bank = make_bank(16, False, False)
    spec, q = make_matrix(bank, 32, 32, 1)
    scale = torch.tensor([3e38, 1e-44, 65520.0, 6e-8] * 8)
    bias = torch.tensor([-3e38, 0.0, 1.0, 1e-9] * 8)
    data = rans.encode([q], [spec])
    for dtype in FLOATS:
        out = torch.empty(32, 32, dtype=dtype)
        rans.decode_dequant(data, [spec], [Dequant(scale, None, bias)], [out], isa=isa)
        assert torch.equal(bits_of(out), bits_of(expected_floats(q, spec, Dequant(scale, None, bias), dtype)))
        rans.decode_dequant(data, [spec], [Dequant(scale * torch.inf, None, None)], [out], isa=isa)
        quiet = {torch.bfloat16: 0x7FC0, torch.float16: 0x7E00, torch.float32: 0x7FC00000}[dtype]
        assert (bits_of(out)[q == 0] == quiet).all()
        assert out[q > 0].eq(torch.inf).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("tokens", "components"), [(300, 300), (40, 1100), (1, 4200), (2100, 70)])
def test_matrices_of_several_streams(isa, tokens, components) -> None:
    for bank in (make_bank(16, False, False), builtin_bank("general")):
        spec, q = make_matrix(bank, tokens, components, 3)
        data = rans.encode([q], [spec], isa="scalar")
        assert len(reference._stream_ranges(spec)) > 1
        assert rans.encode([q], [spec], isa=isa) == data
        out = torch.empty_like(q)
        rans.decode(data, [spec], [out], isa=isa)
        assert torch.equal(out, q)


@pytest.mark.parametrize("isa", ISAS)
def test_many_matrices_at_once_and_threads_change_nothing(isa) -> None:
    specs, values = [], []
    for seed, (alphabet, escape, tokens) in enumerate(
        [(16, False, 64)] * 5 + [(32, True, 64)] * 3 + [(256, False, 7)] * 2
    ):
        spec, q = make_matrix(make_bank(alphabet, escape, escape), tokens, 50 + seed % 2, seed)
        specs.append(spec)
        values.append(q)
    one_by_one = [rans.encode([q], [s], isa="scalar")[0] for q, s in zip(values, specs, strict=True)]
    for threads in (1, 3):
        assert rans.encode(values, specs, threads, isa=isa) == one_by_one
        out = [torch.empty_like(q) for q in values]
        rans.decode([memoryview(b"\0" + data)[1:] for data in one_by_one], specs, out, threads, isa=isa)
        assert all(torch.equal(a, b) for a, b in zip(out, values, strict=True))


def test_the_plain_twin_agrees() -> None:
    for alphabet in (16, 32, 64, 256):
        for escape in (False, True):
            bank = make_bank(alphabet, escape, True, floor=0)
            for tokens, components in ((1, 1), (40, 9), (16, 5)):
                spec, q = make_matrix(bank, tokens, components, 7, by_block=True)
                data = reference.encode(q.tolist(), spec)
                assert rans.encode([q], [spec]) == [data]
                assert reference.decode(data, spec) == q.tolist()


def test_the_cost_is_within_a_hundredth_of_a_bit_of_the_ideal() -> None:
    spec, q = make_matrix(make_bank(16, False, False, tables=64), 256, 256, 11)
    (data,) = rans.encode([q], [spec])
    assert 0 <= len(data) * 8 - ideal_bits(q, spec) <= 0.0165 * q.numel()


GOLDEN = {
    (16, False, False): "2641ecb5da7ced3a9cb78256245f83da",
    (32, True, True): "9abc68b929be710818c1a64d9cb4ab44",
    (64, True, False): "603d0e2d59c1d1dd4a06243ab9f76da8",
    (256, False, True): "3f773f57189c79ca967afa5c6a920f03",
}


def golden_matrix(alphabet: int, escape: bool, low_bits: bool) -> tuple[MatrixSpec, torch.Tensor]:
    """A matrix that no library's random numbers can change."""
    bank = make_bank(alphabet, escape, low_bits)
    spec = MatrixSpec(50, 40, bank, (np.arange(40) * 5 % bank.tables).astype(np.uint16))
    rows, columns = np.arange(50)[:, None], np.arange(40)[None]
    low_bits_of = bank.low_bits[spec.table_ids].astype(np.int64)
    spread = (rows * rows * 7 + columns * 13 + rows * columns) % 9 - 4
    return spec, torch.from_numpy(((spread << low_bits_of) + columns % (1 << low_bits_of)).astype(np.int32))


@pytest.mark.parametrize("kind", GOLDEN)
def test_streams_stay_readable_for_ever(kind) -> None:
    spec, q = golden_matrix(*kind)
    (data,) = rans.encode([q], [spec])
    assert hashlib.sha256(data).hexdigest()[:32] == GOLDEN[kind]


# ------------------------------------------------------------------------------------------ hostile bytes
def decode_to_ints(data, spec, isa) -> torch.Tensor:
    out = torch.zeros(spec.tokens, spec.components, dtype=torch.int32)
    rans.decode([data], [spec], [out], isa=isa)
    return out


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("alphabet", "extras"), [(16, False), (32, True), (256, False)])
def test_every_truncation_is_an_error(isa, alphabet, extras) -> None:
    spec, q = make_matrix(make_bank(alphabet, extras, extras), 37, 40, 2)
    (data,) = rans.encode([q], [spec])
    for size in range(len(data)):
        with pytest.raises((Truncated, CorruptStream)):
            decode_to_ints(data[:size], spec, isa)
    for more in (b"\0", b"\0\0", b"abcdefgh" * 20):
        with pytest.raises(CorruptStream):
            decode_to_ints(data + more, spec, isa)


@pytest.mark.parametrize("isa", ISAS)
def test_a_flipped_bit_is_an_error_or_the_stream_of_other_values(isa) -> None:
    """Without escape and low bits, streams and matrices correspond one to one; nearly no stream ends well by chance."""
    spec, q = make_matrix(make_bank(16, False, False), 33, 20, 4)
    (data,) = rans.encode([q], [spec])
    unnoticed = 0
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            other = decode_to_ints(bytes(flipped), spec, isa)
        except CorruptStream:
            continue
        unnoticed += 1
        assert not torch.equal(other, q)
        assert rans.encode([other], [spec]) == [bytes(flipped)]
    assert unnoticed < 0.01 * 8 * len(data)


@settings(max_examples=2 * EXAMPLES, deadline=None)
@given(banks, shapes, st.integers(0, 2**32), st.data())
def test_damaged_bytes_end_the_same_way_on_every_isa(bank, shape, seed, data) -> None:
    spec, q = make_matrix(bank, *shape, seed)
    damaged = bytearray(rans.encode([q], [spec])[0])
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    outcomes = []
    for isa in ISAS:
        try:
            outcomes.append(decode_to_ints(bytes(damaged), spec, isa).tolist())
        except FormatError as error:
            outcomes.append(type(error))
    assert all(outcome == outcomes[0] for outcome in outcomes)


@pytest.mark.parametrize("isa", ISAS)
def test_absurd_stream_lengths_and_states(isa) -> None:
    spec, q = make_matrix(make_bank(16, False, False), 40, 1100, 1)
    (data,) = rans.encode([q], [spec])
    for length in (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\0\0\0", len(data).to_bytes(4, "little")):
        with pytest.raises((Truncated, CorruptStream)):
            decode_to_ints(length + data[4:], spec, isa)
    with pytest.raises(CorruptStream):
        decode_to_ints(data[:4] + b"\xff\xff\0\0" + data[8:], spec, isa)
    with pytest.raises(Truncated):
        decode_to_ints(b"", spec, isa)


# ------------------------------------------------------------------------------------------ the caller's mistakes
def test_values_that_no_table_codes_are_named() -> None:
    bank = make_bank(16, False, False)
    spec = MatrixSpec(40, 40, bank, np.zeros(40, np.uint16))
    q = torch.zeros(40, 40, dtype=torch.int32)
    q[33, 7] = 9
    for isa in ISAS:
        for dtype in (torch.int32, torch.int16):
            with pytest.raises(CapacityError, match="value 9 of token 33, component 7"):
                rans.encode([q.to(dtype)], [spec], isa=isa)
    escaping = MatrixSpec(40, 40, make_bank(16, True, False), np.zeros(40, np.uint16))
    q[33, 7] = 1 << 15
    for isa in ISAS:
        with pytest.raises(CapacityError, match="32768"):
            rans.encode([q], [escaping], isa=isa)
    narrow = MatrixSpec(40, 40, make_bank(16, False, False, floor=0), np.zeros(40, np.uint16))
    q[33, 7] = 5
    assert narrow.bank.freqs[0, 12] == 0
    for isa in ISAS:
        with pytest.raises(CapacityError, match="value 5"):
            rans.encode([q], [narrow], isa=isa)


def test_a_value_too_wide_for_int16_is_refused_on_decode() -> None:
    spec = MatrixSpec(3, 3, builtin_bank(), np.full(3, 67, np.uint16))
    q = torch.full((3, 3), 40000, dtype=torch.int32)
    data = rans.encode([q], [spec])
    for isa in ISAS:
        with pytest.raises(CorruptStream):
            rans.decode(data, [spec], [torch.zeros(3, 3, dtype=torch.int16)], isa=isa)


def test_mistakes_are_typed_errors(monkeypatch) -> None:
    bank = make_bank(16, False, False)
    spec, q = make_matrix(bank, 8, 8, 0)
    (data,) = rans.encode([q], [spec])
    with pytest.raises(ShapeError):
        rans.encode([q[:7]], [spec])
    with pytest.raises(ShapeError):
        rans.decode([data, data], [spec], [q.clone()])
    with pytest.raises(DtypeError):
        rans.encode([q.float()], [spec])
    with pytest.raises(LayoutError):
        rans.encode([q.t().contiguous().t()], [spec])
    with pytest.raises(LayoutError):
        rans.decode_dequant([data], [spec], [Dequant()], [torch.zeros(8, 8, 2)[:, :, :1].transpose(1, 2)[:, 0].t()])
    with pytest.raises(ShapeError):
        rans.decode_dequant([data], [spec], [Dequant(torch.ones(7))], [torch.zeros(8, 8)])
    with pytest.raises(DtypeError):
        rans.decode_dequant([data], [spec], [Dequant(torch.ones(8).double())], [torch.zeros(8, 8)])
    with pytest.raises(ShapeError):
        rans.decode_dequant([data], [spec], [Dequant()], [torch.zeros(8, 3, 3)])
    with pytest.raises(DtypeError):
        rans.decode_dequant([data], [spec], [Dequant()], [torch.zeros(8, 8, dtype=torch.int32)])
    with pytest.raises(DtypeError):  # symbols can't say what an escape holds
        rans.decode(
            [data],
            [MatrixSpec(8, 8, make_bank(16, True, False), spec.table_ids)],
            [torch.zeros(8, 8, dtype=torch.uint8)],
        )
    with pytest.raises(TableError):
        rans.encode([q], [MatrixSpec(8, 8, bank, np.full(8, bank.tables, np.uint16))])
    with pytest.raises(ShapeError):
        MatrixSpec(8, 0, bank, np.zeros(0, np.uint16))
    with pytest.raises(ShapeError):
        MatrixSpec(8, 8, bank, np.zeros(9, np.uint16))
    with pytest.raises(DtypeError):
        MatrixSpec(8, 8, bank, np.zeros(8, np.int64))
    with pytest.raises(LimitExceeded):
        MatrixSpec(1 << 25, 8, bank, np.zeros(8, np.uint16))
    with pytest.raises(InputError, match="CACHEGEN_ISA"):
        rans.encode([q], [spec], isa="sse9")
    monkeypatch.setenv("CACHEGEN_ISA", "scalar")
    assert rans.isa() == "scalar"
    assert rans.encode([q], [spec]) == [data]
    monkeypatch.setenv("CACHEGEN_ISA", "nonsense")
    with pytest.raises(InputError, match="CACHEGEN_ISA"):
        rans.isa()


def test_nothing_is_nothing() -> None:
    assert rans.encode([], []) == []
    rans.decode([], [], [])
