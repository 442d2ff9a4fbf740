"""Engines "fused" and "vmap": leaves under the model, shadows for their statistics.

Fused: a leaf for every module that owns parameters, by rule, or as a vmap leaf where there is none; the probe moves the
boundary of a leaf up where a parameter is used outside of its module. Vmap: the whole model is one vmap leaf.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from gradstats.account import Account
from gradstats.arguments import Arguments, ExampleDims, count_examples, signature
from gradstats.caller import LEAF, Caller
from gradstats.coverage import ignored, table
from gradstats.distributed.account import ShardedAccount
from gradstats.distributed.counts import Counts
from gradstats.distributed.exchange import enlist
from gradstats.distributed.sharded import check, refuse_late, refuse_nested, shards_of
from gradstats.errors import CoverageError, GradstatsError, MissingStatistic
from gradstats.forwards import Forwards
from gradstats.gradient import Left
from gradstats.graph import backward_may_follow, transformed
from gradstats.handle import Handle, Reader
from gradstats.leaf import Leaf
from gradstats.lifetime import Lifetime
from gradstats.probe import Probe
from gradstats.reading import ByParameter
from gradstats.rules import Composite, Rule, fallback, find
from gradstats.rules.registry import checked, refuse_coupling, refuse_scripted
from gradstats.sampling import Sampling
from gradstats.statistics import Wanted
from gradstats.sums import SUMS
from gradstats.swap import swap, unswap
from gradstats.turns import Turns
from gradstats.watch import hidden


class FusedHandle(Handle):
    """Reads raw sums from the leaves."""

    def __init__(
        self,
        model: nn.Module,
        statistics: Sequence[Any],
        loss_reduction: str,
        ignore: Sequence[str] = (),
        example_dims: ExampleDims = 0,
        granularity: str = "example",
        microbatch_size: int | None = None,
        sampling: Sampling | None = None,
        whole: bool = False,
    ):
        super().__init__(model, statistics, loss_reduction, granularity, microbatch_size)
        self.example_dims = example_dims
        self.sampling = sampling or Sampling()
        self.sampling.check(granularity, self.statistics.values())
        self.leaves: list[Leaf] = []
        self.accounts: dict[str, Account] = {}  # by full name of the parameter
        self.callers: list[nn.Module] = []
        self.calls: dict[Any, int] = {}  # of every kind
        self.due: dict[Any, int] = {}  # which of them is probed next
        self.probe_cost: tuple[float, ...] = (0, 0, 0, 0.0)  # probes, forwards, examples in all of them, seconds
        self.batch_norms: list[nn.Module] = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self.ignored = ignored(model, ignore)
        self.shards = shards_of(model, loss_reduction)
        if self.shards is not None:
            check(granularity, [SUMS[need] for need in self.needs])
        if any(LEAF in module.__dict__ for module in model.modules()):
            raise GradstatsError("the model is attached already: use gradstats.attached(model), or detach() it first")
        try:
            if whole:
                self._add(model, "", None, "engine 'vmap'")
            else:
                self._walk(model, "", set())
            self._add_callers()
            if not any(p.requires_grad for p in self.parameters().values()):
                raise CoverageError(f"{type(model).__name__} has no trainable parameters")
        except GradstatsError:
            self.detach()
            raise
        self._begin()

    def _begin(self) -> None:
        self._names = {}
        self.exchange = None
        self.probing: Forwards | None = None
        self.lifetime = Lifetime(self, list(self.accounts.values()), self.sampling)

    # Calls

    @property
    def differentiates(self) -> bool:
        """Whether a backward pass may go through a call that is made now, or through what recomputes it."""
        if transformed():
            return self.probing is not None or self.lifetime.root is not None  # a part of a forward is
        return backward_may_follow() and (torch.is_grad_enabled() or not self.lifetime.checkpointing.evaluating)

    def outside(self, module: nn.Module) -> bool:
        """Whether a call of `module` now is an outermost one, of a forward or of an evaluation without gradients."""
        if self.differentiates:
            return self.lifetime.examples is None or self.lifetime.recomputes(module)
        return not torch.is_grad_enabled() and not self.lifetime.checkpointing.evaluating and self.lifetime.root is None

    def outermost(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], call: Callable[[], Any]) -> Any:
        """call(), an outermost one of `module`."""
        try:
            self.begin(module, args, kwargs)
            return call()
        finally:
            self.lifetime.leave(module)

    @contextmanager
    def probed_by(self, forwards: Forwards) -> Iterator[None]:
        """Inside, attached modules compute as they would by themselves, and tell `forwards` of their calls."""
        self.probing = forwards
        try:
            yield
        finally:
            self.probing = None

    @torch.compiler.disable
    def begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """An outermost call begins; `lifetime.leave` is told of its end."""
        for norm in self.batch_norms:
            refuse_coupling(norm)
        self.lifetime.look_back()
        replicated = self.look_around() is not None
        count = count_examples(args, kwargs, self.example_dims, may_be_none=replicated)
        self.lifetime.look_ahead()
        if self.lifetime.gathers and count:
            self._probe_once(module, args, kwargs)
        self.lifetime.enter(module, count)

    def _probe_once(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Probes the first call of its kind, and with less effort the second, fourth, eighth, ...: some couplings begin
        late."""
        kind = (module, module.training, signature(args, kwargs))
        calls = self.calls[kind] = self.calls.get(kind, 0) + 1
        if calls >= self.due.get(kind, 1):
            self._probe(kind, args, kwargs, within=True)

    def _probe(self, kind: Any, args: tuple, kwargs: dict[str, Any], within: bool = False) -> None:
        self.check_sharding()
        arguments = Arguments(args, kwargs, self.example_dims)
        ours = all(isinstance(p, nn.Parameter) for p in self.parameters().values())  # not under functional_call
        if arguments.count is None or not ours:
            return
        calls = self.due.get(kind, 1)
        probe = Probe(self, kind[0], arguments, calls - 1, within)
        # A part that is compiled by itself would not be seen.
        with torch.compiler.set_stance("force_eager"), self._together(probe), hidden():
            probe.establish()
        self.due[kind] = 2 * calls
        more = (1, probe.forwards.count, probe.forwards.examples, probe.seconds)
        self.probe_cost = tuple(a + b for a, b in zip(self.probe_cost, more, strict=True))

    def check_sharding(self) -> None:
        """Raises: CoverageError for a model that was sharded after it was attached."""
        if self.shards is None:
            refuse_late(self.model)

    def _together(self, probe: Probe) -> AbstractContextManager[None]:
        """With the probes of other ranks, where there are."""
        lockstep = probe.forwards.lockstep
        if lockstep is None:
            return nullcontext()

        def found() -> str:
            return "; ".join(f"{leaf.title}: {leaf.served_by}" for leaf in self.leaves)

        return lockstep.around(found)

    def probe(self, *args: Any, **kwargs: Any) -> None:
        """Runs the probe on the arguments of one call of the model, ahead of the first step: before torch.compile, or
        on all ranks before training starts."""
        with torch.enable_grad():
            self._probe((self.model, self.model.training, signature(args, kwargs)), args, kwargs)

    # Leaves

    def _ignores(self, p: nn.Parameter) -> bool:
        return any(p is other for other in self.ignored.values())

    def __getstate__(self) -> dict[str, Any]:
        left = ("_names", "exchange", "probing", "lifetime", "calls", "due")
        return {key: value for key, value in self.__dict__.items() if key not in left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy has seen nothing yet, and registers its own parameters when it is used."""
        self.__dict__.update(state)
        self.calls, self.due = {}, {}
        self._begin()
        enlist(self)

    def _walk(self, module: nn.Module, prefix: str, visited: set[int]) -> None:
        if id(module) in visited:
            return
        visited.add(id(module))
        checked(prefix, refuse_scripted, module)
        checked(prefix, refuse_coupling, module)
        parametrized = parametrize.is_parametrized(module)
        own = [p for p in module._parameters.values() if p is not None and not self._ignores(p)]
        rule = None if parametrized or not own else find(module)
        if rule is not None:
            self._add(module, prefix, rule, "")
        elif parametrized or any(p.requires_grad for p in own):
            if any(p.requires_grad and not self._ignores(p) for p in module.parameters()):
                why = "is parametrized" if parametrized else "owns parameters and has no rule"
                self._add(module, prefix, None, why)
        else:
            for name, child in module.named_children():
                self._walk(child, f"{prefix}.{name}" if prefix else name, visited)

    def _add(self, module: nn.Module, prefix: str, rule: type[Rule] | type[Composite] | None, why: str) -> None:
        checked(prefix, fallback.check if rule is None else rule.check, module)
        if rule is None and self.shards is not None:
            checked(prefix, refuse_nested, module)
        accounts = {}
        for name, p in module.named_parameters(recurse=rule is None):
            if not self._ignores(p):
                accounts[name] = self._account(module, prefix, name, p)
        leaf = Leaf(self, module, prefix, rule, accounts, why)
        swap(module, leaf)
        leaf.prepare()
        self.leaves.append(leaf)

    def _account(self, module: nn.Module, prefix: str, name: str, p: nn.Parameter) -> Account:
        """The account of a parameter, the same one wherever it is used."""
        full = f"{prefix}.{name}" if prefix else name
        if isinstance(p, UninitializedParameter):
            raise CoverageError(f"parameter '{full}' is not initialised: call the model once before attach")
        if p.is_complex():
            raise CoverageError(f"parameter '{full}' is complex: rules and squares are for real parameters")
        for account in self.accounts.values():
            if account.tensor is p:
                return account
        path, _, attribute = name.rpartition(".")
        kind = Account if self.shards is None else partial(ShardedAccount, shards=self.shards)
        self.accounts[full] = kind(self, module.get_submodule(path), attribute, full)
        return self.accounts[full]

    def _add_callers(self) -> None:
        """Every other module that computes may be the outermost one of a call, and is seen by the probe."""
        served = {
            module for leaf in self.leaves for module in (leaf.module.modules() if leaf.rule is None else [leaf.module])
        }
        for prefix, module in self.model.named_modules():
            computes = type(module).forward is not nn.Module.forward and any(True for _ in module.children())
            if computes and module not in served:
                swap(module, Caller(self, module, prefix))
                self.callers.append(module)

    def move_up(self, module: nn.Module, why: str) -> None:
        """Makes `module` one vmap leaf, in place of the leaves inside of it."""
        inside = set(module.modules())
        prefix = next(name for name, m in self.model.named_modules() if m is module)
        before, servers = (self.leaves, self.callers), {m: m.__dict__[LEAF] for m in inside if LEAF in m.__dict__}
        for child in inside:
            unswap(child)
        self.leaves = [leaf for leaf in self.leaves if leaf.module not in inside]
        self.callers = [caller for caller in self.callers if caller not in inside]
        try:
            self._add(module, prefix, None, why)
        except GradstatsError:
            self.leaves, self.callers = before
            for child, server in servers.items():
                swap(child, server)
            raise

    def detach(self) -> None:
        super().detach()
        for account in self.accounts.values():
            account.close()
        for module in (*(leaf.module for leaf in self.leaves), *self.callers):
            unswap(module)
        self.leaves, self.callers, self.accounts = [], [], {}

    # With other processes

    @property
    def shadowed(self) -> tuple[str, ...]:
        """Sums that autograd adds up over accumulation steps, as gradients of shadows. None where ranks exchange them
        when gradients are accumulated: autograd may do that before it has accumulated the shadow's."""
        return self.additive if self.exchange is None else ()

    def averaged(self, name: str) -> float:
        if self.shards is not None:
            return self.shards.divisor
        totals = self.accounts[name].totals
        return 1 if totals is None else totals.ranks

    def unsent(self, name: str, kind: str) -> Tensor | None:
        return self.accounts[name].unsent(kind)

    def unsent_count(self, name: str) -> int:
        return self.accounts[name].unsent_count

    def unsent_examples(self) -> tuple[int, int, bool]:
        unsent = self.lifetime.unsent
        return sum(unsent), len(unsent), self.lifetime.passes_gather

    def receive(self, ranks: int, counts: Counts, found: dict[tuple[str, str], Tensor]) -> None:
        generation = self.lifetime.receive(counts)
        for name, counted in counts.counted.items():
            if self.accounts[name].parameter.grad is not None:  # some rank has used it
                own = {kind: value for (owner, kind), value in found.items() if owner == name}
                self.accounts[name].receive(ranks, counts.elsewhere(counted), own, generation)

    def note_again(self) -> None:
        for account in self.accounts.values():
            account.note_again()

    # Reading

    def read(self, statistic: Wanted) -> ByParameter:
        entries = super().read(statistic)
        self.sampling.check_statistic(entries.statistic)
        return entries

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, account in self.accounts.items() if (p := account.current) is not None}

    def parameter(self, name: str) -> nn.Parameter | None:
        account = self.accounts.get(name)
        return None if account is None else account.current

    def reader(self, needs: Sequence[str], needs_gradient: bool = False) -> Reader:
        self.lifetime.check()
        return super().reader(needs, needs_gradient)

    def sums(self, name: str, needs: Sequence[str]) -> tuple[dict[str, Tensor], int]:
        account, found = self.accounts[name], {}
        account.check()
        if needs and self.lifetime.plain and not account.gathered:
            raise MissingStatistic(
                f"parameter '{name}' has no statistics in this window: they are gathered in one window in "
                f"{self.sampling.every} (every={self.sampling.every}). Ask stats.gathered before reading"
            )
        for need in needs:
            value = account.value(need)
            if value is None:
                raise MissingStatistic(
                    f"{need!r} of parameter '{name}' was not gathered by the last backward pass: attach the model "
                    f"before the forward pass"
                )
            found[need] = value
        return found, account.batch_size

    def left(self, name: str) -> Left | None:
        return self.accounts[name].left

    @property
    def every(self) -> int:
        return self.sampling.every

    @property
    def fraction(self) -> float:
        return self.sampling.fraction

    def skipped(self, name: str) -> bool:
        account = self.accounts[name]
        return self.every > 1 and bool(account.generations) and not account.gathered

    @property
    def gathered(self) -> bool:
        return any(account.gathered for account in self.accounts.values())

    def has(self, name: str) -> bool:
        return bool(self.accounts[name].generations)

    @property
    def batch_size(self) -> int:
        self.lifetime.look_back()
        return sum(self.lifetime.counts.values()) + self.lifetime.elsewhere

    def coverage(self) -> str:
        rows, seen = [], set()
        for leaf in self.leaves:
            for account in leaf.accounts.values():
                if account not in seen:
                    seen.add(account)
                    serving = [other for other in self.leaves if account in other.accounts.values()]
                    served = " + ".join(dict.fromkeys(other.served_by for other in serving))
                    why = "; ".join(dict.fromkeys(other.why for other in serving if other.why))
                    if len(serving) > 1 or (account.uses or 0) > 1:
                        served = f"shared: {served}"
                    rows.append((account.name, account.parameter, account.uses, served, why))
        rows += [(name, p, None, "ignored", "named in ignore") for name, p in self.ignored.items()]
        probes, forwards, examples, seconds = self.probe_cost
        cost = f"{probes:.0f} probes: {forwards:.0f} forwards, {examples:.0f} examples in all, {seconds:.2f} s"
        return f"{table(rows)}\n{cost if probes else 'not probed yet'}"

    def new_examples(self) -> None:
        self.lifetime.new_examples()

    def zero(self) -> None:
        self.lifetime.zero()
        self.lifetime.turns = Turns(self.sampling.every)
