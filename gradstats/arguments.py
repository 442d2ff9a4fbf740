"""The arguments of a model's call: which tensors run over the examples, and the same call with other examples.

By default a tensor runs over the examples along its first dimension if that has as many entries as the first tensor's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_flatten, tree_flatten_with_path, tree_unflatten

from gradstats.errors import CoverageError

# What `attach` accepts: a dimension for all tensors, or one for each argument, by position or keyword; None: shared;
# another argument's keyword, or its position as a string: it holds the offsets at which the examples begin.
ExampleDims = int | Mapping[int | str, int | str | None]


class Arguments:
    """args and kwargs of one call."""

    def __init__(self, args: tuple, kwargs: dict[str, Any], example_dims: ExampleDims = 0):
        self.leaves, self.spec = tree_flatten_with_path((args, kwargs), is_leaf=lambda v: isinstance(v, PackedSequence))
        self.values = [value for _, value in self.leaves]
        dims = [self._dim(path, value, example_dims) for path, value in self.leaves]
        keys = {str(key_of(path)): i for i, (path, _) in enumerate(self.leaves)}
        # Arguments whose examples follow each other without a dimension of their own, with those that hold the offsets.
        self.ragged = {i: keys[dim] for i, dim in enumerate(dims) if isinstance(dim, str) and dim in keys}
        if len(self.ragged) != sum(isinstance(dim, str) for dim in dims):
            raise CoverageError(f"example_dims={example_dims} names offsets that are no argument: it has {list(keys)}")
        self.dims = [None if isinstance(dim, str) else dim for dim in dims]
        sizes = [size_of(v, dim) for v, dim in zip(self.values, self.dims, strict=True) if dim is not None]
        self.count = sizes[0] if sizes else None  # examples
        if isinstance(example_dims, int):
            same = [
                dim is not None and size_of(v, dim) == self.count for v, dim in zip(self.values, self.dims, strict=True)
            ]
            self.dims = [dim if runs else None for dim, runs in zip(self.dims, same, strict=True)]

    @staticmethod
    def _dim(path: Any, value: Any, example_dims: ExampleDims) -> int | str | None:
        if isinstance(value, PackedSequence):
            return 0
        if not isinstance(value, Tensor):
            return None
        if isinstance(example_dims, int):
            return example_dims if value.dim() > example_dims else None
        dim = example_dims.get(key_of(path), 0)
        return dim if not isinstance(dim, int) or value.dim() > dim else None

    @property
    def later(self) -> list[int]:
        """Tensors after the first whose size is that of the batch."""
        return [i for i, dim in enumerate(self.dims) if dim is not None and isinstance(self.values[i], Tensor)][1:]

    @property
    def squares(self) -> list[int]:
        """Those of them whose size does not tell whether they run over the examples or over positions."""
        return [i for i in self.later if list(self.values[i].shape) == [self.count] * 2]

    def take(self, rows: Sequence[int], replaced: int | None = None, shared: Sequence[int] = ()) -> tuple[tuple, dict]:
        """The call with examples `rows` (counted round), of which number `replaced` gives way to another one."""
        assert self.count is not None
        taken = []
        for i, (value, dim) in enumerate(zip(self.values, self.dims, strict=True)):
            if dim is None or i in shared:
                taken.append(value)
            elif isinstance(value, PackedSequence):
                padded, lengths = pad_packed_sequence(value, batch_first=True)
                padded, lengths = self._rows(padded, 0, rows, replaced), self._rows(lengths, 0, rows, None)
                taken.append(pack_padded_sequence(padded, lengths, batch_first=True, enforce_sorted=False))
            else:
                taken.append(self._rows(value, dim, rows, replaced))
        for i, o in self.ragged.items():
            taken[i], taken[o] = self._ragged(self.values[i], self.values[o], rows, replaced)
        return tree_unflatten(taken, self.spec)

    def _rows(self, value: Tensor, dim: int, rows: Sequence[int], replaced: int | None) -> Tensor:
        count = value.shape[dim]
        index = torch.tensor([r % count for r in rows], device=value.device)
        taken = value.detach().index_select(dim, index)
        if replaced is None:
            return taken.requires_grad_(value.requires_grad)
        other = value.detach().select(dim, len(rows) % count if count > len(rows) else (rows[replaced] + 1) % count)
        old = taken.select(dim, replaced)
        if torch.equal(other, old):
            other = changed(old)
        old.copy_(other)
        return taken.requires_grad_(value.requires_grad)

    def _ragged(
        self, value: Tensor, offsets: Tensor, rows: Sequence[int], replaced: int | None
    ) -> tuple[Tensor, Tensor]:
        bounds = [*offsets.tolist(), len(value)]
        examples = [value.detach()[a:b] for a, b in pairwise(bounds)]
        count = len(examples)
        taken = [examples[r % count] for r in rows]
        if replaced is not None:
            taken[replaced] = examples[len(rows) % count if count > len(rows) else (rows[replaced] + 1) % count]
        begins = torch.tensor([len(example) for example in taken]).cumsum(0).roll(1)
        begins[0] = 0
        return torch.cat(taken).requires_grad_(value.requires_grad), begins.to(offsets)


def key_of(path: Any) -> int | str:
    return path[1].idx if path[0].idx == 0 else path[1].key


def signature(args: tuple, kwargs: dict[str, Any]) -> Any:
    """What decides how a model runs, but for the sizes of the batch and of its sequences."""
    if not kwargs and all(type(v) is Tensor for v in args):
        return tuple([(v.dim(), v.dtype) for v in args])
    values, spec = tree_flatten((args, kwargs))
    kinds = [
        (v.dim(), v.dtype) if isinstance(v, Tensor) else v if isinstance(v, bool | str | None) else type(v)
        for v in values
    ]
    return spec, tuple(kinds)


def size_of(value: Any, dim: int) -> int:
    return int(value.batch_sizes[0]) if isinstance(value, PackedSequence) else value.shape[dim]


def changed(example: Tensor) -> Tensor:
    """Another example, where the batch has no other: noise on numbers, ids in another order."""
    if example.is_floating_point():
        return example + torch.randn_like(example) * (0.1 + example.abs().mean())
    return example.roll(1, -1) if example.dim() else example


def count_examples(args: tuple, kwargs: dict[str, Any], example_dims: ExampleDims) -> int:
    """How many examples a call has. Raises: CoverageError if no tensor tells."""
    if args and type(args[0]) is Tensor and example_dims == 0 and args[0].dim() and args[0].shape[0]:
        return args[0].shape[0]
    count = Arguments(args, kwargs, example_dims).count
    if count is None:
        raise CoverageError("the model was called without a tensor that would tell the number of examples")
    if count == 0:
        raise CoverageError("the model got a batch without examples: skip it")
    return count
