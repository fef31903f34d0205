"""CRC32C against its definition, bit by bit."""

from __future__ import annotations

import random

import pytest

from cachegen.native import crc32c


def plain(data: bytes, crc: int = 0) -> int:
    state = crc ^ 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = (state >> 1) ^ (0x82F63B78 if state & 1 else 0)
    return state ^ 0xFFFFFFFF


def test_check_value() -> None:
    assert crc32c(b"123456789") == 0xE3069283


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 255, 767, 768, 769, 1537, 12287, 12288, 13069, 30000])
def test_any_length_whole_and_in_parts(size: int) -> None:
    """Lengths around those at which three runs of 256 or of 4096 bytes are summed at once."""
    data = random.Random(size).randbytes(size)
    assert crc32c(data) == plain(data)
    assert crc32c(memoryview(data)[size // 3 :], crc32c(bytearray(data[: size // 3]))) == plain(data)
