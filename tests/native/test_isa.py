"""Every ISA's source gives the same bytes, also where the processor lacks the ISA: AVX-512 then runs through SIMDe."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import builds
import pytest

CODER_TESTS = Path(__file__).resolve().parents[1] / "entropy" / "test_rans.py"


@pytest.mark.long
@pytest.mark.skipif(builds.simde_include() is None, reason="SIMDe isn't installed: pip install 'cachegen[isa]'")
def test_the_avx512_source_is_exact_without_avx512() -> None:
    package = builds.simde_package()
    library = package / "cachegen" / "native" / "_native.so"
    object_file = library.parents[3] / "coder_avx512.o"
    code = subprocess.run(["objdump", "-d", str(object_file)], capture_output=True, text=True, check=True).stdout
    assert "%xmm" in code
    assert "%zmm" not in code  # nothing here may run on the processor's own AVX-512
    assert "%ymm" not in code
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            str(CODER_TESTS),
            "--rootdir",
            str(builds.ROOT),
        ],
        env=builds.environment(package, CACHEGEN_TEST_ISAS="scalar,avx512", CACHEGEN_TEST_EXAMPLES="15"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.mark.long
def test_the_coder_is_clean_under_the_sanitizers() -> None:
    package = builds.sanitized_package()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            str(CODER_TESTS),
            "--rootdir",
            str(builds.ROOT),
        ],
        env=builds.environment(package, CACHEGEN_TEST_EXAMPLES="15", **builds.sanitizer_environment()),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
