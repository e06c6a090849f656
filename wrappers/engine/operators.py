"""What an operator does to memory, as far as a replay has to know; worked out once per operator.

An operator that only reads its arguments and returns new memory can run again whenever its
arguments are there. The others are told apart here:

* views: their result shares memory with an argument;
* writers: they change arguments in place, announced by their schema, or not (batch norm's
  statistics);
* random operators: they read a generator's state;
* makers of uninitialised memory: who fills it may be a kernel that nobody sees;
* collectives: they talk to other ranks;
* choices: which of several elements they pick may hang on the last bit of one, or on a tie;
* the rest that cannot be recorded at all, with the reason.
"""

from __future__ import annotations

from typing import Any

import torch

from wrappers import _torch
from wrappers.policy import SAC_IGNORED_OPS

#: Views without a word of it in their schema; some return their argument itself.
_SILENT_VIEWS = frozenset(
    {
        "aten::_unsafe_view",
        "aten::unsafe_split",
        "aten::unsafe_split_with_sizes",
        "aten::unsafe_chunk",
        "_c10d_functional::wait_tensor",
        "_c10d_functional::_wrap_tensor_autograd",
    }
)

#: Writers without a word of it in their schema: positions of the arguments, and of the flag that
#: says whether they write.
_SILENT_WRITERS = {
    "aten::native_batch_norm": ((3, 4), 5),
    "aten::cudnn_batch_norm": ((3, 4), 5),
    "aten::miopen_batch_norm": ((3, 4), 5),
    "aten::_batch_norm_impl_index": ((3, 4), 5),
    "aten::batch_norm_update_stats": ((1, 2), None),
    "aten::batch_norm_gather_stats": ((3, 4), None),
    "aten::batch_norm_gather_stats_with_counts": ((3, 4), None),
}

#: Operators whose result is memory with nothing in it yet.
_UNINITIALIZED = frozenset(
    {
        "aten::empty",
        "aten::empty_like",
        "aten::empty_strided",
        "aten::empty_permuted",
        "aten::new_empty",
        "aten::new_empty_strided",
        "aten::_empty_affine_quantized",
        "aten::empty_quantized",
    }
)

#: Writers that do not read what was there before; some of them write to a part of it only.
_OVERWRITERS = frozenset(
    {
        "aten::copy_",
        "aten::fill_",
        "aten::zero_",
        "aten::normal_",
        "aten::uniform_",
        "aten::random_",
        "aten::bernoulli_",
        "aten::exponential_",
        "aten::geometric_",
        "aten::cauchy_",
        "aten::log_normal_",
        "aten::_foreach_copy_",
        "aten::_foreach_zero_",
        "aten::rrelu_with_noise",
        "aten::rrelu_with_noise_",
        "aten::index_put_",
        "aten::_index_put_impl_",
        "aten::index_copy_",
        "aten::index_fill_",
        "aten::scatter_",
        "aten::masked_fill_",
        "aten::masked_scatter_",
        "aten::fill_diagonal_",
        "aten::resize_as_sparse_",
    }
)

#: Operators that give a tensor other memory.
_MOVERS = frozenset(
    {"aten::set_", "aten::resize_", "aten::resize_as_", "aten::_resize_output_", "aten::set_data"}
)


#: Operators by which mixtures of experts route. Run again on inputs that a kernel has computed a
#: little differently, or on equal ones, they may send a token elsewhere.
_CHOICES = frozenset({"aten::topk", "aten::argmax"})


class Operator:
    """The facts about one operator.

    Attributes:
        func: The operator.
        call: Calls it.
        name: ``aten.mm.default``.
        is_query: Whether it asks a tensor for its size or the like, and computes nothing.
        is_plain: Whether it reads its arguments, returns new memory and does nothing else.
        is_view: Whether its result may share memory with an argument.
        base: Position or name of the argument that a view's result shares memory with.
        writes: Positions and names of the arguments that it changes.
        write_flag: Position of the argument that says whether it changes them; None if always.
        is_silent_view: Whether it is a view that autograd does not know as one.
        reads_what_it_writes: Whether what it leaves there depends on what was there.
        is_random: Whether it may read the state of a random number generator; nobody knows what
            an operator from elsewhere reads.
        is_uninitialized: Whether its result is memory with nothing in it.
        is_collective: Whether it communicates with other ranks.
        is_choice: Whether it picks some of several elements.
        is_wait: Whether it waits for a collective, whose result it returns.
        is_detach: Whether it is detach, which ``.data`` is too.
        reason: Why it cannot be recorded; empty if it can.
    """

    __slots__ = (
        "_dropout",
        "base",
        "call",
        "func",
        "is_choice",
        "is_collective",
        "is_detach",
        "is_plain",
        "is_plain_view",
        "is_query",
        "is_random",
        "is_silent_view",
        "is_uninitialized",
        "is_view",
        "is_wait",
        "may_alias",
        "name",
        "reads_what_it_writes",
        "reason",
        "write_flag",
        "writes",
    )

    def __init__(self, func: Any) -> None:
        self.func = func
        self.call = _torch.operator_call(func)
        self.name = str(func)
        self.reason = ""
        self.is_silent_view = self.is_wait = self.is_detach = False
        self.is_view = self.is_random = self.is_uninitialized = self.is_choice = False
        self.may_alias = False
        self.base: int | str = 0
        self.writes: tuple[int | str, ...] = ()
        self.write_flag: int | None = None
        self.reads_what_it_writes = True
        self._dropout: tuple[int, Any] | None = None
        self.is_collective = _torch.is_collective(func)
        schema = getattr(func, "_schema", None)
        self.is_query = func in SAC_IGNORED_OPS and not _returns_tensors(schema)
        if self.is_query:
            pass
        elif schema is None:
            self.reason = f"it calls the higher-order operator {func}"
        else:
            self._read_schema(schema)
        self.is_plain = not (
            self.reason
            or self.is_query
            or self.is_view
            or self.may_alias
            or self.writes
            or self.is_random
            or self.is_uninitialized
            or self.is_collective
        )
        #: Whether it is a view of its first argument and nothing else.
        self.is_plain_view = (
            self.is_view
            and self.base == 0
            and not (self.is_silent_view or self.reason or self.may_alias or self.writes)
        )

    def _read_schema(self, schema: Any) -> None:
        name: str = schema.name
        if name in _MOVERS:
            self.reason = f"{self.name} gives a tensor other memory"
        elif name.startswith("fsdp::"):
            self.reason = "an FSDP module inside moves its parameters"
        writes: list[int | str] = []
        for position, argument in enumerate(schema.arguments):
            info = argument.alias_info
            if info is None:
                continue
            place: int | str = argument.name if argument.kwarg_only else position
            if info.is_write:
                writes.append(place)
            else:
                self.base = place
        infos = [value.alias_info for value in schema.returns]
        self.is_wait = name == "_c10d_functional::wait_tensor"
        self.is_detach = name == "aten::detach"
        self.is_choice = name in _CHOICES
        self.is_silent_view = name in _SILENT_VIEWS
        self.is_view = self.is_silent_view or any(i is not None and not i.is_write for i in infos)
        if name in _SILENT_WRITERS:
            positions, self.write_flag = _SILENT_WRITERS[name]
            writes.extend(positions)
        self.writes = tuple(writes)
        is_out_variant = bool(writes) and all(isinstance(place, str) for place in writes)
        self.reads_what_it_writes = name not in _OVERWRITERS and not is_out_variant
        is_foreign = not (name.startswith("aten::") or self.is_view or self.is_collective)
        self.is_random = is_foreign or torch.Tag.nondeterministic_seeded in self.func.tags
        #: Position and default of the argument without which an operator draws nothing.
        self._dropout = next(
            (
                (position, argument.default_value)
                for position, argument in enumerate(schema.arguments)
                if argument.name == "dropout_p" and name.startswith("aten::")
            ),
            None,
        )
        self.is_uninitialized = name in _UNINITIALIZED
        self.may_alias = not name.startswith("aten::") or _torch.is_composite(self.func)

    def argument(self, place: int | str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The argument of a call at a position or of a name; None if it was not given."""
        if isinstance(place, str):
            return kwargs.get(place)
        if place < len(args):
            return args[place]
        name = self.func._schema.arguments[place].name
        return kwargs.get(name)

    def draws(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call may read a generator's state: attention without dropout does not."""
        if not self.is_random:
            return False
        if self._dropout is None:
            return True
        place, default = self._dropout
        given = self.argument(place, args, kwargs)
        return bool(default if given is None else given)

    def written(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The tensors that a call changes."""
        if self.write_flag is not None and not self.argument(self.write_flag, args, kwargs):
            return []
        found: list[Any] = []
        for place in self.writes:
            value = self.argument(place, args, kwargs)
            if isinstance(value, (list, tuple)):
                found.extend(value)
            elif value is not None:
                found.append(value)
        return found


def _returns_tensors(schema: Any) -> bool:
    return any("Tensor" in str(value.type) for value in schema.returns)


_known: dict[int, Operator] = {}


def facts_of(func: Any) -> Operator:
    """The facts about an operator."""
    # By id: hashing an operator runs Python code. The facts keep it alive.
    facts = _known.get(id(func))
    if facts is None:
        facts = _known[id(func)] = Operator(func)
    return facts
