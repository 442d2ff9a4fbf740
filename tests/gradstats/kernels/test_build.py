"""Every kernel compiles for devices that need not be there, and fits on them."""

import json
import os
import subprocess
import sys

import pytest

# Bytes of shared memory that a program may have on the smallest device of capability 8.
SHARED = 99 * 1024


@pytest.fixture(scope="module")
def built():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.gradstats.kernels.build"]
    output = subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def test_they_fit(built):
    assert len(built) == 18
    for name, usage in built.items():
        assert usage["shared"] <= SHARED, name
        # Bytes of registers that a thread of 255 keeps in memory: some, where it holds three tiles of the weight.
        assert usage["stack"] <= (64 if "linear" in name else 0), name


def test_bfloat16_goes_to_the_matrix_units(built):
    assert any(i.startswith("mma.sync") and "bf16" in i for i in built["linear bf16 sm_80"]["instructions"])
    assert any(i.startswith("wgmma") and "bf16" in i for i in built["linear bf16 sm_90"]["instructions"])
    # Exact, unless torch is told otherwise.
    assert not any("mma" in i for i in built["linear fp32 sm_80"]["instructions"])


def test_several_elements_are_read_at_once(built):
    for name in ("adam bf16 sm_80", "adam bf16 sm_90"):
        assert any("v4" in i for i in built[name]["instructions"] if i.startswith("ld")), name
        assert any("v4" in i for i in built[name]["instructions"] if i.startswith("st")), name
