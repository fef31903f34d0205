"""torchac as oracle: it codes the same symbols under the same tables, in nearly the same number of bytes."""

from __future__ import annotations

import pytest
import torch
from entropy_matrices import make_bank, make_matrix

from cachegen.entropy import rans, torchac
from cachegen.errors import CorruptStream, InputError, MissingExtra, ShapeError, Truncated


@pytest.fixture(scope="module")
def compiled() -> None:
    try:
        torchac.backend()
    except MissingExtra as error:
        pytest.skip(str(error))


@pytest.mark.long
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("alphabet", [16, 64, 256])
def test_torchac_and_the_native_coder_say_the_same(alphabet, monkeypatch) -> None:
    monkeypatch.setattr(torchac, "_PART_ENTRIES", 1 << 18)
    bank = make_bank(alphabet, False, False)
    spec, q = make_matrix(bank, 70, 300, 1, by_block=True)
    symbols = (q + bank.offset).to(torch.uint8)
    paper, ours = torchac.encode(symbols, spec), rans.encode([symbols], [spec])[0]
    from_paper, from_ours = torch.zeros_like(symbols), torch.zeros_like(symbols)
    torchac.decode(paper, spec, from_paper)
    rans.decode([ours], [spec], [from_ours])
    assert torch.equal(from_paper, symbols)
    assert torch.equal(from_ours, symbols)
    assert abs(len(ours) - len(paper)) < 0.05 * len(paper) + 256
    with pytest.raises(Truncated):
        torchac.decode(paper[:-1], spec, from_paper)
    with pytest.raises(CorruptStream):
        torchac.decode(paper + b"\0", spec, from_paper)


def test_expanded_tables_are_cumulative_frequencies() -> None:
    bank = make_bank(16, False, False)
    spec, _ = make_matrix(bank, 40, 3, 1, by_block=True)
    cdf = torchac.expanded_cdf(spec).reshape(40, 3, 17)
    last = cdf[39, 2].to(torch.int64) & 0xFFFF
    assert last[0] == 0
    assert last[16] == 0  # 65536
    last[16] = 65536
    assert (last.diff() // 16).tolist() == bank.freqs[spec.table_ids[1, 2]].tolist()
    assert torch.equal(torchac.expanded_cdf(spec, 32, 40), cdf[32:].reshape(-1, 17))


def test_what_torchac_cant_code_is_refused() -> None:
    spec, q = make_matrix(make_bank(16, True, False), 4, 4, 1)
    with pytest.raises(InputError):
        torchac.expanded_cdf(spec)
    with pytest.raises(ShapeError):
        torchac.encode(q, spec)


def test_a_missing_torchac_names_its_extra(monkeypatch) -> None:
    monkeypatch.setattr(torchac.importlib.util, "find_spec", lambda name: None)
    torchac.backend.cache_clear()
    with pytest.raises(MissingExtra, match=r"cachegen\[torchac\]"):
        torchac.backend()
