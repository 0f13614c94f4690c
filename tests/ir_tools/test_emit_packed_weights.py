"""Weights packed for oneDNN: saved plain, packed where they are loaded, bit for bit the same."""

import os
import subprocess
import sys

import pytest
import torch

from ir_tools.emit.package import round_trip
from ir_tools.emit.to_torchscript import emit
from ir_tools.errors import EmitError
from ir_tools.ir.prepack import prepack_linear
from tests.ir_tools.emitting import mkldnn, packed_for_conv, packed_program, torchscript_source


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape, groups", [((64, 16, 3, 3), 4), ((33, 1, 3, 3), 33), ((66, 35, 3, 3), 1), ((64, 64, 1, 1), 1)])
def test_packed_conv_weights_come_back_bit_for_bit(dtype, shape, groups):
    bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[dtype]
    limits = torch.iinfo(bits)
    weight = torch.randint(limits.min, limits.max, shape, dtype=bits).view(dtype)  # NaNs and denormals among them
    for size in (None, (2, shape[1] * groups, 9, 9)):
        packed = packed_for_conv(weight, groups, size)
        assert torch.equal(packed.to_dense().view(bits), weight.view(bits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 128), (33, 17), (1000, 96)])
def test_packed_linear_weights_come_back_bit_for_bit(dtype, shape):
    bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[dtype]
    limits = torch.iinfo(bits)
    weight = torch.randint(limits.min, limits.max, shape, dtype=bits).view(dtype)
    for batch in (None, 1, 128):
        assert torch.equal(prepack_linear(weight, batch).to_dense().view(bits), weight.view(bits))


READ_ELSEWHERE = """
import sys, torch
module = torch.jit.load(sys.argv[1])
x, expected = torch.load(sys.argv[2])
assert "ir_tools" not in sys.modules
with torch.no_grad():
    for _ in range(3):
        assert torch.equal(module(x), expected)
assert all(w.is_mkldnn for w in module.packed_2.weights)
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 4])
def test_packed_weights_in_a_new_process_with_only_torch(dtype, groups, tmp_path):
    program, x, conv, matrix = packed_program(dtype, groups)
    scripted = emit(program, chunk_size=1)
    expected = program(x)
    assert torch.equal(scripted(x), expected)
    loaded = round_trip(round_trip(scripted))
    assert torch.equal(loaded(x), expected)
    assert torch.equal(loaded.packed_2.weights[0].to_dense(), conv)
    assert torch.equal(loaded.packed_2.weights[1].to_dense(), matrix)
    scripted.save(str(tmp_path / "model.pt"))
    torch.save((x, expected), tmp_path / "values.pt")
    command = [sys.executable, "-c", READ_ELSEWHERE, str(tmp_path / "model.pt"), str(tmp_path / "values.pt")]
    done = subprocess.run(command, cwd=tmp_path, env={"PATH": "/usr/bin"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_plain_copies_of_packed_weights_are_not_kept():
    program, *_ = packed_program(torch.float32)
    scripted = emit(program)
    assert set(scripted.state_dict()) == {"packed.bias"}
    assert "weights[0]: " in torchscript_source(program)


NO_AVX512 = """
import sys, torch
from ir_tools.errors import ModelFileError
from ir_tools.emit.package import read_torchscript
if torch.ops.mkldnn._is_mkldnn_bf16_supported():
    sys.exit(77)  # this torch does not heed the variable
for load, error in ((torch.jit.load, torch.jit.Error), (read_torchscript, ModelFileError)):
    try:
        load(sys.argv[1])
    except error as raised:
        print(str(raised).strip().splitlines()[-1])
torch.jit.load(sys.argv[2])
"""


def test_packed_bfloat16_weights_say_why_a_cpu_without_avx512_cannot_load_them(tmp_path):
    half, full = packed_program(torch.bfloat16)[0], packed_program(torch.float32)[0]
    assert "_is_mkldnn_bf16_supported" in torchscript_source(half)
    assert "_is_mkldnn_bf16_supported" not in torchscript_source(full)
    if not mkldnn._is_mkldnn_bf16_supported():
        with pytest.raises(EmitError, match="cannot be packed for oneDNN: this file holds bfloat16 weights"):
            emit(half)
        return
    emit(half).save(str(tmp_path / "half.pt"))
    emit(full).save(str(tmp_path / "full.pt"))
    command = [sys.executable, "-W", "ignore", "-c", NO_AVX512, str(tmp_path / "half.pt"), str(tmp_path / "full.pt")]
    done = subprocess.run(command, env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("oneDNN does not heed ONEDNN_MAX_CPU_ISA here")
    assert done.returncode == 0, done.stderr
    reason = (
        "this file holds bfloat16 weights packed for oneDNN, and this CPU lacks AVX-512, which that needs; "
        "optimise the model with engine='aten' to run it here"
    )
    first, second = done.stdout.splitlines()
    assert first == f"builtins.RuntimeError: {reason}"
    assert second == f"torch cannot read {tmp_path / 'half.pt'}: {reason}"
