"""A leaf: a module that owns parameters, and computes through LeafFunction while attached.

Beside its real inputs the Function takes a *shadow* for every statistic: a stride-0 tensor of zeros shaped like the
statistic, a leaf of autograd. Its backward returns the statistic as the gradient of the shadow, and autograd does the
bookkeeping that it does for every gradient: accumulation, recomputation under checkpointing, several uses.

Shadows precede the parameters in the argument list: what runs on a parameter's gradient finds the statistic in place.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from gradstats.account import Account
from gradstats.caller import LEAF
from gradstats.errors import CoverageError
from gradstats.function import Call, Gradients, LeafFunction, Sums, Use, autocast
from gradstats.graph import accumulator_of
from gradstats.layout import FIRST, Layout, brought
from gradstats.operators import token_of
from gradstats.plain import PlainForward
from gradstats.rules import Composite, Rule, alone, fallback
from gradstats.rules.registry import checked

if TYPE_CHECKING:
    from gradstats.engines.fused import FusedHandle

Layouts = tuple[Layout | None, ...]


class Leaf:
    """What an attached module keeps: how it is served, and the accounts of its parameters.

    rule: a Rule, a Composite of rules, or None for a vmap leaf, which serves the modules inside of it too.
    why: the reason for that choice, as the coverage table prints it.
    """

    def __init__(
        self,
        handle: FusedHandle,
        module: nn.Module,
        prefix: str,
        rule: type[Rule] | type[Composite] | None,
        accounts: Mapping[str, Account],
        why: str,
    ):
        self.handle, self.module, self.prefix, self.rule, self.why = handle, module, prefix, rule, why
        self.accounts = dict(accounts)  # by the module's own names
        self.loops = False  # a vmap leaf that does not vmap runs its module once an example
        self.random = False  # and draws random numbers
        self.tied = [(name, a) for name, a in self.accounts.items() if a.name != f"{prefix}.{name}".removeprefix(".")]
        self.layouts: dict[Any, Layouts] = {}  # by kind of call, as the probe found them
        self._forget()

    def _forget(self) -> None:
        self.token = token_of(self)
        self.call = torch.zeros(2, dtype=torch.int64)  # generation and examples of the last call that was compiled
        with torch.enable_grad():  # copies are often made without
            self._accumulator = accumulator_of(self.token)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("handle", "module", "prefix", "rule", "why", "accounts", "loops", "random", "tied", "layouts")
        return {key: getattr(self, key) for key in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def prepare(self) -> None:
        """Makes the shadows ahead of a compilation, which takes them for inputs."""
        for account in self.accounts.values():
            if account.present:
                for kind in self.handle.additive:
                    account.shadow_of(kind)

    @property
    def title(self) -> str:
        """What errors call this leaf."""
        return f"module '{self.prefix}' ({type(self.module).__name__})"

    @property
    def served_by(self) -> str:
        """What the coverage table calls this leaf."""
        if self.rule:
            return f"rule {self.rule.__name__}"
        return f"{'loop' if self.loops else 'vmap'} over {type(self.module).__name__}"

    @property
    def active(self) -> bool:
        """Whether statistics are wanted of this call; not under functional_call, whose tensors are no parameters."""
        if not self.handle.differentiates:
            return False
        found = False
        for account in self.accounts.values():  # every layer of every forward waits for this
            p = account.holder.get(account.attribute)
            if p is not None and p.requires_grad:
                if not isinstance(p, nn.Parameter):
                    return False
                found = True
        return found

    # Forward

    @partial(torch.compiler.disable, recursive=False)  # as Caller's
    def __call__(self, kind: type[nn.Module], args: tuple, kwargs: dict[str, Any]) -> Any:
        """The module's forward while attached; `kind` is its original class."""
        if self.handle.probing:
            return self.handle.probing.visit(self, kind, args, kwargs)
        if (plain := self.handle.lifetime.plain_forward) is not None:
            return plain.call(self, kind, args, kwargs)
        n = self.handle.lifetime.examples
        if n is None or self.handle.lifetime.recomputes(self.module):  # the module itself is called from outside
            return self.handle.outermost(
                self.module, args, kwargs, lambda: self.module.__dict__[LEAF](kind, args, kwargs)
            )
        for name, account in self.tied:
            if self.module.get_parameter(name) is not account.tensor:
                raise CoverageError(
                    f"parameter '{name}' of {self.title} was shared with '{account.name}' when the model was attached "
                    f"and is not any more: detach(), and attach the model again"
                )
        checked(self.prefix, fallback.check if self.rule is None else self.rule.check, self.module)
        output = self._served(kind, args, kwargs, n)
        return output if self.handle.shards is None else tree_map(no_view, output)

    def _served(self, kind: type[nn.Module], args: tuple, kwargs: dict[str, Any], n: int) -> Any:
        if n == 0 or not self.handle.lifetime.gathers:
            return self._plain(kind, args, kwargs, n)
        if self.rule is None:
            return self._vmapped(kind, args, kwargs, n)
        if issubclass(self.rule, Composite):
            return self._composite(self.rule, args, kwargs, n)
        return self._ruled(self.rule, args, kwargs, n)

    @torch.compiler.disable
    def compiling(self, kind: type[nn.Module], args: tuple, kwargs: dict[str, Any]) -> Any:
        """The same where torch.compile traces: its bookkeeping is Python, and would be traced anew at every step."""
        return self(kind, args, kwargs) if self.active else kind.forward(self.module, *args, **kwargs)

    def bound(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The inputs of a rule from the arguments of the call."""
        assert self.rule is not None and issubclass(self.rule, Rule)
        try:
            x = self.rule.bind(self.module, *args, **kwargs)
        except TypeError as error:
            raise CoverageError(f"{self.title}: {error}") from None
        inputs = x if isinstance(x, tuple) else (x,)
        if not isinstance(inputs[0], Tensor) or self.rule.unbatched(self.module, x):
            shapes = ", ".join(str(tuple(i.shape)) if isinstance(i, Tensor) else repr(i) for i in inputs)
            raise CoverageError(f"{self.title} takes batched tensors while attached; got {shapes}. Use x.unsqueeze(0).")
        return inputs

    def _ruled(self, rule: type[Rule], args: tuple, kwargs: dict[str, Any], n: int) -> Any:
        inputs = self.bound(args, kwargs)
        layouts = self._layouts_of(inputs, n)
        self._check_sizes(inputs, layouts, n)
        rows = [x if layout is FIRST else brought(x, layout, n) for x, layout in zip(inputs, layouts, strict=True)]
        x = tuple(rows) if len(rows) > 1 else rows[0]
        x, parameters = autocast(rule.autocast, rows[0].device.type, x, self.module._parameters)
        y = self._apply(rule, rule.options(self.module), x, parameters, {}, n)
        return y if layouts[0] is FIRST or layouts[0] is None else layouts[0].restore(y, n)

    def _check_sizes(self, inputs: Sequence[Any], layouts: Layouts, n: int) -> None:
        for x, layout in zip(inputs, layouts, strict=False):
            if layout is not None and not layout.fits(x, n):
                raise CoverageError(
                    f"{self.title} got an input of shape {tuple(x.shape)}, in which the {n} examples of the batch are "
                    f"not where the probe has seen them ({layout}). Call stats.probe(*batch) with such a batch first"
                )

    def _layouts_of(self, inputs: tuple[Any, ...], n: int) -> Layouts:
        found = self.layouts.get(tuple(x.dim() if isinstance(x, Tensor) else None for x in inputs))
        if found is None:
            return tuple(self.unseen(x, n) for x in inputs)
        return found

    def unseen(self, x: Any, n: int) -> Layout | None:
        """Where the examples are in a call that the probe has not seen: told by sizes, if they tell."""
        if not isinstance(x, Tensor):
            return None
        if n == 1 or (list(x.shape).count(n) == 1 and x.shape[0] == n):
            return FIRST
        raise CoverageError(
            f"{self.title} got an input of shape {tuple(x.shape)} in a call that the probe has not seen, and the sizes "
            f"do not tell which dimension runs over the {n} examples of the batch. Call stats.probe(*batch) with a "
            f"batch that takes this path."
        )

    def _composite(self, composite: type[Composite], args: tuple, kwargs: dict[str, Any], n: int) -> Any:
        def apply(rule: type[Rule], options: tuple[Any, ...], x: Any, names: dict[str, str | None]) -> Any:
            own = {k: None if v is None else self.module._parameters[v] for k, v in names.items()}
            device = (x[0] if isinstance(x, tuple) else x).device.type
            x, parameters = autocast(rule.autocast, device, x, own)
            return self._apply(rule, options, x, parameters, names, n)

        return composite.forward(self.module, apply, *args, **kwargs)

    def _vmapped(self, kind: type[nn.Module], args: tuple, kwargs: dict[str, Any], n: int) -> Any:
        call = fallback.OverExamples(self.module, kind, args, kwargs)
        layouts = self.layouts.get(call.key)
        if layouts is None:
            layouts = tuple(self.unseen(x, n) if isinstance(x, Tensor) and x.dim() else None for x in call.flat)
        self._check_sizes(call.flat, layouts, n)
        expand = partial(self._apply, fallback.Expand, (n,), None, names={}, n=n)
        expanded = {name: expand({name: a.tensor}) for name, a in self.accounts.items()}
        output = fallback.run(call, layouts, expanded, n, self.loops)
        if self.loops and not self.random:
            alone.check_loop(call, output)
        return output

    def _plain(self, kind: type[nn.Module], args: tuple, kwargs: dict[str, Any], n: int) -> Any:
        """The module's own forward, where none of the model is under way that is plain as a whole."""
        lifetime = self.handle.lifetime
        return PlainForward(lifetime, n, lifetime.begin_forward()).call(self, kind, args, kwargs)

    def _apply(
        self,
        rule: type[Rule],
        options: tuple[Any, ...],
        x: Any,
        parameters: dict[str, Any],
        names: Mapping[str, str | None],
        n: int,
    ) -> Any:
        """Runs the Function on x and parameters, with the shadows that the handle's statistics need.

        `names` maps the rule's parameters to the module's where they differ.
        """
        if not torch.is_grad_enabled():
            return rule.forward(options, x, parameters)[0]
        lifetime = self.handle.lifetime
        generation = lifetime.begin_forward()
        inputs = x if isinstance(x, tuple) else (x,)
        rows = n if x is None else inputs[0].shape[0]
        if rows == 0:
            raise CoverageError(
                f"{self.title} got a batch without examples, of shape {tuple(inputs[0].shape)}: skip it"
            )
        if rows % n:
            raise CoverageError(
                f"{self.title} got {rows} rows where the batch has {n} examples: no rows are an example's own"
            )
        slots: list[tuple[str, str]] = []
        shadows, links, used = [], [], {}
        ids = None if x is None else rule.looked_up(x)
        for name in parameters:
            account = self.accounts.get(names.get(name) or name)
            if account is None or not account.trainable:
                continue
            uses, link = lifetime.uses_of(account)
            used[name] = Use(account, uses, link is None)
            if ids is None:
                uses.whole += 1
            else:
                uses.ids.append(ids.reshape(n, ids.numel() // n))
            if link is not None:
                links.append(link)
                continue
            account.follow()
            uses.dtype = parameters[name].dtype
            for kind in self.handle.shadowed:
                slots.append((name, kind))
                shadows.append(account.shadow_of(kind))
        call = Call(
            self,
            rule,
            options,
            tuple(parameters),
            used,
            tuple(slots),
            len(links),
            next(iter(parameters.values())).device.type if x is None else inputs[0].device.type,
            isinstance(x, tuple),
            n,
            rows // n,
            generation,
        )
        *y, link = LeafFunction.apply(call, *shadows, *links, *inputs, *parameters.values(), self.token)
        lifetime.link(used.values(), link)
        return y[0] if len(y) == 1 else tuple(y)

    # Backward

    def accumulates(self) -> bool:
        """Whether this backward pass accumulates into every leaf of autograd, unlike torch.autograd.grad."""
        return torch._C._will_engine_execute_node(self._accumulator)

    def begin(self, used: Mapping[str, Use], contributing: Collection[str], n: int, generation: int) -> None:
        """Called by the Function's backward before it makes sums of the parameters that contribute to this call."""
        if used:
            reached = [use for name, use in used.items() if name in contributing or use.collects]
            self.handle.lifetime.begin_backward(self, reached, n, generation)

    def record(self, used: Mapping[str, Use], generation: int, gradients: Gradients, sums: Sums) -> None:
        """Called by it before anything is accumulated, with the sums that have no shadow."""
        self.handle.lifetime.returned = True
        for name, use in used.items():
            own = {kind: value for (owner, kind), value in sums.items() if owner == name}
            use.account.record(generation, gradients.get(name), use.uses.units if use.collects else 0, own)


def no_view(value: Any) -> Any:
    """What may be changed in place after FSDP has put its hook on it, which a view would lose."""
    return value.clone() if isinstance(value, Tensor) and value.requires_grad and value._base is not None else value
