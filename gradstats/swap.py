"""The class swap: an attached module computes through its Leaf or Caller, and is otherwise what it was.

Of five ways of interception only this one survives deepcopy, pickle, FSDP, compilation, keyword arguments and the
user's hooks; functions set on the instance silently use the original's weights after a copy.
"""

from __future__ import annotations

import copyreg
from functools import cache, wraps
from typing import TYPE_CHECKING

import torch
from torch import nn

from gradstats import compiled
from gradstats.caller import LEAF, Caller
from gradstats.errors import CoverageError

if TYPE_CHECKING:
    from gradstats.leaf import Leaf


@cache
def attached_class(kind: type) -> type:
    """A subclass of `kind` whose forward goes through the module's Leaf. Its name is the original's, so nothing prints
    differently."""

    @wraps(kind.forward)  # type: ignore[attr-defined]
    def forward(self, *args, **kwargs):
        server: Leaf | Caller | None = self.__dict__.get(LEAF)
        if server is not None and torch.compiler.is_compiling():
            return compiled.forward(server, self, kind, args, kwargs)
        if server is None or not server.active:
            return kind.forward(self, *args, **kwargs)
        return server(kind, args, kwargs)

    def _apply(self, fn, recurse=True):
        """What .to() goes through: the shadows follow the parameters."""
        kind._apply(self, fn, recurse)
        server: Leaf | Caller | None = self.__dict__.get(LEAF)
        if server is not None and not isinstance(server, Caller):
            server.prepare()
        return self

    def __reduce_ex__(self, protocol):
        """Pickles and copies as the original class plus the swap, since this class has no importable name."""
        reduced = kind.__reduce_ex__(self, protocol)
        if reduced[0] is copyreg.__newobj__ and reduced[1][0] is type(self):
            return (new_attached, (kind, *reduced[1][1:]), *reduced[2:])
        return reduced

    namespace = {
        "forward": forward,
        "_apply": _apply,
        "__reduce_ex__": __reduce_ex__,
        "__module__": kind.__module__,
        "__doc__": kind.__doc__,
    }
    swapped = type(kind.__name__, (kind,), namespace)
    swapped.__qualname__ = kind.__qualname__
    swapped._gradstats_original = kind  # type: ignore[attr-defined]
    return swapped


def new_attached(kind: type[nn.Module], *args) -> nn.Module:
    """What copies and pickles of attached modules are rebuilt by."""
    cls = attached_class(kind)  # type: ignore[arg-type]
    return cls.__new__(cls, *args)


def swap(module: nn.Module, server: Leaf | Caller) -> None:
    """Makes `module` compute through `server`."""
    if "forward" in module.__dict__:
        raise CoverageError(
            f"module '{server.prefix}' ({type(module).__name__}) has a forward set on the instance, which a class swap "
            f"cannot see. Put it into a subclass, or attach before the tool that patches it."
        )
    module.__dict__[LEAF] = server
    if "_gradstats_original" not in type(module).__dict__:
        module.__class__ = attached_class(type(module))  # type: ignore[arg-type]


def unswap(module: nn.Module) -> None:
    """Undoes `swap`. A class put on top of ours since then (a parametrization) stays, and finds no leaf any more."""
    module.__dict__.pop(LEAF, None)
    if "_gradstats_original" in type(module).__dict__:
        module.__class__ = type(module)._gradstats_original  # type: ignore[attr-defined]
