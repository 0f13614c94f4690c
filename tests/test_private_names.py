"""Only the door, `ir_tools/torch_compat`, uses what is private to torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import private_names

FILES = private_names.files(["ir_tools", "passes", "benchmarks"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(private_names.ROOT)))
def test_only_the_door_uses_what_is_private_to_torch(path: Path) -> None:
    assert not private_names.private_uses(path), "go through ir_tools/torch_compat"
    assert not private_names.operators_not_in_the_table(path), "list it in ir_tools/torch_compat/operators.py"


def test_the_door_is_seen() -> None:
    """The same function on files that do what the others must not."""
    assert all(private_names.private_uses(path) for path in private_names.DOOR.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize(
    "line, seen",
    [
        ("from torch._ops import OpOverload", 1),
        ("from torch.utils import _pytree as pytree", 1),
        ("from torch.fx.experimental.proxy_tensor import make_fx", 1),
        ("import torch._dynamo", 1),
        ("torch._C._jit_set_profiling_mode(False)", 2),
        ("torch._check(x)", 1),
        ("target._schema.arguments", 1),
        ("x.untyped_storage()._cdata", 1),
        ("model._modules['a'] = 1", 1),
        ("graph._insert_point", 1),
        ("getattr(target, '_schema', None)", 1),
        ("monkeypatch.setattr('torch._dynamo.reset', f)", 2),  # by name, and as text
        ("slots = {'_c'}", 1),
        ("files = 'torch/_export/', 'torch/fx/experimental/proxy_tensor.py'", 2),
        ("raise ValueError('register it with torch.utils._pytree.register_pytree_node')", 1),
        ("scripted._c.save(path, _extra_files=files)", 2),
        ("self._schema", 1),
        ("self._schema = 1\nself._schema", 0),  # a class's own
        ("target._schema\nself._schema = 1", 1),
        ("aten._softmax.default(x, -1, False)", 0),
        ("torch._softmax(x, -1, False)", 1),
        ("import torch.nn.functional\nx.__class__", 0),
    ],
)
def test_private_names_are_seen(line: str, seen: int, tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text(line)
    assert len(private_names.private_uses(tmp_path / "file.py")) == seen


def test_operators_with_an_underscore_are_seen(tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text(
        """NAMES = "aten::_softmax aten::_foo aten::__and__".split() + ["_fused_adam", "_softmax", "_ours"]"""
    )
    assert private_names.operators_not_in_the_table(tmp_path / "file.py") == ["aten::_foo", "aten::_fused_adam"]
