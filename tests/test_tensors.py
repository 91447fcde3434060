"""Our files of tensors are those of the library safetensors, in both directions."""

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from llm_attack.base.tensors import Spec, TensorFile, create

TENSORS = {
    "odd": torch.arange(5, dtype=torch.uint8),
    "half": torch.tensor([[1.5, -2.0, 3e-5]], dtype=torch.float16),
    "brain": torch.tensor([[0.1, -3e38], [1e-40, torch.inf]], dtype=torch.bfloat16),
    "single": torch.linspace(-1, 1, 7),
    "double": torch.tensor(0.1, dtype=torch.float64).reshape(1, 1),
    "whole": torch.tensor([2**40]),
    "ids": torch.tensor([-1, 7], dtype=torch.int32),
    "nothing": torch.zeros(0, 4),
}
NAMES = {
    torch.uint8: "U8",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
}


def stored(tensor):
    return tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor


def test_the_library_reads_what_is_written(tmp_path):
    path = tmp_path / "ours.safetensors"
    specs = {name: Spec(NAMES[t.dtype], tuple(t.shape)) for name, t in TENSORS.items()}
    arrays = create(path, specs, {"what": "a täst"})
    for name, tensor in TENSORS.items():
        arrays[name][...] = stored(tensor).numpy()
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"what": "a täst"}
        assert set(file.keys()) == set(TENSORS)
        for name, tensor in TENSORS.items():
            found = file.get_tensor(name)
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor)


def test_what_the_library_writes_is_read(tmp_path):
    path = tmp_path / "theirs.safetensors"
    save_file(TENSORS, path, {"a": "b"})
    file = TensorFile(path)
    assert file.metadata == {"a": "b"}
    for name, tensor in TENSORS.items():
        wide = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        np.testing.assert_array_equal(file.numbers(name), wide.numpy())
        assert file.numbers(name).dtype == wide.numpy().dtype


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_a_file_that_is_cut_off_is_refused(tmp_path, keep):
    path = tmp_path / "cut.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r".+"):
        TensorFile(path)
