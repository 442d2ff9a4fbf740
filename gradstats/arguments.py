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

    def take(
        self, rows: Sequence[int], replaced: tuple[int, str] | None = None, shared: Sequence[int] = ()
    ) -> tuple[tuple, dict]:
        """The call with examples `rows` (counted round).

        replaced: which of them gives way, and to what: "another" example, an "altered" version of itself, or another
        with the "same length" (one number an example is left alone).
        """
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

    def _rows(self, value: Tensor, dim: int, rows: Sequence[int], replaced: tuple[int, str] | None) -> Tensor:
        count = value.shape[dim]
        index = torch.tensor([r % count for r in rows], device=value.device)
        taken = value.detach().index_select(dim, index)
        if replaced is not None and not (replaced[1] == "same length" and value.dim() == 1):
            example, how = replaced
            old = taken.select(dim, example)
            other = value.detach().select(dim, another(rows, example, count))
            old.copy_(changed(old) if how == "altered" or torch.equal(other, old) else other)
        return taken.requires_grad_(value.requires_grad)

    def _ragged(
        self, value: Tensor, offsets: Tensor, rows: Sequence[int], replaced: tuple[int, str] | None
    ) -> tuple[Tensor, Tensor]:
        bounds = [*offsets.tolist(), len(value)]
        examples = [value.detach()[a:b] for a, b in pairwise(bounds)]
        count = len(examples)
        taken = [examples[r % count] for r in rows]
        if replaced is not None:
            taken[replaced[0]] = examples[another(rows, replaced[0], count)]
        begins = torch.tensor([len(example) for example in taken]).cumsum(0).roll(1)
        begins[0] = 0
        return torch.cat(taken).requires_grad_(value.requires_grad), begins.to(offsets)


def key_of(path: Any) -> int | str:
    """Position or keyword of the argument that a leaf of the arguments' tree is in."""
    return path[1].idx if path[0].idx == 0 else path[1].key


def signature(args: tuple, kwargs: dict[str, Any]) -> Any:
    """What decides how a model runs, but for the sizes of the batch and of its sequences. (A size of one is another
    kind: it tells nothing of larger ones.)"""
    if not kwargs and len(args) == 1 and type(args[0]) is Tensor:
        return kind_of(args[0])
    values, spec = tree_flatten((args, kwargs))
    return spec, tuple(map(kind_of, values))


def kind_of(value: Any) -> Any:
    """What of one argument belongs to the signature."""
    if isinstance(value, Tensor):
        return value.dtype, tuple([size == 1 for size in value.shape])
    return value if isinstance(value, bool | str | None) else type(value)


def size_of(value: Any, dim: int) -> int:
    """How many entries an argument has along `dim`, or sequences, if it is packed."""
    return int(value.batch_sizes[0]) if isinstance(value, PackedSequence) else value.shape[dim]


def another(rows: Sequence[int], replaced: int, count: int) -> int:
    """An example that is not among the rows, if the batch has one."""
    return (max(rows) + 1) % count if count > len(rows) else (rows[replaced] + 1) % count


def changed(example: Tensor) -> Tensor:
    """Another version of an example: noise on numbers, ids in another order or beside, masks and lengths shorter."""
    one = example.flatten()[:1]
    if example.numel() and bool(((example == 0) | (example == 1)).all()):  # a mask
        half = example.clone()
        half.view(-1)[example.numel() // 2 :] = 0
        return half if not torch.equal(half, example) else 1 - half if example.dtype != torch.bool else ~half
    if example.is_floating_point():
        noise = torch.randn(example.shape, generator=torch.Generator().manual_seed(0))  # not from the user's stream
        return example + noise.to(example) * (0.1 + example.abs().mean())
    if example.dim() and bool((example != one).any()):
        return example.roll(1, -1)
    return torch.where(example > 0, example - 1, example)  # never above, where a table may end


def count_examples(args: tuple, kwargs: dict[str, Any], example_dims: ExampleDims, may_be_none: bool = False) -> int:
    """How many examples a call has. Raises: CoverageError if no tensor tells, or for none unless there may be."""
    if args and type(args[0]) is Tensor and example_dims == 0 and args[0].dim() and args[0].shape[0]:
        return args[0].shape[0]
    count = Arguments(args, kwargs, example_dims).count
    if count is None:
        raise CoverageError("the model was called without a tensor that would tell the number of examples")
    if count == 0 and not may_be_none:
        raise CoverageError("the model got a batch without examples: skip it")
    return count
